"""From command-line arguments to a recipe."""

from __future__ import annotations

import re
import tomllib
from argparse import Namespace
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from enginewright import catalog
from enginewright.ground.errors import FaultsError, ToolchainError, raise_faults
from enginewright.sources.mistaken import mistaken

if TYPE_CHECKING:
    from enginewright.ground.signature import InputSpec
    from enginewright.recipe import Recipe

WEIGHT_MODES = ("auto", "copy", "link")
"""What may become of weights that are on disk."""


def recipe_from(chosen: Namespace, model: str | None = None) -> Recipe:
    """The recipe that ``export`` or ``plan`` was asked for. Unknown names are found before anything heavy loads."""
    content: dict[str, Any] = {
        "schema": 1,
        "model": model or chosen.model,
        "seed": chosen.seed,
        "gates": chosen.gates,
        "steps": [named("pass", text) for text in chosen.steps],
        "targets": [named("target", text) for text in chosen.targets],
    }
    check_names(content)
    if chosen.trust_remote_code:
        content["trust_remote_code"] = True
    mode, file = weights_from(chosen.weights)
    content["export"] = given(dtype=chosen.dtype, embed_weights=chosen.embed_weights or None, weights=mode)
    if file:
        content["weights"] = file
    content["calibration"] = given(file=chosen.calibration, calls=chosen.calibration_calls)
    content["validation"] = validation_from(chosen)
    content |= given(job=job_from(getattr(chosen, "job", ())))
    from enginewright.recipe import make

    return make(content)


def validation_from(chosen: Namespace) -> dict[str, Any]:
    """How to validate, as a recipe's table; ``plan`` has no such options."""
    wanted = ("calls", "samples", "rounds", "threads")
    table = given(**{name: getattr(chosen, name, None) for name in wanted})
    sizes = dict(text.split("=") for text in getattr(chosen, "size", ()))
    table |= given(batch={name: int(number) for name, number in sizes.items()} or None)
    return {**table, "skip": True} if getattr(chosen, "no_validate", False) else table


JOB = ("skip", "prompts", "steps")
"""Settings of a pipeline's whole job; others are arguments of the pipeline's call."""


def job_from(texts: Sequence[str]) -> dict[str, Any] | None:
    """How to run a pipeline's whole job, as a recipe's table; None where nothing was said of it."""
    table: dict[str, Any] = {}
    for text in texts:
        key, value = setting(text, where=f"--job {text}")
        (table if key in JOB else table.setdefault("arguments", {}))[key] = value
    return table or None


def given(**settings: Any) -> dict[str, Any]:
    """Those settings that were asked for."""
    return {key: value for key, value in settings.items() if value is not None}


def weights_from(texts: Sequence[str]) -> tuple[str | None, str | None]:
    """What ``--weights`` was given: what becomes of weights on disk, and a file of weights; a file called copy is
    ``./copy``.
    """
    modes = [text for text in texts if text in WEIGHT_MODES]
    files = [text for text in texts if text not in WEIGHT_MODES]
    for several in (modes, files):
        if len(several) > 1:
            raise ToolchainError(f"--weights was given twice: {several[0]!r} and {several[1]!r}", where="--weights")
    return next(iter(modes), None), next(iter(files), None)


def check_names(content: dict[str, Any]) -> None:
    """Look every pass, target and model up, all faults together."""
    faults: list[ToolchainError] = []
    wanted = [("passes", step["pass"], "--pass") for step in content["steps"]]
    wanted += [("targets", target["target"], "--target") for target in content["targets"]]
    if fault := mistaken(content["model"], where="MODEL"):
        faults.append(fault)
    for kind, name, where in wanted:
        try:
            catalog.entry(kind, name, where=where)
        except ToolchainError as fault:
            faults.append(fault)
    raise_faults(faults)


def named(key: str, text: str) -> dict[str, Any]:
    """``NAME:key=value,key=value`` as a recipe's table; values as TOML reads them, or else plain text."""
    name, _, rest = text.partition(":")
    table: dict[str, Any] = {key: name}
    for part in re.split(r",(?=\s*\w+=)", rest) if rest else []:
        own, value = setting(part, where=f"--{key} {text}")
        table[own] = value
    return table


def setting(text: str, *, where: str) -> tuple[str, Any]:
    """``key=value``; the value as TOML reads it, or else plain text."""
    key, equals, value = text.partition("=")
    if not equals:
        raise ToolchainError(f"{text!r} is not key=value", where=where)
    try:
        return key.strip(), tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return key.strip(), value
    except (RecursionError, ValueError) as cause:
        raise ToolchainError(f"{value[:40]}… is no value", where=f"{where[:60]}…") from cause


def sizes_from(texts: Sequence[str], specs: Sequence[InputSpec]) -> dict[str, int]:
    """``NAME=N`` for dynamic dimensions, each within the model's range."""
    known = {d.name: d for spec in specs for d in spec.shape if not isinstance(d, int)}
    sizes, faults = {}, []
    for text in texts:
        name, _, number = text.partition("=")
        if name not in known or not re.fullmatch("[0-9]{1,18}", number):
            names = ", ".join(known) or "none"
            faults.append(
                ToolchainError(f"{text!r} is not NAME=N", where="--size", help=f"dynamic dimensions: {names}")
            )
        elif fault := known[name].fault_of(int(number)):
            faults.append(ToolchainError(fault, where="--size"))
        else:
            sizes[name] = int(number)
    if faults:
        raise FaultsError(faults)
    return sizes
