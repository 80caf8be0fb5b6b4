"""Vevo as a whole: six networks and the code between them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from enginewright import catalog, sources, whole
from enginewright.ground.errors import ToolchainError
from enginewright.ground.signature import Arrays
from enginewright.models.voice.vevo.job import SIZES, at_16_khz
from enginewright.progress import Progress
from enginewright.recipe import make
from enginewright.sources import reference

pytest.importorskip("transformers")
PARTS = ["hubert", "content", "style", "decoder", "flow", "vocoder"]
SETTINGS: dict[str, Any] = {"prompts": (), "steps": 2, "arguments": {}}


def test_a_part_is_a_model_of_its_own() -> None:
    assert sources.parts_of("vevo:tiny") == PARTS
    assert sources.load("vevo:tiny#decoder").name == "vevo-decoder:tiny"
    assert sources.parts_of("vevo-decoder:tiny") == []
    with pytest.raises(ToolchainError, match="no part named 'encoder'"):
        sources.load("vevo:tiny#encoder")
    with pytest.raises(ToolchainError, match="no size of vevo named 'large'"):
        sources.parts_of("vevo:large")
    for size in SIZES.values():
        for text in size.parts.values():
            name, _, own = text.partition(":")
            assert own in reference.sizes_of(catalog.load("models", name))


def test_every_network_has_its_say_in_what_comes_out() -> None:
    job = sources.job_of("vevo:tiny", **SETTINGS)
    networks = whole.originals(job, 1)
    first, again, other = (job.run(job.assemble(networks))(call) for call in (*job.calls[:1] * 2, job.calls[1]))
    assert first["codes"].shape == (1, SIZES["tiny"].frames)
    assert first["wave"].shape == (1, SIZES["tiny"].frames * 480)
    assert all(np.array_equal(first[name], again[name]) for name in first)
    assert not np.allclose(first["wave"], other["wave"])
    for part in ("hubert", "style", "decoder", "flow", "vocoder"):
        changed = job.run(job.assemble({**networks, part: turned(networks[part])}))(job.calls[0])
        assert not np.allclose(changed["wave"], first["wave"], rtol=1e-3, atol=1e-6), part


def test_the_decoder_is_asked_to_say_the_content_of_both_after_the_style_of_one() -> None:
    job = sources.job_of("vevo:tiny", **SETTINGS)
    networks = whole.originals(job, 1)
    asked: list[Arrays] = []

    def told(inputs: Arrays) -> Arrays:
        asked.append(inputs)
        return networks["decoder"](inputs)

    content = np.array([[1, 1, 2, 2, 2, 0, 0, 3, 3, 3, 3, 3, 7, 7, 7, 7]])
    style = np.arange(8)[None]
    given = {"content": lambda _: {"codes": content}, "style": lambda _: {"codes": style}, "decoder": told}
    found = job.run(job.assemble({**networks, **given}))(job.calls[0])
    config = SIZES["tiny"].decoder
    said = [code + config.texts + config.outputs for code in (1, 2, 0, 3, 7)]  # without repeats
    marks = (config.begin_input, config.end_input, config.begin_output)
    assert asked[0]["ids"].tolist() == [[marks[0], *said, marks[1], marks[2], *range(8)]]
    assert [int(each["position"]) for each in asked] == [0, *range(16, 23)]
    assert [int(each["ids"][0, 0]) for each in asked[1:]] == found["codes"][0, :-1].tolist()


def turned(network: Any) -> Any:
    """A network whose answers are those for the frames (or the vocabulary) the other way round."""

    def run(inputs: Arrays) -> Mapping[str, Any]:
        found = network(inputs)
        return {
            name: np.ascontiguousarray(np.flip(array, -1 if array.ndim == 2 else 1)) for name, array in found.items()
        }

    return run


def test_sounds_become_those_of_16_khz_at_the_same_pitch() -> None:
    time = np.arange(4800) / 24_000
    wave = np.sin(2 * np.pi * 1000 * time)[None]
    found = at_16_khz(wave)
    assert found.shape == (1, 3200 + 80)
    wanted = np.sin(2 * np.pi * 1000 * np.arange(3200) / 16_000) * 2**0.5
    np.testing.assert_allclose(found[0, :3200], wanted, atol=1e-5)


def test_it_takes_no_texts() -> None:
    with pytest.raises(ToolchainError, match="neither prompts nor arguments"):
        sources.job_of("vevo:tiny", **{**SETTINGS, "prompts": ("say this",)})


@pytest.mark.slow
def test_engines_convert_a_voice_as_pytorch_does(tmp_path: Path) -> None:
    recipe = make(
        {
            "model": "vevo:tiny",
            "job": {"steps": 2},
            "gates": ["whole.onnxruntime: fidelity.relative_l2 <= 1e-4"],
            "validation": {"calls": 2, "rounds": 3, "samples": 1},
            "targets": [{"target": "onnxruntime"}],
        }
    )
    report, code = whole.export(recipe, tmp_path / "out", force=False, progress=Progress(quiet=True))
    assert (report.verdict, code) == ("met", 0)
    codes = next(each for each in report.targets[0].fidelity if each.output == "codes")
    assert codes.max_abs == 0
    assert "mel spectra" in report.samples[0].caption
