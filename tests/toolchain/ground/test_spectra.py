from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers.audio_utils import mel_filter_bank

from enginewright.ground import spectra
from enginewright.ground.errors import ToolchainError

RATE = 24_000


def tone(hertz: float, seconds: float = 0.2) -> np.ndarray:
    return np.sin(2 * np.pi * hertz * np.arange(round(RATE * seconds)) / RATE)[None]


@pytest.mark.parametrize(("window", "hop"), [(1920, 480), (960, 240), (32, 8)])
def test_magnitudes_are_those_of_torchs_transform(window: int, hop: int) -> None:
    sounds = np.random.default_rng(0).normal(size=(2, 9 * max(hop, 240) + 5))
    padded = F.pad(torch.from_numpy(sounds)[:, None], ((window - hop) // 2,) * 2, mode="reflect")[:, 0]
    hann = torch.hann_window(window, dtype=torch.float64)
    wanted = torch.stft(padded, window, hop, window=hann, center=False, return_complex=True).abs().numpy()
    found = spectra.magnitudes(sounds, window=window, hop=hop)
    assert found.shape == (2, window // 2 + 1, sounds.shape[1] // hop)
    np.testing.assert_allclose(found, wanted, rtol=1e-9, atol=1e-9)


def test_a_sine_of_full_scale_reads_a_quarter_of_the_window_at_its_frequency() -> None:
    found = spectra.magnitudes(tone(1000), window=960, hop=240)[0, :, 5]  # bins are 25 Hz apart
    assert found.argmax() == 40
    assert found[40] == pytest.approx(240)


@pytest.mark.parametrize(("rate", "window", "bands"), [(24_000, 1920, 128), (24_000, 960, 80), (8_000, 320, 80)])
def test_filters_are_slaneys_as_transformers_has_them(rate: int, window: int, bands: int) -> None:
    wanted = mel_filter_bank(window // 2 + 1, bands, 0.0, rate / 2, rate, norm="slaney", mel_scale="slaney").T
    found = spectra.mel_filters(rate=rate, window=window, bands=bands)
    np.testing.assert_allclose(found, wanted, atol=1e-12)
    assert (found.sum(axis=1) > 0).all()  # no band without a bin


def test_a_tone_is_loudest_in_its_band_and_a_gain_adds_its_logarithm() -> None:
    def heard(sound: np.ndarray) -> np.ndarray:
        return spectra.log_mel(sound, rate=RATE, window=960, hop=240, bands=80)[0, :, 10]

    low, high = (int(heard(tone(hertz)).argmax()) for hertz in (300, 3000))
    corners = spectra.hertz(np.linspace(0, spectra.mel(RATE / 2), 82))
    assert corners[low] < 300 < corners[low + 2]
    assert corners[high] < 3000 < corners[high + 2]
    assert heard(0.5 * tone(300))[low] - heard(tone(300))[low] == pytest.approx(np.log(0.5), abs=1e-6)
    assert heard(0 * tone(300))[low] == pytest.approx(np.log(1e-5))


def test_a_sound_shorter_than_a_frame_has_no_spectrum() -> None:
    with pytest.raises(ToolchainError, match="sounds of 959 samples are shorter than one frame, of 960"):
        spectra.magnitudes(np.zeros((1, 959)), window=960, hop=240)
