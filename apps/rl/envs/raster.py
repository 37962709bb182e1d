"""Drawing on uint8 images `[H, W, 3]` with NumPy, in place and with smooth edges.

Coordinates are in pixels, (x, y) with y down, (0, 0) the outer corner of the first pixel. What lies outside the image
is left out. Only the pixels around a shape are touched, so small shapes are cheap.
"""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Float, UInt8

Image = UInt8[np.ndarray, "H W 3"]
Colour = tuple[int, int, int]
Point = tuple[float, float]


def blank(size: int, colour: Colour) -> Image:
    """A square image of one colour."""
    return np.full((size, size, 3), colour, dtype=np.uint8)


def circle(image: Image, centre: Point, radius: float, colour: Colour) -> None:
    """Fill a circle."""
    capsule(image, centre, centre, radius, colour)


def capsule(image: Image, start: Point, end: Point, radius: float, colour: Colour) -> None:
    """Fill all that lies within `radius` of the segment from `start` to `end`: a thick line with round ends."""
    (ax, ay), (bx, by) = start, end
    top, bottom = _span(min(ay, by) - radius, max(ay, by) + radius, image.shape[0])
    left, right = _span(min(ax, bx) - radius, max(ax, bx) + radius, image.shape[1])
    y = (np.arange(top, bottom) + (0.5 - ay))[:, None]
    x = np.arange(left, right) + (0.5 - ax)
    dx, dy = bx - ax, by - ay
    if dx or dy:
        along = np.clip((x * dx + y * dy) / (dx * dx + dy * dy), 0, 1)
        x, y = x - along * dx, y - along * dy
    # A pixel is covered by its distance to the edge: all of it half a pixel inside, none half a pixel outside.
    _blend(image[top:bottom, left:right], np.clip(radius + 0.5 - np.sqrt(x * x + y * y), 0, 1), colour)


def rectangle(image: Image, start: Point, end: Point, colour: Colour) -> None:
    """Fill the upright rectangle between two opposite corners, edge pixels by the share that it covers."""
    (left, top), (right, bottom) = start, end
    rows, columns = _span(top, bottom, image.shape[0]), _span(left, right, image.shape[1])
    cover = np.outer(_cover(rows, top, bottom), _cover(columns, left, right))
    _blend(image[rows[0] : rows[1], columns[0] : columns[1]], cover, colour)


def _span(low: float, high: float, length: int) -> tuple[int, int]:
    """First pixel and the one after the last between two coordinates, a pixel of room for smooth edges."""
    first = min(max(math.floor(low) - 1, 0), length)
    return first, max(min(math.ceil(high) + 1, length), first)


def _cover(span: tuple[int, int], low: float, high: float) -> Float[np.ndarray, " n"]:
    pixels = np.arange(*span)
    return np.clip(np.minimum(pixels + 1, high) - np.maximum(pixels, low), 0, 1)


def _blend(patch: Image, cover: Float[np.ndarray, "H W"], colour: Colour) -> None:
    cover = cover[..., None]
    patch[...] = patch + cover * (np.asarray(colour) - patch) + 0.5
