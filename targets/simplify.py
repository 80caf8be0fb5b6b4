"""Graph simplification after the export: constants are folded, and what changes nothing goes.

onnxscript's own ``optimize_ir`` takes constants for 0 or 1 that are merely near them (1e-8 beside 0, 1e-5 beside 1), so
that ``log(p + 1e-9)`` loses its addition and becomes infinite at 0. Here the same rules run with a matcher that takes a
constant for a number only where it is that number.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import onnx_ir as ir
from onnx_ir.passes import common
from onnxscript import rewriter
from onnxscript.optimizer import fold_constants
from onnxscript.rewriter import _matcher, pattern

LONG_GRAPH = 4000
"""Nodes above which the rewrite rules, whose time grows with the square of the graph, are left out: what they join,
engines join again."""

ROUNDS = 2
"""Times that folding and rules take turns; each may open something for the other."""

LIFT = common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)


class ExactMatcher(_matcher.SimplePatternMatcher):
    """Matches a number in a pattern with that number alone, where the base class allows a tolerance."""

    def _match_constant(self, pattern_constant: Any, value: ir.Value) -> bool:
        if not super()._match_constant(pattern_constant, value):
            return False
        assert value.const_value is not None
        if value.const_value.numpy().tolist() == pattern_constant.value:
            return True
        return self.fail(f"{value.name} is near {pattern_constant.value}, but not equal to it")


def exact_rules() -> list[pattern.RewriteRule]:
    """onnxscript's default rules, each a copy that compares constants exactly; rules with a matcher of their own go."""
    rules = []
    for rule in rewriter._DEFAULT_REWRITE_RULES:
        if type(rule._matcher) is _matcher.SimplePatternMatcher:
            exact = copy.copy(rule)
            exact._matcher = ExactMatcher(rule._target_pattern)
            rules.append(exact)
    return rules


def simplify(model: ir.Model, *, should_fold: Callable[[ir.Node], bool | None]) -> None:
    """Fold constants and drop or join what is redundant, in place; in long graphs without the rules.

    Args:
        model: the graph.
        should_fold: node -> False where it must stay, None to leave the choice.
    """
    if len(model.graph) > LONG_GRAPH:
        fold_constants(model, should_fold=should_fold)
        ir.passes.Sequential(
            common.RemoveUnusedNodesPass(),
            LIFT,
            common.CommonSubexpressionEliminationPass(),
            common.NameFixPass(),
        )(model)
        return
    common.InlinePass()(model)
    rules = rewriter.RewritePass(exact_rules())
    clean = ir.passes.Sequential(
        common.RemoveUnusedNodesPass(), common.RemoveUnusedFunctionsPass(), common.RemoveUnusedOpsetsPass()
    )
    for _ in range(ROUNDS):
        folded = fold_constants(model, onnx_shape_inference=True, should_fold=should_fold)
        if not any([folded.modified, rules(model).modified, clean(model).modified]):
            break
    ir.passes.Sequential(
        common.RemoveUnusedNodesPass(),
        LIFT,
        common.LiftSubgraphInitializersToMainGraphPass(),
        common.DeduplicateInitializersPass(),
        common.CommonSubexpressionEliminationPass(),
        common.OutputFixPass(),
        common.NameFixPass(),
    )(model)
