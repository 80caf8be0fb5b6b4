"""A teacher, what a student learns from it, and where the two can be laid side by side."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from enginewright.ground.errors import ToolchainError
from enginewright.passes.contract import Inputs
from enginewright.passes.kernel.observe import floats_in
from enginewright.passes.recovery.losses import TINY, attention_loss, feature_loss, output_loss, relation_loss
from enginewright.passes.recovery.watching import Pairs, Watch, attention_pairs, block_pairs


class Teacher(BaseModel):
    """Another model to learn from, and the weight of each loss."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str = Field(description="model string, such as hf:FOLDER; it takes the student's inputs")
    output: float = Field(0, ge=0, description="weight of its outputs")
    features: float = Field(0, ge=0, description="weight of its blocks' outputs")
    attention: float = Field(0, ge=0, description="weight of its attention maps")
    relation: float = Field(0, ge=0, description="weight of its token relations")

    def asks(self) -> bool:
        """Whether anything is learned from it."""
        return any((self.output, self.features, self.attention, self.relation))


@dataclass(frozen=True, kw_only=True)
class Guide:
    """A teacher beside a student.

    Args:
        teacher: what is learned, and how much it weighs.
        module: the teacher itself, in evaluation mode.
        features: blocks whose outputs are compared.
        relation: blocks whose tokens' relations are compared.
        attention: attention layers whose maps are compared.
        apart: what could not be laid side by side, by the student's module path, and why.
    """

    teacher: Teacher
    module: nn.Module
    features: Pairs = field(default_factory=dict)
    relation: Pairs = field(default_factory=dict)
    attention: Pairs = field(default_factory=dict)
    apart: Mapping[str, str] = field(default_factory=dict)

    @property
    def aligns(self) -> bool:
        """Whether anything but outputs is compared."""
        return bool(self.features or self.relation or self.attention)

    def watch(self) -> Watch:
        """A watch on the teacher."""
        blocks = {*self.features.values(), *self.relation.values()}
        return Watch(self.module, sorted(blocks), sorted(set(self.attention.values())))

    def losses(
        self, inputs: Inputs, result: list[Tensor], watched: Watch, scale: Tensor | None, *, align: bool
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """The weighted output loss; that of all else, None where nothing else is asked for; the bare output loss.

        Args:
            inputs: one call.
            result: the student's outputs.
            watched: what the student said inside.
            scale: output loss that feature losses are measured by; None: this teacher's.
            align: whether anything but outputs counts.
        """
        with torch.no_grad(), self.watch() as theirs:
            wanted = floats_in(self.module(**inputs))
        bare = (
            output_loss(result, wanted)
            if scale is None or self.teacher.output
            else torch.zeros((), device=result[0].device)
        )
        if not (align and self.aligns):
            return self.teacher.output * bare, None, bare
        parts: list[Tensor] = []
        if self.features:
            ours = [tensor for path in self.features for tensor in watched.results[path]]
            other = [tensor for path in self.features.values() for tensor in theirs.results[path]]
            parts.append(self.teacher.features * feature_loss(ours, other, bare if scale is None else scale))
        if self.attention:
            ours = [tensor for path in self.attention for tensor in watched.maps[path]]
            other = [tensor for path in self.attention.values() for tensor in theirs.maps[path]]
            parts.append(self.teacher.attention * attention_loss(ours, other))
        if self.relation:
            ours = [watched.results[path][0] for path in self.relation]
            other = [theirs.results[path][0] for path in self.relation.values()]
            parts.append(self.teacher.relation * relation_loss(ours, other))
        return self.teacher.output * bare, torch.stack(parts).sum(), bare


def guide(teacher: Teacher, module: nn.Module, student: nn.Module, inputs: Inputs, share: tuple[float, float]) -> Guide:
    """Lay a teacher beside a student, by one call of both.

    Raises:
        ToolchainError: a loss was asked for and nothing of the two can be compared by it.
    """
    blocks = block_pairs(student, module, share) if teacher.features or teacher.relation or teacher.attention else {}
    maps = attention_pairs(student, module, blocks) if teacher.attention else {}
    ours = Watch(student, list(blocks), list(maps))
    theirs = Watch(module, sorted(set(blocks.values())), sorted(set(maps.values())))
    with torch.no_grad():
        with ours:
            result = floats_in(student(**inputs))
        with theirs:
            wanted = floats_in(module(**inputs))
    if teacher.output and shapes(result) != shapes(wanted):
        raise ToolchainError(
            f"{label_of(teacher)} gives outputs {shapes(wanted)}, the student {shapes(result)}",
            help="set its weight of outputs to 0",
        )
    apart: dict[str, str] = {}

    def fitting(loss: str, pairs: Pairs, reason: Callable[[str, str], str]) -> dict[str, str]:
        """The pairs that a loss can compare."""
        if not getattr(teacher, loss):
            return {}
        reasons = {path: reason(path, other) for path, other in pairs.items()}
        apart.update({path: f"{loss}: {why}" for path, why in reasons.items() if why})
        kept = {path: other for path, other in pairs.items() if not reasons[path]}
        if not kept:
            why = next((why for why in reasons.values() if why), "no stack of blocks is in both")
            raise ToolchainError(f"{loss} of the student and of {label_of(teacher)} cannot be compared: {why}")
        return kept

    return Guide(
        teacher=teacher,
        module=module,
        features=fitting(
            "features", blocks, lambda a, b: feature_reason(ours.results.get(a, []), theirs.results.get(b, []))
        ),
        relation=fitting(
            "relation", blocks, lambda a, b: relation_reason(ours.results.get(a, []), theirs.results.get(b, []))
        ),
        attention=fitting("attention", maps, lambda a, b: map_reason(ours.maps.get(a, []), theirs.maps.get(b, []))),
        apart=apart,
    )


def label_of(teacher: Teacher) -> str:
    """What errors call it."""
    return f"teacher {teacher.model!r}" if teacher.model else "the original"


def shapes(tensors: list[Tensor]) -> list[tuple[int, ...]]:
    """Their shapes."""
    return [tuple(tensor.shape) for tensor in tensors]


def feature_reason(ours: list[Tensor], theirs: list[Tensor]) -> str:
    """Why features cannot be compared; empty when they can."""
    if not ours or not theirs:
        return "the inputs never reach it"
    if shapes(ours) != shapes(theirs):
        return f"features are {shapes(ours)} and the teacher's {shapes(theirs)}; relation needs no common width"
    return ""


def relation_reason(ours: list[Tensor], theirs: list[Tensor]) -> str:
    """Why relations cannot be compared; empty when they can."""
    if not ours or not theirs:
        return "the inputs never reach it"
    if ours[0].ndim != 3 or ours[0].shape[:2] != theirs[0].shape[:2]:
        return f"tokens are {tuple(ours[0].shape)} and the teacher's {tuple(theirs[0].shape)}"
    return ""


def map_reason(ours: list[Tensor], theirs: list[Tensor]) -> str:
    """Why maps cannot be compared; empty when they can."""
    if not ours or not theirs:
        return "it does not call scaled_dot_product_attention, so its map cannot be read"
    if [t.shape[2:] for t in ours] != [t.shape[2:] for t in theirs]:
        return f"maps are {shapes(ours)} and the teacher's {shapes(theirs)}"
    return ""


def relative_error(student: Callable[..., object], teacher: Callable[..., object], calls: list[Inputs]) -> float:
    """Root of the mean relative squared error of the student's outputs over these calls."""
    with torch.no_grad():
        if calls and not floats_in(student(**calls[0])):
            raise ToolchainError("the model gives whole numbers alone, from which nothing can be learned by gradients")
        errors = [output_loss(floats_in(student(**call)), floats_in(teacher(**call))) for call in calls]
    return float(torch.stack(errors).mean().clamp(min=TINY**2).sqrt()) if errors else 0.0
