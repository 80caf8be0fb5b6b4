"""Files that are almost right: documents with one odd value, and bytes that were cut, changed or put in."""

from __future__ import annotations

import copy
import json
from typing import Any

import tomli_w
from hypothesis import strategies as st

PLACE = "@@here@@"
"""Stands for raw text until the document is written."""

RAW = (
    "[" * 100_000 + "]" * 100_000,
    '{"a":' * 5_000 + "1" + "}" * 5_000,
    "9" * 5_000,
    "1e999",
    "NaN",
    "Infinity",
    "-Infinity",
    '"\\ud800"',
    "",
    "{",
)
"""What a JSON value is replaced with as text."""

RAW_TOML = ("[" * 50_000 + "]" * 50_000, "9" * 5_000, "1e999", "nan", "inf", "1979-05-27T07:32:00Z", "", "{", "[[")

ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([-1, 0, 1, 2**31, 2**53, 2**63, -(2**64), 10**300]),
    st.sampled_from([0.5, -0.0, 1e308, 1e-320]),
    st.sampled_from(["", " ", "\0", "x" * 5_000, "../../etc/passwd", "/etc/passwd", "a/b", "é", "\u202e", "-", "."]),
    st.sampled_from([[], {}, [[]], [None], {"": None}, [1, "a"], {"schema": 1}]),
    st.text(max_size=12),
    st.integers(),
)


def paths_of(document: Any, before: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The way to every value of a document, the document itself first."""
    found = [before]
    if isinstance(document, dict):
        found += [path for key, value in document.items() for path in paths_of(value, (*before, key))]
    elif isinstance(document, list):
        found += [path for i, value in enumerate(document[:4]) for path in paths_of(value, (*before, i))]
    return found


def put(document: Any, path: tuple[Any, ...], value: Any) -> Any:
    """The document with another value at a path."""
    if not path:
        return value
    changed = copy.deepcopy(document)
    inner = changed
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return changed


def take(document: Any, path: tuple[Any, ...]) -> Any:
    """The document without the value at a path."""
    if not path:
        return {}
    changed = copy.deepcopy(document)
    inner = changed
    for key in path[:-1]:
        inner = inner[key]
    del inner[path[-1]]
    return changed


@st.composite
def changed_json(draw: st.DrawFn, document: Any) -> bytes:
    """A document's JSON with one value odd, gone, doubled in key or replaced by raw text; or its bytes changed."""
    path = draw(st.sampled_from(paths_of(document)))
    kind = draw(st.sampled_from(["odd", "odd", "odd", "gone", "key", "raw", "bytes"]))
    if kind == "odd":
        return json.dumps(put(document, path, draw(ODD))).encode()
    if kind == "gone":
        return json.dumps(take(document, path)).encode()
    if kind == "key":
        holder = put(document, path, {draw(st.text(max_size=8)): draw(ODD), "schema": 1})
        return json.dumps(holder).encode()
    if kind == "raw":
        text = json.dumps(put(document, path, PLACE))
        return text.replace(f'"{PLACE}"', draw(st.sampled_from(RAW))).encode()
    return draw(changed_bytes(json.dumps(document).encode()))


@st.composite
def changed_toml(draw: st.DrawFn, document: dict[str, Any]) -> bytes:
    """A document's TOML, changed as ``changed_json`` does."""
    path = draw(st.sampled_from(paths_of(document)[1:]))
    kind = draw(st.sampled_from(["odd", "odd", "odd", "gone", "raw", "bytes"]))
    if kind == "odd":
        value = draw(ODD.filter(lambda v: "None" not in repr(v)))
        return tomli_w.dumps(put(document, path, value)).encode()
    if kind == "gone":
        return tomli_w.dumps(take(document, path)).encode()
    if kind == "raw":
        text = tomli_w.dumps(put(document, path, PLACE))
        return text.replace(f'"{PLACE}"', draw(st.sampled_from(RAW_TOML))).encode()
    return draw(changed_bytes(tomli_w.dumps(document).encode()))


@st.composite
def changed_bytes(draw: st.DrawFn, content: bytes, head: int = 4_096) -> bytes:
    """Bytes with some of them changed, cut off, or put in; more often near the beginning, where headers are."""
    kind = draw(st.sampled_from(["flip", "flip", "cut", "insert", "zero", "swap"]))
    near = st.integers(0, max(0, min(len(content), head) - 1))
    at = draw(st.one_of(near, st.integers(0, max(0, len(content) - 1))))
    if kind == "cut":
        return content[:at]
    if kind == "insert":
        return content[:at] + draw(st.binary(min_size=1, max_size=9)) + content[at:]
    if kind == "zero":
        return content[:at] + bytes(draw(st.integers(1, 16))) + content[at + 8 :]
    if kind == "swap":
        other = draw(near)
        return content[:at] + content[other : other + 8] + content[at + 8 :]
    changed = bytearray(content)
    for place in draw(st.lists(near, min_size=1, max_size=4)):
        if changed:
            changed[min(place, len(changed) - 1)] = draw(st.integers(0, 255))
    return bytes(changed)


@st.composite
def changed_safetensors(draw: st.DrawFn, header: dict[str, Any], data: bytes) -> bytes:
    """A safetensors file with a header that is a little wrong, or with its bytes changed."""
    if draw(st.booleans()):
        text = draw(changed_json(header))
        length = draw(st.sampled_from([len(text), len(text), len(text), 0, 2**62, len(text) + 9]))
        return length.to_bytes(8, "little") + text + data
    text = json.dumps(header).encode()
    return draw(changed_bytes(len(text).to_bytes(8, "little") + text + data))
