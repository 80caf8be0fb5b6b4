from __future__ import annotations

import pytest

from enginewright.ground.errors import FaultsError, ToolchainError, UnavailableError, raise_faults, require, unknown


def test_an_unknown_name_offers_the_nearest() -> None:
    assert "did you mean 'quantize_int8'?" in str(unknown("pass", "quantise_int8", ["prune_heads", "quantize_int8"]))
    assert "known: a, b" in str(unknown("pass", "zzzz", ["b", "a"]))


def test_where_and_help_stand_on_lines_of_their_own() -> None:
    error = ToolchainError("keep is 0", where="recipe.toml, steps[1]", help="try 12")
    assert str(error) == "keep is 0\n  --> recipe.toml, steps[1]\n  help: try 12"


def test_several_faults_are_raised_together_and_one_alone() -> None:
    one, two = ToolchainError("first"), ToolchainError("second")
    raise_faults([])
    with pytest.raises(ToolchainError) as single:
        raise_faults([one])
    assert single.value is one
    with pytest.raises(FaultsError, match="first\nerror: second"):
        raise_faults([one, two])


def test_a_missing_backend_names_its_extra() -> None:
    with pytest.raises(UnavailableError, match=r"enginewright\[gpu\]") as caught:
        require("no_such_backend", extra="gpu")
    assert caught.value.exit_code == 3
