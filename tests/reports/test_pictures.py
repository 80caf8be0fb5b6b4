from __future__ import annotations

import base64
import io

import numpy as np
import pytest
from PIL import Image

from enginewright.reports.pictures import png, png_grid, spectra_png, token_map_png
from enginewright.reports.record import TokenMap


def pixels_of(file: bytes) -> np.ndarray:
    """Read back a PNG: (H, W, C)."""
    with Image.open(io.BytesIO(file)) as picture:
        assert picture.format == "PNG"
        assert picture.mode in ("L", "RGB")
        return np.asarray(picture).reshape(picture.height, picture.width, -1)


@pytest.mark.parametrize("channels", [1, 3])
def test_pixels_come_back(channels: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, channels), dtype=np.uint8)
    assert np.array_equal(pixels_of(png(pixels)), pixels)


def test_pictures_stand_side_by_side_and_missing_ones_are_black() -> None:
    pictures = np.stack([np.full((1, 2, 2), value) for value in (-1.0, 0.0, 1.0)])
    grid = pixels_of(base64.b64decode(png_grid(pictures, columns=2)))[..., 0]
    assert grid.tolist() == [[0, 0, 128, 128], [0, 0, 128, 128], [255, 255, 0, 0], [255, 255, 0, 0]]


def test_a_token_map_is_white_where_tokens_stay_to_the_end_beside_the_picture() -> None:
    picture = [[(255, 0, 0), (0, 0, 0)], [(0, 0, 0), (0, 0, 255)]]
    pixels = pixels_of(base64.b64decode(token_map_png(TokenMap(left=[[0, 1], [2, 2]], borders=2, picture=picture))))
    assert pixels[:, :2].tolist() == [[list(pixel) for pixel in row] for row in picture]
    assert pixels[:, 3:, 0].tolist() == [[0, 128], [255, 255]]
    alone = pixels_of(base64.b64decode(token_map_png(TokenMap(left=[[1, 0, 1]], borders=1))))
    assert alone[..., 0].tolist() == [[255, 0, 255]]


def test_spectra_stand_side_by_side_low_tones_below_on_one_scale_of_decibels() -> None:
    """Two sounds of two bands (the first is the low one) and one frame; a factor of 10 is 20 dB."""
    log_mel = np.log(np.array([[[1.0], [0.01]], [[10.0], [1e-9]]]))
    grid = pixels_of(base64.b64decode(spectra_png(log_mel, loudest=0.0)))[..., 0]
    assert grid.tolist() == [[128, 255, 0, 255], [255, 255, 255, 255]]
    quieter = pixels_of(base64.b64decode(spectra_png(log_mel, loudest=np.log(10))))[..., 0]
    assert quieter[1].tolist() == [191, 255, 255, 255]  # a quarter of the way from white to black is 20 dB


def test_a_spectrum_without_numbers_is_black() -> None:
    grid = pixels_of(base64.b64decode(spectra_png(np.full((1, 2, 1), np.nan), loudest=0.0)))[..., 0]
    assert grid[:, 0].tolist() == [0, 0]
