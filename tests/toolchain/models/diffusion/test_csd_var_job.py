"""CSD-VAR as a whole: four networks and the code between them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from enginewright import catalog, sources, whole
from enginewright.ground.errors import ToolchainError
from enginewright.ground.signature import Array, Arrays
from enginewright.models.diffusion.csd_var import job
from enginewright.models.diffusion.csd_var.scales import starts
from enginewright.progress import Progress
from enginewright.recipe import make
from enginewright.sources import reference

SIZE = job.SIZES["tiny"]
SETTINGS: dict[str, Any] = {"prompts": (), "steps": 1, "arguments": {}}
PLACES = starts(SIZE.transformer.scales)


@pytest.fixture(scope="module")
def networks() -> dict[str, Any]:
    return dict(whole.originals(sources.job_of("csd_var:tiny", **SETTINGS), 1))


def drawn(networks: dict[str, Any], number: int = 0, **more: Any) -> Arrays:
    return job.drawing(networks, SIZE, **more)({"number": np.array([number])})


def test_parts_are_models_that_fit_one_another() -> None:
    for size in job.SIZES.values():
        for text in size.parts.values():
            name, _, own = text.partition(":")
            assert own in reference.sizes_of(catalog.load("models", name))
        assert size.transformer.context == size.text.first.width + size.text.second.width
        assert size.transformer.pooled == size.text.second.width
        assert size.transformer.text == size.text.text
        assert size.transformer.scales == size.quantizer.scales
        assert (size.transformer.codes, size.transformer.channels) == (size.quantizer.codes, size.quantizer.channels)


def test_every_network_has_its_say_in_what_comes_out(networks: dict[str, Any]) -> None:
    first, again, other = drawn(networks), drawn(networks), drawn(networks, 1)
    assert first["codes"].shape == (1, 55)
    assert first["image"].shape == (1, 3, 10, 10)
    assert all(np.array_equal(first[name], again[name]) for name in first)
    assert not np.allclose(first["image"], other["image"])

    for part in networks:

        def turned(inputs: Arrays, part: str = part) -> Arrays:
            return {name: np.ascontiguousarray(np.flip(array, -1)) for name, array in networks[part](inputs).items()}

        assert not np.allclose(drawn({**networks, part: turned})["image"], first["image"], atol=1e-4), part


def test_early_scales_read_the_style_and_later_ones_the_content(networks: dict[str, Any]) -> None:
    """Codes are compared, which random weights change with any text that is read."""
    read: list[tuple[int, float]] = []

    def told(inputs: Arrays) -> Arrays:
        read.append((int(inputs["position"]), float(inputs["context"][0].mean())))
        return networks["transformer"](inputs)

    def marked(inputs: Arrays) -> Arrays:
        found = networks["text"](inputs)
        number = np.arange(len(job.TEXTS), dtype=np.float32)[:, None, None]
        return {**found, "context": np.ones_like(found["context"]) * number}

    drawn({**networks, "transformer": told, "text": marked})
    style, content = job.TEXTS.index("style"), job.TEXTS.index("content")
    assert read == list(zip(PLACES[:-1], [style] * 4 + [content], strict=True))
    read.clear()
    drawn({**networks, "transformer": told, "text": marked}, split="released-tuning")
    assert [each for _, each in read] == [style] * 3 + [content] * 2


def test_what_is_said_of_the_content_moves_the_scales_that_read_it(networks: dict[str, Any]) -> None:
    def louder(row: str) -> Any:
        def text(inputs: Arrays) -> Arrays:
            found = {name: array.copy() for name, array in networks["text"](inputs).items()}
            found["context"][job.TEXTS.index(row)] *= -1
            return found

        return text

    def logits(**changed: Any) -> list[Array]:
        found: list[Array] = []

        def transformer(inputs: Arrays) -> Arrays:
            found.append(networks["transformer"](inputs)["logits"])
            return {"logits": found[-1]}

        drawn({**networks, **changed, "transformer": transformer})
        return found

    plain, content, style = logits(), logits(text=louder("content")), logits(text=louder("style"))
    assert [np.array_equal(a, b) for a, b in zip(plain, content, strict=True)] == [True] * 4 + [False]
    assert np.abs(plain[4] - content[4]).mean() > 1e-3
    assert all(np.abs(a - b).mean() > 1e-3 for a, b in zip(plain[:4], style[:4], strict=True))


def test_texts_hold_learned_tokens_and_say_where_the_styles_stand() -> None:
    config = SIZE.text
    given = job.texts_of(config, 0)
    learned = given["ids"] >= config.vocabulary
    assert [int(row.sum()) for row in learned] == [4, 4, 4, 0]
    assert [int(row.sum()) for row in given["style"]] == [2, 4, 0, 0]
    assert given["ids"][0].tolist()[:1] + given["ids"][3].tolist()[:2] == [48, 48, 49]
    assert given["ids_second"][3].tolist() == [48, 49, 0, 0, 0, 0, 0]


def test_it_takes_no_prompts_and_knows_its_splits() -> None:
    with pytest.raises(ToolchainError, match="takes no prompts"):
        sources.job_of("csd_var:tiny", **{**SETTINGS, "prompts": ("a cat",)})
    with pytest.raises(ToolchainError, match="only split"):
        sources.job_of("csd_var:tiny", **{**SETTINGS, "arguments": {"split": "mine"}})


@pytest.mark.slow
def test_engines_draw_what_pytorch_does(tmp_path: Path) -> None:
    recipe = make(
        {
            "model": "csd_var:tiny",
            "gates": ["whole.onnxruntime: fidelity.relative_l2 <= 1e-4"],
            "validation": {"calls": 2, "rounds": 3, "samples": 1},
            "targets": [{"target": "onnxruntime"}],
        }
    )
    report, code = whole.export(recipe, tmp_path / "out", force=False, progress=Progress(quiet=True))
    assert (report.verdict, code) == ("met", 0)
    codes = next(each for each in report.targets[0].fidelity if each.output == "codes")
    assert codes.max_abs == 0
