"""A small SplitFlux with random weights for ``splitflux.toml``: 25 M parameters, where FLUX.1-dev has 11.9 billion."""

import torch

from enginewright import ModelSpec
from enginewright.models.adapters import splitflux
from enginewright.validation.inputs import draw


def small() -> ModelSpec:
    """Eight blocks of width 384 over 256 image and 64 text tokens, with adapters of rank 16."""
    config = splitflux.Config(
        double=2,
        single=6,
        heads=6,
        head_dim=64,
        axes=(8, 28, 28),
        channels=16,
        text_width=128,
        pooled_width=64,
        side=16,
        text=64,
        content=range(2),
        boundary=range(2, 3),
        style=range(3, 6),
        rank=16,
        residual_rank=4,
    )
    specs = splitflux.inputs(config)
    call = draw(specs, seed=0)
    return ModelSpec(
        module=splitflux.build(config).eval(),
        inputs={name: torch.from_numpy(array) for name, array in call.items()},
        dynamic={spec.name: {0: ("batch", 1, 8)} for spec in specs},
        outputs=splitflux.OUTPUTS,
        ranges={"timestep": (0, 1), "guidance": (1, 5)},
    )
