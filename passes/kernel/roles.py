"""Which input of a model a pass works on: the one that a user names, or the one of the role that the pass asks for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from enginewright.ground.errors import ToolchainError, unknown
from enginewright.ground.signature import Role, Signature


def input_of(
    role: Role, asked: str, signature: Signature, call: Mapping[str, Any], *, setting: str, otherwise: str = ""
) -> str:
    """The input that a user names, or the first of a role.

    Args:
        role: what the input is for.
        asked: the user's own name; empty: none.
        signature: says which inputs have which role; those of a call that it lacks are known by name.
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
    found = [name for name in signature.of_role(role, among=call) if name in call]
    if not found:
        raise ToolchainError(
            f"no input of the model is known to hold a {role}",
            help=f"its inputs: {', '.join(call)}; set {setting} to one of them{otherwise}",
        )
    return found[0]
