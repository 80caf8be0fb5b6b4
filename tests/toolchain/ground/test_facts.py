"""What steps require, establish and destroy, and the orders that follow from it."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from fnmatch import fnmatchcase

import pytest

from enginewright import catalog
from enginewright.ground.errors import ToolchainError
from enginewright.ground.facts import UNTOUCHED, Fact, Missing, legal_order, missing
from enginewright.passes.contract import Pass
from enginewright.recipe import order_faults

WOOD, EDGE = Fact("wood", "ash"), Fact("an edge", "no edge", given=False)


@dataclass(frozen=True)
class Does:
    requires: tuple[Fact, ...] = ()
    establishes: tuple[Fact, ...] = ()
    destroys: tuple[Fact, ...] = ()


BURN, CARVE = Does(requires=(WOOD,), destroys=(WOOD,)), Does(requires=(WOOD, EDGE))
SHARPEN, PLANT = Does(establishes=(EDGE,)), Does(establishes=(WOOD,))


def test_a_fact_that_is_destroyed_is_missed_until_it_is_established_anew() -> None:
    assert missing([BURN, BURN]) == [Missing(step=1, fact=WOOD, by=0)]
    assert missing([BURN, PLANT, BURN]) == []
    assert missing([BURN, BURN, BURN])[1].by == 0, "the first to destroy it is named"


def test_a_fact_that_no_model_has_of_itself_must_be_established() -> None:
    assert missing([CARVE]) == [Missing(step=0, fact=EDGE, by=None)]
    assert missing([SHARPEN, CARVE]) == []
    assert missing([SHARPEN, Does(destroys=(EDGE,)), CARVE]) == [Missing(step=2, fact=EDGE, by=1)]


def test_every_step_touches_the_model() -> None:
    first = Does(requires=(UNTOUCHED,))
    assert missing([first, SHARPEN]) == []
    assert missing([SHARPEN, first]) == [Missing(step=1, fact=UNTOUCHED, by=0)]
    assert legal_order([SHARPEN, first]) == [1, 0]
    assert legal_order([first, first]) is None


def test_the_order_that_goes_is_found_where_there_is_one() -> None:
    assert legal_order([BURN, SHARPEN, CARVE]) == [1, 2, 0]
    assert legal_order([SHARPEN, CARVE]) == [0, 1], "a legal one stays as it is"
    assert legal_order([BURN, BURN]) is None
    assert legal_order([CARVE]) is None


SHORTENS = ("merge_tokens", "merge_unmerge_tokens", "prune_tokens", "skip_spatial_tokens")
QUANTIZES = ("quantize_int8", "quantize_fp8", "quantize_svd", "quantize_weights", "search_precision")
NOT_AFTER = {
    **dict.fromkeys(QUANTIZES, QUANTIZES),
    **dict.fromkeys(("merge_tokens", "merge_unmerge_tokens", "prune_tokens"), (*SHORTENS, "couple_streams")),
    **dict.fromkeys(("prune_depth", "prune_heads"), QUANTIZES),
    **dict.fromkeys(("prune_width", "approximate_by_accuracy", "sparsify_2_4"), (*QUANTIZES, "sparsify_2_4")),
    "adapters_as_inputs": ("mixture_of_blocks", "slice_width_by_timestep", "reuse_blocks"),
    "convert_dtype": (*QUANTIZES, "convert_dtype"),
    "couple_streams": (
        *(*SHORTENS, "couple_streams"),
        *("mixture_of_blocks", "slice_width_by_timestep", "reuse_blocks"),
    ),
    "dense_to_moe": (*QUANTIZES, "dense_to_moe"),
    "distill": (*QUANTIZES, "reuse_blocks"),
    "factorize": (*QUANTIZES, "factorize", "sparsify_2_4"),
    "hoist_constants": ("hoist_constants",),
    "merge_guidance": ("merge_guidance", "perturb_heads", "couple_streams"),
    "merge_models": ("*",),
    "mixture_of_blocks": ("mixture_of_blocks", "slice_width_by_timestep", "reuse_blocks", "couple_streams"),
    "perturb_heads": (*QUANTIZES, "perturb_heads", "select_heads", "reuse_blocks"),
    "quantize_graph_int8": ("quantize_graph_int8",),
    "reuse_blocks": (
        *("reuse_blocks", "slice_width_by_timestep", "merge_guidance"),
        *("fix_inputs", "perturb_heads", "mixture_of_blocks", "couple_streams"),
    ),
    "select_heads": (*QUANTIZES, "perturb_heads", "select_heads"),
    "skip_spatial_tokens": (*SHORTENS, "reuse_blocks", "couple_streams"),
    "slice_width_by_timestep": (
        *(*QUANTIZES, "slice_width_by_timestep", "fix_inputs"),
        *("perturb_heads", "mixture_of_blocks", "reuse_blocks", "couple_streams"),
    ),
}
"""The pairs that do not work, or that nobody has shown to: by the later step, what may not come before it."""

PASSES = tuple(catalog.entries("passes"))


def made(name: str) -> Pass:
    cls = catalog.pass_class(name)
    return cls()


@pytest.mark.parametrize("later", PASSES)
def test_the_orders_that_facts_allow_are_those_that_work(later: str) -> None:
    for earlier in PASSES:
        refused = any(fnmatchcase(earlier, pattern) for pattern in NOT_AFTER.get(later, ()))
        steps = [made(earlier), made(later)]
        if steps[0].works_on != steps[1].works_on:
            continue
        faults = order_faults(steps, "")
        assert bool(faults) == refused, f"{later} after {earlier}"
        for fault in faults:
            assert earlier in str(fault)
            assert fault.help


def test_advice_never_goes_in_a_circle() -> None:
    for pair in itertools.combinations(PASSES, 2):
        steps = [made(name) for name in pair]
        advised = [faults[0].help for order in (steps, steps[::-1]) if (faults := order_faults(order, ""))]
        changes = [said for said in advised if said and said.startswith("change their order")]
        assert len(changes) <= 1 or len(advised) == 1, pair


def test_facts_are_facts_and_name_no_pass() -> None:
    for name in PASSES:
        cls = catalog.pass_class(name)
        for fact in (*cls.requires, *cls.establishes, *cls.destroys):
            assert isinstance(fact, Fact)
            assert not any(other in fact.words or other in fact.gone for other in PASSES)


def test_a_longer_recipe_is_told_the_whole_order() -> None:
    steps = [made(name) for name in ("quantize_int8", "sparsify_2_4", "prune_width")]
    first, second = order_faults(steps, "")[:2]
    assert first.help == second.help == "change their order: prune_width, sparsify_2_4, quantize_int8"
    with pytest.raises(ToolchainError, match="it needs weights in floats"):
        raise first
