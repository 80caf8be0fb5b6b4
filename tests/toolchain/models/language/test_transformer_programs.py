from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from enginewright import sources
from enginewright.models.blocks.sequences import TASKS, UNLABELLED
from enginewright.models.language import transformer_programs
from enginewright.models.language.transformer_programs import STEP, CopyingHeads, CountingHeads, Tables

TINY = transformer_programs.TINY
ONE = replace(TINY, heads=1, mlps=1)
EVERY = torch.ones(1, 1, 1, 6, dtype=torch.bool)


@pytest.mark.parametrize(
    ("size", "width", "scores"),
    [
        ("reverse", 173, 865),
        ("histogram", 51, 357),
        ("double-histogram", 119, 714),
        ("sort", 221, 1105),
        ("most-frequent", 221, 1547),
        ("dyck-1", 333, 999),
        ("dyck-2", 327, 981),
    ],
)
def test_the_classifier_reads_every_variable_and_count(size: str, width: int, scores: int) -> None:
    """Widths of the stream, and parameters of the classifier, are those of the authors' code but for padding's."""
    config = transformer_programs.PUBLISHED[size]
    with torch.device("meta"):
        program = transformer_programs.build(config)
    assert config.variables(config.layers) * config.values + config.counts(config.layers) == width
    assert sum(p.numel() for p in program.parameters()) == scores == width * config.labels


def asking(heads: CopyingHeads | CountingHeads, asked: int, *, value: int = 1) -> None:
    """Every query asks for a token; the head gives the variable or count ``value``."""
    for gate, index in ((heads.query, 0), (heads.key, 0), (heads.value, value)):
        gate.fill_(index)
    heads.asked.fill_(asked)


def variables(*tokens: int) -> Tensor:
    return torch.stack([torch.tensor(tokens), torch.arange(len(tokens))])[None]  # (1, 2, N)


def test_a_query_copies_from_the_nearest_other_key_and_the_earlier_of_two() -> None:
    head = CopyingHeads(ONE, 0)
    asking(head, asked=4)
    assert head(variables(4, 0, 0, 4, 0, 4), EVERY)[0, 0].tolist() == [3, 0, 3, 5, 3, 3]


def test_a_query_copies_from_itself_where_no_other_key_matches() -> None:
    head = CopyingHeads(ONE, 0)
    asking(head, asked=4)
    assert head(variables(2, 2, 2, 4, 2, 2), EVERY)[0, 0].tolist() == [3] * 6


def test_a_query_without_a_match_copies_from_the_first_token() -> None:
    head = CopyingHeads(ONE, 0)
    asking(head, asked=4, value=0)
    assert head(variables(3, 2, 2, 0, 2, 2), EVERY)[0, 0].tolist() == [3] * 6


def test_keys_that_are_not_seen_match_nothing() -> None:
    copying, counting = CopyingHeads(ONE, 0), CountingHeads(ONE, 0)
    asking(copying, asked=4)
    asking(counting, asked=4, value=0)
    x, ones, earlier = variables(1, 4, 4, 2, 4, 4), torch.ones(1, 1, 6).long(), torch.ones(6, 6).bool().tril()
    assert copying(x, earlier)[0, 0].tolist() == [0, 1, 1, 2, 2, 4]
    assert counting(x, ones, earlier)[0, 0].tolist() == [0, 1, 2, 2, 3, 4]
    assert copying(x, EVERY)[0, 0].tolist() == [1, 2, 1, 2, 5, 4]
    assert counting(x, ones, EVERY)[0, 0].tolist() == [4] * 6


def test_each_query_looks_up_what_it_asks_for_in_its_heads_own_table() -> None:
    heads = CountingHeads(replace(ONE, heads=2), 0)
    asking(heads, asked=5, value=0)
    heads.asked[0] = torch.arange(6)  # the first head asks for tokens like its own
    counts = torch.tensor([[[1, 10, 100, 1000, 10_000, 100_000]]])
    found = heads(variables(0, 1, 1, 5, 0, 5), counts, EVERY)[0]
    assert found.tolist() == [[10_001, 110, 110, 101_000, 10_001, 101_000], [101_000] * 6]


def test_tables_read_two_numbers_and_large_ones_as_the_largest() -> None:
    tables = Tables(replace(ONE, mlps=2), sources=2, size=3)
    tables.first.copy_(torch.tensor([0, 1]))
    tables.second.copy_(torch.tensor([1, 1]))
    tables.table.copy_(torch.arange(18).view(2, 3, 3))
    found = tables(torch.tensor([[[0, 2, 40], [1, 0, 99]]]))
    assert found.tolist() == [[[1, 6, 8], [13, 9, 17]]]


@torch.no_grad()
def test_padding_changes_no_label_of_what_it_follows() -> None:
    """A head that asks for padding finds the first token, however many there are."""
    torch.manual_seed(1)
    program = transformer_programs.build(TINY)
    for layer in program.layers:
        layer.copying.key.fill_(0)
        layer.copying.asked.fill_(0)
    padded = torch.tensor([[3, 4, 2, 0, 0, 0]])
    wanted = program(padded)
    for layer in program.layers:
        layer.copying.asked.fill_(3)  # the first token's
    torch.testing.assert_close(program(padded)[:, 1:], wanted[:, 1:], rtol=0, atol=0)
    for layer in program.layers:
        layer.copying.asked.fill_(2)
    assert not torch.equal(program(padded)[:, 1:], wanted[:, 1:])


@torch.no_grad()
def test_a_causal_program_gives_a_token_the_same_logits_whatever_follows() -> None:
    torch.manual_seed(1)
    ids = torch.randint(1, 6, (50, 6))
    changed = torch.cat([ids[:, :3], torch.randint(1, 6, (50, 3))], dim=1)
    causal, other = (transformer_programs.build(replace(TINY, is_causal=flag)) for flag in (True, False))
    assert torch.equal(causal(ids)[:, :3], causal(changed)[:, :3])
    assert not torch.equal(other(ids)[:, :3], other(changed)[:, :3])


@pytest.mark.parametrize("size", transformer_programs.SHIPPED)
def test_sums_of_scores_are_exact_in_float32(size: str) -> None:
    """No order of additions rounds: all scores, at the greatest counts that can be, stay below 2**24 steps."""
    config = transformer_programs.PUBLISHED[size]
    weights = sources.load(f"transformer_programs:{size}").module.state_dict()
    values, counts = weights["value_scores.weight"], weights["count_scores.weight"]
    assert all(torch.equal(scores, (scores / STEP).round() * STEP) for scores in (values, counts))
    greatest = [1]
    for layer in range(config.layers):
        greatest += [config.longest * greatest[int(g)] for g in weights[f"layers.{layer}.counting.value"]]
    most = values.abs().unflatten(0, (-1, config.values)).amax(1).sum(0)
    most += counts.abs() @ torch.tensor(greatest).float()
    assert most.max() / STEP < 2**24


@pytest.mark.parametrize("size", transformer_programs.SHIPPED)
@torch.no_grad()
def test_the_shipped_program_solves_its_task_on_fresh_sequences(size: str) -> None:
    ids, labels = TASKS[size].sequences(2000, seed=99)
    found = sources.load(f"transformer_programs:{size}").module(torch.from_numpy(ids)).argmax(2).numpy()
    assert (found == labels)[labels != UNLABELLED].mean() >= LEAST[size]


LEAST = {"histogram": 0.99, "sort": 0.99, "reverse": 0.93}  # what each reached is in the training script
