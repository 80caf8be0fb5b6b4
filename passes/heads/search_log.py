"""A search that can be killed: every score is on disk before the next one is sought."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

from enginewright.ground.errors import ToolchainError
from enginewright.ground.reading import parse_json, read_text
from enginewright.ground.writing import in_words, make_folder, refuse_link


class SearchLog:
    """Scores by what they are of, in a file of JSON lines, the first of which names the search.

    Args:
        path: the file, which need not be there; None keeps scores in memory only.
        search: tells this search from others; a file of another search is refused.
    """

    def __init__(self, path: Path | None, search: str) -> None:
        self.path = path
        self.scores: dict[str, float] = {}
        if path is None:
            return
        refuse_link(path, "the log of the search")
        if path.exists() and (lines := whole_lines(path)):
            self.read(lines, search)
        else:
            with in_words("the log of the search", path):
                make_folder(path.parent)
            self.write({"search": search})

    def read(self, lines: list[str], search: str) -> None:
        """Take the scores of an earlier run."""
        where = str(self.path)
        try:
            head, *rest = (parse_json(line, what="a line of the log") for line in lines)
            found = head["search"]
            scores = {entry["of"]: float(entry["score"]) for entry in rest}
            if not all(isinstance(of, str) and math.isfinite(score) for of, score in scores.items()):
                raise ValueError("a score that is no number")
            self.scores = scores
        except (ValueError, KeyError, TypeError, OverflowError, ToolchainError) as cause:
            raise ToolchainError("this is no log of a search", where=where, help="name another file") from cause
        if found != search:
            raise ToolchainError(
                "this is the log of another search: other settings, another model or other weights",
                where=where,
                help="name another file, or remove this one",
            )

    def add(self, of: str, score: float) -> None:
        """Note a score, on disk first."""
        self.write({"of": of, "score": score})
        self.scores[of] = score

    def write(self, entry: dict[str, str | float]) -> None:
        """Append a line and wait until the disk has it.

        Raises:
            ToolchainError: it cannot be written; the lines before it are whole.
        """
        if self.path is None:
            return
        with in_words("the log of the search", self.path), self.path.open("ab", buffering=0) as file:
            size = file.tell()
            try:
                line = (json.dumps(entry) + "\n").encode()
                while line:
                    line = line[file.write(line) :]
                os.fsync(file.fileno())
            except OSError:
                file.truncate(size)
                raise


def whole_lines(path: Path) -> list[str]:
    """The lines of a file; a last one that was cut off while it was written is taken out of the file."""
    text = read_text(path, what="the log of the search")
    whole, newline, rest = text.rpartition("\n")
    if rest:
        os.truncate(path, len((whole + newline).encode()))
    return whole.split("\n") if whole else []
