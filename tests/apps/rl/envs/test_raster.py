from __future__ import annotations

import math
import tracemalloc

import numpy as np
import pytest

from apps.rl.envs.pictures import as_frame, resize
from apps.rl.envs.raster import blank, capsule, circle, rectangle

BLACK, WHITE, RED = (0, 0, 0), (255, 255, 255), (200, 40, 20)


def area(image):
    return image[..., 0].sum() / 255


def test_shapes_cover_their_areas():
    image = blank(64, BLACK)
    circle(image, (30.3, 28.7), 9.4, WHITE)
    assert area(image) == pytest.approx(math.pi * 9.4**2, rel=0.01)
    image = blank(64, BLACK)
    capsule(image, (12, 20), (45, 41), 4.5, WHITE)
    assert area(image) == pytest.approx(2 * 4.5 * math.hypot(33, 21) + math.pi * 4.5**2, rel=0.01)
    image = blank(64, BLACK)
    rectangle(image, (10.25, 20.5), (30.75, 25.25), WHITE)
    assert area(image) == pytest.approx(20.5 * 4.75, rel=0.01)


def test_places_and_colours():
    image = blank(32, WHITE)
    rectangle(image, (4, 8), (10, 12), RED)
    assert (image[8:12, 4:10] == RED).all()
    image[8:12, 4:10] = WHITE
    assert (image == WHITE).all()
    circle(image, (20.5, 5.5), 3, RED)
    rows, columns = np.nonzero((image != WHITE).any(-1))
    assert (rows.mean(), columns.mean()) == (5.0, 20.0)  # x to the right, y down, pixel centres at halves
    assert (image[5, 20] == RED).all()


def test_edges_are_smooth():
    image = blank(32, BLACK)
    circle(image, (16, 16), 8, WHITE)
    between = (image[..., 0] > 20) & (image[..., 0] < 235)
    assert 20 < between.sum() < 2 * math.pi * 8 * 1.5
    image = blank(4, BLACK)
    rectangle(image, (1.5, 1), (3, 2), WHITE)
    assert image[1, :, 0].tolist() == [0, 128, 255, 0]


def test_what_lies_outside_is_left_out():
    image = blank(16, BLACK)
    circle(image, (-30, 8), 5, WHITE)
    rectangle(image, (40, 40), (50, 50), WHITE)
    capsule(image, (-20, -20), (-10, -40), 3, WHITE)
    assert not image.any()
    circle(image, (0, 0), 4, WHITE)
    assert area(image) == pytest.approx(math.pi * 4, rel=0.05)


def test_small_shapes_touch_few_pixels():
    image = blank(1000, BLACK)
    tracemalloc.start()
    circle(image, (500, 500), 10, WHITE)
    rectangle(image, (200, 200), (220, 220), WHITE)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 200_000  # the image has 3,000,000 values


def test_resizing_averages_areas():
    image = np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)
    small = resize(image, 30)
    assert small.shape == (30, 30, 3)
    expected = image.reshape(30, 2, 30, 3, 3).mean((1, 3))
    assert np.abs(small - expected).max() <= 0.5 + 1e-3
    assert resize(np.full((7, 5, 3), 93, dtype=np.uint8), 16).tolist() == np.full((16, 16, 3), 93).tolist()


def test_frames_have_channels_first_and_brightness_in_gray():
    image = blank(8, RED)
    assert as_frame(image, gray=False).shape == (3, 8, 8)
    assert as_frame(image, gray=False)[:, 0, 0].tolist() == list(RED)
    assert as_frame(image, gray=True)[0, 0, 0] == round(0.299 * 200 + 0.587 * 40 + 0.114 * 20)
