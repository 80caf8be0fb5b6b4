"""What first-order scores without labels share: sums of a model's output under random signs, and their gradients.

Such a sum stands for the loss, because its squared gradient is on average the output's own squared change; a mean
square of the output would be blind where a layer norm comes last, which fixes it.

Shapes: K inputs, N outputs of a linear layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from enginewright.ground.errors import ToolchainError
from enginewright.passes.contract import Context
from enginewright.passes.kernel.observe import After, Before, Look, floats_in, looking, observe

PROBES = 4
"""Random signs drawn for each calibration batch; each costs one backward pass."""


@dataclass(frozen=True)
class Call:
    """One call of a watched linear layer: its key, what it read (B, ..., K) and what it gave (B, ..., N)."""

    key: Any
    input: Tensor
    output: Tensor


Use = Callable[[Sequence[Call], Sequence[Tensor]], None]


def probe(
    model: nn.Module,
    linears: Mapping[Any, nn.Linear],
    context: Context,
    use: Use,
    *,
    at: Literal["input", "output"],
    what: str,
) -> None:
    """Hand each probe's calls and their gradients to ``use``, for every calibration batch.

    Leaves the model as it was: gradients, ``requires_grad``, hooks, modes and the global random state.

    Args:
        model: runs in evaluation mode.
        linears: the layers to watch, by any key.
        context: calibration inputs, seed of the signs, progress.
        use: called with the calls of one batch in order, and the gradient of one probe for each.
        at: where gradients are taken.
        what: what is scored, in messages.

    Raises:
        ToolchainError: no floating-point output, or one that gradients cannot be traced back from.
    """
    generator = torch.Generator().manual_seed(context.seed)
    calls: list[Call] = []

    def score(result: Any) -> None:
        output = first_floating(result)
        if calls and not output.requires_grad:
            raise ToolchainError(
                f"taylor cannot trace the model's output back to its {what}: its forward cuts gradients"
            )
        tensors = [call.input if at == "input" else call.output for call in calls]
        for _ in range(PROBES if calls else 0):
            signs = torch.randint(0, 2, output.shape, generator=generator).to(output) * 2 - 1
            loss = (output * signs).sum()
            use(calls, torch.autograd.grad(loss, tensors, retain_graph=True, materialize_grads=True))
        calls.clear()

    looks = [Look(linear, *collecting(calls, key, at=at)) for key, linear in linears.items()]
    observe(model, looks, context, doing=f"scoring {what}", each=score, gradients=True)


@contextmanager
def linear_calls(linears: Mapping[Any, nn.Linear], *, at: Literal["input", "output"]) -> Iterator[list[Call]]:
    """Collect the calls of some layers, with a gradient to come where it is wanted."""
    calls: list[Call] = []
    with looking(Look(linear, *collecting(calls, key, at=at)) for key, linear in linears.items()):
        yield calls


def collecting(calls: list[Call], key: Any, *, at: Literal["input", "output"]) -> tuple[Before, After]:
    """What is done before and after each call of one layer, so that it is among the calls."""

    def before(inputs: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, ...]:
        return (traced(inputs[0]) if at == "input" else inputs[0], *inputs[1:])

    def after(inputs: tuple[Any, ...], named: dict[str, Any], output: Tensor) -> Tensor:
        output = traced(output) if at == "output" else output
        calls.append(Call(key, inputs[0], output))
        return output

    return before, after


def traced(tensor: Tensor) -> Tensor:
    """The tensor, or its values as a new start of gradients where it carries none."""
    return tensor if tensor.requires_grad else tensor.detach().requires_grad_()


def first_floating(output: object) -> Tensor:
    """A model's first floating-point output."""
    tensor = next(iter(floats_in(output)), None)
    if tensor is None:
        raise ToolchainError(f"taylor needs a floating-point output; this model gives a {type(output).__name__}")
    return tensor
