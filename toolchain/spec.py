"""What a user's ``py:`` function may return to say more about its module than example inputs can."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """A module and how it is called; a plain dict with these keys does as well.

    Args:
        module: a trained network.
        inputs: an example of each input, by the name of ``forward``'s argument.
        dynamic: for each input, the axes that may change from call to call, as (name, smallest, largest) or, where
            sizes come in steps, (name, smallest, largest, multiple); the same name in two inputs means the same size.
            The example's size is the typical one, and engines are run at the others too. None: axis 0 of every input is
            ``batch``, from 1 to 64 or the example's size, where all examples agree in it. Empty: all fixed.
        outputs: names for what the module returns, in order. Empty: a mapping's keys, or ``output``, ``output_0`` on.
        ranges: the (low, high) that values of an input are drawn from; for integers, ``high`` is one past the
            largest. Without one, floats are standard normal, integers go from 0 (or the example's smallest, if that
            is less) to the example's largest, booleans are mixed (for true alone, say (1, 2)); the report says that
            ranges were guessed. The example itself is always the first call of a validation.
        roles: what inputs are for, by name, where their names do not say it: ``sample``, ``timestep``, ``condition``,
            ``guidance``, ``mask``, ``positions``, ``noise``, ``state``, ``strength`` or ``adapter``. Passes ask for a
            role.
        realistic: (count, seed) -> that many sets of inputs like those in use, by name, for calibration and
            validation; random ones do without it.
    """

    module: nn.Module
    inputs: Mapping[str, Tensor] | Sequence[Tensor]
    dynamic: Mapping[str, Mapping[int, tuple[str, int, int] | tuple[str, int, int, int]]] | None = None
    outputs: Sequence[str] = ()
    ranges: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    roles: Mapping[str, str] = field(default_factory=dict)
    realistic: Callable[[int, int], Sequence[Mapping[str, Any]]] | None = None
