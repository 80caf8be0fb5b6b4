"""Running a user's Python file as part of a private package, so that its neighbours are found and nothing else moves.

``sys.path`` is never touched. The file's folder becomes a package of a name that nobody else uses: ``from . import
helper`` finds ``helper.py`` beside the file, and a neighbour cannot take the place of an installed module.
"""

from __future__ import annotations

import ast
import importlib.util
import itertools
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

from enginewright.ground.errors import ToolchainError

OURS = "enginewright"
"""Our own package, which an absolute import finds before any neighbour."""

NUMBERS = itertools.count()


def run(path: Path) -> ModuleType:
    """Run a file; its module stays registered until ``forget`` is called with it.

    Raises:
        ToolchainError: no such file; not Python; it would import ours for a neighbour; or what it raised.
    """
    imported(path)
    package = f"_enginewright_user_{next(NUMBERS)}"
    spec = ModuleSpec(package, None, is_package=True)
    spec.submodule_search_locations = [str(path.parent)]
    sys.modules[package] = importlib.util.module_from_spec(spec)
    own = importlib.util.spec_from_file_location(f"{package}.{path.stem}", path)
    assert own is not None
    assert own.loader is not None
    module = importlib.util.module_from_spec(own)
    sys.modules[own.name] = module
    try:
        with in_our_words(path, f"running {path.name}"):
            own.loader.exec_module(module)
    except BaseException:
        forget(package)
        raise
    return module


def forget(package: str) -> None:
    """Take a private package out of Python's register of modules."""
    for name in [name for name in sys.modules if name == package or name.startswith(f"{package}.")]:
        del sys.modules[name]


def parse(path: Path) -> ast.Module:
    """The file as a syntax tree.

    Raises:
        ToolchainError: no such file, or not Python, with the line.
    """
    try:
        return ast.parse(path.read_bytes(), filename=str(path))
    except (FileNotFoundError, IsADirectoryError) as cause:
        raise ToolchainError(f"there is no Python file {path.name!r}", where=str(path)) from cause
    except SyntaxError as cause:
        raise not_python(cause, path) from cause
    except ValueError as cause:  # a null byte, before Python 3.12
        raise ToolchainError(f"{path.name} is not Python: {cause}", where=str(path)) from cause


def not_python(cause: SyntaxError, path: Path) -> ToolchainError:
    """The error for a file that cannot be parsed: ``path`` itself, or the neighbour that Python names."""
    place = Path(cause.filename or path)
    return ToolchainError(f"{place.name} is not Python: {cause.msg}", where=f"{place}, line {cause.lineno}")


def imported(path: Path) -> list[Path]:
    """A file and the neighbours that it imports relatively, and they in turn.

    Raises:
        ToolchainError: an absolute import would find a package of ours where a neighbour has its name.
    """
    seen, waiting = {path}, [path]
    while waiting:
        file = waiting.pop()
        for level, name, line in imports_of(parse(file)):
            top = name.partition(".")[0]
            beside = neighbour(file.parent, top) if top else None
            if level == 0 and top == OURS and beside is not None:
                raise ToolchainError(
                    f"{file.name} imports {top!r}, which is the toolchain itself, but {beside.name!r} lies beside it",
                    where=f"{file}, line {line}",
                    help=f"for your own file write 'from . import {top}'; for the toolchain, give yours another name",
                )
            if level == 1 and beside is not None and beside.suffix == ".py" and beside not in seen:
                seen.add(beside)
                waiting.append(beside)
    return [path, *sorted(seen - {path})]


def imports_of(tree: ast.Module) -> Iterator[tuple[int, str, int]]:
    """Each import as (dots before the name, name, line)."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((0, alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.level, node.module, node.lineno
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.level, alias.name, node.lineno) for alias in node.names)


def neighbour(folder: Path, name: str) -> Path | None:
    """The Python file or folder of Python files of this name in ``folder``."""
    file, package = folder / f"{name}.py", folder / name
    if file.is_file():
        return file
    return package if package.is_dir() and any(package.glob("*.py")) else None


@contextmanager
def in_our_words(path: Path, what: str) -> Iterator[None]:
    """Run user code in this block: what it raises becomes an error that names its last line in the user's folder."""
    try:
        yield
    except ToolchainError:
        raise
    except SyntaxError as cause:
        raise not_python(cause, path) from cause
    except (Exception, SystemExit) as cause:
        said = f"{type(cause).__name__}: {cause}" if str(cause) else type(cause).__name__
        where, help = last_line(cause, path), advice(cause, path)
        raise ToolchainError(f"{what} failed: {said}", where=where, help=help) from cause


def last_line(cause: BaseException, path: Path) -> str:
    """The last line of the user's own code that an exception went through."""
    frames = traceback.extract_tb(cause.__traceback__)
    own = [
        frame
        for frame in frames
        if Path(frame.filename).is_relative_to(path.parent) and "site-packages" not in Path(frame.filename).parts
    ]
    return f"{own[-1].filename}, line {own[-1].lineno}, in {own[-1].name}" if own else str(path)


def advice(cause: BaseException, path: Path) -> str | None:
    """What to do about an exception, where that is known."""
    if isinstance(cause, ModuleNotFoundError) and cause.name:
        top = cause.name.partition(".")[0]
        if neighbour(path.parent, top):
            return f"{top!r} lies beside {path.name}: write 'from . import {top}' or 'from .{top} import ...'"
        if top == "toolchain":
            return "the package is called enginewright: write 'from enginewright import ModelSpec'"
    return None
