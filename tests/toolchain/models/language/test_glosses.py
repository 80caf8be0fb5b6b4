"""Two networks that tell parts of speech: what they read, and that what ships tells them."""

from __future__ import annotations

import pytest
import torch

from enginewright import sources
from enginewright.models.blocks.glosses import CLASSES, JUDGED, LONGEST, PADDING, call_of, held_out, unjudged
from enginewright.targets.pytorch_engine import EagerRunner
from enginewright.training.glosses import without_examples
from enginewright.validation.contract import ClassifyingTask
from enginewright.validation.metrics.accuracy import Accuracy


def test_a_call_holds_the_bytes_of_each_gloss_and_hides_its_padding() -> None:
    call = call_of(["ab", "é"])
    assert call["ids"].tolist() == [[97, 98], [0xC3, 0xA9]]
    call = call_of(["a", "abc", "x" * 1000])
    assert call["ids"].shape == (3, LONGEST)
    assert call["ids"][0, :2].tolist() == [97, PADDING]
    assert call["mask"].sum(axis=1).tolist() == [1, 3, LONGEST]


def test_padding_changes_no_answer() -> None:
    module = sources.load("wide_attention:glosses-wide").module
    alone, padded = call_of(["walk slowly"]), call_of(["walk slowly", "a large and very heavy animal of the forest"])
    with torch.no_grad():
        one, two = (module(**{k: torch.from_numpy(v) for k, v in call.items()})[0] for call in (alone, padded))
    torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-5)


def test_what_is_held_out_is_in_turns_and_below_its_licence() -> None:
    glosses, classes = held_out()
    assert len(glosses) == len(set(glosses)) == 1000
    assert classes.tolist() == list(range(len(CLASSES))) * 250
    judged = set(glosses[:JUDGED])
    given = {bytes(int(code) for code in row if code != PADDING) for call in unjudged(50, 3) for row in call["ids"]}
    assert not given & {gloss.encode()[:LONGEST] for gloss in judged}


@pytest.mark.parametrize(("gloss", "left"), [('go; "he went"; "she goes"', "go"), ("a b\tc ", "a b c"), ('"only"', "")])
def test_examples_are_left_out(gloss: str, left: str) -> None:
    assert without_examples(gloss) == left


@pytest.mark.parametrize("size", ["glosses-wide", "glosses-deep"])
def test_shipped_networks_tell_parts_of_speech(size: str) -> None:
    model = sources.load(f"wide_attention:{size}")
    task = model.task
    assert isinstance(task, ClassifyingTask)
    told = task.sample(EagerRunner(model.module, threads=1, outputs=model.outputs), 200, 0)
    assert told.shape == (200, 2)
    assert Accuracy().measure(task, told, told) >= 0.8
