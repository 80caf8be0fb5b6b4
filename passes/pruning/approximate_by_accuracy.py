"""Leave out what a score says the model does better, or no worse, without: layers first, then their parts.

Source: AxFormer, Nagarajan et al. 2020, arXiv:2010.03688, and its release's script for GLUE: hard attention from the
first layer to the last; then from the last layer to the first its feed-forward and then its attention, each as a whole
and, if that fails narrowly, its heads or groups of 256 hidden units one at a time. With ``losses`` both its tests hold:
the mean loss is below the best so far, and more than a quota of samples lose no more than with the original.
Departures: a ``score`` is one number, so the second test falls away and equality is enough; how narrowly a layer may
fail is then told in the score's own unit; what goes is cut out, not masked, so that each trial is the model that
ships; a layer keeps its last part unless it goes as a whole.
Checked against amrnag/Specialized-Transformers at commit fa673a9: order, both tests and the gate of 1.1 are its
script's; a BERT whose heads, groups or whole layers it would mask gives what the cut one gives, and hard attention
keeps the same probabilities, to rounding.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

from pydantic import Field
from torch import Tensor, nn

from enginewright.ground.errors import ToolchainError
from enginewright.ground.facts import FLOAT_WEIGHTS, FREE_WEIGHTS, Fact
from enginewright.passes.contract import SCORE_HELP, Context, Decision, Facts, Json, Losses, Pass, Plan, Score
from enginewright.passes.kernel.audit import unproven
from enginewright.passes.kernel.digits import six_digits
from enginewright.passes.kernel.observe import evaluating
from enginewright.passes.kernel.selection import check_patterns, excluded_by
from enginewright.passes.kernel.surgery import share
from enginewright.passes.pruning.elements import CutLayer, Element, carry_out, elements_of
from enginewright.passes.traits import FixedAttention, layers_of


class SearchFacts(Facts):
    """Every evaluation of a search."""

    start: float | None = Field(None, description="what the model reached before")
    best: float | None = Field(None, description="what it reached at best")
    trials: tuple[dict[str, Json], ...] = Field(description="in order: what was left out, and what the judge said")


class ApproximateByAccuracy(Pass):
    """Try to leave out each feed-forward, attention and part of them; keep what the score allows."""

    by_layer: ClassVar[bool] = False
    requires: ClassVar[tuple[Fact, ...]] = (FLOAT_WEIGHTS, FREE_WEIGHTS)

    functions: ClassVar[tuple[str, ...]] = ("score", "losses")
    looks_for: ClassVar[str] = "feed-forwards and attention layers that a family knows"
    decisions: ClassVar[tuple[type[Decision], ...]] = (CutLayer,)
    facts: ClassVar[type[Facts]] = SearchFacts

    score: str = Field("", description="what a trial is judged by, one number, higher is better: FILE.py:FUNCTION")
    losses: str = Field(
        "", description="FILE.py:FUNCTION that gives a loss for each sample; judges in the score's place"
    )
    tolerance: float = Field(
        0.0, ge=0, description="how far below the best score so far (or above the best mean loss) a trial may end"
    )
    gate: float = Field(
        0.1,
        ge=0,
        description="a layer's parts are tried where the whole costs less than this: a fraction of the best mean loss, "
        "or of the best score, taken as 1 where it is smaller",
    )
    quota: float = Field(0.5, ge=0, lt=1, description="for losses: more than this share of samples must not get worse")
    group: int = Field(256, ge=1, description="hidden units in one part of a feed-forward")
    hard_attention: int = Field(0, ge=0, description="try attention with so many probabilities a query; 0: do not")
    exclude: tuple[str, ...] = Field((), description="glob patterns of layer paths left alone")

    def plan(self, model: nn.Module, context: Context) -> Plan[CutLayer]:
        """Search; each trial is a copy around the same tensors. Every evaluation is in the plan's facts.

        Raises ``ToolchainError`` for weights without values, a value that is not finite, and an ``exclude`` pattern
        that matches no layer.
        """
        everything = elements_of(model)
        check_patterns(self.exclude, [element.path for element in everything], what="layer")
        skipped = {path: fixed.reason for path, fixed in layers_of(model, FixedAttention)}
        skipped |= {e.path: reason for e in everything if (reason := excluded_by(e.path, self.exclude))}
        skipped |= unproven(model, {e.path for e in everything if e.path not in skipped}, context)
        elements = [element for element in everything if element.path not in skipped]
        if not elements:
            return Plan(choice={}, skipped=skipped, facts=SearchFacts(trials=()))
        if where := next((name for name, parameter in model.named_parameters() if parameter.is_meta), None):
            raise ToolchainError(
                f"{self.name()} must run the model, and its weights are on the meta device, which holds no values",
                where=where,
                help="load the model's weights before planning, or replay a plan that was made with them",
            )
        search = Search(model, self.judge(context), context)
        self.search(search, elements)
        skipped |= {e.key: "the model does worse without any of it" for e in elements if e.key not in search.choice}
        facts = SearchFacts(start=search.judge.start, best=search.judge.best, trials=tuple(search.trials))
        return Plan(choice=search.choice, skipped=skipped, facts=facts)

    def refuse_incomplete(self) -> None:
        """A judge is needed that something left out can leave as good as it was."""
        if not (self.score or self.losses):
            raise ToolchainError(
                f"{self.name()} needs a score, or losses: what the model must stay as good at",
                where="score",
                help=SCORE_HELP,
            )
        if self.score == "fidelity" and not (self.losses or self.tolerance):
            raise ToolchainError(
                f"{self.name()} by score = fidelity with tolerance = 0 can leave nothing out: nothing is closer to the "
                "original than the original",
                where="tolerance",
                help=f"give a tolerance above 0, or another score: {SCORE_HELP}",
            )

    def rewrite(self, model: nn.Module, plan: Plan[CutLayer]) -> nn.Module:
        """Cut, in place."""
        return carry_out(model, plan.choice)

    def judge(self, context: Context) -> Judge:
        """By losses where they are given, else by the score."""
        if self.losses:
            return LossJudge(context.losses_of(self.losses), self.tolerance, self.gate, self.quota)
        return ScoreJudge(context.score_of(self.score), self.tolerance, self.gate)

    def search(self, search: Search, elements: list[Element]) -> None:
        """The paper's order."""
        attention = [element for element in reversed(elements) if element.kind == "attention"]
        steps = (len(attention) if self.hard_attention else 0) + len(elements)
        for element in attention if self.hard_attention else ():
            search.step(steps, f"hard attention in {element.path}")
            search.attempt(element, "hard", hard=self.hard_attention)
        for element in elements:
            search.step(steps, f"without {element.path}")
            if search.attempt(element, "whole", whole=True, removed=(), hard=0) in (
                "worse, narrowly",
                "cannot",
            ):
                for part in element.parts(self.group):
                    removed = (*search.found(element).removed, *part)
                    if len(removed) < element.of:
                        search.attempt(element, f"{part[0]}-{part[-1]}", removed=removed)


