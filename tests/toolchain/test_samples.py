from __future__ import annotations

import base64
import io

import numpy as np
from PIL import Image

from enginewright.measure import sampling
from enginewright.progress import Progress
from enginewright.recipe import Validation
from enginewright.samples import shown
from enginewright.validation.contract import DecodingTask, SoundTask, SpectraTask

RATE = 8_000


def tones(hertz: float, n: int) -> np.ndarray:
    """A second of a tone, n times, at 8 kHz."""
    return np.sin(2 * np.pi * hertz * np.arange(RATE) / RATE)[None].repeat(n, 0) / 2


def rows_that_are_lit(picture: str) -> list[int]:
    """Rows of a picture that have a bright place left of the line behind the first sound."""
    with Image.open(io.BytesIO(base64.b64decode(picture))) as opened:
        pixels = np.asarray(opened)
    return np.flatnonzero((pixels[:, 5:95] > 220).all(axis=1)).tolist()


def test_sounds_are_shown_as_spectra_on_the_originals_scale_with_their_rate() -> None:
    task = SoundTask(sample=lambda runner, n, seed: tones(0, n), samples=4, rate=RATE)
    drawn = {"original": tones(400, 4), "same": tones(400, 4), "higher": tones(2000, 4), "hushed": tones(400, 4) / 1e6}
    same, higher, hushed = shown(task, drawn, ["same", "higher", "hushed"], 4)
    assert same.original_png == same.candidate_png == higher.original_png
    low, high = rows_that_are_lit(higher.original_png), rows_that_are_lit(higher.candidate_png)
    assert low
    assert high
    assert max(high) < min(low) < 80  # further up is higher
    assert not rows_that_are_lit(hushed.candidate_png)
    assert "the first 3 of 4 sounds" in same.caption
    assert "8000 samples a second, so bands up to 4000 Hz" in same.caption


def test_spectra_are_shown_as_they_are_and_tokens_not_at_all() -> None:
    spectra = np.log(np.full((1, 3, 2), 1e-3))
    spectra[0, 0] = 0
    task = SpectraTask(sample=lambda runner, n, seed: spectra, samples=1, rate=RATE)
    (found,) = shown(task, {"original": spectra, "ours": spectra}, ["ours"], 1)
    with Image.open(io.BytesIO(base64.b64decode(found.candidate_png))) as opened:
        assert np.asarray(opened)[:, 0].tolist() == [64, 64, 255]  # 60 dB of 80 below white
    tokens = DecodingTask(sample=lambda runner, n, seed: spectra, samples=1)
    assert shown(tokens, {"original": spectra, "ours": spectra}, ["ours"], 1) == []


def test_a_whole_job_of_sounds_is_measured_by_the_metrics_of_sounds() -> None:
    def sample(runner: object, n: int, seed: int) -> np.ndarray:
        return np.random.default_rng(seed).normal(size=(n, RATE)) * (0.5 if runner is ours else 1.0)

    ours, original = lambda inputs: inputs, lambda inputs: inputs
    task = SoundTask(sample=sample, samples=2, rate=RATE)
    quality, pictures = sampling(task, original, {"ours": ours}, Validation(), seed=3, progress=Progress(quiet=True))
    figures = {figure.name: figure for figure in quality["ours"]}
    assert figures.keys() == {"log_spectral_distance_db", "mel_distance", "sound_snr_db"}
    assert round(figures["log_spectral_distance_db"].value or 0, 3) == 6.021
    assert round(figures["sound_snr_db"].value or 0, 3) == 6.021  # half is missing: noise half as large as the signal
    assert (figures["sound_snr_db"].original, figures["mel_distance"].original) == (100, 0)
    assert len(pictures) == 1
