from __future__ import annotations

import numpy as np
import torch

from enginewright import sources
from enginewright.models.blocks import digits
from enginewright.validation.statistics import frechet_distance


def test_calibration_and_validation_inputs_come_from_runs_and_never_meet() -> None:
    model = sources.load("dit:digits")
    one, again, other = model.batches(3, 0), model.batches(3, 0), model.batches(3, 1)
    assert all(np.array_equal(a["x"], b["x"]) for a, b in zip(one, again, strict=True))
    assert not any(np.array_equal(a["x"], b["x"]) for a in one for b in other)
    assert one[0]["x"].shape == (2, 1, 28, 28)
    assert {k: v.dtype.name for k, v in one[0].items()} == {"x": "float32", "t": "float32", "y": "int64"}
    times = np.concatenate([call["t"] for call in model.batches(20, 2)])
    assert times.min() < 200
    assert times.max() > 800


def test_the_reference_features_are_the_judges_and_floors_fall_with_samples() -> None:
    task = digits.digits_task(none=10)
    assert task.real.shape == (1000, 64)
    assert task.real_again.shape == (4000, 64)
    floors = [frechet_distance(task.real_again[:n], task.real) for n in (200, 1000)]
    assert floors[0] > floors[1] > 0


def test_a_sampling_run_is_repeatable_and_asks_for_every_class() -> None:
    def runner(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {"out": np.concatenate([inputs["x"], inputs["x"]], axis=1)}

    one, two = (digits.sample(runner, 12, seed, none=10) for seed in (0, 0))  # type: ignore[arg-type]
    assert np.array_equal(one, two)
    assert one.shape == (12, 1, 28, 28)
    assert digits.digits_task(none=10).asked(12).tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]


def test_features_are_what_the_head_reads() -> None:
    pictures = np.random.default_rng(0).uniform(-1, 1, (5, 1, 28, 28)).astype(np.float32)
    classes, features = digits.read(pictures)
    with torch.no_grad():
        logits = digits.judge()(torch.from_numpy(pictures))
        assert torch.equal(digits.judge().head(torch.from_numpy(features)), logits)
    assert classes.tolist() == logits.argmax(1).tolist()
