"""Reading what ``torch.export.save`` wrote without running anything that came with it.

``torch.export.load`` of torch 2.13 unpickles without restraint what an archive marks as pickled (tensor subclasses,
custom objects, weights of older formats, example inputs that the restricted reader refuses), loads compiled code, lets
sympy evaluate size expressions as Python, and writes names and operators of the graph into Python source. Plain
programs need none of the first and only harmless forms of the others: anything else is refused before torch sees it.
"""

from __future__ import annotations

import io
import json
import keyword
import logging
import pickle
import re
import zipfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch._ops import HigherOrderOperator, OpOverload
from torch.export import ExportedProgram
from torch.export.pt2_archive import PT2ArchiveReader

from enginewright.ground.errors import ToolchainError
from enginewright.ground.reading import LARGEST_TEXT, parse_json

MODEL = "models/model.json"
WEIGHTS = "data/weights/model_weights_config.json"
CONSTANTS = "data/constants/model_constants_config.json"
EXAMPLE = "data/sample_inputs/model.pt"

LARGEST_RATIO = 20
"""Bytes of a record over its bytes in the file."""

IDENTIFIER = re.compile(r"([A-Za-z_]\w*)?", re.ASCII)
MULTIPLE = re.compile(r"[1-9][0-9]*\*s[0-9]+")
"""A size that comes in multiples, such as ``4*s25``."""
PLAIN = re.compile(r"[\w.\-+/: ]*", re.ASCII)
"""Paths of parameters, versions, kinds: nothing that could end a string in source code."""

EXPRESSION = re.compile(r"([A-Za-z_]\w*|'[a-z]{1,2}\d+'|'?\d+(\.\d+)?'?|[\s+\-*/%(),<>=&|~^])*", re.ASCII)
SYMBOL = re.compile(r"[a-z]{1,2}\d+")
SIZE_WORDS = frozenset(
    """
    Symbol Integer Rational Float Add Mul Pow Max Min Abs floor ceiling Eq Ne Lt Le Gt Ge And Or Not
    Equality Unequality StrictLessThan LessThan StrictGreaterThan GreaterThan
    FloorDiv ModularIndexing Where PythonMod Mod CleanDiv CeilToInt FloorToInt CeilDiv LShift RShift PowByNatural
    FloatPow FloatTrueDiv IntTrueDiv IsNonOverlappingAndDenseIndicator TruncToFloat TruncToInt RoundToInt
    RoundDecimal ToFloat Identity
    True False positive nonnegative negative integer real finite zero precision
    """.split()  # noqa: SIM905
)
"""What sympy may find in the expression of a size: its own and torch's functions on numbers, and what is assumed."""

ARITHMETIC = re.compile(
    r"_operator\.(eq|ne|le|ge|lt|gt|neg|pos|mul|add|sub|floordiv|mod|pow|truediv|and_|or_|lshift|rshift|getitem)"
    r"|math\.trunc|torch\.sym_(not|int|float|ite|max|min|sqrt)"
)
CONTROL_FLOW = frozenset({"cond", "while_loop", "scan", "map_impl", "wrap_with_set_grad_enabled", "wrap_with_autocast"})
CONTAINERS = (None, "builtins.tuple", "builtins.list", "builtins.dict", "collections.OrderedDict")
UNREAD = frozenset({"metadata", "guards_code", "as_string", "as_strings"})
"""Text that becomes no code: stack traces, guards (we do not compile them), operators' string arguments."""

SAVE_AGAIN = "save it again: torch.export.save(torch.export.export(module.eval(), ...), 'file.pt2')"


def read(path: Path) -> ExportedProgram:
    """The program of an archive.

    Raises:
        ToolchainError: no such file, damaged, of another kind, or with content that would have to be run to be read.
    """
    version = check(path)
    log = logging.getLogger("torch.export")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        return torch.export.load(path)
    except Exception as cause:  # the loader raises anything from AssertionError to its own SerializeError
        said = (str(cause).strip() or type(cause).__name__).splitlines()[0]
        raise ToolchainError(
            f"torch {torch.__version__} cannot read {path.name}, written by torch {version}: {said}",
            where=str(path),
            help=SAVE_AGAIN,
        ) from cause
    finally:
        log.setLevel(level)


