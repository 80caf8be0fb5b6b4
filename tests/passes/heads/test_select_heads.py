import json

import pytest
import torch
from torch import nn

from enginewright.ground.errors import ToolchainError
from enginewright.models.blocks.transformer import SelfAttention
from enginewright.passes.contract import Context, Plan
from enginewright.passes.heads.perturb_heads import PerturbHeads
from enginewright.passes.heads.select_heads import SelectHeads
from enginewright.passes.heads.softpag import BlendedHeads, PerturbedHeads
from enginewright.passes.kernel.heads import KeptHeads
from enginewright.passes.pruning.prune_heads import PruneHeads
from enginewright.passes.traits import HeadedAttention, layers_of
from tests.passes.conftest import reference_dit
from tests.passes.joint import JOINT

MODES = ("perturb", "prune")


class Two(nn.Module):
    """Two attention layers of 3 heads; the first number of a head's columns of the projection is its own: 1 to 6."""

    def __init__(self):
        super().__init__()
        self.a, self.b = SelfAttention(6, 3), SelfAttention(6, 3)
        with torch.no_grad():
            for i, layer in enumerate((self.a, self.b)):
                layer.proj.weight[0, ::2] = torch.tensor([1.0, 2.0, 3.0]) + 3 * i

    def forward(self, x):
        return self.b(self.a(x))


