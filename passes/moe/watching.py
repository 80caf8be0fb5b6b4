"""Look into feed-forwards while a model runs on its calibration inputs, and mask their hidden units."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor, nn

from enginewright.passes.contract import Context
from enginewright.passes.kernel.observe import Look, first_argument, observe
from enginewright.passes.moe.experts import samples
from enginewright.passes.traits import FeedForward

See = Callable[[str, Tensor, Tensor], Tensor | None]
"""Called with a layer's path, its input x (B, N, D) and its hidden units a (B, N, H); may answer with other units."""


def watch(model: nn.Module, layers: Mapping[str, FeedForward], context: Context, see: See, *, doing: str) -> None:
    """Run every calibration call without gradients and show what each layer sees; leaves the model as it was."""
    looks = [look for path, layer in layers.items() for look in looks_into(path, layer, see)]
    observe(model, looks, context, doing=doing)


def looks_into(path: str, layer: FeedForward, see: See) -> tuple[Look, Look]:
    """Note a layer's input, and call ``see`` before its output projection."""
    entered: list[Tensor] = []

    def enter(inputs: tuple[Tensor, ...], named: Mapping[str, Tensor]) -> None:
        entered[:] = [first_argument(inputs, named)]

    def leave(inputs: tuple[Tensor, ...], named: Mapping[str, Tensor]) -> tuple[Tensor, ...] | None:
        units = see(path, samples(entered.pop()), samples(inputs[0]))
        return None if units is None else (units.view(inputs[0].shape), *inputs[1:])

    return Look(layer.inputs[0], before=enter), Look(layer.output, before=leave)
