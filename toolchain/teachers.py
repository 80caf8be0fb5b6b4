"""What a distillation learns from beside the original: another model, or an artifact's optimized one."""

from __future__ import annotations

from torch import nn

from toolchain import sources
from toolchain.progress import Progress
from toolchain.recipe import Recipe, read


def teacher_of(text: str, recipe: Recipe) -> nn.Module:
    """The module of a model string or of an artifact's folder; paths start at the recipe's folder.

    Raises:
        ToolchainError: there is no such model, or the artifact is damaged.
    """
    folder = recipe.path(text)
    if (folder / "recipe.toml").is_file():
        from toolchain.opened import replay  # not above: it stands on the pipeline, which hands this function on
        from toolchain.pipeline import Run

        return replay(Run(read(folder / "recipe.toml"), Progress(quiet=True)), folder)
    return sources.load(sources.with_path(text, recipe.folder, lambda path: str(recipe.path(path)))).module
