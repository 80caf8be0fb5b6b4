"""The training run of a distillation: steps, learning rate, the stop of alignment, and what is said meanwhile."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from enginewright.ground.errors import ToolchainError
from enginewright.passes.contract import Context, Inputs
from enginewright.passes.kernel.observe import floats_in
from enginewright.passes.kernel.patterns import mask_of
from enginewright.passes.kernel.wrap import Around, Call, wrap
from enginewright.passes.recovery import checkpoints
from enginewright.passes.recovery.checkpoints import State
from enginewright.passes.recovery.devices import Devices
from enginewright.passes.recovery.feeding import joined
from enginewright.passes.recovery.guides import Guide
from enginewright.passes.recovery.watching import Watch
from enginewright.passes.traits import BlockStack, layers_of

if TYPE_CHECKING:
    from enginewright.passes.recovery.distill import Distill

LOOK_EVERY, LOOKS = 10, 3
"""Steps from one look at the gradients' angle to the next, and the looks whose mean decides."""

NOISE = 1e-11
"""A loss below this is rounding: relative errors of some 3e-6, as between two ways to compute one thing in fp32."""


@dataclass(kw_only=True)
class Training:
    """A run.

    Args:
        student: the copy that is trained.
        guides: its teachers.
        weights: what is trained, by name.
        settings: the parameters.
        calls: calls of a step.
        devices: where it computes.
        state: how far it is.
        shared: inputs that have no row for each sample.
    """

    student: nn.Module
    guides: Sequence[Guide]
    weights: Mapping[str, nn.Parameter]
    settings: Distill
    calls: Callable[[int], list[Inputs]]
    devices: Devices
    state: State = field(default_factory=State)
    shared: Sequence[str] = ()

    def __post_init__(self) -> None:
        self.parameters = list(self.weights.values())
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=self.settings.lr, weight_decay=self.settings.weight_decay
        )
        self.masks = [mask_of(parameter) for parameter in self.parameters]
        self.aligns = any(guide.aligns for guide in self.guides)
        for module in self.student.modules():
            if hasattr(module, "learns"):  # routers: of experts, and of tokens that stay or that run
                module.learns = True  # type: ignore[assignment]

    def run(self, context: Context, *, folder: Path | None, made_for: str) -> None:
        """Train to the end, from the checkpoint in ``folder`` where there is one.

        Raises:
            ToolchainError: the loss is not finite any more, or the checkpoint is of another run.
        """
        if folder is not None:
            self.state = checkpoints.load(folder, self.weights, self.optimizer, made_for)
        began, first, total = time.perf_counter(), self.state.step, self.settings.steps
        while self.state.step < total:
            step = self.state.step
            loss = self.step()
            if not math.isfinite(loss):
                raise ToolchainError(
                    f"the loss of step {step + 1} is {loss}", help=f"try lr = {self.settings.lr / 3:.1g}"
                )
            self.state.losses = [*self.state.losses[:1], loss]
            self.state.step += 1
            left = (time.perf_counter() - began) / (self.state.step - first) * (total - self.state.step)
            context.say(step, total, f"recovering: loss {loss:.4g}, {left:.0f} s to go")
            due = self.state.step % self.settings.checkpoint_every == 0 or self.state.step == total
            if folder is not None and due and self.devices.number == 0:
                checkpoints.save(folder, self.weights, self.optimizer, self.state, made_for)

    def step(self) -> float:
        """One update; the loss before it."""
        self.stop_when_due()
        loss, gradients = self.gradients()
        # Rounding has nothing to teach, and Adam would turn it into steps of full size.
        if loss > NOISE:
            for parameter, gradient, mask in zip(self.parameters, gradients, self.masks, strict=True):
                parameter.grad = gradient if mask is None else gradient * mask  # 2:4 zeros stay zero
            nn.utils.clip_grad_norm_(self.parameters, self.settings.clip)
            for group in self.optimizer.param_groups:
                group["lr"] = self.settings.lr * schedule(self.state.step, self.settings.steps, self.settings.warm_up)
            self.optimizer.step()
        return loss

    def stop_when_due(self) -> None:
        """End the alignment of all but outputs at the step or the angle that was asked for (HASTE)."""
        settings, state = self.settings, self.state
        if not self.aligns or state.stopped is not None:
            return
        looks = state.cosines[-LOOKS:]
        late = settings.stop == "share" and state.step >= settings.stop_share * settings.steps
        apart = settings.stop == "angle" and len(looks) == LOOKS and sum(looks) / LOOKS < settings.stop_cosine
        if late or apart:
            state.stopped = state.step

    def gradients(self) -> tuple[float, list[Tensor]]:
        """Loss and gradients of one step's calls, over all processes."""
        aligning = self.aligns and self.state.stopped is None
        looking = aligning and self.settings.stop == "angle" and self.state.step % LOOK_EVERY == 0
        total, first, second = 0.0, self.zeros(), self.zeros()
        groups = self.groups(self.devices.own(self.calls(self.state.step)))
        for call in groups:
            base, align = self.losses(call, align=aligning)
            whole = base if align is None else base + align
            total += float(whole.detach()) / len(groups)
            if looking and align is not None:
                add(first, self.grad(base, keep=True), len(groups))
                add(second, self.grad(align), len(groups))
            else:
                add(first, self.grad(whole), len(groups))
        first = self.devices.mean(first)
        if looking:
            second = self.devices.mean(second)
            self.state.cosines.append(cosine(first, second))
            add(first, second, 1)
        return float(self.devices.mean([torch.tensor(total, device=self.devices.device)])[0]), first

    def groups(self, calls: list[Inputs]) -> list[Inputs]:
        """The same calls, as few as will do."""
        return joined(calls, self.shared)

    def taught_by(self, call: Inputs) -> tuple[Sequence[Guide], Inputs]:
        """Who says what a call should give, and how they are asked."""
        return self.guides, call

    def losses(self, call: Inputs, *, align: bool) -> tuple[Tensor, Tensor | None]:
        """Losses of outputs and load balance, and of everything else: None where nothing else counts."""
        guides, question = self.taught_by(call)
        blocks = sorted({path for guide in guides for path in (*guide.features, *guide.relation)})
        layers = sorted({path for guide in guides for path in guide.attention})
        with Watch(self.student, blocks if align else [], layers if align else []) as watched, self.autocast():
            result = floats_in(self.student(**call))
        bases, aligned, scale = [], [], None
        for guide in guides:
            base, extra, bare = guide.losses(question, result, watched, scale, align=align)
            scale = bare if scale is None else scale
            bases.append(base)
            aligned += [] if extra is None else [extra]
        if self.settings.balance:
            bases += [self.settings.balance * loss for loss in balance_losses(self.student)]
        return torch.stack(bases).sum(), torch.stack(aligned).sum() if aligned else None

    def autocast(self) -> torch.autocast:
        """Products of the student in bfloat16, where that was asked for."""
        return torch.autocast(self.devices.device.type, torch.bfloat16, enabled=self.settings.autocast)

    def grad(self, loss: Tensor, *, keep: bool = False) -> Sequence[Tensor]:
        """Gradients of a loss; zero where a weight has no part in it."""
        if not loss.requires_grad:
            return self.zeros()
        return torch.autograd.grad(loss, self.parameters, retain_graph=keep, materialize_grads=True)

    def zeros(self) -> list[Tensor]:
        """A gradient of nothing."""
        return [torch.zeros_like(parameter) for parameter in self.parameters]


