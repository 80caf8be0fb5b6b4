"""HeadHunter: choose attention heads one round after another by what a score says of the model without or beside them.

Source: Ahn et al. 2025, arXiv:2506.10978: from an empty set, each round tries the set with each head that is left and
adds the k best. Departures: the score is any function of the model (theirs: a reward on M sampled images, M being the
score's own affair); ``candidates`` can bound a round to heads drawn at random; ``prune`` runs the same search with the
heads taken out. A search costs as many scores as it tries heads; with ``log`` it can be stopped and goes on.
Checked against cvlab-kaist/HeadHunter at commit 3828d1c by reading its search: every head that is left is tried beside
those chosen before, its samples' mean score counts, and the k best join; it searches at u = 1 and without
classifier-free guidance, where the paper's u of 0.25 is the default here.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import nn

from enginewright.ground.errors import ToolchainError
from enginewright.ground.facts import FLOAT_WEIGHTS, UNMARKED_HEADS, Fact
from enginewright.passes.contract import (
    SCORE_HELP,
    Context,
    Decision,
    Facts,
    Json,
    NewInput,
    Pass,
    Plan,
    Score,
    digest_of,
)
from enginewright.passes.heads.perturb_heads import perturbed, perturbed_reference, unblended
from enginewright.passes.heads.search_log import SearchLog
from enginewright.passes.heads.softpag import Perturbation, PerturbedHeads, entries, names_of
from enginewright.passes.kernel.audit import without_proof
from enginewright.passes.kernel.digits import six_digits
from enginewright.passes.kernel.heads import KeptHeads, held_in_state, keep_heads, on_other_rows, uncut
from enginewright.passes.kernel.selection import check_patterns
from enginewright.passes.kernel.surgery import share
from enginewright.passes.traits import HeadedAttention, layers_of

Head = tuple[str, int]
"""Path of a layer, and one of its heads."""


class ChosenFacts(Facts):
    """What a search saw."""

    score: str = Field(description="that was to rise")
    mode: str = Field(description="what is done to the chosen heads")
    chosen: tuple[str, ...] = Field(description="LAYER:HEAD, in the order they were found")
    before: float = Field(description="the score with none")
    after: float = Field(description="the score with all")
    rounds: tuple[dict[str, Json], ...] = Field(description="the scores of the heads tried, and which were added")
    heads: tuple[str, ...] = Field((), description="LAYER:HEAD for each column of the strength")


class SelectHeads(Pass):
    """Perturb or remove the heads that a score is best with, found by greedy search."""

    intends: ClassVar[str] = "the original with some heads perturbed, where that is baked in"
    by_layer: ClassVar[bool] = False
    requires: ClassVar[tuple[Fact, ...]] = (FLOAT_WEIGHTS, UNMARKED_HEADS)
    destroys: ClassVar[tuple[Fact, ...]] = (UNMARKED_HEADS,)

    functions: ClassVar[tuple[str, ...]] = ("score",)
    looks_for: ClassVar[str] = "attention layers whose heads can be told apart"
    decisions: ClassVar[tuple[type[Decision], ...]] = (PerturbedHeads, KeptHeads)
    facts: ClassVar[type[Facts]] = ChosenFacts

    score: str = Field(
        default="",
        description="what to raise: a metric of samples, FILE.py:FUNCTION; for mode = prune also fidelity, which it "
        "is there when left out",
    )
    mode: Literal["perturb", "prune"] = Field(default="perturb", description="what is done to the chosen heads")
    rounds: int = Field(default=1, ge=1, description="rounds of the search (the paper's R)")
    heads_per_round: int = Field(default=1, ge=1, description="heads that each round adds (the paper's k)")
    candidates: int | None = Field(
        default=None, ge=1, description="heads tried in a round, drawn at random from those left; left out: all"
    )
    layers: tuple[str, ...] = Field(default=("*",), description="glob patterns of layer paths to choose from")
    u: float = Field(default=0.25, ge=0, le=1, description="strength while searching")
    guidance: bool = Field(default=True, description="perturb: score e + w (e - e_perturbed), not e_perturbed itself")
    w: float = Field(default=3.0, description="weight of the guidance while searching")
    channels: int | None = Field(default=None, ge=1, description="leading channels that are guided; left out: all")
    rows: Literal["all", "image"] = Field(default="all", description="tokens that are blended, image and text or image")
    baked: bool = Field(default=False, description="bake u and w into the result; else they are inputs, 0 at first")
    seed: int = Field(default=0, ge=0, description="of the candidates' draw, added to the recipe's")
    log: str | None = Field(default=None, description="JSON-lines file; a search that was stopped goes on from it")

    def plan(self, model: nn.Module, context: Context) -> Plan:
        """Search.

        Raises:
            ToolchainError: a pattern without a layer, fewer heads than are asked for, a score that is unknown or gives
                no finite number, or a log of another search.
        """
        layers = dict(layers_of(model, HeadedAttention))
        skipped = uncut(model, layers)
        check_patterns(self.layers, [*layers, *skipped], what="attention layer", setting="layers")
        skipped |= self.left_out({path: layer for path, layer in layers.items() if path not in skipped})
        if self.mode == "prune":
            skipped |= held_in_state(model, layers)
        elif not self.baked:
            skipped |= on_other_rows(model, [path for path in layers if path not in skipped], context)
        skipped |= without_proof(model, {path: each for path, each in layers.items() if path not in skipped}, context)
        pool = {path: layer.heads for path, layer in layers.items() if path not in skipped}
        self.check_enough(pool)
        log = SearchLog(
            context.folder / self.log if self.log else None, self.search(model, context) if self.log else ""
        )
        chosen, seen = self.searched(model, pool, context, log)
        choice = self.choice(chosen, model)
        skipped |= {path: "none of its heads was chosen" for path in pool if path not in choice}
        facts = ChosenFacts(score=self.judge, mode=self.mode, chosen=tuple(map(name_of, chosen)), **seen)
        if self.mode == "perturb":
            facts = facts.model_copy(update={"heads": tuple(names_of(choice))})
        return Plan(choice=choice, skipped=skipped, facts=facts)

    @property
    def judge(self) -> str:
        """The score's name."""
        return self.score or ("fidelity" if self.mode == "prune" else "")

    def refuse_incomplete(self) -> None:
        """Perturbing wants a score that can rise: closeness to the plain model is what it is meant to leave."""
        if self.mode == "perturb" and self.score in ("", "fidelity"):
            said = "none is given" if not self.score else "fidelity is best where a perturbation does least"
            raise ToolchainError(
                f"{self.name()} with mode = perturb needs a score of what guidance is to raise; {said}",
                where="score",
                help=SCORE_HELP,
            )

    def moved(self, path: Callable[[str], str], model: Callable[[str], str]) -> SelectHeads:
        """This pass as a recipe in another folder names its files and models."""
        here = super().moved(path, model)
        return here.model_copy(update={"log": path(self.log)}) if self.log else here

    def rewrite(self, model: nn.Module, plan: Plan) -> nn.Module:
        """Perturb or prune, in place. Raises ``ToolchainError`` when a layer has not the heads of the plan."""
        return self.carried_out(model, plan, baked=self.baked)

    def new_inputs(self, plan: Plan) -> tuple[NewInput, ...]:
        """``pag_u`` and ``pag_w``, unless heads are pruned or the two are baked in."""
        if self.mode == "prune":
            return ()
        return self.perturbation(baked=self.baked).inputs(len(names_of(plan.choice)))

    def intended(self, model: nn.Module, plan: Plan, context: Context) -> nn.Module:
        """The original, perturbed where that is baked in; pruned heads are what the original is to be missed by."""
        if self.mode == "prune":
            return model
        return perturbed_reference(model, plan, self.perturbation(baked=self.baked))

    def carried_out(self, model: nn.Module, plan: Plan, *, baked: bool) -> nn.Module:
        """The model with the chosen heads perturbed or gone."""
        if self.mode == "prune":
            return keep_heads(model, plan.choice)
        return perturbed(model, plan, self.perturbation(baked=baked))

    def perturbation(self, *, baked: bool) -> Perturbation:
        """What becomes of the chosen heads; while searching, strength and weight are fixed."""
        return Perturbation(
            rows=self.rows,
            u=self.u if baked else None,
            guidance=self.guidance,
            w=self.w if baked else None,
            channels=self.channels,
        )

    def left_out(self, layers: Mapping[str, HeadedAttention]) -> dict[str, str]:
        """Layers that are not searched, and why."""
        reasons = unblended(layers, self.perturbation(baked=True)) if self.mode == "perturb" else {}
        for path, layer in layers.items():
            if not any(fnmatchcase(path, pattern) for pattern in self.layers):
                reasons[path] = "it is not among the layers to choose from"
            elif self.mode == "prune" and layer.heads == 1:
                reasons[path] = "has one head only"
        return reasons

    def check_enough(self, pool: Mapping[str, int]) -> None:
        """Refuse to look for more heads than there are; of those that are pruned, one stays in each layer."""
        wanted = self.rounds * self.heads_per_round
        if self.candidates is not None and self.candidates < self.heads_per_round:
            raise ToolchainError(f"a round cannot add {self.heads_per_round} of {self.candidates} candidates")
        there = sum(heads - (self.mode == "prune") for heads in pool.values())
        if wanted > there:
            raise ToolchainError(
                f"{self.rounds} rounds of {self.heads_per_round} heads are {wanted}; there are {there} to choose from",
                help="take fewer, or more layers",
            )

    def search(self, model: nn.Module, context: Context) -> str:
        """What tells this search from another: settings, seed, and the model with its weights."""
        content = {
            # A recipe that moved to another folder names the same function by another path.
            "settings": self.model_dump(mode="json", exclude={"log", "baked"}) | {"score": Path(self.judge).name},
            "seed": context.seed,
            "tensors": {name: digest_of(tensor) for name, tensor in model.state_dict().items()},
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def searched(
        self, model: nn.Module, pool: Mapping[str, int], context: Context, log: SearchLog
    ) -> tuple[list[Head], dict[str, Json]]:
        """The heads that were chosen, and what the search saw: scores before and after, and of every head tried."""
        score = context.score_of(self.judge)
        heads = sum(pool.values())
        tries = [min(heads - i * self.heads_per_round, self.candidates or heads) for i in range(self.rounds)]
        done, total = 0, sum(tries) + 2

        def scored(chosen: Sequence[Head]) -> float:
            nonlocal done
            value = self.scored(model, chosen, score, log)
            done += 1
            context.say(done, total, f"scoring heads: {value:.6g} with {len(chosen)} chosen")
            return value

        chosen: list[Head] = []
        before, rounds = scored(chosen), []
        for number in range(self.rounds):
            drawn = self.drawn(pool, chosen, context.seed + self.seed + number)
            scores = {head: scored([*chosen, head]) for head in drawn}
            added = self.best(scores, pool, chosen)
            rounds.append({"tried": {name_of(head): scores[head] for head in drawn}, "added": [*map(name_of, added)]})
            chosen += added
        return chosen, {"before": before, "after": scored(chosen), "rounds": rounds}

    def scored(self, model: nn.Module, chosen: Sequence[Head], score: Score, log: SearchLog) -> float:
        """The score with these heads perturbed or gone, to 6 significant digits; from the log where it is there."""
        of = " ".join(sorted(map(name_of, chosen)))
        if of not in log.scores:
            plan = Plan(choice=self.choice(chosen, model))
            value = score(self.carried_out(share(model), plan, baked=True) if chosen else model)
            if not math.isfinite(value):
                raise ToolchainError(f"score {self.judge!r} gave {value}", where=of or "the model as it is")
            log.add(of, six_digits(value))
        return log.scores[of]

    def drawn(self, pool: Mapping[str, int], chosen: Sequence[Head], seed: int) -> list[Head]:
        """The heads that a round tries, in the model's order."""
        left = [(path, head) for path, heads in pool.items() for head in range(heads) if (path, head) not in chosen]
        left = [head for head in left if self.may_go(head, pool, chosen)]
        if self.candidates is None or self.candidates >= len(left):
            return left
        order = torch.randperm(len(left), generator=torch.Generator().manual_seed(seed)).tolist()
        return [left[i] for i in sorted(order[: self.candidates])]

    def best(self, scores: Mapping[Head, float], pool: Mapping[str, int], chosen: Sequence[Head]) -> list[Head]:
        """The heads that a round adds: the highest scores; of equal ones, the first in the model."""
        added: list[Head] = []
        for head in sorted(scores, key=lambda head: -scores[head]):
            if len(added) < self.heads_per_round and self.may_go(head, pool, [*chosen, *added]):
                added.append(head)
        return added

    def may_go(self, head: Head, pool: Mapping[str, int], chosen: Sequence[Head]) -> bool:
        """Whether a head may join those chosen: one that is not pruned stays in every layer."""
        return self.mode == "perturb" or sum(path == head[0] for path, _ in chosen) < pool[head[0]] - 1

    def choice(self, chosen: Sequence[Head], model: nn.Module) -> dict[str, Json]:
        """The plan's entries for these heads, as ``perturb_heads`` or ``prune_heads`` has them."""
        by_layer: dict[str, set[int]] = {}
        for path, head in chosen:
            by_layer.setdefault(path, set()).add(head)
        if self.mode == "perturb":
            return entries(by_layer, model)
        return {
            path: KeptHeads(
                kept=tuple(sorted(set(range(layer.heads)) - by_layer[path])),
                removed=tuple(sorted(by_layer[path])),
                of=layer.heads,
            )
            for path, layer in layers_of(model, HeadedAttention)
            if path in by_layer
        }


def name_of(head: Head) -> str:
    """``LAYER:HEAD``."""
    return f"{head[0]}:{head[1]}"
