import numpy as np
import pytest

from enginewright.ground.errors import ToolchainError
from enginewright.validation.contract import SpectraTask
from enginewright.validation.metrics.mel_distance import MelDistance

SPECTRA = SpectraTask(sample=lambda runner, n, seed: np.zeros((n, 2, 2)), samples=1, rate=8_000)


def test_of_spectra_it_is_the_relative_error(sound_task):
    """Errors of 3 and 4 are one of 5, beside a length of 10."""
    original, candidate = np.array([[[6.0, 8.0], [0, 0]]]), np.array([[[9.0, 8.0], [0, 4.0]]])
    assert MelDistance().measure(SPECTRA, original, candidate) == pytest.approx(0.5)


def test_equal_sounds_are_at_no_distance_whatever_their_sign(sound_task, sounds):
    assert MelDistance().measure(sound_task, sounds, sounds) == 0
    assert MelDistance().measure(sound_task, sounds, -sounds) == 0


def test_a_gain_moves_every_band_by_its_logarithm(sound_task, sounds):
    bands = sound_task.log_mel(sounds)
    assert bands.shape == (2, 80, 100)
    wanted = np.log(2) * np.sqrt(bands.size) / np.linalg.norm(bands)
    assert MelDistance().measure(sound_task, sounds, 2 * sounds) == pytest.approx(wanted, rel=1e-3)
    assert wanted > 0.1


def test_noise_is_further_off_the_louder_it_is(sound_task, sounds):
    noise = np.random.default_rng(1).normal(size=sounds.shape)
    found = [MelDistance().measure(sound_task, sounds, sounds + size * noise) for size in (1e-6, 1e-3, 1e-1)]
    assert 0 < found[0] < 1e-3 < found[1] < 0.05 < found[2]


def test_no_numbers_stay_and_what_cannot_be_paired_is_refused(sound_task, sounds):
    broken = sounds.copy()
    broken[1, 3] = np.nan
    assert np.isnan(MelDistance().measure(sound_task, sounds, broken))
    with pytest.raises(ToolchainError, match=r"sounds of shapes \(2, 8000\) and \(2, 7999\) cannot be compared"):
        MelDistance().measure(sound_task, sounds, sounds[:, :-1])