@dataclass(kw_only=True)
class Trial:
    """What a judge says of a model: ``kept``, ``worse, narrowly`` or ``worse``, and what it found."""

    verdict: str
    found: dict[str, Any]


@dataclass
class ScoreJudge:
    """One number, higher is better: kept at the best so far less a tolerance."""

    score: Score
    tolerance: float
    gate: float
    start: float = math.nan
    best: float = math.nan

    def begin(self, model: nn.Module) -> None:
        """What the untouched model reaches."""
        self.start = self.best = number(self.score(model))

    def __call__(self, model: nn.Module) -> Trial:
        """Judge a trial, and remember the best that was kept."""
        found, best = number(self.score(model)), self.best
        if found >= best - self.tolerance:
            self.best = max(best, found)
            return Trial(verdict="kept", found={"score": found})
        narrowly = found >= best - self.gate * max(abs(best), 1)
        return Trial(verdict="worse, narrowly" if narrowly else "worse", found={"score": found})


@dataclass
class LossJudge:
    """A loss for each sample: kept when the mean falls below the best so far and enough samples are no worse."""

    losses: Losses
    tolerance: float
    gate: float
    quota: float
    baseline: Tensor = field(init=False)
    start: float = math.nan
    best: float = math.nan

    def begin(self, model: nn.Module) -> None:
        """What the untouched model loses."""
        self.baseline = self.losses(model)
        self.start = self.best = number(float(self.baseline.mean()))

    def __call__(self, model: nn.Module) -> Trial:
        """Judge a trial, and remember the best that was kept."""
        losses = self.losses(model)
        mean, unharmed = number(float(losses.mean())), int((losses <= self.baseline).sum())
        found = {"loss": mean, "no_worse": unharmed}
        if mean < self.best + self.tolerance and unharmed > self.quota * len(losses):
            self.best = min(self.best, mean)
            return Trial(verdict="kept", found=found)
        return Trial(verdict="worse, narrowly" if mean < (1 + self.gate) * self.best else "worse", found=found)


Judge = ScoreJudge | LossJudge


def number(value: float) -> float:
    """A value to 6 significant digits, so that the last bits of another machine decide nothing."""
    if not math.isfinite(value):
        raise ToolchainError(f"a trial's value is not finite: {value}")
    return six_digits(value)


class Search:
    """What has been left out so far, and every trial on the way."""

    def __init__(self, model: nn.Module, judge: Judge, context: Context) -> None:
        self.model, self.judge, self.context = model, judge, context
        self.choice: dict[str, CutLayer] = {}
        self.trials: list[dict[str, Any]] = []
        self.done = 0
        with evaluating(model):
            judge.begin(model)

    def step(self, of: int, text: str) -> None:
        """Tell how far the search is."""
        self.context.say(self.done, of, text)
        self.done += 1

    def found(self, element: Element) -> CutLayer:
        """What is left out of an element so far."""
        return self.choice.get(element.key, element.untouched())

    def attempt(self, element: Element, what: str, **change: Any) -> str:
        """Judge the model with one more change, and keep it if that is no loss; the verdict.

        A layer that cannot be taken out whole is tried in parts.
        """
        choice = {**self.choice, element.key: self.found(element).model_copy(update=change)}
        log: dict[str, Any] = {"path": element.path, "what": what}
        try:
            candidate = carry_out(share(self.model), choice)
        except ToolchainError as refused:
            self.trials.append({**log, "verdict": "cannot", "refused": refused.message})
            return "cannot"
        with evaluating(candidate):
            trial = self.judge(candidate)
        self.trials.append({**log, "verdict": trial.verdict, **trial.found})
        if trial.verdict == "kept":
            self.choice = choice
        return trial.verdict
