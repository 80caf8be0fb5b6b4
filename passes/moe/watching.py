"""Look into feed-forwards while a model runs on its calibration inputs, and mask their hidden units."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from enginewright.passes.contract import Context
from enginewright.passes.kernel.probes import evaluating
from enginewright.passes.moe.experts import samples
from enginewright.passes.traits import FeedForward

See = Callable[[str, Tensor, Tensor], Tensor | None]
"""Called with a layer's path, its input x (B, N, D) and its hidden units a (B, N, H); may answer with other units."""


def watch(model: nn.Module, layers: Mapping[str, FeedForward], context: Context, see: See, *, doing: str) -> None:
    """Run every calibration call without gradients and show what each layer sees; leaves the model as it was."""
    with torch.no_grad(), evaluating(model), hooked(layers, see):
        for number, inputs in enumerate(context.calibration):
            context.say(number, len(context.calibration), doing)
            model(**inputs)


@contextmanager
def hooked(layers: Mapping[str, FeedForward], see: See) -> Iterator[None]:
    """Call ``see`` before the output projection of each layer."""
    entered: dict[str, Tensor] = {}
    hooks = []
    for path, layer in layers.items():

        def enter(_: nn.Module, inputs: tuple[Tensor, ...], path: str = path) -> None:
            entered[path] = inputs[0]

        def leave(_: nn.Module, inputs: tuple[Tensor, ...], path: str = path) -> tuple[Tensor, ...] | None:
            units = see(path, samples(entered.pop(path)), samples(inputs[0]))
            return None if units is None else (units.view(inputs[0].shape), *inputs[1:])

        hooks += [layer.inputs[0].register_forward_pre_hook(enter), layer.output.register_forward_pre_hook(leave)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
