from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from enginewright import sources
from enginewright.calibration import from_file
from enginewright.ground.errors import FaultsError, ToolchainError
from enginewright.ground.signature import Dim, InputSpec


def rows(n: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "x": rng.standard_normal((n, 4, 8, 8)).astype(np.float32),
        "t": rng.uniform(0, 999, n).astype(np.float32),
        "y": rng.integers(0, 4, n),
    }


def test_rows_are_cut_into_calls_of_the_typical_batch(tmp_path: Path) -> None:
    save_file(rows(5), tmp_path / "c.safetensors")
    calls = from_file(tmp_path / "c.safetensors", sources.load("dit:tiny").inputs)
    assert [len(call["x"]) for call in calls] == [2, 2, 1]
    assert np.array_equal(calls[1]["t"], rows(5)["t"][2:4])


def test_every_misfit_is_told_at_once(tmp_path: Path) -> None:
    bad = rows(4)
    bad["x"] = bad["x"][:, :, :7]
    bad["t"] = bad["t"].astype(np.float64)
    del bad["y"]
    bad["z"] = np.zeros(4, np.float32)
    save_file(bad, tmp_path / "c.safetensors")
    with pytest.raises(FaultsError) as caught:
        from_file(tmp_path / "c.safetensors", sources.load("dit:tiny").inputs)
    text = str(caught.value)
    assert "'x' has shape (4, 4, 7, 8); the model takes (batch, 4, 8, 8)" in text
    assert "'t' is float64; the model takes float32" in text
    assert "lacks input 'y'" in text
    assert "no input 'z'" in text


def test_rows_that_do_not_match_truncation_and_absence(tmp_path: Path) -> None:
    specs = sources.load("dit:tiny").inputs
    save_file({**rows(4), "t": rows(3)["t"]}, tmp_path / "c.safetensors")
    with pytest.raises(ToolchainError, match=r"different numbers of rows: \[3, 4\]"):
        from_file(tmp_path / "c.safetensors", specs)
    whole = (tmp_path / "c.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ToolchainError, match="not a whole safetensors file"):
        from_file(tmp_path / "cut.safetensors", specs)
    with pytest.raises(ToolchainError, match="no calibration file"):
        from_file(tmp_path / "gone.safetensors", specs)


def test_inputs_without_rows_go_whole_into_every_call(tmp_path: Path) -> None:
    batch = Dim(name="batch", low=1, typical=2, high=4)
    specs = (InputSpec(name="rate", shape=(), dtype="int64"), InputSpec(name="x", shape=(batch, 3)))
    save_file({"rate": np.array(16_000), "x": np.ones((3, 3), np.float32)}, tmp_path / "c.safetensors")
    calls = from_file(tmp_path / "c.safetensors", specs)
    assert [(int(call["rate"]), len(call["x"])) for call in calls] == [(16_000, 2), (16_000, 1)]
    save_file({"rate": np.array(16_000)}, tmp_path / "one.safetensors")
    assert len(from_file(tmp_path / "one.safetensors", specs[:1])) == 1
