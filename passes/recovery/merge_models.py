"""Distil several fine-tuned checkpoints of one network into one that takes a style: which of them to answer like.

Source: DMM 2025, arXiv:2504.12364: one student, one teacher for each style, outputs and block features matched on
inputs of no style in particular; the style's embedding is added to the timestep's (``passes/recovery/styles.py``).
Departures: errors are relative to each teacher's mean square, and features are weighted as in ``distill``; a U-Net's
features are those of its transformer blocks, not of its nine stages; in a step every teacher is asked the same calls;
no adversarial loss and no last stage on samples of the teachers; buffers stay the base's. Adding a style to a merged
model later is not here: merge again with all teachers.
Checked against MCG-NJU/DMM at commit b38e52d: its embedding of a style beside the timestep's, put into diffusers'
U-Net, gives the same prediction to rounding; its release has no adversarial loss either, and starts that embedding's
last layer at random, not at zero.

Baseline: the mean of the teachers' weights; the facts give its error to each teacher beside the merged model's.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, ValidationInfo, field_validator
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from enginewright.ground.errors import ToolchainError
from enginewright.ground.facts import UNTOUCHED, Fact
from enginewright.ground.reading import read_tensors
from enginewright.passes.contract import Context, Decision, Facts, Inputs, NewInput, Pass, Plan
from enginewright.passes.kernel.digits import six_digits
from enginewright.passes.recovery.devices import Devices
from enginewright.passes.recovery.distill import (
    KINDS,
    Distill,
    TrainedWeights,
    copy_of,
    decision,
    frozen_copy,
    put_weights,
)
from enginewright.passes.recovery.guides import Guide, Teacher, guide, relative_error
from enginewright.passes.recovery.styles import (
    PARTS,
    STYLE,
    EveryStyle,
    Merging,
    add_styles,
    bake_in,
    one_hot,
    styles_of,
    time_embeddings,
)

APART = {"teachers", "style", "start"}
"""Parameters that do not mean what they mean in ``distill``."""


class StyledEmbedding(TrainedWeights):
    """A time embedding that an embedding of styles is added to."""

    arrays: ClassVar[Mapping[str, str]] = {
        **TrainedWeights.arrays,
        **{f".{part}": "a part of the embedding of styles" for part in PARTS},
    }

    weights: tuple[str, ...] = Field((), description="names of its own weights that training changed")
    styles: int = Field(description="number of the styles")

    def array_names(self, path: str) -> set[str]:
        """Its own weights, and the parts of the embedding of styles."""
        return super().array_names(path) | {f"{path}.{part}" for part in PARTS}


class MergedFacts(Facts):
    """How training went."""

    data: str = Field(description="what it was on")
    steps: int = Field(description="updates")
    loss: list[float] = Field(description="at the start and at the end")
    relative_error: dict[str, dict[str, float]] = Field(
        description="by teacher: of the mean of weights, and before and after training"
    )


class MergeModels(Pass):
    """Train one model to answer like each of several of its kind, as an input ``style`` says, and like mixtures."""

    by_layer: ClassVar[bool] = False
    intends: ClassVar[str] = "its teachers, weighed by the style"
    requires: ClassVar[tuple[Fact, ...]] = (UNTOUCHED,)
    decisions: ClassVar[tuple[type[Decision], ...]] = (TrainedWeights, StyledEmbedding)
    facts: ClassVar[type[Facts]] = MergedFacts

    teachers: tuple[str, ...] = Field(
        (), description="model strings, or safetensors files of weights; each is a style, in this order"
    )
    style: tuple[float, ...] = Field(
        (), description="weights of the styles to bake in; left out, they are the input style (batch, styles)"
    )
    start: Literal["base", "mean"] = Field(
        "base", description="weights to start from: the model's own, or the mean of the teachers'"
    )
    steps: int = Field(1000, ge=1, description="updates of the weights")
    batch: int = Field(8, ge=1, description="calls that each teacher is asked in each step")
    lr: float = Field(1e-4, gt=0, description="learning rate of AdamW at its highest")
    warm_up: float = Field(0.05, ge=0, lt=1, description="share of the steps in which it rises; then a cosine to 0")
    weight_decay: float = Field(0, ge=0, description="AdamW's")
    clip: float = Field(1, gt=0, description="largest norm of a gradient")
    data: str = Field("auto", description="calls to train on, as for distill")
    features: float = Field(0.1, ge=0, description="weight of the teachers' block outputs; of their outputs it is 1")
    recompute: bool = Field(False, description="less memory, more time: blocks are computed again on the way back")
    autocast: bool = Field(False, description="compute the student's products in bfloat16")
    device: Literal["cpu", "cuda"] = Field("cpu", description="where to train; only cpu gives the same bits each time")
    accelerate: bool = Field(False, description="share each step's calls among processes of `accelerate launch`")
    checkpoint: str = Field("", description="folder to go on from after an interruption; empty: none is kept")
    checkpoint_every: int = Field(100, ge=1, description="steps from one checkpoint to the next")

    @field_validator("style")
    @classmethod
    def one_for_each(cls, style: tuple[float, ...], info: ValidationInfo) -> tuple[float, ...]:
        """A weight for each style."""
        if style and len(style) != len(info.data.get("teachers", style)):
            raise ValueError(f"there are {len(info.data['teachers'])} teachers")
        return style

    def moved(self, path: Callable[[str], str], model: Callable[[str], str]) -> MergeModels:
        """This pass as a recipe in another folder names its files and models."""
        teachers = tuple(path(text) if is_file(text) else model(text) for text in self.teachers)
        data = self.data if self.data in KINDS else path(self.data)
        checkpoint = path(self.checkpoint) if self.checkpoint else ""
        return self.model_copy(update={"teachers": teachers, "data": data, "checkpoint": checkpoint})

    def plan(self, model: nn.Module, context: Context) -> Plan[TrainedWeights]:
        """Train a copy; the plan holds the weights that came out.

        Raises ``ToolchainError`` without two teachers, for a teacher with other weights than the model's, without calls
        to train on, for weights without values, and when the loss is not finite any more.
        """
        if len(set(self.teachers)) < 2:
            raise ToolchainError(
                f"{self.name()} got {len(set(self.teachers))} different teachers; a style needs another to differ from",
                help="teachers = ['hf:FOLDER', 'FILE.safetensors']",
            )
        places = time_embeddings(model)
        if not places:
            return Plan(choice={}, skipped={"": "no family knows where it embeds a timestep, so a style has no place"})
        school = Distill(**self.model_dump(exclude=APART))
        names, skipped = school.trained(model)
        calls, kind = school.calls(context)
        teachers = {text: teacher_of(text, model, context) for text in self.teachers}
        devices = Devices(self.device, share=self.accelerate)
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            torch.manual_seed(context.seed)
            first = devices.everything(calls(0))
            judged = devices.everything(list(context.calibration)) or first
            mean = with_weights(model, mean_of(list(teachers.values())), devices)
            student = mean if self.start == "mean" else copy_of(model, devices)
            guides = [
                self.guide(text, frozen_copy(each, devices), student, first[0]) for text, each in teachers.items()
            ]
            errors = [{"mean_of_weights": six_digits(relative_error(mean, each.module, judged))} for each in guides]
            add_styles(student, places, len(guides))
            training = Merging(
                student=student,
                guides=guides,
                weights=school.weights(student, names) | unfrozen(styles_of(student, places)),
                settings=school,
                calls=EveryStyle(calls, len(guides)),
                devices=devices,
                shared=context.signature.shared,
            )
            before = errors_by_teacher(student, guides, judged)
            self.train(training, school, model, context)
            after = errors_by_teacher(student, guides, judged)
        for number, error in enumerate(errors):
            error |= {"before": before[number], "after": after[number]}
        facts = MergedFacts(
            data=kind,
            steps=self.steps,
            loss=[six_digits(loss) for loss in training.state.losses],
            relative_error=dict(zip(teachers, errors, strict=True)),
            notes=tuple(teacher_line(text, error) for text, error in zip(teachers, errors, strict=True)),
        )
        return with_styles(decision(model, student, names, skipped, facts), student, places, len(guides))

    def guide(self, text: str, module: nn.Module, student: nn.Module, inputs: Inputs) -> Guide:
        """A teacher beside the student."""
        return guide(Teacher(model=text, output=1, features=self.features), module, student, inputs, (0, 1))

    def train(self, training: Merging, school: Distill, model: nn.Module, context: Context) -> None:
        """To the end, from the checkpoint where there is one."""
        if not self.checkpoint:
            training.run(context, folder=None, made_for="")
            return
        made_for = json.loads(school.made_for(model, list(training.guides), context)) | {"start": self.start}
        training.run(context, folder=context.folder / self.checkpoint, made_for=json.dumps(made_for, sort_keys=True))

    def rewrite(self, model: nn.Module, plan: Plan[TrainedWeights]) -> nn.Module:
        """Put the weights in place, and the styles beside the time embeddings; paths of modules stay as they were.

        Raises ``ToolchainError`` for a weight of another shape.
        """
        put_weights(model, plan)
        places = {path: each.styles for path, each in plan.choice.items() if isinstance(each, StyledEmbedding)}
        if self.style:
            arrays = {name: plan.array(name) for path in places for name in (f"{path}.{part}" for part in PARTS)}
            return bake_in(model, list(places), arrays, self.style)
        if not places:
            return model
        widths = {path: plan.array(f"{path}.style_table").shape[1] for path in places}
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            add_styles(model, widths, next(iter(places.values())))
            for name, parameter in styles_of(model, widths).items():
                parameter.copy_(plan.array(name))
        return model

    def new_inputs(self, plan: Plan[TrainedWeights]) -> tuple[NewInput, ...]:
        """The weights of the styles, if they are not baked in; left out, all styles weigh the same."""
        styles = [each.styles for each in plan.choice.values() if isinstance(each, StyledEmbedding)]
        if self.style or not styles:
            return ()
        return (NewInput(name=STYLE, shape=(styles[0],), default=1 / styles[0]),)

    def intended(self, model: nn.Module, plan: Plan, context: Context) -> nn.Module:
        """The teachers, whose outputs are weighed by the style. Raises ``ToolchainError`` where one is not there."""
        return WeighedTeachers([teacher_of(text, model, context) for text in self.teachers], self.style)


class WeighedTeachers(nn.Module):
    """Answers with the outputs of several models, each times its weight.

    Args:
        teachers: called alike.
        style: a weight for each; empty: the input ``style`` (B, teachers) says them, and without it all weigh the same.
    """

    def __init__(self, teachers: Sequence[nn.Module], style: Sequence[float]) -> None:
        super().__init__()
        self.teachers, self.style = nn.ModuleList(teachers), tuple(style)

    def forward(self, **inputs: Tensor) -> Any:
        """What the teachers give, in their form; of tensors that are no floats, the first teacher's."""
        given = inputs.pop(STYLE, None)
        even = [1 / len(self.teachers)] * len(self.teachers)
        weights = torch.tensor([self.style or even]) if given is None else given
        answers = [pytree.tree_flatten(teacher(**inputs)) for teacher in self.teachers]
        mixed = [weighed(same, weights) for same in zip(*(leaves for leaves, _ in answers), strict=True)]
        return pytree.tree_unflatten(mixed, answers[0][1])


