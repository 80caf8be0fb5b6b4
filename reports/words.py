"""How a report says a number, a verdict or a comparison: one wording for the page, the comment and the test results."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from enginewright.reports.record import Verdict

VERDICT: dict[Verdict, str] = {
    "met": "met",
    "missed": "missed",
    "not_measured": "not measured",
    "inconclusive": "inconclusive",
}
GLYPH: dict[Verdict, str] = {"met": "✓", "missed": "✗", "not_measured": "○", "inconclusive": "?"}
NOT_MEASURED = VERDICT["not_measured"]


def number(value: float, digits: int = 3) -> str:
    """So many significant digits; scientific below 0.001 and from 100 000 on, so that nothing small reads as zero."""
    if value == 0:
        return "0"
    if math.isinf(value):
        return "infinite" if value > 0 else "-infinite"
    if 1e-3 <= abs(value) < 1e5:
        return f"{value:.{max(digits - 1 - math.floor(math.log10(abs(value))), 0)}f}"
    return f"{value:.{digits - 1}e}"


def size(byte_count: int | None) -> str:
    """Bytes as MB (a million bytes), the small ones as kB, the large ones as GB."""
    if byte_count is None:
        return NOT_MEASURED
    for unit, scale, least in (("GB", 1e9, 1e9), ("MB", 1e6, 1e5), ("kB", 1e3, 1e3)):
        if byte_count >= least:
            return f"{number(byte_count / scale)} {unit}"
    return f"{byte_count} bytes"


def amount(count: int | None) -> str:
    """Parameters or multiply-accumulates, in thousands (k), millions (M) or thousand millions (G)."""
    if count is None:
        return NOT_MEASURED
    for unit, scale in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= scale:
            return f"{number(count / scale)} {unit}"
    return str(count)


def change(before: int | None, after: int | None) -> str:
    """Growth or shrinkage in percent."""
    if before is None or after is None:
        return NOT_MEASURED
    if before == after:
        return "unchanged"
    return f"{(after - before) / before:+.1%}" if before else "new"


def milliseconds(seconds: float) -> str:
    """A time of one call."""
    return f"{number(seconds * 1e3)} ms"


def duration(seconds: float | None) -> str:
    """A time of a build or a run."""
    return NOT_MEASURED if seconds is None else f"{number(seconds)} s"


def percent(part: float) -> str:
    """A share of one."""
    return f"{part:.0%}" if part >= 0.1 else f"{part:.1%}"


def cosine(value: float) -> str:
    """A cosine similarity; close to 1 as its distance from it, so that 0.99999 does not read as 1."""
    if value >= 1:
        return "1"
    return f"1 - {1 - value:.1e}" if value > 0.99 else number(value)


def decibels(value: float | None) -> str:
    """A signal-to-noise ratio; none stands for equal outputs."""
    if value is not None and math.isinf(value):
        return f"{number(value)} dB"
    return "infinite (equal)" if value is None else f"{value:.1f} dB"


def figure(value: float | None, unit: str = "") -> str:
    """A figure beside a bound or beside the original's: precise enough not to seem to be on the other side of it."""
    if value is None:
        return NOT_MEASURED
    if math.isinf(value):
        return f"{number(value)} {unit}".strip()
    text = cosine(value) if 0 < abs(1 - value) < 1e-5 else f"{value:.6g}"
    return f"{text} {unit}".strip()


def ratio(value: float) -> str:
    """A ratio of times; only 1 itself reads as 1."""
    if value < 0.1:
        return number(value, 2)
    decimals = 2
    while decimals < 6 and float(f"{value:.{decimals}f}") == 1 != value:
        decimals += 1
    return f"{value:.{decimals}f}"


def interval(value: float, low: float, high: float) -> str:
    """A ratio with the limits of its interval."""
    return f"{ratio(value)} ({ratio(low)} to {ratio(high)})"


def tendency(low: float, high: float) -> str:
    """What the interval of a ratio of times says; nothing unless it leaves out 1."""
    if high < 1:
        return "faster"
    return "slower" if low > 1 else "no measurable difference"


def times(value: float, low: float, high: float, than: str) -> str:
    """A ratio of times as people say it: ``1.58x faster than …``; nothing is claimed where its interval holds 1."""
    said = tendency(low, high)
    if said == "faster" and low > 0:
        return f"{speed(value, low, high)} than {than} ({number(1 / high)}x to {number(1 / low)}x)"
    if said == "slower":
        return f"{speed(value, low, high)} than {than} ({number(low)}x to {number(high)}x)"
    return f"no measurable difference from {than}: {interval(value, low, high)} of its time"


def speed(value: float, low: float, high: float) -> str:
    """The same without what it is beside."""
    said = tendency(low, high)
    if said == "faster" and low > 0:
        return f"{number(1 / value)}x faster"
    return f"{number(value)}x slower" if said == "slower" else "no measurable difference"


def beside_fp32(value: float) -> str:
    """What 8 bits bring over the same graph in fp32, in the same runtime."""
    graph = "the same graph in fp32 in the same runtime"
    if value < 1:
        return f"{number(1 / value)}x faster than {graph}"
    return f"NOT faster than {graph}: {ratio(value)} of its time"


def plural(count: int, noun: str) -> str:
    """``1 layer``, ``2 layers``."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def listing(items: Sequence[str]) -> str:
    """``a``, ``a and b``, ``a, b and c``."""
    return " and ".join(filter(None, [", ".join(items[:-1]), *items[-1:]]))


def shapes(by_name: Mapping[str, Sequence[int]]) -> str:
    """Input shapes, such as ``x 2×1×28×28, t 2``."""
    return ", ".join(f"{name} {'×'.join(map(str, shape)) or 'scalar'}" for name, shape in by_name.items()) or "none"


def setting(value: Any) -> str:
    """A parameter or a fact about the machine."""
    if value is None:
        return "not known"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        return ", ".join(f"{key} {setting(entry)}" for key, entry in value.items()) or "none"
    if isinstance(value, list | tuple):
        return ", ".join(setting(entry) for entry in value) or "none"
    return str(value)
