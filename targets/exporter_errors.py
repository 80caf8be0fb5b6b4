"""What the exporter raises, in words: the operator or the line at fault, and what to do about it."""

from __future__ import annotations

import re
import traceback
from collections.abc import Iterator
from pathlib import Path

import onnx_ir
import onnxscript
import torch

from enginewright.ground.errors import ToolchainError

LIBRARIES = tuple(str(Path(str(library.__file__)).parent) for library in (torch, onnxscript, onnx_ir))
OURS = str(Path(__file__).parent)

BOILERPLATE = ("Failed to ", "Suggested fixes not found")
"""How errors begin that say nothing about the model."""

UNKNOWN_OPERATOR = re.compile(r"No ONNX function found for <OpOverload\(op='([\w.]+)', overload='(\w+)'\)>")
STRANGE_ANSWER = re.compile(r"Found <class '([\w.<>]+)'> in output")
FIXED_SIZE = re.compile(r"\d+ not in VR\[(\d+), \1\]")
CALL = re.compile(r'File "([^"]+)", line (\d+), in (\w+)\n\s*(.+)')


def refusal(error: BaseException) -> ToolchainError:
    """The error for a module that the exporter refused."""
    chain = list(links(error))
    texts = [str(link) for link in chain]
    where = next((place for link in reversed(chain) if (place := line_of(link))), None)
    whole = "\n".join(texts)
    if found := UNKNOWN_OPERATOR.search(whole):
        complex_numbers = "complex" in whole
        return ToolchainError(
            f"the model could not be exported to ONNX: operator {found[1]} has no translation",
            where=where,
            help="compute with real numbers (cosines and sines in the place of a complex table)"
            if complex_numbers
            else "compute the same with other operators, or leave that part out of the module that is exported",
        )
    if "data-dependent" in whole:
        return ToolchainError(
            "the model could not be exported to ONNX: what it does next depends on a value, and not on a size alone",
            where=where,
            help="compute both ways and choose with torch.where; a value that never changes belongs into the module",
        )
    if found := FIXED_SIZE.search(whole):
        return ToolchainError(
            f"the model could not be exported to ONNX: a size that was to be open must be {found[1]} here",
            where=where,
            help="make that dimension fixed in the model's inputs",
        )
    if found := STRANGE_ANSWER.search(whole):
        return ToolchainError(
            f"the model could not be exported to ONNX: it returns a {found[1].rpartition('.')[2]}",
            help="return tensors, or a tuple, list or dict of them (a cache: use_cache=False, or its tensors)",
        )
    return ToolchainError(
        f"the model could not be exported to ONNX: {': '.join(reasons(texts)) or type(error).__name__}",
        where=where,
        help="change this in the model, or export a module without that part, through py:FILE.py:FUNCTION",
    )


def links(error: BaseException | None) -> Iterator[BaseException]:
    """An exception and those behind it, the outermost first; each once."""
    seen: list[BaseException] = []
    while error is not None and error not in seen:
        seen.append(error)
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def reasons(texts: list[str]) -> list[str]:
    """The first line of each text that says something, without what an earlier one said."""
    found: list[str] = []
    for text in texts:
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        line = " ".join(lines[: 2 if lines and lines[0].endswith(":") else 1])
        line = line.replace("See the stack trace for more information.", "").strip().rstrip(".")
        if line and not line.startswith(BOILERPLATE) and not any(line in other for other in found):
            found.append(line)
    return found[:2]


def line_of(error: BaseException) -> str | None:
    """The innermost line of a user's file in an exception's text or traceback, as ``net.py:12 in forward: code``."""
    calls = [(file, int(number), function, code) for file, number, function, code in CALL.findall(str(error))]
    calls += [(f.filename, f.lineno or 0, f.name, f.line or "") for f in traceback.extract_tb(error.__traceback__)]
    own = [call for call in calls if not call[0].startswith((*LIBRARIES, OURS, "<"))]
    if not own:
        return None
    file, number, function, code = own[-1]
    return f"{Path(file).name}:{number} in {function}: {code.strip()}"
