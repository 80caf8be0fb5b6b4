"""What moves along a recipe: the model as the steps made it, and the two models that it is held against."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import nn

from enginewright import calibration, scoring, teachers
from enginewright.added import intended_by
from enginewright.ground.signature import Signature
from enginewright.passes.contract import Context, Inputs, Pass, Result, in_rows, without
from enginewright.passes.kernel.surgery import share
from enginewright.progress import Progress
from enginewright.recipe import Recipe
from enginewright.scratch import Scratch
from enginewright.sources.contract import Model
from enginewright.validation.inputs import draw


@dataclass(frozen=True, kw_only=True)
class State:
    """A model between two steps, with all that the next step may look at.

    Args:
        module: as the steps so far have made it.
        original: the untouched model.
        intended: what the steps so far mean to compute, in exact form: what the next ones learn from and are judged by.
        context: what passes may look at, for ``module`` and ``intended``.
        intents: names of the steps that changed what is intended.
    """

    module: nn.Module
    original: Model
    intended: Model
    context: Context
    intents: tuple[str, ...] = field(default=())

    def then(self, step: Pass, recipe: Recipe) -> tuple[State, Result]:
        """Take a step: the state after it, and what it did."""
        result = step.apply(self.module, self.context)
        intended = intended_by(self.intended, step, result.plan, self.context)
        changed = intended.module is not self.intended.module
        gone = step.removed_inputs(result.plan)
        context = in_rows(without(self.context, gone), step.rows_together(result.plan))
        teacher_of = context.teacher_of

        def called_alike(text: str) -> nn.Module:
            """Another model to learn from, which is called as the student is."""
            return step.intended(teacher_of(text), result.plan, context) if gone else teacher_of(text)

        after = State(
            module=result.model,
            original=self.original,
            intended=intended,
            context=replace(
                context,
                original=intended.module,
                signature=Signature(intended.inputs),
                score_of=lambda text: scoring.score_of(text, intended, recipe, context.calibration),
                teacher_of=called_alike,
            ),
            intents=(*self.intents, step.name()) if changed else self.intents,
        )
        return after, result


def example_of(model: Model, seed: int, **sizes: int) -> Inputs:
    """One call of a model; dynamic dimensions at the sizes given, else typical."""
    return {name: torch.from_numpy(array) for name, array in draw(model.inputs, seed=seed, sizes=sizes).items()}


def first_state(
    recipe: Recipe, model: Model, *, progress: Progress, trust_code: bool, scratch: Path | None = None
) -> State:
    """The state before the first step: a copy that shares the original's weights.

    Args:
        recipe: says how calls are made, and where files start.
        model: the untouched original.
        progress: told how far a step is.
        trust_code: whether artifacts that the recipe names may run the code of their models.
        scratch: a folder for new weights on their way; None keeps them in memory.
    """
    calls = calibration.inputs(recipe, model) if recipe.steps else []
    context = replace(
        knowing_teachers(recipe, trust_code=trust_code),
        calibration=calls,
        example=example_of(model, recipe.head.seed, batch=1),
        seed=recipe.head.seed,
        original=model.module,
        score_of=lambda text: scoring.score_of(text, model, recipe, calls),
        losses_of=lambda text: scoring.losses_of(text, recipe.folder),
        say=progress.count,
        draw=calibration.drawn_by(recipe, model),
        calls_in=lambda text: calibration.calls_in(recipe.path(text), model.inputs),
        signature=Signature(model.inputs),
    )
    if scratch:
        context = replace(context, offload=Scratch(scratch).offload)
    module = share(model.module) if recipe.steps else model.module
    return State(module=module, original=model, intended=model, context=context)


def knowing_teachers(recipe: Recipe, *, trust_code: bool) -> Context:
    """A context that finds other models, and no more."""
    return Context(
        teacher_of=lambda text: teachers.teacher_of(text, recipe, trust_code=trust_code), folder=recipe.folder
    )
