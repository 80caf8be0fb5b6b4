"""Where the marks of a curve stand."""

from __future__ import annotations

from enginewright.reports.curve_plot import HEIGHT, MARGIN, plot
from enginewright.reports.record import Curve


def test_marks_stand_where_their_values_are():
    found = plot(Curve(x="cost", y="error", points=[(0.0, 0.4), (1.0, 0.0)], chosen=(0.5, 0.2)))

    assert [(round(m.x, 6), round(m.y, 6)) for m in found.marks] == [(MARGIN, 10), (100, HEIGHT)]
    assert (round(found.chosen.x, 6), round(found.chosen.y, 6)) == ((100 + MARGIN) / 2, (10 + HEIGHT) / 2)
    assert found.chosen.title == "cost: 0.5; error: 0.2"
    assert found.across[0].label == "0.0"
    assert found.across[-1].label == "1.0"


def test_a_curve_of_one_point_has_a_plot():
    found = plot(Curve(x="cost", y="error", points=[(0.0, 0.0)], chosen=(0.0, 0.0)))
    assert len(found.marks) == 1
