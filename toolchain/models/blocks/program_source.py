"""The readable source of a Transformer Program: Python that needs no package, and computes what the network does.

Source: Friedman et al. 2023, arXiv:2306.01128, section 3.4.
"""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from enginewright.ground.errors import ToolchainError
from enginewright.models.blocks.sequences import PADDING
from enginewright.models.language.transformer_programs import STEP, Config, Heads, Layer, Tables, TransformerProgram

WIDTH = 112
"""Characters of a line of the source."""

LEAVE_OUT = "leave out the steps that change weights: a program has none to spare"

PROGRAM = '''"""A Transformer Program: labels for the tokens of a sequence, by lookups, comparisons and counts.

Tokens are whole numbers from 0 to {last_token}, of which {padding} is padding; labels are those from 0 to {last_label}.
Run this file with tokens as arguments, or call labels_of.
"""

LONGEST = {longest}


def sees(tokens, here, there):
    return {sees}


def copied(values, wanted, keys, tokens):
    """For each token the value of the nearest other one whose key is wanted, else its own, else that of the first."""
    found = []
    for here, want in enumerate(wanted):
        places = [there for there, key in enumerate(keys) if key == want and sees(tokens, here, there)]
        found.append(values[min(places, key=lambda there: (there == here, abs(there - here), there), default=0)])
    return found


def summed(values, wanted, keys, tokens):
    """For each token the sum of the values of all whose key is wanted."""
    pairs = list(enumerate(zip(values, keys)))
    return [
        sum(value for there, (value, key) in pairs if key == want and sees(tokens, here, there))
        for here, want in enumerate(wanted)
    ]


def looked_up(table, other, firsts, seconds):
    """For each token the entry of the table under two numbers; ``other`` where it has none."""
    return [table.get((first, second), other) for first, second in zip(firsts, seconds)]


def variables_of(tokens):
    """All variables, by name: a value for each token."""
    positions = list(range(LONGEST))
    ones = [1] * LONGEST
{steps}
    return dict(
{names}
    )


# For each variable what each of its values adds to the score of each label, in {parts}ths.
VALUE_SCORES = {{
{value_scores}
}}

# For each count what a one adds to the score of each label, in {parts}ths.
COUNT_SCORES = {{
{count_scores}
}}


def logits_of(tokens):
    """The score of each label, for each token: a list for each of LONGEST places."""
    tokens = list(tokens) + [{padding}] * (LONGEST - len(tokens))
    variables = variables_of(tokens)
    rows = []
    for place in range(LONGEST):
        added = [scores[variables[name][place]] for name, scores in VALUE_SCORES.items()]
        added += [[variables[name][place] * score for score in scores] for name, scores in COUNT_SCORES.items()]
        rows.append([sum(column) / {parts} for column in zip(*added)])
    return rows


def labels_of(tokens):
    """The label of each token."""
    return [row.index(max(row)) for row in logits_of(tokens)][: len(tokens)]


if __name__ == "__main__":
    import sys

    print(*labels_of([int(token) for token in sys.argv[1:]]))
'''