def check(path: Path) -> str:
    """Look an archive through; returns the version of torch that wrote it."""
    try:
        if path.exists() and not path.is_file():
            raise ToolchainError(f"there is no exported program {path.name!r}: it is no file", where=str(path))
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except OSError as cause:
        raise ToolchainError(f"there is no exported program {path.name!r}", where=str(path)) from cause
    except (zipfile.BadZipFile, ValueError, NotImplementedError, EOFError) as cause:
        raise ToolchainError(f"{path.name} is no whole exported program", where=str(path), help=SAVE_AGAIN) from cause
    check_sizes(entries, path)
    names = [entry.filename for entry in entries]
    if len({name.partition("/")[0] for name in names}) != 1:  # the layout of old, which is read by unpickling
        raise refused(path, "has the layout of torch 2.7 or older")
    try:
        reader = PT2ArchiveReader(str(path))
        records = set(reader.get_file_names())
    except (RuntimeError, AssertionError, UnicodeDecodeError) as cause:
        raise ToolchainError(f"{path.name} is no whole exported program", where=str(path), help=SAVE_AGAIN) from cause
    check_records(records, path)
    try:
        program, weights, constants = (json_record(reader, name, path) for name in (MODEL, WEIGHTS, CONSTANTS))
        check_payloads(weights["config"], "weight_", path)
        check_payloads(constants["config"], "tensor_", path)
        check_text(program, "", path)
        check_example(reader.read_bytes(EXAMPLE), path)
        return str(program["torch_version"])
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError, RecursionError) as cause:
        raise ToolchainError(f"{path.name} is damaged: {cause!r}", where=str(path), help=SAVE_AGAIN) from cause


def json_record(reader: PT2ArchiveReader, name: str, path: Path) -> Any:
    """One JSON record of an archive."""
    try:
        return parse_json(reader.read_string(name), what=name, finite=False)
    except ToolchainError as fault:
        raise ToolchainError(f"{path.name} is damaged: {fault.message}", where=str(path), help=SAVE_AGAIN) from fault


def refused(path: Path, why: str) -> ToolchainError:
    """The error for an archive that holds more than a plain program."""
    return ToolchainError(f"{path.name} {why}; refused", where=str(path), help=SAVE_AGAIN)


def check_sizes(entries: Sequence[zipfile.ZipInfo], path: Path) -> None:
    """Refuse what would take far more memory than the file has bytes: torch compresses nothing."""
    for entry in entries:
        if entry.file_size > max(entry.compress_size, 1) * LARGEST_RATIO:
            raise refused(
                path, f"holds {entry.filename!r}, {entry.file_size:,} bytes packed into {entry.compress_size:,}"
            )
        if entry.filename.endswith(".json") and entry.file_size > LARGEST_TEXT:
            raise refused(path, f"holds {entry.filename!r} of {entry.file_size:,} bytes; read are {LARGEST_TEXT:,}")


def check_records(records: set[str], path: Path) -> None:
    """Refuse archives with compiled code, several programs, or weights of an older format."""
    if any(name.startswith("data/aotinductor/") for name in records):
        raise refused(path, "holds compiled code, which would run when it is loaded")
    models = sorted(name for name in records if name.startswith("models/"))
    if models != [MODEL]:
        raise refused(path, f"holds {models or 'no program'} where one program named 'model' is wanted")
    if old := records & {"data/weights/model.pt", "data/constants/model.pt"}:
        raise refused(path, f"keeps its tensors in a pickle, {min(old)}")
    if missing := {WEIGHTS, CONSTANTS, EXAMPLE} - records:
        raise ToolchainError(f"{path.name} is damaged: it lacks {min(missing)}", where=str(path), help=SAVE_AGAIN)


