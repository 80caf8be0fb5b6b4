"""A small DisenBooth with random weights for ``disenbooth.toml``: Stable Diffusion 2.1 has 866 million parameters."""

import torch

from enginewright import ModelSpec
from enginewright.models.adapters import disenbooth
from enginewright.validation.inputs import draw


def small() -> ModelSpec:
    """Three levels of 64 to 256 channels on a latent of 32 x 32, and 77 states of text."""
    config = disenbooth.Config(
        widths=(64, 128, 256), heads=(2, 4, 8), layers=1, groups=16, width=256, side=32, text=77, rank=4
    )
    specs = disenbooth.inputs(config)
    call = draw(specs, seed=0)
    return ModelSpec(
        module=disenbooth.build(config).eval(),
        inputs={name: torch.from_numpy(array) for name, array in call.items()},
        dynamic={spec.name: {0: ("batch", 1, 8)} for spec in specs},
        outputs=disenbooth.OUTPUTS,
        ranges={"timestep": (0, 999), "eta": (0, 1)},
    )
