"""Samples as one PNG, in base64, for a report that is a single file."""

from __future__ import annotations

import base64
import io
import math

import numpy as np
import numpy.typing as npt
from PIL import Image

from enginewright.reports.record import TokenMap


def png_grid(pictures: npt.NDArray[np.generic], *, columns: int = 10) -> str:
    """Pictures (n, C, H, W) in [-1, 1], C 1 or 3, side by side in rows -> PNG as base64."""
    n, channels, height, width = pictures.shape
    columns = min(columns, n)
    rows = -(-n // columns)
    pixels = ((pictures.astype(np.float64).clip(-1, 1) + 1) * 127.5).round().astype(np.uint8)
    sheet = np.zeros((rows * columns, channels, height, width), np.uint8)
    sheet[:n] = pixels
    grid = sheet.reshape(rows, columns, channels, height, width).transpose(0, 3, 1, 4, 2)
    return base64.b64encode(png(grid.reshape(rows * height, columns * width, channels))).decode()


SHADES_DB = 80.0
"""From the loudest place of a spectrum, which is white, down to black."""


def spectra_png(log_mel: npt.NDArray[np.generic], *, loudest: float) -> str:
    """Spectra of sounds (n, M, T), side by side, low tones at the bottom, a white line behind each -> PNG as base64.

    Args:
        log_mel: natural logarithms of magnitudes.
        loudest: the one that is white; the same for all pictures that stand beside one another.
    """
    below_db = (loudest - log_mel.astype(np.float64)) * 20 / math.log(10)
    shades = 1 - 2 * np.nan_to_num(below_db, nan=SHADES_DB) / SHADES_DB  # (n, M, T); no number is silent
    lined = np.pad(shades[:, ::-1], ((0, 0), (0, 0), (0, 1)), constant_values=1)
    return png_grid(lined[:, None], columns=len(lined))


def token_map_png(tokens: TokenMap) -> str:
    """Which tokens stayed, a pixel each, as base64: the input's picture on the left if there is one.

    On the right, white passed every border and black none.
    """
    left = np.array(tokens.left)[..., None].repeat(3, axis=-1)
    parts = [(left * 255 / tokens.borders).round().astype(np.uint8)]
    if tokens.picture:
        gap = np.full((len(left), 1, 3), 127, np.uint8)
        parts = [np.array(tokens.picture, np.uint8), gap, *parts]
    return base64.b64encode(png(np.concatenate(parts, axis=1))).decode()


def png(pixels: npt.NDArray[np.uint8]) -> bytes:
    """Pixels (H, W, C), C 1 (grey) or 3 (RGB) -> a PNG file."""
    file = io.BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(file, "PNG", optimize=True)
    return file.getvalue()
