import numpy as np
import pytest

from enginewright.ground.errors import ToolchainError
from enginewright.validation.metrics.sound_snr_db import SoundSnrDb


def test_known_noise_reads_its_level_in_each_sound(sound_task):
    """Noise of a tenth of the signal's size is 20 dB below it, of a hundredth 40 dB; the mean is of decibels."""
    original = np.random.default_rng(0).normal(size=(2, 500))
    candidate = original + np.array([[0.1], [0.01]]) * original[:, ::-1]
    assert SoundSnrDb().measure(sound_task, original, candidate) == pytest.approx(30)


def test_equal_sounds_read_the_cap_and_one_does_not_hide_the_other(sound_task, sounds):
    assert SoundSnrDb().measure(sound_task, sounds, sounds) == 100
    half = sounds.copy()
    half[0] *= 1.1
    assert SoundSnrDb().measure(sound_task, sounds, half) == pytest.approx((20 + 100) / 2, abs=1e-4)


def test_a_sound_of_the_other_sign_is_all_noise(sound_task, sounds):
    assert SoundSnrDb().measure(sound_task, sounds, -sounds) == pytest.approx(-20 * np.log10(2))


def test_a_sample_that_is_no_number_is_not_capped_away(sound_task, sounds):
    broken = sounds.copy()
    broken[1, 3] = np.nan
    assert np.isnan(SoundSnrDb().measure(sound_task, sounds, broken))


def test_silence_and_other_shapes_are_refused(sound_task, sounds):
    with pytest.raises(ToolchainError, match="silent"):
        SoundSnrDb().measure(sound_task, sounds * [[1], [0]], sounds)
    with pytest.raises(ToolchainError, match=r"sounds of shapes \(2, 8000\) and \(1, 8000\) cannot be compared"):
        SoundSnrDb().measure(sound_task, sounds, sounds[:1])
