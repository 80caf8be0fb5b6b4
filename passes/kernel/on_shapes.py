"""Calls of a module on shapes alone, of which nothing stays behind.

A call under ``FakeTensorMode`` computes tensors without values. Models keep tensors from call to call: position tables
as attributes, grids in a function's cache. A later real call would find those and answer without values too.
"""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FunctionType, ModuleType
from typing import Any

from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

KEPT = (dict, list, set)
"""Containers that a module may keep tensors in."""


@contextmanager
def on_shapes(module: nn.Module, mode: FakeTensorMode | None = None) -> Iterator[None]:
    """Tensors have no values in this block; afterwards the module and the caches of its functions are as before.

    Args:
        module: what is called.
        mode: one to go on with, for calls on what an earlier block gave; None: a new one.
    """
    state = {part: remembered(part) for part in module.modules()}
    caches = caches_of(module)
    before = [cache.cache_info().misses for cache in caches]
    log = logging.getLogger("torch._subclasses.fake_tensor")
    level = log.level
    log.setLevel(logging.CRITICAL)  # it would print the stack of what is raised, too
    try:
        with mode or FakeTensorMode(allow_non_fake_inputs=True):
            yield
    finally:
        log.setLevel(level)
        for part, attributes in state.items():
            restore(part, attributes)
        for cache, misses in zip(caches, before, strict=True):
            if cache.cache_info().misses != misses:
                cache.cache_clear()


def remembered(part: nn.Module) -> dict[str, tuple[Any, Any]]:
    """Each attribute, and what it holds where it is a container."""
    return {name: (value, value.copy() if isinstance(value, KEPT) else None) for name, value in part.__dict__.items()}


def restore(part: nn.Module, attributes: dict[str, tuple[Any, Any]]) -> None:
    """Give a module the attributes back that it had."""
    for name in part.__dict__.keys() - attributes.keys():
        del part.__dict__[name]
    for name, (value, content) in attributes.items():
        part.__dict__[name] = value
        if content is not None and not same(value, content):
            value.clear()
            (value.extend if isinstance(value, list) else value.update)(content)


def same(one: Any, other: Any) -> bool:
    """Whether two containers hold the same objects in the same order; tensors are not compared by value."""
    if isinstance(one, dict):
        return list(map(id, one)) == list(map(id, other)) and list(map(id, one.values())) == list(
            map(id, other.values())
        )
    return (
        sorted(map(id, one)) == sorted(map(id, other)) if isinstance(one, set) else [*map(id, one)] == [*map(id, other)]
    )


def caches_of(module: nn.Module) -> list[Any]:
    """The caches of functions (``functools.lru_cache``) that the classes of a module, and their files, define."""
    classes = {base for part in module.modules() for base in type(part).__mro__}
    files = {base.__module__ for base in classes} - {"builtins"}
    found = {
        id(cache): cache
        for name in files
        if name.partition(".")[0] != "torch" and isinstance(sys.modules.get(name), ModuleType)
        for cache in caches_in(sys.modules[name])
    }
    return list(found.values())


@functools.cache
def caches_in(file: ModuleType) -> tuple[Any, ...]:
    """The caches of the functions and methods that a Python file defines."""
    defined = [value for value in vars(file).values() if getattr(value, "__module__", None) == file.__name__]
    methods = [method for value in defined if isinstance(value, type) for method in vars(value).values()]
    return tuple(cache for value in (*defined, *methods) for cache in caches_behind(value))


def caches_behind(value: Any) -> list[Any]:
    """The cache that a function is, or that it calls by its closure, as decorators do."""
    if isinstance(value, staticmethod | classmethod):
        value = value.__func__
    if isinstance(value, functools._lru_cache_wrapper):
        return [value]
    if not isinstance(value, FunctionType):
        return []
    cells = [cell.cell_contents for cell in value.__closure__ or () if has_content(cell)]
    return [each for each in cells if isinstance(each, functools._lru_cache_wrapper)]


def has_content(cell: Any) -> bool:
    """Whether the variable of a closure has been set."""
    try:
        cell.cell_contents  # noqa: B018 - reading raises
    except ValueError:
        return False
    return True
