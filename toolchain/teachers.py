"""What a distillation learns from beside the original: another model, or an artifact's optimized one."""

from __future__ import annotations

from torch import nn

from enginewright import artifact, sources
from enginewright.recipe import Recipe


def teacher_of(text: str, recipe: Recipe, *, trust_code: bool = False) -> nn.Module:
    """The module of a model string or of an artifact's folder; paths start at the recipe's folder.

    Args:
        text: the model string or the folder.
        recipe: the recipe that names it.
        trust_code: run the code that an artifact's model is made by.

    Raises:
        ToolchainError: there is no such model; or the artifact or its source is not what it was, or it needs trust.
    """
    folder = recipe.path(text)
    artifact.heal_absent(folder)
    if (folder / "recipe.toml").is_file():
        from enginewright.opened import reopen, replay  # not above: it stands on the pipeline, which hands this on

        return replay(reopen(folder, trust_code=trust_code), folder)
    return sources.load(sources.with_path(text, recipe.folder, lambda path: str(recipe.path(path)))).module
