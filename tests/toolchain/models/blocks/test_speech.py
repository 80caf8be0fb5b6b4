from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import onnxruntime

from enginewright.ground.signature import Array
from enginewright.models.blocks.speech import RATE, excerpts, recording


def chances(sound: Array) -> list[float]:
    """How sure silero's detector is that it hears a voice, block by block; sound (samples,) at 16 kHz."""
    found = find_spec("silero_vad")
    assert found is not None
    assert found.origin is not None
    path = Path(found.origin).parent / "data" / "silero_vad_16k_op15.onnx"
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    state, before, said = np.zeros((2, 1, 128), np.float32), np.zeros((1, 64), np.float32), []
    for block in sound[: len(sound) // 512 * 512].reshape(-1, 1, 512).astype(np.float32):
        chance, state = session.run(
            None, {"input": np.concatenate([before, block], axis=1), "state": state, "sr": np.asarray(16_000)}
        )
        before = block[:, -64:]
        said.append(float(chance[0, 0]))
    return said


def test_a_detector_of_voices_hears_speech_in_the_recording_and_none_in_it_as_noise() -> None:
    whole = recording()
    assert 7 * RATE < len(whole) < 12 * RATE
    assert 0.3 < np.abs(whole).max() <= 1
    slow = np.fft.irfft(np.fft.rfft(whole)[: len(whole) // 3], len(whole) * 2 // 3) * 2 / 3  # at 16 kHz
    assert np.mean(chances(slow)) > 0.6
    assert np.mean(chances(np.random.default_rng(0).permutation(slow))) < 0.2


def test_excerpts_come_again_with_their_seed_and_run_on_from_the_end_to_the_start() -> None:
    one, again, other = excerpts(3, RATE, 0), excerpts(3, RATE, 0), excerpts(3, RATE, 1)
    assert one.shape == (3, RATE)
    assert one.dtype == np.float32
    assert np.array_equal(one, again)
    assert not np.array_equal(one, other)
    assert not np.array_equal(one[0], one[1])
    length = len(recording())
    twice = excerpts(1, 2 * length, 0)[0]
    assert np.array_equal(twice[:length], twice[length:])
    assert sorted(twice[:length].tolist()) == sorted(recording().tolist())
