"""What a network takes: inputs with named dimensions, types, ranges and roles."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.generic]
Arrays = dict[str, Array]


@dataclass(frozen=True, kw_only=True)
class Dim:
    """A dimension that may change from call to call.

    Args:
        name: what it counts, such as ``batch``.
        low: smallest size.
        typical: size to measure at and to tune engines for.
        high: largest size.
        multiple_of: what every size is a multiple of: networks that halve a picture take no size between.
    """

    name: str
    low: int
    typical: int
    high: int
    multiple_of: int = 1

    def fault_of(self, size: int) -> str:
        """Why this dimension cannot have a size; empty when it can."""
        if self.low <= size <= self.high and size % self.multiple_of == 0:
            return ""
        multiples = f"multiples of {self.multiple_of} from " if self.multiple_of > 1 else ""
        return f"{self.name} is {size}; the model takes {multiples}{self.low} to {self.high}"


@dataclass(frozen=True, kw_only=True)
class InputSpec:
    """One input of a model.

    Args:
        name: the argument of ``forward``.
        shape: sizes and named dimensions.
        dtype: numpy's name of the element type.
        low: smallest value; ``None`` means a standard normal for floats, and both values, mixed, for booleans.
        high: for integers one past the largest value, for floats the largest.
        guessed: whether nobody said which values it takes, so that the range is a guess.
        default: every element, where a caller leaves the input out; it is never drawn. None: it must be given.
        corners: the last axis holds boxes, as (x0, y0, x1, y1) with x0 <= x1 and y0 <= y1.
    """

    name: str
    shape: tuple[int | Dim, ...]
    dtype: str = "float32"
    low: float | None = None
    high: float | None = None
    default: float | None = None
    guessed: bool = False
    corners: bool = False

    def sizes(self, chosen: Mapping[str, int] | None = None) -> tuple[int, ...]:
        """The shape with each dynamic dimension at its chosen or typical size."""
        chosen = chosen or {}
        return tuple(d if isinstance(d, int) else chosen.get(d.name, d.typical) for d in self.shape)

    def limits(self) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """Smallest, typical and largest shape."""
        low = tuple(d if isinstance(d, int) else d.low for d in self.shape)
        high = tuple(d if isinstance(d, int) else d.high for d in self.shape)
        return low, self.sizes(), high


def rows_of(specs: Sequence[InputSpec]) -> int | Dim | None:
    """What counts the samples of a call: the leading axis named ``batch``, else the first that is dynamic, or any."""
    leading = [spec.shape[0] for spec in specs if spec.shape]
    dims = [d for d in leading if isinstance(d, Dim)]
    return next((d for d in dims if d.name == "batch"), dims[0] if dims else next(iter(leading), None))


def shared_by_rows(specs: Sequence[InputSpec]) -> tuple[str, ...]:
    """Names of the inputs that have no row for each sample: all samples of a call share them."""
    rows = rows_of(specs)
    return tuple(spec.name for spec in specs if not spec.shape or spec.shape[0] != rows)