def touched(net):
    """Numbers of the heads that were perturbed or are gone."""
    found = set()
    for name, first in (("a", 1), ("b", 4)):
        proj = getattr(net, name).proj
        if isinstance(proj, BlendedHeads):
            found |= {first + int(head) for head in proj.columns.argmax(dim=1) // 2}
        else:
            found |= {first, first + 1, first + 2} - {int(number) for number in proj.weight[0, ::2]}
    return frozenset(found)


class Table:
    """Scores by the heads touched, as written down; sets that are not are worth minus their sum."""

    def __init__(self, fail_at=None, **known):
        self.known = {frozenset(int(c) for c in key.strip("_")): value for key, value in known.items()}
        self.asked, self.fail_at = [], fail_at

    def __call__(self, net):
        heads = touched(net)
        if len(self.asked) == self.fail_at:
            raise KeyboardInterrupt
        self.asked.append(heads)
        return self.known.get(heads, -float(sum(heads)))


BY_HAND = {"_": 0.0, "_5": 3.0, "_2": 2.0, "_25": 2.5, "_56": 4.0, "_256": 7.0, "_456": 6.0, "_13": 9.0}
"""The best pair is 1 and 3; a greedy search takes 5 first, then 6, then 2."""


def context(score, **more):
    return Context(score_of=lambda text: score, **more)


@pytest.mark.parametrize("mode", MODES)
def test_the_search_is_greedy_as_found_by_hand(mode):
    score = Table(**BY_HAND)

    plan = SelectHeads(mode=mode, rounds=3, score="mine").plan(Two(), context(score))

    assert list(plan.facts.chosen) == ["b:1", "b:2", "a:1"]
    assert [entry["added"] for entry in plan.facts.rounds] == [["b:1"], ["b:2"], ["a:1"]]
    assert (plan.facts.before, plan.facts.after) == (0, 7)
    assert plan.facts.rounds[1]["tried"]["a:1"] == 2.5
    # In pruning, the layer b has one head left after two rounds; it is not tried.
    assert [len(entry["tried"]) for entry in plan.facts.rounds] == [6, 5, 4 if mode == "perturb" else 3]
    entry = plan.choice["b"]
    assert entry == (
        PerturbedHeads(heads=(1, 2), of=3, first=1) if mode == "perturb" else KeptHeads(kept=(0,), removed=(1, 2), of=3)
    )


def test_several_heads_a_round_are_the_best_ones_and_distinct():
    plan = SelectHeads(rounds=2, heads_per_round=2).plan(Two(), context(Table(**BY_HAND)))

    assert plan.facts.rounds[0]["added"] == ["b:1", "a:1"]
    assert len(set(plan.facts.chosen)) == 4


def test_pruning_several_heads_a_round_leaves_one_in_each_layer():
    plan = SelectHeads(mode="prune", heads_per_round=4).plan(Two(), context(Table(_6=3.0, _5=2.0, _4=1.0)))

    assert list(plan.facts.chosen) == ["b:2", "b:1", "a:0", "a:1"]


def test_equal_scores_are_broken_by_place():
    plan = SelectHeads(heads_per_round=2).plan(Two(), context(lambda net: 1.0))

    assert list(plan.facts.chosen) == ["a:0", "a:1"]


def test_the_result_is_perturb_heads_with_those_heads():
    subject = reference_dit()
    score = lambda net: -float(subject.output(net).norm())  # noqa: E731
    result = SelectHeads(score="mine", rounds=2, u=0.5, w=2).apply(subject.copy(), context(score))
    heads = {path: entry.heads for path, entry in result.plan.choice.items()}
    same = PerturbHeads(heads=heads, guidance=True).apply(subject.copy(), Context()).model
    more = {"pag_u": torch.rand(2, 2), "pag_w": torch.rand(2)}

    with torch.no_grad():
        assert torch.equal(result.model(**subject.inputs, **more), same(**subject.inputs, **more))
    torch.testing.assert_close(subject.output(result.model), subject.output(subject.model), atol=1e-6, rtol=1e-6)
    assert [each.name for each in SelectHeads().new_inputs(result.plan)] == ["pag_u", "pag_w"]


def test_a_baked_result_is_what_was_scored():
    subject = reference_dit()
    score = lambda net: -float(subject.output(net).norm())  # noqa: E731
    step = SelectHeads(score="mine", rounds=2, u=0.5, w=2, baked=True)
    result = step.apply(subject.copy(), context(score))

    assert step.new_inputs(result.plan) == ()
    assert score(result.model) == pytest.approx(result.plan.facts.after, rel=1e-4)
    assert result.plan.facts.after != result.plan.facts.before


@pytest.mark.parametrize("name", JOINT)
@pytest.mark.parametrize("mode", MODES)
def test_joint_attention_is_searched_too(name, mode):
    subject = JOINT[name]()
    wanted = subject.output(subject.model)
    score = lambda net: -float((subject.output(net) - wanted).norm())  # noqa: E731
    step = SelectHeads(score="mine", mode=mode, rounds=2, candidates=3, guidance=False, baked=True)

    result = step.apply(subject.copy(), context(score))

    assert len(set(result.plan.facts.chosen)) == 2
    assert score(result.model) == pytest.approx(result.plan.facts.after, rel=1e-4)
    if mode == "prune":
        kept = sum(layer.heads for _, layer in layers_of(result.model, HeadedAttention))
        assert kept == 4 * len(subject.paths) - 2


def test_pruning_by_fidelity_finds_the_silent_heads():
    subject = reference_dit()
    with torch.no_grad():
        subject.model.blocks[0].attn.proj.weight[:, 8:16] = 0
        subject.model.blocks[1].attn.proj.weight[:, 24:] = 0
    wanted = subject.output(subject.model)
    score = lambda net: -float((subject.output(net) - wanted).norm())  # noqa: E731

    result = SelectHeads(mode="prune", rounds=2).apply(subject.copy(), context(score))

    assert sorted(result.plan.facts.chosen) == ["blocks.0.attn:1", "blocks.1.attn:3"]
    by_hand = PruneHeads().rewrite(subject.copy(), Plan(choice=result.plan.choice))
    assert torch.equal(subject.output(result.model), subject.output(by_hand))
    torch.testing.assert_close(subject.output(result.model), wanted, atol=1e-5, rtol=0)


# Stopped and gone on


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("fail_at", [0, 4, 9])
def test_a_search_that_was_killed_goes_on_to_the_same_plan(tmp_path, mode, fail_at):
    torch.manual_seed(3)
    net = Two()
    settings = {"mode": mode, "rounds": 3, "score": "mine"}
    whole = Table(**BY_HAND)
    wanted = SelectHeads(**settings).plan(net, context(whole))
    log = tmp_path / "logs" / "search.jsonl"
    step = SelectHeads(**settings, log=str(log))

    with pytest.raises(KeyboardInterrupt):
        step.plan(net, context(Table(fail_at=fail_at, **BY_HAND)))
    assert len(log.read_text().splitlines()) == 1 + fail_at
    rest = Table(**BY_HAND)
    found = step.plan(net, context(rest))

    assert found.digest() == wanted.digest()
    assert rest.asked == whole.asked[fail_at:]
    again = Table(fail_at=0)
    assert step.plan(net, context(again)).digest() == wanted.digest()
    assert again.asked == []


def test_a_line_that_was_cut_off_is_scored_again(tmp_path):
    net, log = Two(), tmp_path / "search.jsonl"
    step = SelectHeads(rounds=2, log=str(log))
    wanted = step.plan(net, context(Table(**BY_HAND)))
    text = log.read_text()
    log.write_text(text[:-9])

    rest = Table(**BY_HAND)
    assert step.plan(net, context(rest)).digest() == wanted.digest()

    assert len(rest.asked) == 1
    assert log.read_text() == text


def test_a_log_of_another_search_is_refused(tmp_path):
    log = tmp_path / "search.jsonl"
    net = Two()
    SelectHeads(log=str(log)).plan(net, context(Table()))

    for step, other, seed in (
        (SelectHeads(log=str(log), u=0.5), net, 0),
        (SelectHeads(log=str(log)), Two(), 0),
        (SelectHeads(log=str(log)), net, 1),
    ):
        with pytest.raises(ToolchainError, match="log of another search") as caught:
            step.plan(other, context(Table(), seed=seed))
        assert caught.value.where == str(log)
    log.write_text("hello\n")
    with pytest.raises(ToolchainError, match="no log of a search"):
        SelectHeads(log=str(log)).plan(net, context(Table()))


def test_a_log_holds_a_line_for_each_score(tmp_path):
    log = tmp_path / "search.jsonl"
    SelectHeads(log=str(log)).plan(Two(), context(Table(**BY_HAND)))

    head, *entries = map(json.loads, log.read_text().splitlines())

    assert set(head) == {"search"}
    assert entries[0] == {"of": "", "score": 0}
    assert {"of": "b:1", "score": 3} in entries
    assert len(entries) == 7  # none, and each of the six; the chosen one is known


# Bounds of a search


def test_candidates_are_drawn_by_the_seed():
    def tried(seed, of_recipe=0):
        step = SelectHeads(candidates=2, rounds=2, seed=seed)
        plan = step.plan(Two(), context(lambda net: 1.0, seed=of_recipe))
        return [list(entry["tried"]) for entry in plan.facts.rounds]

    assert tried(0) == tried(0)
    assert tried(1) == tried(0, of_recipe=1)
    assert len({str(tried(seed)) for seed in range(6)}) > 1
    assert all(len(heads) == 2 for heads in tried(0))


def test_only_the_layers_asked_for_are_searched():
    score = Table(**BY_HAND)

    plan = SelectHeads(layers=("a",), rounds=2).plan(Two(), context(score))

    assert list(plan.facts.chosen) == ["a:1", "a:0"]
    assert plan.skipped == {"b": "it is not among the layers to choose from"}


def test_progress_is_told():
    told = []

    SelectHeads(rounds=2).plan(Two(), context(Table(), say=lambda done, total, text: told.append((done, total))))

    assert told == [(i, 13) for i in range(1, 14)]


def test_layers_without_a_chosen_head_say_so():
    plan = SelectHeads().plan(Two(), context(Table(**BY_HAND)))

    assert plan.skipped == {"a": "none of its heads was chosen"}


# What a user can mend


def test_more_heads_than_there_are():
    with pytest.raises(ToolchainError, match="3 rounds of 2 heads are 6; there are 4 to choose from"):
        SelectHeads(mode="prune", rounds=3, heads_per_round=2).plan(Two(), context(Table()))
    SelectHeads(mode="perturb", rounds=3, heads_per_round=2).plan(Two(), context(Table()))
    with pytest.raises(ToolchainError, match="cannot add 2 of 1 candidates"):
        SelectHeads(heads_per_round=2, candidates=1).plan(Two(), context(Table()))


def test_a_score_that_is_no_number_names_its_heads():
    with pytest.raises(ToolchainError, match="score 'mine' gave nan") as caught:
        SelectHeads(score="mine").plan(Two(), context(lambda net: float("nan") if touched(net) else 1.0))
    assert caught.value.where == "a:0"


def test_a_pattern_without_a_layer():
    with pytest.raises(ToolchainError, match="layers 'attn' matches no attention layer"):
        SelectHeads(layers=("attn",)).plan(Two(), context(Table()))