def check_payloads(payloads: dict[str, Any], prefix: str, path: Path) -> None:
    """Refuse tensors and constants that are stored as pickles or lie on another device."""
    for name, payload in payloads.items():
        if payload["use_pickle"] or not payload["path_name"].startswith(prefix):
            raise refused(path, f"keeps {name!r} as a pickle: a tensor subclass or custom object")
        check_text(payload["tensor_meta"], "", path)


def check_example(content: bytes, path: Path) -> None:
    """Refuse example inputs that torch would unpickle without restraint, after failing with it."""
    try:
        torch.load(io.BytesIO(content), weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as cause:
        raise refused(path, "has example inputs that are no plain tensors") from cause


def check_text(value: Any, key: str, path: Path) -> None:
    """Refuse text that could become code other than a graph's."""
    if isinstance(value, dict):
        if key in ("device", "as_device") and value.get("type", "cpu") != "cpu":
            raise ToolchainError(
                f"{path.name} was exported on {value['type']!r}", where=str(path), help="export it on the CPU"
            )
        for name, content in value.items():
            if not PLAIN.fullmatch(name) and not (key == "range_constraints" and MULTIPLE.fullmatch(name)):
                raise refused(path, f"has a name that no exporter writes: {name!r}")
            if name not in UNREAD:
                check_text(content, name, path)
    elif isinstance(value, list):
        for content in value:
            check_text(content, key, path)
    elif isinstance(value, str) and key in ("in_spec", "out_spec"):
        if not is_plain_tree(json.loads(value)[1], inputs=key == "in_spec"):
            does = "takes" if key == "in_spec" else "returns"
            raise ToolchainError(
                f"{path.name} {does} other than tensors in tuples, lists and dicts",
                where=str(path),
                help="wrap the module so that its forward takes and returns those, and export that",
            )
    elif isinstance(value, str) and not harmless(value, key):
        raise refused(path, f"has a {key} that no exporter writes: {value[:80]!r}")


def harmless(text: str, key: str) -> bool:
    """Whether a string is what its key says and nothing more."""
    if key in ("name", "as_name", "forward_arg_names"):
        return bool(IDENTIFIER.fullmatch(text)) and not keyword.iskeyword(text)
    if key == "expr_str":
        names = re.findall(r"[A-Za-z_]\w*", text)
        return bool(EXPRESSION.fullmatch(text)) and all(SYMBOL.fullmatch(n) or n in SIZE_WORDS for n in names)
    if key in ("target", "as_operator"):
        return bool(ARITHMETIC.fullmatch(text)) or is_operator(text)
    return bool(PLAIN.fullmatch(text))


def is_operator(text: str) -> bool:
    """Whether a target is an operator of torch's on tensors; control flow is one too, reading a file is not."""
    room, *rest = text.split(".")
    if room != "torch" or rest[:1] != ["ops"] or rest[1:3] == ["aten", "from_file"]:
        return False
    if rest[1:2] == ["higher_order"] and (len(rest) != 3 or rest[2] not in CONTROL_FLOW):
        return False
    found: Any = torch
    with suppress(AttributeError, RuntimeError):
        for name in rest:
            found = getattr(found, name)
    return isinstance(found, OpOverload | HigherOrderOperator)


def is_plain_tree(tree: dict[str, Any], *, inputs: bool) -> bool:
    """Whether a tree of arguments is made of tuples, lists and dicts with text for keys."""
    context = json.loads(tree["context"]) if tree["context"] is not None else None
    keys = context if isinstance(context, list) else []
    known = tree["type"] in CONTAINERS and (context is None or isinstance(context, list))
    sound = all(isinstance(name, str) and (IDENTIFIER.fullmatch(name) or not inputs) for name in keys)
    return known and sound and all(is_plain_tree(child, inputs=inputs) for child in tree["children_spec"])
