"""The exact choice under a budget."""

from __future__ import annotations

import itertools
import random

from enginewright.passes.quantization.budget import Option, at_most, best_trades, within


def test_every_best_trade_is_found_and_no_other():
    generator = random.Random(0)
    for _ in range(20):
        layers = [
            [Option(generator.randint(1, 9), generator.random()) for _ in range(generator.randint(1, 3))]
            for _ in range(5)
        ]
        every = [(sum(o.cost for o in picked), sum(o.error for o in picked)) for picked in itertools.product(*layers)]
        trades = best_trades(layers)
        for limit in range(5, 46):
            fitting = [error for cost, error in every if cost <= limit]
            found = within(trades, limit)
            assert (found is None) == (not fitting)
            if found is not None:
                assert abs(found.error - min(fitting)) < 1e-12
        for bound in (0.5, 1.0, 2.0):
            fitting_costs = [cost for cost, error in every if error <= bound]
            found = at_most(trades, bound)
            assert (found.cost if found else None) == (min(fitting_costs) if fitting_costs else None)


def test_a_trade_knows_the_option_of_each_layer():
    layers = [[Option(4, 0.0), Option(1, 0.5)], [Option(4, 0.0), Option(1, 0.1)], [Option(2, 0.0)]]
    trades = best_trades(layers)
    assert [(t.cost, t.choices()) for t in trades] == [(4, [1, 1, 0]), (7, [0, 1, 0]), (10, [0, 0, 0])]
    for trade in trades:
        assert trade.cost == sum(layer[i].cost for layer, i in zip(layers, trade.choices(), strict=True))


def test_nothing_to_choose_costs_nothing():
    [trade] = best_trades([])
    assert (trade.cost, trade.error, trade.choices()) == (0, 0.0, [])
