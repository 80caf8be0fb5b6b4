"""Inputs by their roles."""

from __future__ import annotations

import pytest

from enginewright.ground.errors import ToolchainError
from enginewright.ground.signature import NAMES, ROLES, Dim, InputSpec, Signature, in_multiples, role_of

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


def test_rows_that_belong_together_come_in_multiples() -> None:
    tokens = Dim(name="tokens", low=1, typical=4, high=9)
    specs = (InputSpec(name="x", shape=(ROWS, tokens)), InputSpec(name="img_ids", shape=(tokens, 3)))
    x, ids = in_multiples(specs, 3)
    assert x.shape == (Dim(name="batch", low=3, typical=3, high=6, multiple_of=3), tokens)
    assert ids == specs[1]
    assert in_multiples(specs, 1) == specs
    even = (InputSpec(name="x", shape=(Dim(name="batch", low=2, typical=4, high=64, multiple_of=2),)),)
    assert in_multiples(even, 3)[0].shape == (Dim(name="batch", low=6, typical=6, high=60, multiple_of=6),)
    assert in_multiples((InputSpec(name="x", shape=(6, 3)),), 3)[0].shape == (6, 3)


def test_rows_that_cannot_belong_together_are_refused() -> None:
    with pytest.raises(ToolchainError, match="batch is at most 8, and 9 rows would have to belong together"):
        in_multiples((InputSpec(name="x", shape=(ROWS,)),), 9)
    with pytest.raises(ToolchainError, match="a call has 4 rows, and 3 of them would have to belong together"):
        in_multiples((InputSpec(name="x", shape=(4, 3)),), 3)