def weighed(answers: Sequence[Any], weights: Tensor) -> Any:
    """Outputs (B, ...) of several models, times the weights (B or 1, models), in one."""
    if not isinstance(answers[0], Tensor) or not answers[0].is_floating_point():
        return answers[0]
    each = weights.to(answers[0]).unbind(1)
    return torch.stack([w.view(-1, *[1] * (a.ndim - 1)) * a for a, w in zip(answers, each, strict=True)]).sum(0)


def is_file(text: str) -> bool:
    """Whether a teacher is a file of weights."""
    return text.endswith(".safetensors")


def teacher_of(text: str, model: nn.Module, context: Context) -> nn.Module:
    """The teacher that a text names; raises ``ToolchainError`` where names or shapes of weights are not the model's."""
    module = None if is_file(text) else context.teacher_of(text)
    weights = read(text, context) if module is None else dict(module.named_parameters())
    own = dict(model.named_parameters())
    shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
    for name, weight in own.items():
        if shapes.get(name) != tuple(weight.shape):
            raise ToolchainError(
                f"teacher {text!r} is another network: {name} is {shapes.get(name, 'not there')}, in the model "
                f"{tuple(weight.shape)}",
                help="all teachers and the model are fine-tuned from one network",
            )
    return module or loaded(copy.deepcopy(model), weights)


