from __future__ import annotations

import base64
import struct
import zlib

import numpy as np
import pytest

from enginewright.reports.pictures import png, png_grid, token_map_png
from enginewright.reports.record import TokenMap


def pixels_of(file: bytes) -> np.ndarray:
    """Read back a PNG of unfiltered rows."""
    assert file[:8] == b"\x89PNG\r\n\x1a\n"
    place, body, shape = 8, b"", (0, 0, 0)
    while place < len(file):
        length, kind = struct.unpack(">I4s", file[place : place + 8])
        content = file[place + 8 : place + 8 + length]
        assert struct.unpack(">I", file[place + 8 + length : place + 12 + length])[0] == zlib.crc32(kind + content)
        if kind == b"IHDR":
            width, height, depth, colour = struct.unpack(">IIBB", content[:10])
            assert depth == 8
            shape = (height, width, {0: 1, 2: 3}[colour])
        body += content if kind == b"IDAT" else b""
        place += 12 + length
    rows = np.frombuffer(zlib.decompress(body), np.uint8).reshape(shape[0], -1)
    assert not rows[:, 0].any()
    return rows[:, 1:].reshape(shape)


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
