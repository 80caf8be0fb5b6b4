"""Train what other passes changed until it answers like the original again.

Sources: Dense2MoE, ICCV 2025 (output and feature distillation, weights of features); HASTE, arXiv:2505.16792
(attention maps, alignment that stops); Hybrid Distillation, ICLR 2024 (several teachers, token relations);
Hu et al. 2021, arXiv:2106.09685 (adapters of low rank). Departures: no labels are used, so the output loss stands
where those papers have their task's; no projectors between student and teacher, so features need a common width, and
they are compared by squared error, which Dense2MoE weighs, where HASTE takes the cosine after its projector;
the student runs in evaluation mode, so that dropout and batch statistics do not blur what it is compared by.
Checked against NUS-HPC-AI-Lab/HASTE at commit eb7b1f1: the attention loss is its cross-entropy less the teacher's own
entropy, with the same gradient to rounding, and both alignments stop for good at a step.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from typing import ClassVar, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from enginewright.ground.errors import ToolchainError
from enginewright.ground.facts import FLOAT_WEIGHTS, STATELESS_CALLS, Fact
from enginewright.passes.contract import Context, Decision, Facts, Inputs, Pass, Plan, digest_of
from enginewright.passes.kernel.digits import six_digits
from enginewright.passes.recovery.devices import Devices
from enginewright.passes.recovery.feeding import Cycled, Generated
from enginewright.passes.recovery.guides import Guide, Teacher, guide, label_of, relative_error
from enginewright.passes.recovery.low_rank import adapt
from enginewright.passes.recovery.training import Training, recompute_blocks

KINDS = ("auto", "generated", "calibration")
"""What ``data`` may be beside a file."""


class TrainedWeights(Decision):
    """The weights of a module that training changed."""

    arrays: ClassVar[Mapping[str, str]] = {".WEIGHT": "one of the weights, by its name"}

    weights: tuple[str, ...] = Field(description="their names in the module")

    def array_names(self, path: str) -> set[str]:
        """The names of the weights in the model."""
        return {f"{path}.{weight}".removeprefix(".") for weight in self.weights}


class TrainedFacts(Facts):
    """How training went."""

    data: str = Field(description="what it was on")
    steps: int = Field(description="updates")
    loss: list[float] = Field(description="at the start and at the end")
    relative_error: dict[str, float] = Field(description="to the original, before and after")
    aligned: dict[str, dict[str, int]] = Field(description="by teacher: how many places were compared, by loss")
    not_aligned: dict[str, dict[str, str]] = Field(description="by teacher: what could not be, and why")
    alignment_stopped_at: int | None = Field(description="update from which only outputs were compared; null: none")


class Distill(Pass):
    """Recover a changed model by distillation from the original; weights change, structure never does."""

    requires: ClassVar[tuple[Fact, ...]] = (FLOAT_WEIGHTS, STATELESS_CALLS)
    looks_for: ClassVar[str] = "weights that could be trained"
    decisions: ClassVar[tuple[type[Decision], ...]] = (TrainedWeights,)
    facts: ClassVar[type[Facts]] = TrainedFacts

    steps: int = Field(1000, ge=1, description="updates of the weights")
    batch: int = Field(8, ge=1, description="calls of the model in each step; run as one where the inputs allow")
    lr: float = Field(1e-4, gt=0, description="learning rate of AdamW at its highest")
    warm_up: float = Field(0.05, ge=0, lt=1, description="share of the steps in which it rises; then a cosine to 0")
    weight_decay: float = Field(0, ge=0, description="AdamW's")
    clip: float = Field(1, gt=0, description="largest norm of a gradient")
    data: str = Field(
        "auto",
        description="generated: new calls for each step; calibration: those calls again and again; FILE.safetensors: "
        "an array for each input; auto: generated where the model's source can, else calibration",
    )
    output: float = Field(1, ge=0, description="weight of the original's outputs, as a relative squared error")
    features: float = Field(0, ge=0, description="weight of its blocks' outputs")
    attention: float = Field(0, ge=0, description="weight of its attention maps")
    relation: float = Field(0, ge=0, description="weight of its tokens' cosine similarities after each block")
    balance: float = Field(0.01, ge=0, description="weight of the balance losses that layers with experts state")
    teachers: tuple[Teacher, ...] = Field((), description="more models to learn from, each with weights as above")
    aligned: tuple[float, float] = Field(
        (0, 1),
        description="share of the depth whose blocks are aligned, the first left out; HASTE takes blocks 5 to 8: 1/3 "
        "to 2/3 of SiT-B, 1/7 to 2/7 of SiT-XL",
    )
    stop: Literal["never", "share", "angle"] = Field(
        "never", description="when all but outputs stop counting: never, after a share of the steps, or by gradients"
    )
    stop_share: float = Field(0.5, ge=0, le=1, description="of the steps, for stop=share")
    stop_cosine: float = Field(
        0, ge=-1, le=1, description="for stop=angle: stop where the gradients of outputs and alignment agree less"
    )
    train: tuple[str, ...] = Field(("*",), description="glob patterns of the module paths whose weights are trained")
    rank: int = Field(0, ge=0, description="above 0: train adapters of this rank beside linear layers, and merge them")
    recompute: bool = Field(False, description="less memory, more time: blocks are computed again on the way back")
    autocast: bool = Field(False, description="compute the student's products in bfloat16")
    device: Literal["cpu", "cuda"] = Field("cpu", description="where to train; only cpu gives the same bits each time")
    accelerate: bool = Field(False, description="share each step's calls among processes of `accelerate launch`")
    checkpoint: str = Field("", description="folder to go on from after an interruption; empty: none is kept")
    checkpoint_every: int = Field(100, ge=1, description="steps from one checkpoint to the next")

    @field_validator("aligned")
    @classmethod
    def rising(cls, value: tuple[float, float]) -> tuple[float, float]:
        """A part of the depth that is not empty."""
        if not 0 <= value[0] < value[1] <= 1:
            raise ValueError("it is two shares of the depth, the first below the second, both from 0 to 1")
        return value

    def moved(self, path: Callable[[str], str], model: Callable[[str], str]) -> Distill:
        """This pass as a recipe in another folder names its files and models."""
        teachers = tuple(t.model_copy(update={"model": model(t.model)}) for t in self.teachers)
        data = self.data if self.data in KINDS else path(self.data)
        checkpoint = path(self.checkpoint) if self.checkpoint else ""
        return self.model_copy(update={"teachers": teachers, "data": data, "checkpoint": checkpoint})

    def plan(self, model: nn.Module, context: Context) -> Plan[TrainedWeights]:
        """Train a copy; the plan holds the weights that came out.

        Raises ``ToolchainError`` without an original, without calls to train on, where nothing is left to train or to
        compare, for weights without values, and when the loss is not finite any more.
        """
        names, skipped = self.trained(model)
        if context.original is None:
            raise ToolchainError(f"{self.name()} learns from the original model, and there is none here")
        calls, kind = self.calls(context)
        devices = Devices(self.device, share=self.accelerate)
        if self.batch < devices.count:
            raise ToolchainError(f"batch is {self.batch}; {devices.count} processes need a call each")
        student = copy_of(model, devices)
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            torch.manual_seed(context.seed)
            # Traits are read off plain layers, so the teachers are laid beside the student before it is adapted.
            guides = self.guides(student, context.original, devices.everything(calls(0))[0], context, devices)
            training = Training(
                student=student,
                guides=guides,
                weights=self.weights(student, names),
                settings=self,
                calls=calls,
                devices=devices,
                shared=context.signature.shared,
            )
            judged = devices.everything(list(context.calibration) or calls(0))
            before = relative_error(student, guides[0].module, judged)
            folder = context.folder / self.checkpoint if self.checkpoint else None
            training.run(context, folder=folder, made_for=self.made_for(model, guides, context) if folder else "")
            after = relative_error(student, guides[0].module, judged)
        facts = TrainedFacts(
            data=kind,
            steps=self.steps,
            loss=[six_digits(loss) for loss in training.state.losses],
            relative_error={"before": six_digits(before), "after": six_digits(after)},
            aligned={label_of(g.teacher): counts(g) for g in guides if g.aligns},
            not_aligned={label_of(g.teacher): dict(g.apart) for g in guides if g.apart},
            alignment_stopped_at=training.state.stopped,
        )
        if after > before and self.judged_by_outputs():
            facts = facts.model_copy(update={"notes": (worse(before, after),)})
            return decision(model, model, names, skipped, facts)
        return decision(model, student, names, skipped, facts)

    def judged_by_outputs(self) -> bool:
        """Whether nothing but the original's outputs is learned, so that the error to them says what was won."""
        own = self.output > 0 and not (self.features or self.attention or self.relation)
        return own and not any(teacher.asks() for teacher in self.teachers)

    def rewrite(self, model: nn.Module, plan: Plan[TrainedWeights]) -> nn.Module:
        """Put the learned weights in place. Raises ``ToolchainError`` for a weight of another shape."""
        return put_weights(model, plan)

    def trained(self, model: nn.Module) -> tuple[list[str], dict[str, str]]:
        """Names of the weights to train, and the module paths whose weights stay, with the reason."""
        owners: dict[str, list[str]] = {}
        reasons: dict[str, str] = {}
        for name, parameter in model.named_parameters():
            path = name.rpartition(".")[0]
            if parameter.is_meta:
                raise ToolchainError(
                    "its weights are on the meta device, which holds no values",
                    where=name,
                    help="load the model's weights before planning, or replay a plan that was made with them",
                )
            owners.setdefault(path, [])
            if reason := self.reason_to_skip(model, name, parameter):
                reasons.setdefault(path, reason)
            else:
                owners[path].append(name)
        for pattern in self.train:
            if not any(fnmatchcase(path, pattern) for path in owners):
                listed = ", ".join(list(owners)[:12])
                raise ToolchainError(f"train {pattern!r} matches no module with weights", help=f"modules: {listed}, …")
        names = [name for path in owners for name in owners[path]]
        if not names:
            raise ToolchainError(f"{self.name()} has nothing to train: {next(iter(reasons.values()), 'no weights')}")
        return names, {path: reasons[path] for path in owners if not owners[path]}

    def reason_to_skip(self, model: nn.Module, name: str, parameter: nn.Parameter) -> str:
        """Why a weight stays as it is; empty when it does not."""
        path, _, leaf = name.rpartition(".")
        if not any(fnmatchcase(path, pattern) for pattern in self.train):
            return f"matches none of train = {', '.join(self.train)}"
        if not (parameter.requires_grad and parameter.is_floating_point()):
            return "its weights are constants: they ask for no gradient"
        if self.rank and not (type(model.get_submodule(path)) is nn.Linear and leaf == "weight"):
            return "only the matrices of linear layers have adapters"
        if self.rank and self.rank >= min(parameter.shape):
            return f"a rank of {self.rank} is no less than its matrix's own, {min(parameter.shape)}"
        return ""

    def calls(self, context: Context) -> tuple[Callable[[int], list[Inputs]], str]:
        """The calls of each step, and where they come from, in words."""
        kind = self.data
        if kind == "auto":
            kind = "generated" if context.draw else "calibration"
        if kind == "generated":
            if context.draw is None:
                raise ToolchainError(
                    "data is 'generated', and the model's source cannot make calls like those it is calibrated on",
                    help="take data = 'calibration', or a safetensors file",
                )
            return Generated(context.draw, self.batch), kind
        given = context.calibration if kind == "calibration" else context.calls_in(kind)
        if not given:
            raise ToolchainError(f"there are no calls to train on: data = {kind!r} gives none")
        return Cycled(given, self.batch), "calibration" if kind == "calibration" else "file"

    def guides(
        self, student: nn.Module, original: nn.Module, inputs: Inputs, context: Context, devices: Devices
    ) -> list[Guide]:
        """The original and the other teachers, laid beside the student."""
        own = Teacher(
            model="", output=self.output, features=self.features, attention=self.attention, relation=self.relation
        )
        if not any(teacher.asks() for teacher in (own, *self.teachers)):
            raise ToolchainError(f"every loss of {self.name()} weighs 0; there is nothing to learn")
        modules = [original, *(context.teacher_of(teacher.model) for teacher in self.teachers)]
        return [
            guide(teacher, frozen_copy(module, devices), student, inputs, self.aligned)
            for teacher, module in zip((own, *self.teachers), modules, strict=True)
        ]

    def weights(self, student: nn.Module, names: list[str]) -> dict[str, nn.Parameter]:
        """What is trained in the copy, by name; everything else is frozen."""
        if self.recompute:
            recompute_blocks(student)
        parameters = dict(student.named_parameters())
        for parameter in parameters.values():
            parameter.requires_grad_(False)
        weights = adapt(student, names, self.rank) if self.rank else {name: parameters[name] for name in names}
        for weight in weights.values():
            weight.requires_grad_(True)
        return weights

    def made_for(self, model: nn.Module, guides: list[Guide], context: Context) -> str:
        """What a checkpoint belongs to, as JSON: parameters, seed, and digests of student and teachers."""
        content = self.model_dump(mode="json", exclude={"checkpoint", "checkpoint_every"})
        content |= {"seed": context.seed, "student": fingerprint(model)}
        content |= {label_of(g.teacher): fingerprint(g.module) for g in guides}
        return json.dumps(content, sort_keys=True)