def add(totals: Sequence[Tensor], gradients: Sequence[Tensor], parts: int) -> None:
    """Add one of so many parts of a mean, in place."""
    for total, gradient in zip(totals, gradients, strict=True):
        total += gradient / parts


def cosine(first: Sequence[Tensor], second: Sequence[Tensor]) -> float:
    """Cosine of the angle between two gradients; 0 where one of them is zero."""
    dot = sum(float((a.double() * b.double()).sum()) for a, b in zip(first, second, strict=True))
    sizes = [math.sqrt(sum(float(g.double().square().sum()) for g in gradients)) for gradients in (first, second)]
    return dot / (sizes[0] * sizes[1]) if all(sizes) else 0.0


def schedule(step: int, steps: int, warm_up: float) -> float:
    """Share of the learning rate at a step: a straight rise, then half a cosine down to 0 after the last."""
    rise = math.ceil(warm_up * steps)
    if step < rise:
        return (step + 1) / (rise + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / (steps - rise)))


def balance_losses(model: nn.Module) -> list[Tensor]:
    """What modules with experts say about how evenly they were used in the last call."""
    found = (getattr(module, "balance_loss", None) for module in model.modules())
    return [loss for loss in found if isinstance(loss, Tensor)]


class Recomputed(Around):
    """A block that keeps no results inside for the way back: it is computed again there."""

    def run(self, forward: Call, *args: Any, **inputs: Any) -> Any:
        """What the block gives."""
        return checkpoint(forward, *args, use_reentrant=False, **inputs)


def recompute_blocks(model: nn.Module) -> None:
    """Keep no results inside the blocks of a model for the way back: each block is computed again there."""
    for _, stack in layers_of(model, BlockStack):
        for block in stack.blocks:
            wrap(block, Recomputed())
