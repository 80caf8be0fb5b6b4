"""What happens while one waits: a bar on a terminal, plain lines elsewhere; always on standard error."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Progress:
    """Stages of a run. ``quiet`` shows nothing."""

    def __init__(self, *, quiet: bool = False) -> None:
        self.quiet = quiet
        self.live = not quiet and sys.stderr.isatty()
        self.status: Any = None
        self.started = time.perf_counter()
        self.told = 0.0

    @contextmanager
    def stage(self, title: str) -> Iterator[None]:
        """One stage, with its time when it ends."""
        began = time.perf_counter()
        if self.live:
            from rich.console import Console

            self.status = Console(stderr=True).status(title)
            self.status.start()
        else:
            self.line(f"{title} …")
        self.title = title
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
                self.line(f"{title}: {time.perf_counter() - began:.1f} s")

    def say(self, text: str) -> None:
        """Something about the stage under way; plain output hears of it at most every two seconds."""
        if self.status is not None:
            self.status.update(f"{self.title}: {text}")
        elif time.perf_counter() - self.told > 2:
            self.told = time.perf_counter()
            self.line(f"  {text}")

    def count(self, done: int, total: int, text: str) -> None:
        """``say`` with how far it is."""
        self.say(f"{text} ({done + 1}/{total})")

    def line(self, text: str) -> None:
        """A line that stays."""
        if not self.quiet:
            print(text, file=sys.stderr, flush=True)
