"""What there is: models, pipelines, passes, targets and the rest; found as files, listed without importing any.

Other installed packages add to it by entry points (``ground/plugins.py``); a name of ours stays ours.

There is no list to edit: a file in the right folder is an entry, its name is the entry's name, and the first line of
its docstring is the summary. Of a model in several files, in a folder of its own, each that says what its network takes
is an entry, ``FOLDER-FILE``; its ``job.py``, where there is one, makes them a pipeline called ``FOLDER``.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from enginewright.ground import plugins
from enginewright.ground.errors import unknown

if TYPE_CHECKING:
    from enginewright.passes.contract import Pass
    from enginewright.targets.contract import Target

ROOMS = (
    "enginewright.passes",
    "enginewright.targets",
    "enginewright.validation",
    "enginewright.reports",
    "enginewright",
)
"""Packages that entries lie in, the innermost first; each is a folder of its own."""
KINDS = ("models", "pipelines", "methods", "sources", "passes", "targets", "metrics", "recipes")


def folder_of(package: str) -> Path:
    """Where a package of ours lies; it is not imported."""
    spec = importlib.util.find_spec(package)
    assert spec is not None
    assert spec.submodule_search_locations is not None
    return Path(next(iter(spec.submodule_search_locations))).resolve()


@dataclass(frozen=True)
class Entry:
    """One thing in the catalogue."""

    kind: str
    name: str
    path: Path
    added: str = ""
    """Dotted name of its module, where another package adds it."""

    @property
    def module(self) -> str:
        """Dotted name of its module."""
        if self.added:
            return self.added
        room = next(name for name in ROOMS if self.path.is_relative_to(folder_of(name)))
        return ".".join((room, *self.path.relative_to(folder_of(room)).with_suffix("").parts))

    @property
    def docstring(self) -> str:
        """Its whole docstring, a recipe's leading comment, or a method's title."""
        text = self.path.read_text()
        if self.kind == "methods":
            return str(tomllib.loads(text)["title"])
        if self.path.suffix == ".toml":
            lines = text.splitlines()
            end = next((i for i, line in enumerate(lines) if not line.startswith("#")), len(lines))
            return "\n".join(line.removeprefix("#").strip() for line in lines[:end])
        return ast.get_docstring(ast.parse(text)) or ""

    @property
    def summary(self) -> str:
        """First line of the docstring."""
        return self.docstring.partition("\n")[0]


def entries(kind: str) -> dict[str, Entry]:
    """Everything of one kind, by name, in alphabetical order."""
    named = {
        "models": lambda: model_files(folder_of("enginewright") / "models"),
        "pipelines": lambda: {
            path.parent.name: path for path in (folder_of("enginewright") / "models").glob("*/*/job.py")
        },
        "methods": lambda: by_name((folder_of("enginewright.reports") / "methods").glob("*.toml")),
        "sources": lambda: by_name((folder_of("enginewright") / "sources").glob("*_source.py")),
        "passes": lambda: by_name(
            family_files(folder_of("enginewright.passes"), apart={"families", "kernel"}, holding="(Pass)")
        ),
        "targets": lambda: by_name(folder_of("enginewright.targets").glob("*_engine.py")),
        "metrics": lambda: by_name(
            p for p in (folder_of("enginewright.validation") / "metrics").glob("*.py") if p.stem != "__init__"
        ),
        "recipes": lambda: by_name((folder_of("enginewright") / "recipes").glob("*.toml")),
    }[kind]()
    ours = {name: Entry(kind, name, path) for name, path in named.items()}
    added = {
        name: Entry(kind, name, path, module)
        for name, module in plugins.installed(kind).items()
        if name not in ours and (path := plugins.file_of(module)) is not None
    }
    return dict(sorted((ours | added).items()))


def listing(kind: str) -> list[tuple[str, str]]:
    """Names and summaries of one kind; metrics by the names that gates want, with the figures that are no metric."""
    found = entries(kind)
    if kind != "metrics":
        return [(name, entry.summary) for name, entry in found.items()]
    from enginewright.validation.gates import gate_names
    from enginewright.validation.metrics import load_metrics

    names = gate_names(load_metrics())
    return [(name, summary_of_figure(name, found)) for name in names]


FIGURES = {
    "latency.ratio": "Time of a call over the original's: below 1 the engine is faster.",
    "latency.ratio_high": "The upper end of that ratio's interval: a bound that noise does not meet by luck.",
}
"""What a gate may bound beside metrics."""


def summary_of_figure(name: str, metrics: dict[str, Entry]) -> str:
    """One line about what a gate may bound."""
    metric = metrics.get(name.partition(".")[2])
    if metric and name.startswith("fidelity_to_original."):
        return f"To the untouched original: {metric.summary}"
    return FIGURES.get(name) or (metric.summary if metric else f"The figure {name} of a target's record.")


def by_name(paths: Iterable[Path]) -> dict[str, Path]:
    """Files by the names of the entries that they are."""
    return {path.stem.removesuffix("_engine").removesuffix("_source"): path for path in paths}


def model_files(folder: Path) -> dict[str, Path]:
    """Files of networks by their entries' names: ``FILE``, and in a folder of one method ``METHOD-FILE``."""
    single = by_name(family_files(folder, apart={"blocks"}))
    parts = [path for path in folder.glob("*/*/*.py") if "\ndef inputs(" in path.read_text()]
    return single | {f"{path.parent.name}-{path.stem}": path for path in parts}


def family_files(folder: Path, *, apart: set[str], holding: str = "") -> list[Path]:
    """Python files one folder down, but for the folders named, and that hold a text."""
    files = (path for path in folder.glob("*/*.py") if path.stem != "__init__" and path.parent.name not in apart)
    return [path for path in files if not holding or holding in path.read_text()]


def entry(kind: str, name: str, *, where: str | None = None) -> Entry:
    """One entry; raises with the nearest name when there is none."""
    found = entries(kind)
    if name not in found:
        raise unknown(kind.removesuffix("s") if kind != "passes" else "pass", name, found, where=where)
    return found[name]


def load(kind: str, name: str, *, where: str | None = None) -> ModuleType:
    """Import an entry's module."""
    return importlib.import_module(entry(kind, name, where=where).module)


def sole_class(module: ModuleType, base: type) -> type[Any]:
    """The one concrete subclass of ``base`` that a module defines."""
    own = [
        value
        for value in vars(module).values()
        if inspect.isclass(value) and issubclass(value, base) and value.__module__ == module.__name__
    ]
    assert len(own) == 1, f"{module.__name__} must define one {base.__name__}, has {len(own)}"
    return own[0]


def pass_class(name: str, *, where: str | None = None) -> type[Pass]:
    """The pass of that name."""
    from enginewright.passes.contract import Pass

    return sole_class(load("passes", name, where=where), Pass)


def target_class(name: str, *, where: str | None = None) -> type[Target]:
    """The target of that name."""
    from enginewright.targets.contract import Target

    return sole_class(load("targets", name, where=where), Target)


def recipe_path(name: str) -> Path:
    """The file of a recipe that ships with us."""
    return entry("recipes", name).path
