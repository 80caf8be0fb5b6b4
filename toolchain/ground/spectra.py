"""Short-time spectra of sounds and their mel bands, as metrics, pictures and models of voice read them.

Sounds are real numbers with full scale 1. Shapes: n sounds, S samples, T frames, K = window / 2 + 1 bins, M bands.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from enginewright.ground.errors import ToolchainError
from enginewright.ground.signature import Array

Floats = npt.NDArray[np.float64]

QUIETEST = 1e-5
"""Mel magnitudes below it count as it, so that silence has a logarithm; the value of HiFi-GAN and its followers."""


def magnitudes(sounds: Array, *, window: int, hop: int) -> Floats:
    """How large each frequency is in each frame, under a Hann window.

    The ends are mirrored by half of what a frame overlaps, so that a sound has a frame for every whole hop.

    Args:
        sounds: (n, S).
        window: samples of a frame.
        hop: samples from one frame to the next; at most ``window``.

    Returns:
        (n, K, T), in float64; a sine of amplitude 1 reads ``window`` / 4 at its frequency.

    Raises:
        ToolchainError: the sounds are shorter than a frame.
    """
    if sounds.shape[1] < window:
        raise ToolchainError(f"sounds of {sounds.shape[1]} samples are shorter than one frame, of {window}")
    edge = (window - hop) // 2
    padded = np.pad(np.asarray(sounds, np.float64), ((0, 0), (edge, edge)), mode="reflect")
    frames = np.lib.stride_tricks.sliding_window_view(padded, window, axis=-1)[:, ::hop]  # (n, T, window)
    # Periodic: numpy's own ends with the zero that the next period starts with.
    with np.errstate(invalid="ignore"):  # an infinite sample has no spectrum, and leaves a NaN
        return np.abs(np.fft.rfft(frames * np.hanning(window + 1)[:-1], axis=-1)).swapaxes(1, 2)


def mel_filters(*, rate: int, window: int, bands: int) -> Floats:
    """What each bin adds to each mel band, (M, K): triangles of area 1 that overlap by half, from 0 to half the rate.

    Source: Slaney 1998, Auditory Toolbox: linear below 1 kHz, 27 bands for each factor of 6.4 above it.

    Args:
        rate: samples a second.
        window: samples of a frame.
        bands: how many.
    """
    corners = hertz(np.linspace(0, mel(rate / 2), bands + 2))[:, None]  # (M + 2, 1)
    bins = np.arange(window // 2 + 1) * rate / window  # (K,)
    widths = np.diff(corners, axis=0)
    rising = (bins - corners[:-2]) / widths[:-1]
    falling = (corners[2:] - bins) / widths[1:]
    return np.maximum(0, np.minimum(rising, falling)) * 2 / (corners[2:] - corners[:-2])


BREAK_HZ = 1000.0
"""Where Slaney's scale turns from linear, three mels for 200 Hz, to logarithmic."""
BREAK_MEL = 15.0
LOG_STEP = float(np.log(6.4)) / 27


def mel(frequency: float) -> float:
    """Hz -> mels of Slaney's scale."""
    if frequency < BREAK_HZ:
        return frequency * BREAK_MEL / BREAK_HZ
    return BREAK_MEL + float(np.log(frequency / BREAK_HZ)) / LOG_STEP


def hertz(mels: Floats) -> Floats:
    """Mels of Slaney's scale -> Hz."""
    linear = mels * BREAK_HZ / BREAK_MEL
    return np.where(mels < BREAK_MEL, linear, BREAK_HZ * np.exp(LOG_STEP * (mels - BREAK_MEL)))


def log_mel(sounds: Array, *, rate: int, window: int, hop: int, bands: int) -> Floats:
    """Natural logarithms of mel magnitudes, (n, M, T), of sounds (n, S) at ``rate`` samples a second.

    Source: Kong et al. 2020, HiFi-GAN, arXiv:2010.05646, whose mel spectra most vocoders read.
    """
    found = np.sqrt(np.square(magnitudes(sounds, window=window, hop=hop)) + 1e-9)  # (n, K, T)
    return np.log(np.maximum(mel_filters(rate=rate, window=window, bands=bands) @ found, QUIETEST))


def log_mel_of_sounds(sounds: Array, *, rate: int) -> Floats:
    """The same of 80 bands, in windows of 40 ms, one for each 10 ms: (n, S) -> (n, 80, T)."""
    hop = rate // 100
    return log_mel(sounds, rate=rate, window=4 * hop, hop=hop, bands=80)
