"""Mel frames of speech, as Vevo's flow draws them and its vocoder reads them.

Source: the authors' released configuration (Zhang et al. 2025, arXiv:2502.07243). Checked against open-mmlab/Amphion at
d3de90f (melvqgan/melspec.py, vevo_utils.py, Vocoder.json): order of operations, and equal frames by torch's transform.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from enginewright.ground import spectra
from enginewright.ground.signature import Array
from enginewright.models.blocks.speech import RATE
from enginewright.models.voice.vevo.sampling import normalize_mel


def mel_frames(sounds: Array, *, n_fft: int = 1920, hop: int = 480, bands: int = 128) -> Tensor:
    """Sounds (B, S) at 24 kHz -> normalised mel frames (B, C, T) in float32, one for each whole hop.

    Args:
        sounds: with full scale 1.
        n_fft: samples that a frame looks at.
        hop: samples from one frame to the next; by default 50 frames are a second.
        bands: mel channels.
    """
    found = spectra.log_mel(sounds, rate=RATE, window=n_fft, hop=hop, bands=bands)
    return normalize_mel(torch.from_numpy(found.astype(np.float32)))
