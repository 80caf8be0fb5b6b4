"""Pull chosen attention heads towards the identity map, by a strength that is an input, for guidance away from that.

Source: Ahn et al. 2025, arXiv:2506.10978 (SoftPAG, equation 7; u = 1 is PAG, arXiv:2403.17377). In joint attention the
blend uses values of the same tokens' stream, so it works on text rows as on image rows (``rows``), where the processors
of diffusers isolate the image's rows alone. Departures: ``pag_u`` has a column for each chosen head only, not for every
head of the model; with ``guidance`` the plain and the perturbed rows are two runs of the batch in one graph, not one of
twice the batch, because then each block before the first chosen head can stand in the graph once, and nothing that
carries no batch need be told apart from what does. Of several networks those run plain and perturbed that a chosen head
reaches, and either run has state tensors of its own.
Checked against cvlab-kaist/HeadHunter at commit 3828d1c: its map of a chosen head, (1-u) A + u I over all tokens of
image and text, put into diffusers' SD3 gives the same prediction to rounding at u = 1 and u = 0.25.
"""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import ClassVar, Literal

from pydantic import Field, ValidationInfo, field_validator
from torch import nn

from enginewright.ground.errors import ToolchainError
from enginewright.ground.facts import FLOAT_WEIGHTS, STATELESS_CALLS, UNBLENDED_ATTENTION, UNMARKED_HEADS, Fact
from enginewright.ground.program import Program
from enginewright.passes.contract import Context, Decision, Facts, NewInput, Pass, Plan
from enginewright.passes.heads.softpag import (
    STRENGTH,
    WEIGHT,
    Perturbation,
    PerturbedHeads,
    blocks_before,
    entries,
    names_of,
)
from enginewright.passes.kernel.audit import without_proof
from enginewright.passes.kernel.heads import on_other_rows, uncut
from enginewright.passes.kernel.selection import check_patterns
from enginewright.passes.kernel.surgery import share
from enginewright.passes.kernel.twofold import Twofold, twofold
from enginewright.passes.networks import (
    called_by,
    each_network,
    given_beside,
    local,
    networks_of,
    place_of,
    program_of,
    taking,
)
from enginewright.passes.traits import HeadedAttention, layer_at, layers_of


class PerturbedFacts(Facts):
    """What an input steers."""

    rows: str = Field(description="tokens that are blended")
    heads: tuple[str, ...] = Field(description="LAYER:HEAD for each column of the strength")
    blocks_before: dict[str, int] = Field(
        {}, description="with guidance, by stack: blocks that run once, because no chosen head comes before their end"
    )