def copy_of(model: nn.Module, devices: Devices) -> nn.Module:
    """A copy to train: in float32, because AdamW's small steps would be lost in 16 bits, and in evaluation mode."""
    return copy.deepcopy(model).to(devices.device).float().eval()


def frozen_copy(module: nn.Module, devices: Devices) -> nn.Module:
    """A teacher in evaluation mode on its device, the one that was handed over left as it is."""
    if devices.device.type != "cpu":
        return copy.deepcopy(module).to(devices.device).eval()
    tensors = [*module.parameters(), *module.buffers()]
    return copy.deepcopy(module, {id(tensor): tensor for tensor in tensors}).eval()


def decision(
    model: nn.Module, student: nn.Module, names: list[str], skipped: dict[str, str], facts: Facts
) -> Plan[TrainedWeights]:
    """The plan: every weight that is not what it was."""
    changed: dict[str, list[str]] = {}
    arrays: dict[str, Tensor] = {}
    skipped = dict(skipped)
    for name in names:
        path, _, leaf = name.rpartition(".")
        old = model.get_parameter(name)
        new = getattr(student.get_submodule(path), leaf).detach().to("cpu", old.dtype)
        if torch.equal(old.cpu(), new):
            skipped.setdefault(path, "training left its weights as they were")
        else:
            changed.setdefault(path, []).append(leaf)
            arrays[name] = new.clone()
    return Plan(
        choice={path: TrainedWeights(weights=tuple(weights)) for path, weights in changed.items()},
        skipped={path: reason for path, reason in skipped.items() if path not in changed},
        facts=facts,
        arrays=arrays,
    )


