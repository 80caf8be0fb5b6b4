"""What a source gives: a module with its input contract, and what is known about it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from validation.contract import SamplingTask
from validation.inputs import Arrays, InputSpec, draw


@dataclass(frozen=True, kw_only=True)
class Published:
    """A figure from a paper and where it stands."""

    figure: str
    value: float | int | str
    source: str


@dataclass(frozen=True, kw_only=True)
class Model:
    """A network ready for the pipeline.

    Args:
        name: the string that asked for it, such as ``dit:digits``.
        module: in eval mode; ``forward`` takes the inputs by name.
        inputs: its input contract.
        outputs: names of what it returns, in order.
        weights: where the weights came from, in words.
        published: figures from its paper.
        task: for generative models, a whole sampling run with a judge.
        realistic: (count, seed) -> inputs like those in use; None where random ones must do.
    """

    name: str
    module: nn.Module
    inputs: tuple[InputSpec, ...]
    outputs: tuple[str, ...]
    weights: str
    published: tuple[Published, ...] = ()
    task: SamplingTask | None = None
    realistic: Callable[[int, int], list[Arrays]] | None = None

    def batches(self, count: int, seed: int) -> list[Arrays]:
        """``count`` sets of inputs at typical sizes: realistic where the model can make them, else random."""
        if self.realistic:
            return self.realistic(count, seed)
        return [draw(self.inputs, seed=seed + i) for i in range(count)]