class PerturbHeads(Pass):
    """Blend each chosen head's result with its values; at strength 0, where callers start, nothing changes."""

    intends: ClassVar[str] = "the original with some heads perturbed, where that is baked in"
    by_layer: ClassVar[bool] = False
    requires: ClassVar[tuple[Fact, ...]] = (FLOAT_WEIGHTS, UNMARKED_HEADS, STATELESS_CALLS)
    destroys: ClassVar[tuple[Fact, ...]] = (UNMARKED_HEADS, UNBLENDED_ATTENTION)
    looks_for: ClassVar[str] = "attention layers whose heads can be told apart"
    decisions: ClassVar[tuple[type[Decision], ...]] = (PerturbedHeads,)
    facts: ClassVar[type[Facts]] = PerturbedFacts

    heads: dict[str, tuple[int, ...]] = Field(
        default={"*": ()},
        description="glob pattern of layer paths -> heads, counted from 0; no heads means all of the layer",
    )
    rows: Literal["all", "image"] = Field(
        default="all", description="tokens that are blended where image and text attend together"
    )
    u: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="strength, 0 (none) to 1 (PAG); left out, it is the input pag_u (batch, chosen heads)",
    )
    guidance: bool = Field(
        default=False, description="give e + w (e - e_perturbed) in one call; blocks before the first head run once"
    )
    w: float | None = Field(default=None, description="weight of the guidance; left out, it is the input pag_w (batch)")
    channels: int | None = Field(
        default=None, ge=1, description="leading channels of the output that are guided; left out: all"
    )

    @field_validator("w", "channels")
    @classmethod
    def only_with_guidance(cls, value: float | None, info: ValidationInfo) -> float | None:
        """They say nothing without guidance."""
        if value is not None and not info.data.get("guidance"):
            raise ValueError("it needs guidance = true")
        return value

    def plan(self, model: nn.Module, context: Context) -> Plan[PerturbedHeads]:
        """Find the heads.

        Raises ``ToolchainError`` for a pattern that matches no layer, an absent head, or one that guides nothing.
        """
        layers = dict(layers_of(model, HeadedAttention))
        skipped = uncut(model, layers)
        check_patterns(self.heads, [*layers, *skipped], what="attention layer", setting="heads")
        skipped |= unblended(layers, self.perturbation())
        if self.u is None:
            skipped |= on_other_rows(model, [path for path in layers if path not in skipped], context)
        skipped |= without_proof(model, {path: each for path, each in layers.items() if path not in skipped}, context)
        chosen = {path: self.chosen(path, layer) for path, layer in layers.items() if path not in skipped}
        skipped |= {path: "none of its heads was asked for" for path, heads in chosen.items() if not heads}
        choice = entries(chosen, model)
        facts = PerturbedFacts(rows=self.rows, heads=tuple(names_of(choice)))
        if self.guidance:
            networks_of_both(model, choice, self.perturbation())
            facts = facts.model_copy(update={"blocks_before": blocks_before(model, choice)})
        return Plan(choice=choice, skipped=skipped, facts=facts)

    def rewrite(self, model: nn.Module, plan: Plan[PerturbedHeads]) -> nn.Module:
        """Wrap projections, in place. Raises ``ToolchainError`` when a layer has not the heads of the plan."""
        return perturbed(model, plan, self.perturbation())

    def new_inputs(self, plan: Plan[PerturbedHeads]) -> tuple[NewInput, ...]:
        """``pag_u`` and ``pag_w``, as far as they are not baked in."""
        return self.perturbation().inputs(len(names_of(plan.choice)))

    def intended(self, model: nn.Module, plan: Plan[PerturbedHeads], context: Context) -> nn.Module:
        """The original, perturbed as far as that is baked in: what an input steers is as it was."""
        return perturbed_reference(model, plan, self.perturbation())

    def perturbation(self) -> Perturbation:
        """What becomes of the chosen heads."""
        return Perturbation(rows=self.rows, u=self.u, guidance=self.guidance, w=self.w, channels=self.channels)

    def chosen(self, path: str, layer: HeadedAttention) -> set[int]:
        """The heads of a layer that were asked for."""
        found: set[int] = set()
        for pattern, heads in self.heads.items():
            if fnmatchcase(path, pattern):
                if beyond := [head for head in heads if not 0 <= head < layer.heads]:
                    raise ToolchainError(
                        f"heads {pattern!r} asks for head {beyond[0]}; this layer has 0 to {layer.heads - 1}",
                        where=path,
                    )
                found |= set(heads or range(layer.heads))
        return found


def unblended(layers: Mapping[str, HeadedAttention], how: Perturbation) -> dict[str, str]:
    """Layers whose heads can be told apart but not blended, and why."""
    reasons = {}
    for path, layer in layers.items():
        if not layer.streams:
            reasons[path] = "its values are of other tokens than its queries, so it has no identity map"
        elif not how.streams(layer):
            reasons[path] = "its image and text are one row of tokens, which rows = 'image' cannot tell apart"
    return reasons


def perturbed_reference(original: nn.Module, plan: Plan[PerturbedHeads], how: Perturbation) -> nn.Module:
    """The original with these heads perturbed for good; itself where calls say how much, or its heads are others."""
    if how.u is None or (how.guidance and how.w is None):
        return original
    layers = dict(layers_of(original, HeadedAttention))
    if any(path not in layers or layers[path].heads != chosen.of for path, chosen in plan.choice.items()):
        return original
    return perturbed(share(original), plan, how)


def perturbed(model: nn.Module, plan: Plan[PerturbedHeads], how: Perturbation) -> nn.Module:
    """Carry a plan out, in place."""
    for path, chosen in plan.choice.items():
        found = layer_at(model, path, HeadedAttention).heads
        if found != chosen.of:
            raise ToolchainError(f"the plan is for a layer of {chosen.of} heads; this one has {found}", where=path)
    parts, program = networks_of_both(model, plan.choice, how)
    names = [each.name for each in how.inputs(len(names_of(plan.choice)))]
    own = {name: local(plan.choice, place_of(model, name)) for name in networks_of(model)}

    def added(name: str) -> list[str]:
        reads = {STRENGTH: bool(own[name]), WEIGHT: name in parts and parts[name].ends}
        return given_beside(program, name, names, [each for each in names if reads[each]])

    each_network(model, lambda net, name: how.put_into(net, own[name], added(name), parts.get(name)))
    return called_by(model, taking(program, {name: added(name) for name in own}))


def networks_of_both(
    model: nn.Module, choice: Mapping[str, PerturbedHeads], how: Perturbation
) -> tuple[dict[str, Twofold], Program]:
    """The networks that run plain and perturbed for guidance, and how they are then called.

    Raises ``ToolchainError`` as ``twofold`` does.
    """
    program = program_of(model)
    if not how.guidance:
        return {}, program
    begins = [name for name in program.networks if local(choice, place_of(model, name))]
    return twofold(program, begins, what="a perturbed head")
