"""An argument parser that says what is wrong, where and what to do; and what the values of arguments may be."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from enginewright.ground.errors import ToolchainError, nearest
from enginewright.ground.writing import in_words, make_folder

LARGEST_SEED = 2**63 - 1
DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16", "half": "float16", "float": "float32"}
"""Short names of the types to compute in."""


class Parser(argparse.ArgumentParser):
    """Raises ``ToolchainError`` for wrong use, with the nearest command, choice or option."""

    def error(self, message: str) -> NoReturn:
        """Raise what argparse would print with the usage."""
        place, _, rest = message.removeprefix("argument ").partition(": ")
        if not message.startswith("argument "):
            place, rest = "", message
        raise ToolchainError(rest, where=place or None, help=f"see: {self.prog} --help")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """Hold a value against the choices, and offer the nearest."""
        if action.choices is not None and value not in action.choices:
            known = list(action.choices)
            command = isinstance(action, argparse._SubParsersAction)
            raise ToolchainError(
                f"there is no {'command' if command else action.dest} {value!r}",
                help=nearest(str(value), known) or f"known: {', '.join(known)}",
            )

    def read(self, arguments: Sequence[str]) -> argparse.Namespace:
        """The arguments of a command; options that it lacks are errors with the nearest one that it has."""
        chosen, strange = self.parse_known_args(arguments)
        if strange:
            command = self.commands().get(getattr(chosen, "command", ""), self)
            raise strange_argument(strange[0], command)
        return chosen

    def commands(self) -> dict[str, Parser]:
        """Parsers of the commands, by name."""
        found = (action.choices for action in self._actions if isinstance(action, argparse._SubParsersAction))
        return {name: one for choices in found if choices for name, one in choices.items()}


def strange_argument(text: str, command: Parser) -> ToolchainError:
    """The error for an argument that a command does not take."""
    option = text.partition("=")[0]
    if not option.startswith("-"):
        return ToolchainError(f"{text!r} is one argument too many", help=f"see: {command.prog} --help")
    known = [name for action in command._actions for name in action.option_strings]
    return ToolchainError(
        f"{command.prog} has no option {option!r}",
        help=nearest(option, known) or f"see: {command.prog} --help",
    )


def whole(low: int, high: int | None = None) -> Callable[[str], int]:
    """A converter from text to a whole number between two bounds."""

    def read(text: str) -> int:
        plain = text.removeprefix("-")
        if not (plain.isascii() and plain.isdigit()) or len(plain) > 30:
            raise argparse.ArgumentTypeError(f"{cut(text)!r} is no whole number")
        number = int(text)
        if number < low or (high is not None and number > high):
            bounds = f"{low} or more" if high is None else f"from {low} to {high}"
            raise argparse.ArgumentTypeError(f"{number} is out of range; it must be {bounds}")
        return number

    return read


def size(text: str) -> str:
    """``NAME=N``, checked and given back as it is."""
    name, equals, number = text.partition("=")
    if not (name and equals and number.isascii() and number.isdigit() and len(number) < 19 and int(number)):
        raise argparse.ArgumentTypeError(f"{cut(text)!r} is not NAME=N, such as batch=8")
    return text


def dtype(text: str) -> str:
    """A floating type by its name or a short one."""
    name = DTYPES.get(text.lower(), text.lower())
    known = sorted({*DTYPES.values()})
    if name not in known:
        tip = nearest(text, [*known, *DTYPES]) or f"known: {', '.join(known)}"
        raise argparse.ArgumentTypeError(f"there is no dtype {cut(text)!r}; {tip}")
    return name


def cut(text: str, length: int = 80) -> str:
    """Text of a bearable length."""
    return text if len(text) <= length else f"{text[:length]}…"


def listed(entries: Iterable[tuple[str, str]]) -> str:
    """Examples for the end of a help text, each with what it does."""
    return "\n".join(f"  {command}\n      {what}" for command, what in entries)


def place_for(path: Path | None) -> None:
    """Make sure that a file can be written later; its folder is made.

    Raises:
        ToolchainError: a folder stands in its place, or its folder cannot be made.
    """
    if path is None:
        return
    if path.is_dir():
        raise ToolchainError(f"{str(path)!r} is a folder, and a file is wanted")
    with in_words(repr(path.name), path):
        make_folder(path.parent)
