"""One network that speaks like several: an embedding for each style, beside the timestep's, and how it is trained.

Source: DMM 2025, arXiv:2504.12364: rows of a table, a two-layer SiLU MLP, added to the time embedding. Departures: the
MLP's second layer starts at zero, so that the first answer of every style is exactly the base's (the authors' random
start is not); a call may mix styles by weights, which the authors do at test time only.

Shapes: B batch, K styles, D width of the time embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from enginewright.passes.contract import Inputs
from enginewright.passes.kernel.wrap import Around, Call, around, wrap
from enginewright.passes.recovery.feeding import joined
from enginewright.passes.recovery.guides import Guide
from enginewright.passes.recovery.training import Training
from enginewright.passes.traits import TimeEmbedding, layers_of

STYLE = "style"
"""The input that holds the weights of the styles (B, K)."""

PARTS = ("style_table", "style_mlp.0.weight", "style_mlp.0.bias", "style_mlp.2.weight", "style_mlp.2.bias")
"""What an embedding of styles consists of, under the time embedding's path."""


@dataclass
class Mixture:
    """The styles of the call that is being made.

    Args:
        even: weights (1, K) for calls that say nothing.
        weights: the call's own (B, K), or (1, K) for all rows.
        stays: whether the weights stay after the call: blocks that are computed again on the way back ask once more.
    """

    even: Tensor
    weights: Tensor
    stays: bool = False

    @staticmethod
    def of(styles: int) -> Mixture:
        """Between calls."""
        even = torch.full((1, styles), 1 / styles)
        return Mixture(even, even)


def time_embeddings(model: nn.Module) -> dict[str, int]:
    """Width of the time embedding by path."""
    return {f"{owner}.{found.name}".lstrip("."): found.width for owner, found in layers_of(model, TimeEmbedding)}


def add_styles(model: nn.Module, paths: Mapping[str, int], styles: int) -> nn.Module:
    """Give a model, in place, an input ``style`` and, beside each time embedding, an embedding of styles.

    Args:
        model: answers as before, whatever the style.
        paths: time embeddings, and their widths.
        styles: how many.
    """
    mixture = Mixture.of(styles)
    for path, width in paths.items():
        part: Any = model.get_submodule(path)
        like = next(part.parameters())
        part.style_table = nn.Parameter(torch.randn(styles, width))
        part.style_mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        for zero in part.style_mlp[2].parameters():
            nn.init.zeros_(zero)
        part.style_table.data = part.style_table.data.to(like)
        part.style_mlp.to(like).train(part.training)
        wrap(part, Styled(part, mixture))
    wrap(model, Mixing(mixture))
    return model


@dataclass(frozen=True)
class Styled(Around):
    """A time embedding to whose answer (B, D) the embedding of the call's styles is added."""

    part: Any
    mixture: Mixture

    def run(self, forward: Call, *args: Any, **inputs: Any) -> Any:
        """The sum of both embeddings."""
        embedded: Tensor = forward(*args, **inputs)
        weights = self.mixture.weights.to(self.part.style_table)
        return embedded + self.part.style_mlp(weights @ self.part.style_table).to(embedded.dtype)


@dataclass(frozen=True)
class Mixing(Around):
    """A model that takes the weights of styles too; left out, all weigh the same."""

    mixture: Mixture

    @property
    def adds(self) -> tuple[str, ...]:
        """The weights."""
        return (STYLE,)

    def run(self, forward: Call, *args: Any, **inputs: Any) -> Any:
        """What the model gives for a mixture of styles."""
        mixture, given = self.mixture, inputs.pop(STYLE, None)
        mixture.weights = mixture.even if given is None else given
        try:
            return forward(*args, **inputs)
        finally:
            if not mixture.stays:
                mixture.weights = mixture.even


def styles_of(model: nn.Module, paths: Iterable[str]) -> dict[str, nn.Parameter]:
    """The weights of all embeddings of styles, by name."""
    return {f"{path}.{part}": model.get_parameter(f"{path}.{part}") for path in paths for part in PARTS}


def bake_in(
    model: nn.Module, paths: Sequence[str], arrays: Mapping[str, Tensor], weights: Sequence[float]
) -> nn.Module:
    """Add, in place, the embedding of one mixture of styles to each time embedding, as a constant.

    Args:
        model: takes no further input.
        paths: time embeddings.
        arrays: ``PARTS`` of each, by path.
        weights: of the styles, K.
    """
    for path in paths:
        part: Any = model.get_submodule(path)
        table, *mlp = (arrays[f"{path}.{name}"] for name in PARTS)
        mixed = torch.tensor([list(weights)]) @ table
        vector = F.linear(F.silu(F.linear(mixed, mlp[0], mlp[1])), mlp[2], mlp[3])  # (1, D)
        part.register_buffer("style_vector", vector.to(next(part.parameters())))
        wrap(part, Shifted(part))
    return model


@dataclass(frozen=True)
class Shifted(Around):
    """A time embedding to whose answer a constant is added."""

    part: Any

    def run(self, forward: Call, *args: Any, **inputs: Any) -> Any:
        """The sum of both."""
        embedded: Tensor = forward(*args, **inputs)
        return embedded + self.part.style_vector.to(embedded.dtype)


def one_hot(number: int, styles: int) -> Tensor:
    """Weights (1, K) of one style alone."""
    return F.one_hot(torch.tensor([number]), styles).float()


@dataclass
class EveryStyle:
    """The calls of a step, each once for every style."""

    calls: Callable[[int], list[Inputs]]
    styles: int

    def __call__(self, step: int) -> list[Inputs]:
        """Calls of a step, with the style as an input of as many rows as the call has."""
        return [
            {**call, STYLE: one_hot(number, self.styles).expand(rows_of(call), -1)}
            for call in self.calls(step)
            for number in range(self.styles)
        ]


def rows_of(call: Inputs) -> int:
    """Rows of a call: those of its first input that has any."""
    return next(tensor.shape[0] for tensor in call.values() if tensor.ndim)


class Merging(Training):
    """A run in which each style has a teacher of its own."""

    def __post_init__(self) -> None:
        super().__post_init__()
        mixing = around(self.student, Mixing)
        assert mixing is not None
        mixing.mixture.stays = True

    def groups(self, calls: list[Inputs]) -> list[Inputs]:
        """Calls of one style go together; no more than that, because each teacher is asked apart."""
        apart = [[call for call in calls if number_of(call) == number] for number in range(len(self.guides))]
        return [group for own in apart for group in joined(own, self.shared)]

    def taught_by(self, call: Inputs) -> tuple[Sequence[Guide], Inputs]:
        """The style's own teacher, who knows of no styles."""
        return [self.guides[number_of(call)]], {name: tensor for name, tensor in call.items() if name != STYLE}


def number_of(call: Inputs) -> int:
    """The one style of a call."""
    return int(call[STYLE][0].argmax())
