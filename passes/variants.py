"""A model that is several networks, each for some of a sampler's timesteps.

Shapes: B batch, T timesteps of the schedule.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass
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
        shared: inputs that have no row for each sample: every network gets the whole of them.
    """

    def __init__(
        self,
        variants: Sequence[nn.Module],
        *,
        input: str,
        timesteps: Sequence[float],
        table: Sequence[int],
        shared: Sequence[str] = (),
    ) -> None:
        super().__init__()
        self.variants = nn.ModuleList(variants)
        self.input, self.timesteps, self.table = input, tuple(timesteps), tuple(table)
        self.shared = tuple(shared)

    def forward(self, **inputs: Tensor) -> Any:
        """Inputs by name, with B rows but for the shared ones -> what the networks give."""
        rows = inputs[self.input].reshape(-1)
        chosen = torch.tensor(self.table)[nearest(rows, self.timesteps)].tolist()
        numbers = sorted(set(chosen))
        if len(numbers) == 1:
            return self.variants[numbers[0]](**inputs)
        parts, order = [], []
        for number in numbers:
            own = [row for row, choice in enumerate(chosen) if choice == number]
            parts.append(self.variants[number](**some_rows(inputs, own, self.shared)))
            order += own
        back = torch.tensor(order).argsort()
        leaves = [pytree.tree_flatten(part)[0] for part in parts]
        form = pytree.tree_flatten(parts[0])[1]
        return pytree.tree_unflatten([torch.cat(same)[back] for same in zip(*leaves, strict=True)], form)


def some_rows(call: Mapping[str, Any], rows: Any, shared: Collection[str]) -> dict[str, Any]:
    """The same call, of tensors or arrays, for these rows only; what all rows share stays whole."""
    return {name: value if name in shared else value[rows] for name, value in call.items()}


def each_network(model: nn.Module, change: Callable[[nn.Module, str], nn.Module]) -> nn.Module:
    """A model changed as a whole (how it is called, what it gives), or each of its networks by timestep.

    Engines are made of the networks one by one, so what is put around all of them would be lost there.

    Args:
        model: changed in place.
        change: (network, path of it in the model) -> the changed network.
    """
    if not isinstance(model, ByTimestep):
        return change(model, "")
    for number, variant in enumerate(model.variants):
        model.variants[number] = change(variant, f"variants.{number}")
    return model


def guidance_rows(model: nn.Module) -> int:
    """How often the rows of a call follow one another inside a model: twice after ``merge_guidance``, else once."""
    return 2 if getattr(model, "guidance", {}).get("at_once") else 1


def local(paths: Mapping[str, Any], network: str) -> dict[str, Any]:
    """Entries by module path that lie in one network, by their paths from there."""
    if not network:
        return dict(paths)
    return {
        path.removeprefix(network).removeprefix("."): entry
        for path, entry in paths.items()
        if path == network or path.startswith(f"{network}.")
    }


REUSED = "reused"
"""What the whole network gives beside its output, and the shortened one takes beside its inputs."""


@dataclass
class Walk:
    """Where a sampler is on its schedule, and what the last whole step left for the steps after it.

    Only a call of all rows at the timestep after that of the call before, of the same shapes, goes on; any other starts
    anew. Two calls at one timestep (guidance in two calls) leave nothing, because the next could be of either.

    Args:
        table: for each timestep, 1 where it may reuse.
    """

    table: Sequence[int]
    step: int | None = None
    shapes: Hashable = None
    again: bool = False
    kept: Any = None

    def reusable(self, steps: Collection[int], shapes: Hashable) -> Any:
        """What a call reuses; None for one that is to run whole.

        Args:
            steps: of all its rows.
            shapes: of all its inputs.
        """
        step = next(iter(steps)) if len(steps) == 1 else None
        self.again = step is None or step == self.step
        if self.step is None or step != self.step + 1 or shapes != self.shapes:
            self.kept = None
        self.step, self.shapes = step, shapes
        return self.kept if step is not None and self.table[step] else None

    def keep(self, given: Any) -> None:
        """Note what a whole step gave."""
        self.kept = None if self.again else given


class Reusing(ByTimestep):
    """Runs whole at some timesteps, and at those after them without some blocks, whose contribution is reused.

    The tensor is kept from call to call (see ``Walk``), so one sampling run at a time.

    Args:
        whole: inputs by name -> (what the model gives, contribution).
        short: inputs by name and ``reused`` -> what the model gives.
        input: as for ``ByTimestep``.
        timesteps: the schedule (T), in the sampler's order.
        table: 0 for whole, 1 for short.
        shape: of the contribution of one row.
        dtype: its type, numpy's name.
    """

    def __init__(
        self,
        whole: nn.Module,
        short: nn.Module,
        *,
        input: str,
        timesteps: Sequence[float],
        table: Sequence[int],
        shape: Sequence[int],
        dtype: str,
    ) -> None:
        super().__init__([whole, short], input=input, timesteps=timesteps, table=table)
        self.shape, self.dtype, self.walk = tuple(shape), dtype, Walk(self.table)

    def forward(self, **inputs: Tensor) -> Any:
        """Inputs by name -> what the network gives."""
        steps = set(nearest(inputs[self.input].reshape(-1), self.timesteps).tolist())
        kept = self.walk.reusable(steps, tuple(tuple(value.shape) for value in inputs.values()))
        if kept is not None:
            return self.variants[1](**inputs, **{REUSED: kept})
        output, given = self.variants[0](**inputs)
        self.walk.keep(given.detach())
        return output


def nearest(t: Tensor, timesteps: Sequence[float]) -> Tensor:
    """Index (B,) of the timestep nearest to each row's own (B,)."""
    schedule = torch.tensor(timesteps, dtype=torch.float32, device=t.device)
    return (t[:, None].float() - schedule).abs().argmin(dim=1)
