"""Short sequences of tokens with the right label of each: the tasks that Transformer Programs learn.

Source: Friedman et al. 2023, arXiv:2306.01128, section 4 and appendix; the tasks are those of Weiss et al. 2021,
arXiv:2106.06981. Lengths and vocabularies are those of the authors' scripts.

Shapes: n sequences, N tokens of the longest, its marks counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int64]

PADDING, BEGIN, END = 0, 1, 2
"""Tokens; symbols follow: from 3 on where sequences are closed by END, else from 2 on."""

UNLABELLED = -1
"""The label of tokens that nothing is asked of."""

FALSE, PENDING, TRUE = 0, 1, 2
"""Labels of brackets: what was read is wrong whatever follows, may become right, or is balanced."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """Sequences, and what is asked of each token.

    Args:
        symbols: kinds of token besides the marks.
        labels: kinds of answer.
        longest: tokens of the longest sequence, its marks counted; shorter ones are padded to that.
        closes: whether END follows the symbols.
        answer: the symbols of one sequence -> a label for each.
        draw: (generator, most symbols) -> the symbols of one sequence.
    """

    symbols: int
    labels: int
    longest: int
    closes: bool
    answer: Callable[[list[int]], list[int]]
    draw: Callable[[np.random.Generator, Task], list[int]]

    @property
    def first(self) -> int:
        """The token of symbol 0."""
        return END + 1 if self.closes else END

    @property
    def vocabulary(self) -> int:
        """Kinds of token, the marks among them."""
        return self.first + self.symbols

    @property
    def room(self) -> int:
        """Most symbols of a sequence."""
        return self.longest - (2 if self.closes else 1)

    def tokens(self, symbols: list[int]) -> list[int]:
        """One sequence as tokens (N,)."""
        marked = [BEGIN, *(self.first + symbol for symbol in symbols), *([END] if self.closes else [])]
        return marked + [PADDING] * (self.longest - len(marked))

    def labelled(self, symbols: list[int]) -> list[int]:
        """The label of each token of one sequence (N,)."""
        labels = [UNLABELLED, *self.answer(symbols)]
        return labels + [UNLABELLED] * (self.longest - len(labels))

    def sequences(self, count: int, seed: int) -> tuple[Ids, Ids]:
        """Random sequences, repetitions allowed: tokens (n, N) and labels (n, N)."""
        generator = np.random.default_rng(seed)
        drawn = [self.draw(generator, self) for _ in range(count)]
        return np.array([self.tokens(s) for s in drawn]), np.array([self.labelled(s) for s in drawn])


def any_symbols(generator: np.random.Generator, task: Task) -> list[int]:
    """Symbols at random, any length as likely as another."""
    return generator.integers(0, task.symbols, generator.integers(1, task.room + 1)).tolist()


def brackets(generator: np.random.Generator, task: Task) -> list[int]:
    """As many brackets as there is room for: half of the time the start of balanced ones, else all at random.

    Symbols 2i and 2i + 1 open and close a bracket of kind i.
    """
    if generator.integers(2):
        return generator.integers(0, task.symbols, task.room).tolist()
    balanced: list[int] = []
    for _ in range(task.longest // 2):
        left, nests = 2 * int(generator.integers(task.symbols // 2)), generator.integers(2)
        balanced = [left, *balanced, left + 1] if nests else [*balanced, left, left + 1]
    return balanced[: task.room]


def counted(symbols: list[int]) -> list[int]:
    """How often each symbol occurs, less one."""
    times = Counter(symbols)
    return [times[symbol] - 1 for symbol in symbols]


def counted_twice(symbols: list[int]) -> list[int]:
    """How many kinds of symbol occur as often as each, less one."""
    times = Counter(symbols)
    alike = Counter(times.values())
    return [alike[times[symbol]] - 1 for symbol in symbols]


def by_frequency(symbols: list[int], none: int) -> list[int]:
    """The kinds of symbol, the most frequent first and of equals the first met; ``none`` where no more are left."""
    order = [symbol for symbol, _ in Counter(symbols).most_common()]
    return order + [none] * (len(symbols) - len(order))


def balance(symbols: list[int]) -> list[int]:
    """FALSE, PENDING or TRUE for each prefix of a sequence of brackets."""
    labels: list[int] = []
    open_brackets: list[int] = []
    for symbol in symbols:
        if symbol % 2 == 0:
            open_brackets.append(symbol)
        elif not open_brackets or open_brackets.pop() != symbol - 1:
            return labels + [FALSE] * (len(symbols) - len(labels))
        labels.append(PENDING if open_brackets else TRUE)
    return labels


TASKS = {
    "reverse": Task(symbols=5, labels=5, longest=8, closes=True, answer=lambda s: s[::-1], draw=any_symbols),
    "histogram": Task(symbols=6, labels=7, longest=8, closes=False, answer=counted, draw=any_symbols),
    "double-histogram": Task(symbols=6, labels=6, longest=8, closes=False, answer=counted_twice, draw=any_symbols),
    "sort": Task(symbols=5, labels=5, longest=8, closes=True, answer=sorted, draw=any_symbols),
    "most-frequent": Task(
        symbols=6, labels=7, longest=8, closes=False, answer=lambda s: by_frequency(s, 6), draw=any_symbols
    ),
    "dyck-1": Task(symbols=2, labels=3, longest=16, closes=False, answer=balance, draw=brackets),
    "dyck-2": Task(symbols=4, labels=3, longest=16, closes=False, answer=balance, draw=brackets),
}
"""By the paper's names."""