class Writer:
    """Writes the steps of a program in order, and remembers what they are called and which values they can take."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.lines: list[str] = []
        self.variables = {"tokens": range(config.vocabulary), "positions": range(config.longest)}
        self.counts = {"ones": range(1, 2)}

    def asking(self, heads: Heads, head: int) -> str:
        """Write what each token wants; returns the name of the variable that is compared with it."""
        query, key = (list(self.variables)[int(gate[head])] for gate in (heads.query, heads.key))
        self.lines.append(f"wanted = [{tuple(heads.asked[head].tolist())}[value] for value in {query}]")
        return key

    def copying(self, name: str, heads: Heads, head: int) -> range:
        """Write a head that copies a variable."""
        key, value = self.asking(heads, head), list(self.variables)[int(heads.value[head])]
        self.lines.append(f"{name} = copied({value}, wanted, {key}, tokens)")
        return self.variables[value]

    def counting(self, name: str, heads: Heads, head: int) -> range:
        """Write a head that sums a count."""
        key, value = self.asking(heads, head), list(self.counts)[int(heads.value[head])]
        self.lines.append(f"{name} = summed({value}, wanted, {key}, tokens)")
        return range(self.config.longest * self.counts[value][-1] + 1)

    def table(self, name: str, tables: Tables, number: int, sources: dict[str, range]) -> range:
        """Write a table, without the entries that no input reaches; the most frequent one stands for the rest."""
        one, two = (list(sources)[int(gate[number])] for gate in (tables.first, tables.second))
        reached = {each: range(sources[each][0], min(sources[each][-1], tables.size - 1) + 1) for each in (one, two)}
        pairs = [(a, b) for a in reached[one] for b in reached[two] if one != two or a == b]
        entries = {pair: int(tables.table[number][pair]) for pair in pairs}
        other = Counter(entries.values()).most_common(1)[0][0]
        if len(set(entries.values())) == 1:
            self.lines.append(f"{name} = [{other}] * LONGEST")
            return range(other, other + 1)
        self.lines.append("table = {")
        for entry in sorted(set(entries.values()) - {other}):
            self.lines += wrapped(f"**dict.fromkeys({[p for p in pairs if entries[p] == entry]}, {entry}),", deep=1)
        self.lines.append("}")
        last = tables.size - 1
        firsts, seconds = (
            f"[min(count, {last}) for count in {each}]" if sources[each][-1] > last else each for each in (one, two)
        )
        self.lines.append(f"{name} = looked_up(table, {other}, {firsts}, {seconds})")
        return range(self.config.values)


def program_of(module: TransformerProgram) -> str:
    """The source of a program: its functions ``labels_of`` and ``logits_of`` take the tokens of one sequence.

    Raises:
        ToolchainError: a step has changed the program's scores to what whole numbers cannot say.
    """
    if type(module.value_scores) is not nn.Embedding or type(module.count_scores) is not nn.Linear:
        raise ToolchainError("a step has replaced a layer of the program; it can no longer be written", help=LEAVE_OUT)
    config = module.config
    writer = Writer(config)
    for index, layer in enumerate(module.layers):
        assert isinstance(layer, Layer)
        at = f"{index + 1}_"
        writer.lines += [
            "",
            f"# Layer {index + 1}: heads that copy, heads that sum, tables of variables, tables of counts",
        ]
        copied, summed, tables = {}, {}, {}
        for head in range(config.heads):
            name = f"copied_{at}{head + 1}"
            copied[name] = writer.copying(name, layer.copying, head)
        for head in range(config.heads):
            name = f"summed_{at}{head + 1}"
            summed[name] = writer.counting(name, layer.counting, head)
        writer.variables.update(copied)
        writer.counts.update(summed)
        for kind, layers_tables, sources in (
            ("variables", layer.of_variables, writer.variables),
            ("counts", layer.of_counts, writer.counts),
        ):
            for number in range(config.mlps):
                name = f"of_{kind}_{at}{number + 1}"
                tables[name] = writer.table(name, layers_tables, number, sources)
        writer.variables.update(tables)

    of_values = module.value_scores.weight.unflatten(0, (len(writer.variables), config.values))  # (V, k, labels)
    names = [*writer.variables, *writer.counts]
    return PROGRAM.format(
        last_token=config.vocabulary - 1,
        last_label=config.labels - 1,
        longest=config.longest,
        padding=PADDING,
        parts=round(1 / STEP),
        sees=f"tokens[there] != {PADDING}" + (" and there <= here" if config.is_causal else ""),
        steps=textwrap.indent("\n".join(writer.lines), " " * 4),
        names="\n".join(wrapped(" ".join(f"{name}={name}," for name in names), deep=2, deeper=0)),
        value_scores=value_scores(writer.variables, of_values),
        count_scores=count_scores(writer.counts, module.count_scores.weight.T),
    )


def value_scores(names: Iterable[str], of: Tensor) -> str:
    """The scores (V, k, labels) of each variable's values, as whole numbers of steps."""
    lines = []
    for name, rows in zip(names, whole(of), strict=True):
        lines += [f'    "{name}": [', *(f"        {row},  # {value}" for value, row in enumerate(rows)), "    ],"]
    return "\n".join(lines)


def count_scores(names: Iterable[str], of: Tensor) -> str:
    """The scores (C, labels) of each count, as whole numbers of steps."""
    return "\n".join(f'    "{name}": {row},' for name, row in zip(names, whole(of), strict=True))


def whole(scores: Tensor) -> list[Any]:
    """Scores as whole numbers of steps."""
    steps = scores / STEP
    if not torch.equal(steps, steps.round()):
        raise ToolchainError(f"scores of the program are no longer multiples of {STEP}", help=LEAVE_OUT)
    return steps.int().tolist()


def wrapped(text: str, *, deep: int, deeper: int = 1) -> list[str]:
    """A statement on as many lines as it needs, those after the first ``deeper``."""
    first, later = " " * 4 * deep, " " * 4 * (deep + deeper)
    return textwrap.wrap(text, WIDTH, initial_indent=first, subsequent_indent=later, break_long_words=False)
