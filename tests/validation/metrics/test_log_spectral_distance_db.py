import numpy as np
import pytest

from enginewright.ground.errors import ToolchainError
from enginewright.validation.metrics.log_spectral_distance_db import LogSpectralDistanceDb


def test_equal_sounds_are_at_no_distance_whatever_their_sign(sound_task, sounds):
    assert LogSpectralDistanceDb().measure(sound_task, sounds, sounds) == 0
    assert LogSpectralDistanceDb().measure(sound_task, sounds, -sounds) == 0


@pytest.mark.parametrize(("gain", "decibels"), [(0.5, 6.0206), (10.0, 20.0)])
def test_a_gain_reads_its_decibels(sound_task, sounds, gain, decibels):
    assert LogSpectralDistanceDb().measure(sound_task, sounds, gain * sounds) == pytest.approx(decibels, abs=1e-3)


def test_a_gain_of_one_sound_in_two_reads_half(sound_task, sounds):
    candidate = sounds * np.array([[1], [0.1]])
    assert LogSpectralDistanceDb().measure(sound_task, sounds, candidate) == pytest.approx(10, abs=1e-2)


def test_a_band_that_is_lost_reads_more_than_one_that_is_turned_down(sound_task, sounds):
    spectrum = np.fft.rfft(sounds)
    upper = np.arange(spectrum.shape[1]) > spectrum.shape[1] // 2
    turned, lost = (np.fft.irfft(spectrum * np.where(upper, gain, 1)) for gain in (0.5, 1e-9))
    small, large = (LogSpectralDistanceDb().measure(sound_task, sounds, each) for each in (turned, lost))
    assert small == pytest.approx(
        6.02 / np.sqrt(2), abs=0.1
    )  # the root mean square of 6 dB in one half and 0 in the other
    assert large > 30


def test_what_no_ear_hears_is_no_distance(sound_task, sounds):
    silence = np.zeros_like(sounds)
    assert LogSpectralDistanceDb().measure(sound_task, silence, 1e-7 * sounds) == 0
    assert LogSpectralDistanceDb().measure(sound_task, silence, sounds) > 50


def test_no_numbers_stay_and_what_cannot_be_paired_is_refused(sound_task, sounds):
    for value in (np.nan, np.inf):
        broken = sounds.copy()
        broken[1, 3] = value
        assert np.isnan(LogSpectralDistanceDb().measure(sound_task, sounds, broken))
    with pytest.raises(ToolchainError, match="one by one"):
        LogSpectralDistanceDb().measure(sound_task, sounds, sounds[:, :-1])
    with pytest.raises(ToolchainError, match="sounds of 80 samples are shorter than one frame, of 320"):
        LogSpectralDistanceDb().measure(sound_task, sounds[:, :80], sounds[:, :80])
