"""Code that a recipe names: what runs it when an artifact is opened, and what it takes to allow that.

Digests are no protection: whoever made an artifact wrote them too. So nothing that an artifact brings or names is run
because it is opened, an engine of native code as little as a Python file; the user says ``--trust-code``, or
``trust_code=True`` in Python. An engine that was just built is the user's own. A recipe that the user hands to
``run`` is the user's own act, and so is a model string on the command line: they run what they name.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from enginewright import sources
from enginewright.ground.errors import ToolchainError

if TYPE_CHECKING:
    from enginewright.recipe import Recipe, TargetStep

HELP = "if you trust it: --trust-code, or trust_code=True in Python"

NO_CODE = ("onnx", "pt2")
"""Sources that never run anything, whatever a recipe trusts."""


def model_code(recipe: Recipe) -> list[str]:
    """What loading a recipe's model runs, beside our own code and installed libraries."""
    model, prefix = recipe.model, recipe.head.model.partition(":")[0]
    if prefix == "py":
        return [model.removeprefix("py:")]
    if recipe.head.trust_remote_code and prefix in sources.prefixes() and prefix not in NO_CODE:
        return [f"what {model!r} brings along (trust_remote_code = true)"]
    return []


def recipe_code(recipe: Recipe) -> list[str]:
    """What running a recipe runs: its model's code, and what its steps name, such as scores and teachers."""
    named = (text for step in recipe.steps for text in texts_in(step.model_dump(mode="json")) if ".py:" in text)
    return list(dict.fromkeys([*model_code(recipe), *(str(recipe.path(text.removeprefix("py:"))) for text in named)]))


def texts_in(value: Any) -> Iterator[str]:
    """Every text of a nested value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list | tuple):
        for each in value.values() if isinstance(value, dict) else value:
            yield from texts_in(each)


def engine_untrusted(step: TargetStep, *, trusted: bool) -> ToolchainError | None:
    """The error for an artifact's engine that is code, where the user did not say that it may run."""
    if trusted or not step.target.runs_code:
        return None
    return ToolchainError(
        f"{step.name} is native code that the artifact brings, and loading it would run that",
        help=HELP,
    )


def refuse_untrusted(recipe: Recipe, *, trusted: bool) -> None:
    """Raise where an artifact's model cannot be had without running code, and the user did not say that it may."""
    if (found := model_code(recipe)) and not trusted:
        raise ToolchainError(
            f"the artifact names code that opening it would run: {', '.join(found)}",
            where=str(recipe.folder / "recipe.toml"),
            help=HELP,
        )
