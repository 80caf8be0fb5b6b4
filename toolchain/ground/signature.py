"""What a network takes: inputs with named dimensions, types, ranges and roles."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from enginewright.ground.errors import ToolchainError

Role = Literal[
    "sample",
    "timestep",
    "condition",
    "guidance",
    "mask",
    "positions",
    "noise",
    "state",
    "strength",
    "adapter",
    "unknown",
]
"""What an input is for: what passes ask for, whatever its name."""

ROLES: tuple[Role, ...] = get_args(Role)

NAMES: Mapping[Role, tuple[str, ...]] = {
    "timestep": ("timestep", "timesteps", "t", "sigma", "time", "noise_level"),
    "condition": (
        "encoder_hidden_states",
        "class_labels",
        "y",
        "context",
        "condition",
        "cond",
        "labels",
        "pooled_projections",
        "text_embeds",
        "time_ids",
        "resolution",
        "aspect_ratio",
    ),
    "guidance": ("guidance", "guidance_scale"),
    "mask": ("attention_mask", "encoder_attention_mask", "pixel_mask", "input_features_mask", "mask", "couple_bias"),
    "positions": ("position_ids", "img_ids", "txt_ids", "image_rotary_emb", "image_rotary_emb_0", "image_rotary_emb_1"),
    "noise": ("noise",),
    "strength": (
        "strength",
        "lora_scale",
        "pag_u",
        "pag_w",
        "style",
        "couple_gate",
        "couple_rate",
        "couple_scale",
        "couple_features",
    ),
    "sample": (
        "sample",
        "hidden_states",
        "latents",
        "x",
        "z",
        "input_ids",
        "pixel_values",
        "input_values",
        "input_features",
    ),
}
"""What models commonly call the inputs of each role, where nobody says; of several, passes take the first."""

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
        default: every element, where a caller leaves the input out. None: it must be given.
        drawn: whether values are drawn in spite of a default, because equal elements would show nothing.
        corners: the last axis holds boxes, as (x0, y0, x1, y1) with x0 <= x1 and y0 <= y1.
        role: what it is for; where nobody says, its name does.
    """

    name: str
    shape: tuple[int | Dim, ...]
    dtype: str = "float32"
    low: float | None = None
    high: float | None = None
    default: float | None = None
    guessed: bool = False
    corners: bool = False
    drawn: bool = False
    role: Role = "unknown"

    def __post_init__(self) -> None:
        """Take the role from the name where none is given."""
        if self.role == "unknown":
            object.__setattr__(self, "role", role_of(self.name))

    def sizes(self, chosen: Mapping[str, int] | None = None) -> tuple[int, ...]:
        """The shape with each dynamic dimension at its chosen or typical size."""
        chosen = chosen or {}
        return tuple(d if isinstance(d, int) else chosen.get(d.name, d.typical) for d in self.shape)

    def limits(self) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """Smallest, typical and largest shape."""
        low = tuple(d if isinstance(d, int) else d.low for d in self.shape)
        high = tuple(d if isinstance(d, int) else d.high for d in self.shape)
        return low, self.sizes(), high


def read_spec(content: Mapping[str, Any]) -> InputSpec:
    """An input out of parsed JSON, as ``dataclasses.asdict`` gave it; raises what Python raises where it is none."""
    shape = tuple(Dim(**size) if isinstance(size, dict) else size for size in content["shape"])
    return InputSpec(**{**content, "shape": shape})


def rows_of(specs: Sequence[InputSpec]) -> int | Dim | None:
    """What counts the samples of a call: the leading axis named ``batch``, else the first that is dynamic, or any."""
    leading = [spec.shape[0] for spec in specs if spec.shape]
    dims = [d for d in leading if isinstance(d, Dim)]
    return next((d for d in dims if d.name == "batch"), dims[0] if dims else next(iter(leading), None))


def shared_by_rows(specs: Sequence[InputSpec]) -> tuple[str, ...]:
    """Names of the inputs that have no row for each sample: all samples of a call share them."""
    rows = rows_of(specs)
    return tuple(spec.name for spec in specs if not spec.shape or spec.shape[0] != rows)


def in_multiples(specs: Sequence[InputSpec], of: int) -> tuple[InputSpec, ...]:
    """The same inputs, where every call has a multiple of so many rows.

    Raises:
        ToolchainError: no call within the declared range has.
    """
    rows = rows_of(specs)
    if rows is None or of == 1:
        return tuple(specs)
    if isinstance(rows, int):
        if rows % of:
            raise ToolchainError(f"a call has {rows} rows, and {of} of them would have to belong together")
        return tuple(specs)
    step = math.lcm(of, rows.multiple_of)
    low, typical = (-(-size // step) * step for size in (rows.low, rows.typical))
    high = rows.high // step * step
    if low > high:
        raise ToolchainError(f"{rows.name} is at most {rows.high}, and {step} rows would have to belong together")
    changed = replace(rows, low=low, typical=min(typical, high), high=high, multiple_of=step)
    return tuple(
        replace(spec, shape=tuple(changed if isinstance(d, Dim) and d.name == rows.name else d for d in spec.shape))
        for spec in specs
    )


def role_of(name: str) -> Role:
    """The role of an input by its name; ``unknown`` for a name that is not common."""
    return next((role for role, names in NAMES.items() if name in names), "unknown")


@dataclass(frozen=True)
class Signature:
    """The inputs of a network.

    Args:
        inputs: in order.
    """

    inputs: tuple[InputSpec, ...] = ()

    @property
    def shared(self) -> tuple[str, ...]:
        """Inputs that have no row for each sample: whatever becomes of the rows, they stay whole."""
        return shared_by_rows(self.inputs)

    @property
    def ranges(self) -> dict[str, tuple[float, float]]:
        """The least and the greatest value of inputs that say so."""
        return {s.name: (s.low, s.high) for s in self.inputs if s.low is not None and s.high is not None}

    def of_role(self, *roles: Role, among: Iterable[str] = ()) -> list[str]:
        """Names of the inputs of some roles, the most common names first.

        Args:
            roles: which.
            among: names of inputs that a call has beside those declared here; their roles are known by name.
        """
        known = {spec.name: spec.role for spec in self.inputs}
        known |= {name: role_of(name) for name in among if name not in known}
        common = [name for role in roles for name in NAMES.get(role, ())]
        found = [name for name, role in known.items() if role in roles]
        return sorted(found, key=lambda name: common.index(name) if name in common else len(common))

    def without(self, names: Sequence[str]) -> Signature:
        """The signature of a network that lacks some inputs."""
        return replace(self, inputs=tuple(spec for spec in self.inputs if spec.name not in names))
