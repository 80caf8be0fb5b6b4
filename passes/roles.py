"""What an input of a model is for, by the names that models give it, where a user names none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from enginewright.ground.errors import ToolchainError, unknown

TIMESTEPS = ("timestep", "timesteps", "t", "sigma", "time")
"""Names of the timestep."""

CONDITIONS = ("encoder_hidden_states", "class_labels", "y", "context", "condition", "cond", "labels")
"""Names of what is asked for: a text, a class."""


def named(asked: str, names: Sequence[str], call: Mapping[str, Any], *, setting: str, otherwise: str = "") -> str:
    """The input that a user names, or the first of these names that a call has.

    Args:
        asked: the user's own name; empty: none.
        names: what models call it.
        call: has the inputs.
        setting: the parameter that a user names it with.
        otherwise: what else could be done, for the error.

    Raises:
        ToolchainError: there is no such input.
    """
    if asked:
        if asked not in call:
            raise unknown("input", asked, call)
        return asked
    found = next((name for name in names if name in call), None)
    if found is None:
        raise ToolchainError(
            f"no input of the model is called {' or '.join(repr(name) for name in names)}",
            help=f"its inputs: {', '.join(call)}; set {setting} to one of them{otherwise}",
        )
    return found
