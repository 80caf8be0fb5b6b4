"""Two styles for ``dmm-tiny.toml``: the tiny DiT with other random weights each, as no fine-tuned checkpoints ship."""

import torch
from torch import Tensor, nn

from enginewright import sources


def style(seed: int) -> tuple[nn.Module, dict[str, Tensor]]:
    """The tiny DiT from this seed, and a call of it."""
    model = sources.load("dit:tiny", seed=seed)
    return model.module, {name: torch.from_numpy(array) for name, array in model.at({}, seed).items()}


def first() -> tuple[nn.Module, dict[str, Tensor]]:
    """One style."""
    return style(1)


def second() -> tuple[nn.Module, dict[str, Tensor]]:
    """Another."""
    return style(2)
