from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from transformers.audio_utils import mel_filter_bank

from enginewright.models.blocks.speech import excerpts
from enginewright.models.voice.vevo.mel import mel_frames


def test_frames_of_speech_are_those_of_torchs_transform_and_slaneys_bands() -> None:
    """The authors' order of operations, in torch."""
    sounds = excerpts(2, 24_000, seed=0)
    padded = F.pad(torch.from_numpy(sounds)[:, None], (720, 720), mode="reflect")[:, 0]
    spectrum = torch.stft(padded, 1920, 480, window=torch.hann_window(1920), center=False, return_complex=True)
    size = torch.sqrt(torch.view_as_real(spectrum).pow(2).sum(-1) + 1e-9)  # (B, K, T)
    filters = mel_filter_bank(961, 128, 0.0, 12_000.0, 24_000, norm="slaney", mel_scale="slaney").T
    mel = torch.log((torch.from_numpy(filters).float() @ size).clamp(min=1e-5))
    found = mel_frames(sounds)
    assert found.shape == (2, 128, 50)
    torch.testing.assert_close(found, (mel + 4.92) / math.sqrt(8.14), rtol=1e-3, atol=1e-3)


def test_speech_is_near_what_the_authors_normalise_to_zero_mean_and_unit_variance() -> None:
    found = mel_frames(excerpts(8, 48_000, seed=0))
    assert abs(float(found.mean())) < 1
    assert 0.5 < float(found.std()) < 1.5
    assert np.isfinite(found.numpy()).all()