def read(text: str, context: Context) -> dict[str, Tensor]:
    """Tensors of a file."""
    return read_tensors(context.folder / text, what=repr(text), absent=f"there is no file {text!r}")


def loaded(model: nn.Module, weights: Mapping[str, Tensor]) -> nn.Module:
    """A model of its own, with these weights written into it."""
    model.load_state_dict({name: weights[name] for name, _ in model.named_parameters()}, strict=False)
    return model


def with_weights(model: nn.Module, weights: Mapping[str, Tensor], devices: Devices) -> nn.Module:
    """A copy to train, with other weights."""
    return loaded(copy_of(model, devices), weights)


def mean_of(teachers: Sequence[nn.Module]) -> dict[str, Tensor]:
    """The mean of each weight, in double precision."""
    named = [dict(teacher.named_parameters()) for teacher in teachers]
    return {name: torch.stack([each[name].detach().double() for each in named]).mean(0) for name in named[0]}


def errors_by_teacher(student: nn.Module, guides: Sequence[Guide], calls: list[Inputs]) -> list[float]:
    """The student's error to each teacher, in that teacher's style."""
    styles = [one_hot(number, len(guides)) for number in range(len(guides))]
    pairs = zip(guides, styles, strict=True)
    return [six_digits(relative_error(partial(student, style=style), each.module, calls)) for each, style in pairs]


def unfrozen(weights: dict[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """Weights that are to be trained, which ask for gradients from now on."""
    for weight in weights.values():
        weight.requires_grad_(True)
    return weights


def with_styles(
    plan: Plan[TrainedWeights], student: nn.Module, places: Mapping[str, int], count: int
) -> Plan[TrainedWeights]:
    """The same decision, with the embeddings of styles."""
    arrays = {name: parameter.detach().cpu().clone() for name, parameter in styles_of(student, places).items()}
    trained = {path: {"weights": plan.choice[path].weights} if path in plan.choice else {} for path in places}
    choice = {path: StyledEmbedding(**own, styles=count) for path, own in trained.items()}
    skipped = {path: reason for path, reason in plan.skipped.items() if path not in places}
    return replace(plan, choice={**plan.choice, **choice}, skipped=skipped, arrays={**plan.arrays, **arrays})


def teacher_line(text: str, error: Mapping[str, float]) -> str:
    """A teacher's line in the report."""
    return (
        f"relative error to teacher {text!r}: {error['before']:.3g} before, {error['after']:.3g} after; of the mean of "
        f"all teachers' weights {error['mean_of_weights']:.3g}"
    )
