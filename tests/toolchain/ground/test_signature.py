"""Inputs by their roles."""

from __future__ import annotations

from enginewright.ground.signature import NAMES, ROLES, Dim, InputSpec, Signature, role_of

ROWS = Dim(name="batch", low=1, typical=2, high=8)


def test_an_input_has_the_role_of_its_name_unless_somebody_says_another() -> None:
    assert InputSpec(name="t", shape=(ROWS,)).role == "timestep"
    assert InputSpec(name="t", shape=(ROWS,), role="noise").role == "noise"
    assert InputSpec(name="q7", shape=(ROWS,)).role == "unknown"


def test_no_name_has_two_roles() -> None:
    names = [name for known in NAMES.values() for name in known]
    assert len(names) == len(set(names))
    assert set(NAMES) <= set(ROLES)
    assert {role_of(name) for name in names} == set(NAMES)


def test_inputs_are_found_by_role_whatever_their_name_the_common_names_first() -> None:
    own = InputSpec(name="q7", shape=(ROWS,), role="timestep")
    signature = Signature((own, InputSpec(name="y", shape=(ROWS,)), InputSpec(name="class_labels", shape=(ROWS,))))
    assert signature.of_role("timestep") == ["q7"]
    assert signature.of_role("condition") == ["class_labels", "y"]
    assert signature.of_role("timestep", among=["timestep", "q7"]) == ["timestep", "q7"]
    assert signature.of_role("state") == []
    assert signature.without(["q7"]).of_role("timestep") == []


def test_rows_and_ranges_follow_from_the_inputs() -> None:
    x, ids = InputSpec(name="x", shape=(ROWS, 4), low=-1, high=1), InputSpec(name="img_ids", shape=(4, 3))
    signature = Signature((x, ids))
    assert signature.shared == ("img_ids",)
    assert signature.ranges == {"x": (-1, 1)}