def worse(before: float, after: float) -> str:
    """For the report: training that did harm was undone."""
    return (
        f"training made it worse (relative error {before:.3g} before, {after:.3g} after), so the weights stay as they "
        "were: take a smaller lr or more steps"
    )


def put_weights(model: nn.Module, plan: Plan[TrainedWeights]) -> nn.Module:
    """Put the weights that a plan names in place. Raises ``ToolchainError`` for one of another shape."""
    for path, trained in plan.choice.items():
        module = model.get_submodule(path)
        for leaf in trained.weights:
            name = f"{path}.{leaf}" if path else leaf
            old, new = getattr(module, leaf), plan.array(name)
            if old.shape != new.shape:
                raise ToolchainError(
                    f"the plan is for a weight of shape {tuple(new.shape)}; this one has {tuple(old.shape)}",
                    where=name,
                )
            replace_parameter(model, old, nn.Parameter(new, requires_grad=old.requires_grad))
    return model


def replace_parameter(model: nn.Module, old: nn.Parameter, new: nn.Parameter) -> None:
    """Put a weight in another's place, wherever it is used: tied weights stay tied."""
    for module in model.modules():
        for leaf, parameter in module._parameters.items():
            if parameter is old:
                module._parameters[leaf] = new


def fingerprint(model: nn.Module) -> str:
    """SHA-256 of a model's tensors by name."""
    digests = [f"{name} {digest_of(tensor.cpu())}" for name, tensor in model.state_dict().items()]
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()


def counts(guide: Guide) -> dict[str, int]:
    """Places that are compared, by loss."""
    parts = {"features": guide.features, "attention": guide.attention, "relation": guide.relation}
    return {loss: len(pairs) for loss, pairs in parts.items() if pairs}
