"""What holds of a model between two steps of a recipe. A step states what it requires, establishes and destroys."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Fact:
    """Something that holds of a model.

    Args:
        words: what a step needs that requires it.
        gone: what there is instead after a step that destroyed it.
        given: whether it holds of every model that no step has touched.
    """

    words: str
    gone: str
    given: bool = True


UNTOUCHED = Fact("the untouched model", "a changed model")
"""Destroyed by every step."""

FLOAT_WEIGHTS = Fact("weights in floats", "quantized weights")
FULL_PRECISION = Fact("weights in full precision", "weights in half precision")
WHOLE_MATRICES = Fact("weights that are whole matrices", "weights as products of two matrices")
FREE_WEIGHTS = Fact("weights that may all be other than zero", "two of four weights at zero, a pattern to be kept")
TWO_IN_FOUR_ZEROS = Fact("two of four weights at zero", "weights without that pattern", given=False)
DENSE_FEED_FORWARDS = Fact("dense feed-forwards", "feed-forwards of experts")
FLOAT_GRAPH = Fact("a graph in floats", "a quantized graph")
UNMARKED_HEADS = Fact("attention whose heads nothing tells apart", "attention whose heads are told apart for good")
UNBLENDED_ATTENTION = Fact("plain attention", "attention that is blended by an input")
ALL_TOKENS = Fact("blocks that run on every token", "blocks that run on fewer tokens")
ALL_INPUTS = Fact("every input of the original", "no input that was bound")
SINGLE_ROWS = Fact("a call that runs every row once", "a call that runs every row twice")
INDEPENDENT_ROWS = Fact("rows of a call that do not read one another", "rows that read one another")
ONE_NETWORK = Fact("one network for all timesteps", "several networks by timestep")
STATELESS_CALLS = Fact("calls that keep nothing from one to the next", "a state between calls")
UNPARTED = Fact("networks that are exported whole", "networks that are exported as two graphs each")


class Step(Protocol):
    """What is asked of a step of a recipe."""

    @property
    def requires(self) -> tuple[Fact, ...]:
        """Facts that must hold before it."""

    @property
    def establishes(self) -> tuple[Fact, ...]:
        """Facts that hold after it."""

    @property
    def destroys(self) -> tuple[Fact, ...]:
        """Facts that hold no more after it."""


@dataclass(frozen=True)
class Missing:
    """A fact that a step requires and that does not hold.

    Args:
        step: its place in the recipe.
        fact: which.
        by: the place of the step that destroyed it; None where no step established it.
    """

    step: int
    fact: Fact
    by: int | None


def missing(steps: Sequence[Step]) -> list[Missing]:
    """For each step of a recipe the facts that it lacks."""
    destroyed: dict[Fact, int] = {}
    held: set[Fact] = set()
    found: list[Missing] = []
    for place, step in enumerate(steps):
        lacks = [fact for fact in step.requires if fact in destroyed or not (fact.given or fact in held)]
        found += [Missing(step=place, fact=fact, by=destroyed.get(fact)) for fact in lacks]
        for fact in (UNTOUCHED, *step.destroys):
            destroyed.setdefault(fact, place)
            held.discard(fact)
        for fact in step.establishes:
            destroyed.pop(fact, None)
            held.add(fact)
    return found


def legal_order(steps: Sequence[Step]) -> list[int] | None:
    """An order of the same steps in which none lacks a fact, near the given one; None where none was found.

    A step that destroys a fact goes after all others that require it; of those that may go next, the first does.
    """
    left, order = list(range(len(steps))), list[int]()
    while left:
        needed = {place: {fact for other in left if other != place for fact in steps[other].requires} for place in left}
        ready = [place for place in left if not needed[place] & {UNTOUCHED, *steps[place].destroys}]
        if not ready:
            return None
        order.append(ready[0])
        left.remove(ready[0])
    return None if missing([steps[place] for place in order]) else order
