"""What happens while one waits: a bar on a terminal, plain lines elsewhere; always on standard error."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

PATIENCE = 2.0
"""Seconds: what is shorter needs no estimate, and plain output hears of progress no more often."""


class Pace:
    """How long the rest of a count will take, if it goes on as it went."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock
        self.began, self.first, self.last, self.total = 0.0, 0, 0, 0

    def left(self, done: int, total: int) -> float | None:
        """Seconds left when ``done`` of ``total`` are finished; None as long as nothing can be said."""
        now = self.clock()
        if total != self.total or done < self.last or not self.total:
            self.began, self.first = now, done  # another count begins
        self.last, self.total = done, total
        if done <= self.first or now - self.began < PATIENCE:
            return None
        return (now - self.began) / (done - self.first) * (total - done)


def in_words(seconds: float) -> str:
    """A time to wait: ``5 s``, ``3 min``, ``2 h 5 min``."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


class Progress:
    """Stages of a run. ``quiet`` shows nothing; ``clock`` gives seconds."""

    def __init__(self, *, quiet: bool = False, clock: Callable[[], float] = time.perf_counter) -> None:
        self.quiet, self.clock = quiet, clock
        self.live = not quiet and sys.stderr.isatty()
        self.status: Any = None
        self.started = clock()
        self.told = float("-inf")
        self.title = ""
        self.pace = Pace(clock)

    @contextmanager
    def stage(self, title: str) -> Iterator[None]:
        """One stage, with its time when it ends."""
        began = self.clock()
        if self.live:
            from rich.console import Console

            self.status = Console(stderr=True).status(title)
            self.status.start()
        else:
            self.line(f"{title} …")
        self.title, self.pace = title, Pace(self.clock)
        done = False
        try:
            yield
            done = True
        except Exception as error:
            error.add_note(f"while: {title}")
            raise
        finally:
            if self.status is not None:
                self.status.stop()
                self.status = None
            if done:
                self.line(f"{title}: {self.clock() - began:.1f} s")

    def say(self, text: str) -> None:
        """Something about the stage under way; plain output hears of it at most every two seconds."""
        if self.status is not None:
            self.status.update(f"{self.title}: {text}")
        elif self.clock() - self.told > PATIENCE:
            self.told = self.clock()
            self.line(f"  {text}")

    def count(self, done: int, total: int, text: str) -> None:
        """``say`` with how far it is (``done`` are finished), and how long the rest will take."""
        left = self.pace.left(done, total)
        known = left is not None and "to go" not in text
        self.say(f"{text} ({done + 1}/{total}{f', about {in_words(left or 0)} to go' if known else ''})")

    def line(self, text: str) -> None:
        """A line that stays."""
        if not self.quiet:
            print(text, file=sys.stderr, flush=True)
