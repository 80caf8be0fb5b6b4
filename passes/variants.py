"""A model that is several networks of one interface, each for some of a sampler's timesteps.

Shapes: B batch, T timesteps of the schedule.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree


class ByTimestep(nn.Module):
    """Runs each row in the network that the table gives for the timestep of the schedule nearest to the row's own.

    Args:
        variants: the networks.
        input: name of the input (B,) that holds the timestep.
        timesteps: the schedule (T).
        table: for each of them, which network.
    """

    def __init__(self, variants: Sequence[nn.Module], *, input: str, timesteps: Sequence[float], table: Sequence[int]):
        super().__init__()
        self.variants = nn.ModuleList(variants)
        self.input, self.timesteps, self.table = input, tuple(timesteps), tuple(table)

    def forward(self, **inputs: Tensor) -> Any:
        """Inputs by name, all with B rows -> what the networks give."""
        rows = inputs[self.input].reshape(-1)
        chosen = torch.tensor(self.table)[nearest(rows, self.timesteps)].tolist()
        numbers = sorted(set(chosen))
        if len(numbers) == 1:
            return self.variants[numbers[0]](**inputs)
        parts, order = [], []
        for number in numbers:
            own = [row for row, choice in enumerate(chosen) if choice == number]
            parts.append(self.variants[number](**{name: value[own] for name, value in inputs.items()}))
            order += own
        back = torch.tensor(order).argsort()
        leaves = [pytree.tree_flatten(part)[0] for part in parts]
        form = pytree.tree_flatten(parts[0])[1]
        return pytree.tree_unflatten([torch.cat(same)[back] for same in zip(*leaves, strict=True)], form)


def nearest(t: Tensor, timesteps: Sequence[float]) -> Tensor:
    """Index (B,) of the timestep nearest to each row's own (B,)."""
    schedule = torch.tensor(timesteps, dtype=torch.float32, device=t.device)
    return (t[:, None].float() - schedule).abs().argmin(dim=1)
