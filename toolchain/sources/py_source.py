"""A user's own model: ``py:FILE.py:FUNCTION``, where the function returns a module and example inputs.

It returns ``(module, inputs)``, with ``inputs`` a dict of tensors by ``forward``'s argument names or a tuple in their
order; or an ``enginewright.ModelSpec``; or a dict of that class's fields. The file runs as it would in Python: give
only files that you trust.
"""

from __future__ import annotations

import dataclasses
import inspect
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import torch
from torch import nn

from enginewright.ground.errors import ToolchainError, unknown
from enginewright.ground.signature import ROLES, InputSpec, Role
from enginewright.sources import examples, user_file
from enginewright.sources.contract import Model, files_from
from enginewright.spec import ModelSpec

WANTED = "return (module, inputs), an enginewright.ModelSpec, or a dict of its fields"


def load(text: str, *, seed: int = 0, trust_remote_code: bool = False) -> Model:
    """Run the file, call the function, and call its module once on the example.

    Args:
        text: ``py:FILE.py:FUNCTION``; a relative path starts at the current folder.
        seed: of torch's random numbers before the file runs.
        trust_remote_code: without effect: naming the file is trust enough.

    Raises:
        ToolchainError: what is wrong with the file, the function, what it returns, or the module's call.
    """
    del trust_remote_code
    path, name = parts(text)
    torch.manual_seed(seed)
    user = user_file.run(path)
    package = user.__name__.rpartition(".")[0]
    try:
        model = build(user, path, name)
    except BaseException:
        user_file.forget(package)
        raise
    # An import inside a forward still finds its neighbours.
    weakref.finalize(model.module, user_file.forget, package).atexit = False
    return dataclasses.replace(
        model,
        name=f"py:{path.name}:{name}",
        weights=f"by {name} in {path.name}, seed {seed}",
        files=files_from(path, user_file.imported(path)),
    )


def parts(text: str) -> tuple[Path, str]:
    """The absolute path of the file, and the function's name."""
    file, _, name = text.removeprefix("py:").rpartition(":")
    if not file or not name:
        raise ToolchainError(f"{text!r} is not py:FILE.py:FUNCTION", help="such as py:net.py:build")
    return Path(file).absolute(), name


def build(user: ModuleType, path: Path, name: str) -> Model:
    """Call the function and make a model of what it returns."""
    where = f"{path}, {name}"
    function = function_of(user, path, name)
    with user_file.in_our_words(path, f"{name}()"):
        result = function()
    spec = spec_of(result, where)
    spec.module.eval()
    inputs = examples.by_name(spec.module, spec.inputs, where=where)
    with user_file.in_our_words(path, "the module's call on its example inputs"), torch.no_grad():
        answer = spec.module(**inputs)
    interface, outputs = examples.interface_of_answer(answer, inputs, tuple(spec.outputs), where=where)
    specs = with_roles(examples.input_specs(inputs, spec.dynamic, spec.ranges, where=where), spec.roles, where)

    def realistic(count: int, seed: int) -> Sequence[Mapping[str, Any]]:
        assert spec.realistic is not None
        with user_file.in_our_words(path, "realistic"):
            return spec.realistic(count, seed)

    return Model(
        name=name,
        module=spec.module,
        inputs=specs,
        outputs=outputs,
        weights="",
        realistic=examples.checked(realistic, specs, where=where) if spec.realistic else None,
        example=examples.arrays_of(inputs),
        interface=interface,
    )


def with_roles(specs: tuple[InputSpec, ...], roles: Mapping[str, str], where: str) -> tuple[InputSpec, ...]:
    """Inputs with the roles that a user gives them. Raises ``ToolchainError`` for one that is not there."""
    for name, role in roles.items():
        if name not in {spec.name for spec in specs}:
            raise unknown("input", name, [spec.name for spec in specs], where=where)
        if role not in ROLES:
            raise unknown("role", str(role), ROLES, where=where)
    given = cast(Mapping[str, Role], roles)
    return tuple(dataclasses.replace(spec, role=given.get(spec.name, spec.role)) for spec in specs)


def function_of(user: ModuleType, path: Path, name: str) -> Callable[[], Any]:
    """The function that was asked for, which must need no arguments."""
    function: Any = getattr(user, name, None)
    if not callable(function):
        raise unknown("function", name, [n for n, v in vars(user).items() if inspect.isfunction(v)], where=str(path))
    needed = [
        parameter.name
        for parameter in inspect.signature(function).parameters.values()
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    ]
    if needed:
        raise ToolchainError(
            f"{name} needs arguments: {', '.join(needed)}",
            where=f"{path}, {name}",
            help="it is called without any; give them defaults",
        )
    return function  # type: ignore[no-any-return]


def spec_of(result: Any, where: str) -> ModelSpec:
    """What a function returned, as a spec.

    Raises:
        ToolchainError: it is something else; says what came and what is wanted.
    """
    if isinstance(result, Mapping):
        fields = [field.name for field in dataclasses.fields(ModelSpec)]
        for key in result:
            if key not in fields:
                raise unknown("key", str(key), fields, where=where)
        if not {"module", "inputs"} <= result.keys():
            raise ToolchainError(f"the dict has only {sorted(result)}; it needs 'module' and 'inputs'", where=where)
        result = ModelSpec(**result)
    elif isinstance(result, tuple) and len(result) == 2:
        result = ModelSpec(module=result[0], inputs=result[1])
    if not isinstance(result, ModelSpec):
        raise ToolchainError(f"the function returned {kind_of(result)}", where=where, help=WANTED)
    if not isinstance(result.module, nn.Module):
        raise ToolchainError(f"the module is {kind_of(result.module)}, no torch.nn.Module", where=where, help=WANTED)
    return result


def kind_of(value: Any) -> str:
    """What a value is, in a few words."""
    if value is None:
        return "nothing"
    size = f" of {len(value)}" if isinstance(value, tuple | list) else ""
    return f"a {type(value).__name__}{size}"
