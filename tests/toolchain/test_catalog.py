from __future__ import annotations

import pytest

from enginewright import catalog
from enginewright.ground.errors import ToolchainError


@pytest.mark.parametrize("kind", catalog.KINDS)
def test_every_entry_says_what_it_is_in_one_line(kind: str) -> None:
    found = catalog.entries(kind)
    assert found
    for entry in found.values():
        assert 20 < len(entry.summary) < 130, f"{kind} {entry.name}: {entry.summary!r}"


def test_every_pass_and_target_has_defaults_and_described_parameters() -> None:
    for name in catalog.entries("passes"):
        cls = catalog.pass_class(name)
        assert cls().name() == name
        assert all(field.description for field in cls.model_fields.values()), name
    for name in catalog.entries("targets"):
        target = catalog.target_class(name)
        assert target().name() == name
        assert all(field.description for field in target.model_fields.values()), name


def test_targets_bear_no_librarys_name() -> None:
    assert catalog.entries("targets")["onnxruntime"].path.name == "onnxruntime_engine.py"


def test_an_unknown_entry_offers_the_nearest() -> None:
    with pytest.raises(ToolchainError, match="did you mean 'prune_heads'"):
        catalog.pass_class("prune_head")


def test_a_model_in_several_files_has_an_entry_for_each_network() -> None:
    found = catalog.entries("models")
    assert found["vevo-decoder"].module == "enginewright.models.voice.vevo.decoder"
    assert not {"decoder", "vevo-sampling", "sampling"} & found.keys()
