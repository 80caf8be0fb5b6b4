"""Transformer Programs: a transformer whose values are all discrete, so that it is a program, and runs as one anywhere.

Source: Friedman et al. 2023, arXiv:2306.01128, section 3. This is the form that a trained network ends in: each head
reads one variable for its query, key and value, each MLP is a table, and each variable is a whole number. It has
lookups, comparisons and counts, and no product but that of counts and their scores; ``program_of`` of
``models/blocks/program_source.py`` writes it as Python. Checked against princeton-nlp/TransformerPrograms at commit
59970de: counts, order of operations, and outputs of all sizes with the same weights (equal to 1e-14 in float64, before
scores are rounded). What differs from it:

* They compute this form from one-hot vectors. Here a head looks for the key that its query's value asks for; of several
  it takes the nearest, of two as near the earlier, and itself last; if there is none, the first token. That is the
  order of their scores with their distance biases.
* An MLP of counts is a table as well. Counts above ``most`` are read as ``most``, in training too; only the programs
  that they print have such an end.
* Scores of the classifier are multiples of 1/256, so that their sums are exact in float32, in any order.
* Padding is no label: they give it one and mask it. Tokens of padding see what others see; they see nothing.
* Their program for the double histogram has 8 heads in a layer; table 1 has 4, as here.

Shapes: B batch, N tokens, V variables, C counts, H heads of a kind, M MLPs of a kind, k values of a variable.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from enginewright.ground.signature import Arrays, Dim, InputSpec
from enginewright.models.blocks.sequences import PADDING, TASKS
from enginewright.sources.contract import Published

STEP = 1 / 256
"""Scores of the classifier are multiples of it."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """A size of a Transformer Program.

    Args:
        values: that a variable can take; no fewer than tokens or positions.
        vocabulary: tokens; 0 is padding.
        longest: positions.
        labels: that a token can be given.
        layers: of heads, then MLPs that read what the heads gave.
        heads: of a layer that copy a variable; as many again sum counts.
        mlps: of a layer that read two variables; as many again read two counts.
        most: greatest count that an MLP tells from greater ones.
        is_causal: whether tokens see no later ones.
    """

    values: int
    vocabulary: int
    longest: int
    labels: int
    layers: int
    heads: int
    mlps: int
    most: int = 32
    is_causal: bool = False

    def variables(self, layer: int) -> int:
        """Variables that the heads of a layer can read: token and position, and what the layers before it gave."""
        return 2 + layer * (self.heads + 2 * self.mlps)

    def counts(self, layer: int) -> int:
        """Counts that the heads of a layer can read: a one, and what the layers before it gave."""
        return 1 + layer * self.heads


def size_for(task: str, *, layers: int, heads: int, mlps: int) -> Config:
    """The size for a task: as many values as positions."""
    asked = TASKS[task]
    return Config(
        values=asked.longest,
        vocabulary=asked.vocabulary,
        longest=asked.longest,
        labels=asked.labels,
        layers=layers,
        heads=heads,
        mlps=mlps,
        is_causal=task.startswith("dyck"),
    )


PUBLISHED = {
    "reverse": size_for("reverse", layers=3, heads=4, mlps=1),
    "histogram": size_for("histogram", layers=1, heads=2, mlps=1),
    "double-histogram": size_for("double-histogram", layers=3, heads=2, mlps=1),
    "sort": size_for("sort", layers=3, heads=4, mlps=2),
    "most-frequent": size_for("most-frequent", layers=3, heads=4, mlps=2),
    "dyck-1": size_for("dyck-1", layers=3, heads=4, mlps=1),
    "dyck-2": size_for("dyck-2", layers=3, heads=2, mlps=2),
}
SHIPPED = {size: PUBLISHED[size] for size in ("histogram", "sort", "reverse")}
TINY = Config(values=6, vocabulary=6, longest=6, labels=3, layers=2, heads=2, mlps=1, most=8)
OUTPUTS = ("logits",)
FIGURES = {
    size: (Published(figure="accuracy", value=f"{percent} %", source="arXiv:2306.01128, table 1"),)
    for size, percent in {
        "reverse": 99.79,
        "histogram": 100.0,
        "double-histogram": 98.40,
        "sort": 99.83,
        "most-frequent": 75.69,
        "dyck-1": 99.30,
        "dyck-2": 99.09,
    }.items()
}


def preferences(longest: int) -> Tensor:
    """How much a query (row) likes each key (column): the nearest most, of two as near the earlier, itself least."""
    place = torch.arange(longest)
    ahead = place - place[:, None]  # (N, N)
    return torch.where(ahead == 0, 1, 2 * (longest - ahead.abs()) + (ahead < 0)).float()


class Heads(nn.Module):
    """Heads that compare one variable of each token with what a variable of another token asks for."""

    query: Tensor
    key: Tensor
    value: Tensor
    asked: Tensor
    start: Tensor

    def __init__(self, config: Config, *, variables: int, sources: int) -> None:
        super().__init__()
        self.register_buffer("query", torch.randint(variables, (config.heads,)))
        self.register_buffer("key", torch.randint(variables, (config.heads,)))
        self.register_buffer("value", torch.randint(sources, (config.heads,)))
        self.register_buffer("asked", torch.randint(config.values, (config.heads, config.values)))  # by query's value
        start = config.values * torch.arange(config.heads)[:, None]
        self.register_buffer("start", start, persistent=False)  # (H, 1), of each head's row in the table

    def matches(self, variables: Tensor) -> Tensor:
        """Variables (B, V, N) -> whether each key has the value that each query asks for (B, H, N, N)."""
        asked = self.asked.flatten()[variables[:, self.query] + self.start]  # (B, H, N)
        return asked[..., None] == variables[:, self.key][:, :, None]


class CopyingHeads(Heads):
    """Copy a variable of the one key that matches best; of the first token where none matches."""

    preference: Tensor

    def __init__(self, config: Config, layer: int) -> None:
        super().__init__(config, variables=config.variables(layer), sources=config.variables(layer))
        self.register_buffer("preference", preferences(config.longest), persistent=False)

    def forward(self, variables: Tensor, seen: Tensor) -> Tensor:
        """Variables (B, V, N), keys seen (B, 1, 1 or N, N) -> (B, H, N)."""
        liked = torch.where(self.matches(variables) & seen, self.preference, 0.0)  # (B, H, N, N)
        return variables[:, self.value].gather(2, liked.argmax(3))


class CountingHeads(Heads):
    """Sum a count over all keys that match."""

    def __init__(self, config: Config, layer: int) -> None:
        super().__init__(config, variables=config.variables(layer), sources=config.counts(layer))

    def forward(self, variables: Tensor, counts: Tensor, seen: Tensor) -> Tensor:
        """Variables (B, V, N), counts (B, C, N), keys seen (B, 1, 1 or N, N) -> (B, H, N)."""
        return torch.where(self.matches(variables) & seen, counts[:, self.value][:, :, None], 0).sum(3)


class Tables(nn.Module):
    """Give a variable for two whole numbers by a table: what an MLP of two inputs has become."""

    first: Tensor
    second: Tensor
    table: Tensor
    start: Tensor

    def __init__(self, config: Config, *, sources: int, size: int) -> None:
        super().__init__()
        self.size = size
        self.register_buffer("first", torch.randint(sources, (config.mlps,)))
        self.register_buffer("second", torch.randint(sources, (config.mlps,)))
        self.register_buffer("table", torch.randint(config.values, (config.mlps, size, size)))
        start = size * size * torch.arange(config.mlps)[:, None]
        self.register_buffer("start", start, persistent=False)  # (M, 1), of each table among all

    def forward(self, numbers: Tensor) -> Tensor:
        """Variables or counts (B, V or C, N) -> variables (B, M, N)."""
        numbers = numbers.clamp(max=self.size - 1)
        return self.table.flatten()[self.start + self.size * numbers[:, self.first] + numbers[:, self.second]]


class Layer(nn.Module):
    """Heads, then MLPs; each of them adds a variable or a count, and none is ever changed."""

    def __init__(self, config: Config, layer: int) -> None:
        super().__init__()
        self.copying = CopyingHeads(config, layer)
        self.counting = CountingHeads(config, layer)
        self.of_variables = Tables(config, sources=config.variables(layer) + config.heads, size=config.values)
        self.of_counts = Tables(config, sources=config.counts(layer + 1), size=config.most + 1)

    def forward(self, variables: Tensor, counts: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
        """Variables (B, V, N), counts (B, C, N) -> the same with those that this layer adds."""
        copied, summed = self.copying(variables, seen), self.counting(variables, counts, seen)
        variables, counts = torch.cat([variables, copied], dim=1), torch.cat([counts, summed], dim=1)
        return torch.cat([variables, self.of_variables(variables), self.of_counts(counts)], dim=1), counts


class TransformerProgram(nn.Module):
    """Label each token of a sequence by a program of lookups, comparisons and counts."""

    position: Tensor
    start: Tensor
    earlier: Tensor

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(Layer(config, layer) for layer in range(config.layers))
        variables, counts = config.variables(config.layers), config.counts(config.layers)
        self.value_scores = nn.Embedding(variables * config.values, config.labels)
        self.count_scores = nn.Linear(counts, config.labels, bias=False)
        for weight in (self.value_scores.weight, self.count_scores.weight):
            weight.data = rounded(torch.randn_like(weight))
        self.register_buffer("position", torch.arange(config.longest), persistent=False)  # (N,)
        start = config.values * torch.arange(variables)
        self.register_buffer("start", start, persistent=False)  # (V,), of each variable's scores
        earlier = torch.ones(config.longest, config.longest, dtype=torch.bool).tril()
        self.register_buffer("earlier", earlier, persistent=False)  # (N, N)

    def forward(self, ids: Tensor) -> Tensor:
        """Ids (B, N) -> logits (B, N, labels)."""
        seen = (ids != PADDING)[:, None, None]  # (B, 1, 1, N)
        if self.config.is_causal:
            seen = seen & self.earlier  # (B, 1, N, N)
        variables = torch.stack([ids, self.position.expand_as(ids)], dim=1)  # (B, 2, N)
        counts = torch.ones_like(ids)[:, None]  # (B, 1, N)
        for layer in self.layers:
            variables, counts = layer(variables, counts, seen)
        of_values = self.value_scores(variables.transpose(1, 2) + self.start).sum(2)  # (B, N, labels)
        return of_values + self.count_scores(counts.transpose(1, 2).to(of_values.dtype))

    def python_source(self) -> str:
        """The same program in Python, without any package."""
        from enginewright.models.blocks.program_source import program_of

        return program_of(self)


def rounded(scores: Tensor) -> Tensor:
    """The nearest multiples of STEP."""
    return (scores / STEP).round() * STEP


def build(config: Config) -> TransformerProgram:
    """A program drawn at random."""
    return TransformerProgram(config)


def inputs(config: Config) -> tuple[InputSpec, ...]:
    """Sequences of any tokens; shorter ones are padded at their end."""
    batch = Dim(name="batch", low=1, typical=8, high=256)
    shape = (batch, config.longest)
    return (InputSpec(name="ids", role="sample", shape=shape, dtype="int64", low=0, high=config.vocabulary),)


def realistic(module: nn.Module, size: str, config: Config) -> Callable[[int, int], list[Arrays]] | None:
    """Sequences of the task that the size is for."""
    del module, config
    if size not in TASKS:
        return None
    return lambda count, seed: [{"ids": TASKS[size].sequences(8, seed + call)[0]} for call in range(count)]
