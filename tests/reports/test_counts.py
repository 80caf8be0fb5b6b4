"""Counts of networks of others: every figure is the paper's or one that was counted in the authors' code."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch

from enginewright.ground.errors import ToolchainError
from enginewright.reports.benchmarks import counts

pytest.importorskip("diffusers")
pytest.importorskip("transformers")


@pytest.mark.parametrize(
    ("of", "parameters"),
    {
        "FLUX.1-dev": 11_901_408_320,
        "SD3-medium": 2_028_328_000,
        "SD3, d=15": 496_066_624,
        "SD3, d=18": 856_159_552,
        "SD3, d=21": 1_358_950_720,
        "SD3, d=30": 3_962_392_384,
        "SD3.5-medium": 2_243_171_520,
        "SD3.5-large": 8_056_627_520,
        "SD1.5": 859_520_964,
        "SD2.1-base": 865_910_724,
        "SDXL": 2_567_463_684,
        "SD1.5, 8 styles": 862_810_564,
        "SiT-XL/2": 675_111_184,
        "SiT-XL/2 in training": 683_242_512,
        "SiT-B/2 in training": 137_845_008,
        "BERT-base, cased, two classes": 108_311_810,
        "DistilBERT": 66_362_880,
        "ViT-Ti/16": 5_717_416,
    }.items(),
)
def test_parameters_are_counted_on_the_meta_device(of: str, parameters: int) -> None:
    assert all(parameter.is_meta for parameter in counts.made(of).parameters())
    assert counts.parameters(of) == parameters


@pytest.mark.parametrize(("of", "parameters"), [("dev", 43_646_976), ("LoRA-Flux", 44_826_624)])
def test_adapters_of_splitflux_are_counted(of: str, parameters: int) -> None:
    assert counts.splitflux_adapters(of) == parameters


@pytest.mark.parametrize(("of", "parameters"), [("unet", 829_952), ("image", 2_100_224)])
def test_what_disenbooth_adds_is_counted(of: str, parameters: int) -> None:
    assert counts.disenbooth_parts(of) == parameters


def test_a_style_adds_a_row_to_the_table_and_nothing_else() -> None:
    base = counts.parameters("SD1.5")
    with torch.device("meta"):
        one, two = (counts.parameter_count(counts.with_styles(counts.unet(), n)) - base for n in (1, 2))
    assert (one, two - one) == (2 * (1280 * 1280 + 1280) + 1280, 1280)


@pytest.mark.parametrize(
    ("of", "found"),
    {"SD3-medium, 32, 154": 0.579, "SD3, d=15, 32, 154": 0.145, "SD3-medium, 128, 333": 8.904}.items(),
)
def test_operations_of_sd3_are_those_of_torch(of: str, found: float) -> None:
    assert counts.teraflops(of) == pytest.approx(found, abs=5e-4)


def test_a_third_of_sd3_sees_the_timestep_and_the_pooled_text_alone() -> None:
    width, depth = 1536, 24
    last = 6 * (width + 1) * width + 2 * (width + 1) * width  # no feed-forward of its text
    embedders = (256 + 1 + 2048 + 1 + 2 * (width + 1)) * width
    wanted = (depth - 1) * 12 * (width + 1) * width + last + 2 * (width + 1) * width + embedders
    assert counts.modulation_parameters("SD3-medium") == wanted
    assert wanted / counts.parameters("SD3-medium") == pytest.approx(0.337, abs=5e-4)


@pytest.mark.parametrize(("of", "layers", "parameters"), [("all", 494, 85_917_696), ("attention", 266, 26_148_864)])
def test_adapters_of_in_context_lora(of: str, layers: int, parameters: int) -> None:
    assert (counts.adapted_layers(of), counts.adapter_parameters(of)) == (layers, parameters)


def test_heads_to_choose_from() -> None:
    assert counts.heads("SD3-medium") == 24 * 24
    assert counts.heads("BERT-base") == 12 * 12


def test_experts_of_flux_leave_five_eighths_of_its_feed_forwards_idle() -> None:
    assert counts.active_feed_forward_share("FLUX.1-dev") == 0.375
    assert counts.feed_forward_share("FLUX.1-dev") == pytest.approx(0.4822, abs=5e-5)
    units = 12_288 * 5 // 8
    assert counts.parameters("FLUX.1-dev") - counts.active_parameters("FLUX.1-dev") == 76 * units * (2 * 3072 + 1)


@pytest.mark.parametrize(
    ("of", "parameters"), {"attention": 2_362_368, "ffn": 4_722_432, "head": 196_800, "group": 393_472}.items()
)
def test_what_goes_with_a_part_of_bert(of: str, parameters: int) -> None:
    assert counts.removed(of) == parameters


def test_merging_leaves_41_of_197_tokens() -> None:
    assert counts.tokens_left("S, 13") == 197 - 12 * 13 == 41


def test_products_of_a_small_transformer() -> None:
    assert counts.macs("S") == 4_598_882_304


@pytest.mark.slow
@pytest.mark.parametrize(("of", "gmacs"), {"S, 13": 2.70, "B, 13": 10.37, "L, 8": 30.96}.items())
def test_merging_saves_what_the_card_counts(of: str, gmacs: float) -> None:
    assert counts.merged_macs(of) == pytest.approx(gmacs * 1e9, abs=0.005e9)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("of", "blocks", "macs"),
    [
        ("alignedgen", 38, 2 * (512 + 4096) * 4096 * 3072 * 38),
        ("freecus", 10, 2 * (512 + 1024) * 1024 * 3072 * 10),
        ("attenst", 4, 0),
        ("stylesculptor", 28, 0),
        (
            "diffstyler",  # of two rows: queries times keys, and the projections that make them
            8,
            -2 * sum(c * (n * n * w + 2 * n * w * w) for n, w, c in ((4096, 320, 3), (1024, 640, 3), (256, 1280, 2))),
        ),
    ],
)
def test_what_coupled_rows_cost_beside_rows_alone(of: str, blocks: int, macs: int) -> None:
    assert counts.coupled_blocks(of) == blocks
    assert counts.coupled_macs(of) == macs


def test_the_missing_package_is_named(monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ToolchainError, match="diffusers"):
        counts.parameters("SD1.5")
