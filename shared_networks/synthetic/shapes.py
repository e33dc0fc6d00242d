"""Describe organs by smooth implicit shapes in patient millimetres.

x runs right, y anterior, z superior; the origin lies in the first lumbar vertebra.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.interpolate import CubicSpline
from scipy.spatial.transform import Rotation

Array = NDArray[np.floating[Any]]
Triple = tuple[float, float, float]


class Shape(NamedTuple):
    """A tapered tube about a centre line, or an ellipsoid where the line is a single point.

    Attributes:
        path: `[n, 4]` points of the centre line: x, y, z in mm and the radius there.
        flat: Factors on the radius along the shape's own three axes.
        turn: Rotation of these axes about x, y and z in degrees.
    """

    path: Array
    flat: Triple = (1, 1, 1)
    turn: Triple = (0, 0, 0)


class Structure(NamedTuple):
    """A union of shapes and what to paint into it.

    Attributes:
        tissue: Tissue of the outermost layer.
        shapes: The shapes; none paints nothing.
        organ: Label to give; "background" clears it. Without one, labels inside `within` stay and others are cleared.
        layers: Further tissues from outside in, as (depth in mm, tissue).
        within: Organ to which painting is confined.
        carve: Shapes to take away.
        blend: Over how many mm neighbouring shapes melt into each other; if negative, how far apart they stay.
        halo: Width in mm of the fat around the structure.
        gas: Share of the innermost layer's height that is gas, on the upper side as the patient lies.
        sediment: Tissue on the lower side of the innermost layer, and its share of the height.
        mottle: Tissue in patches through the innermost layer, and its share of the volume.
        part: Organ that the structure moves with and goes with, unless `within` or `organ` names it.
        inside: Whether the structure stays within the abdominal wall and below the diaphragm.
        deep: Whether the structure stays outside the belly and beneath the subcutaneous fat.
    """

    tissue: str
    shapes: tuple[Shape, ...]
    organ: str = ""
    layers: tuple[tuple[float, str], ...] = ()
    within: str = ""
    carve: tuple[Shape, ...] = ()
    blend: float = 0
    halo: float = 0
    gas: float = 0
    sediment: tuple[str, float] = ("", 0)
    mottle: tuple[str, float] = ("", 0)
    part: str = ""
    inside: bool = True
    deep: bool = False


def ball(x: float, y: float, z: float, *radii: float, turn: Triple = (0, 0, 0)) -> Shape:
    """Make an ellipsoid about (x, y, z) with one radius or three, in mm."""
    rx, ry, rz = radii * 3 if len(radii) == 1 else radii
    return Shape(np.array([[x, y, z, 1]], np.float32), (rx, ry, rz), turn)


def tube(*points: tuple[float, float, float, float], flat: Triple = (1, 1, 1), steps: int = 4) -> Shape:
    """Make a tube through points (x, y, z, radius) in mm along a cubic spline, in `steps` straight pieces a point."""
    line = np.array(points, float)
    along = np.r_[0, np.cumsum(np.linalg.norm(np.diff(line[:, :3], axis=0), axis=1))]
    fine = np.interp(np.linspace(0, len(line) - 1, steps * (len(line) - 1) + 1), np.arange(len(line)), along)
    return Shape(CubicSpline(along, line)(fine).astype(np.float32), flat)


def mirrored(*shapes: Shape) -> tuple[Shape, ...]:
    """Return shapes and their mirror images on the other side of the body."""
    mirror = np.array([-1, 1, 1, 1], np.float32)
    return shapes + tuple(Shape(s.path * mirror, s.flat, (s.turn[0], -s.turn[1], -s.turn[2])) for s in shapes)


def pieces(shape: Shape) -> Array:
    """Return the straight pieces of a shape's path, `[n, 2, 4]`; an ellipsoid has one, of no length."""
    path = shape.path if len(shape.path) > 1 else shape.path[[0, 0]]
    return np.stack([path[:-1], path[1:]], 1)


def axes(shape: Shape) -> Array:
    """Return the directions of a shape's own axes as the columns of a matrix."""
    return _turned(tuple(map(float, shape.turn)))


@lru_cache(4096)
def _turned(turn: Triple) -> Array:
    """Return the matrix of a rotation about x, y and z by degrees."""
    return Rotation.from_euler("xyz", turn, degrees=True).as_matrix().astype(np.float32)


def bounds(shape: Shape, margin: float) -> Array:
    """Return the lowest and highest corner, `[n, 2, 3]` in mm, around each piece of a shape and `margin` mm more."""
    ends = pieces(shape)
    reach = np.linalg.norm(axes(shape) * shape.flat, axis=1) * ends[..., 3:] + margin
    return np.stack([(ends[..., :3] - reach).min(1), (ends[..., :3] + reach).max(1)], 1)


def distance(shape: Shape, piece: Array, points: Array) -> Array:
    """Return the distance in mm from the surface of a piece of a shape, negative inside, exact to first order.

    Args:
        shape: The shape, for its flattening and turn.
        piece: `[2, 4]` ends of the piece.
        points: `[3, ...]` positions in mm.
    """
    flat = np.array(shape.flat, np.float32)
    if shape.flat == (1, 1, 1):
        start, step = piece[0, :3], piece[1, :3] - piece[0, :3]
        away = points - start.reshape(3, 1, 1, 1)
        along = np.clip(np.tensordot(step, away, 1) / max(float(step @ step), 1e-6), 0, 1)
        away -= step.reshape(3, 1, 1, 1) * along
        return np.sqrt(np.einsum("i...,i...", away, away)) - piece[0, 3] - (piece[1, 3] - piece[0, 3]) * along
    to_round = (axes(shape) / flat).T
    start, step = to_round @ piece[0, :3], to_round @ (piece[1, :3] - piece[0, :3])
    if any(shape.turn):
        away = np.tensordot(to_round, points, 1) - start.reshape(3, 1, 1, 1)
    else:
        away = points / flat.reshape(3, 1, 1, 1) - start.reshape(3, 1, 1, 1)
    along = np.clip(np.tensordot(step, away, 1) / max(float(step @ step), 1e-6), 0, 1)
    away -= step.reshape(3, 1, 1, 1) * along
    length = np.linalg.norm(away, axis=0) + 1e-6
    slope = np.linalg.norm(away / flat.reshape(3, 1, 1, 1), axis=0) / length + 1e-6
    return (length - piece[0, 3] - (piece[1, 3] - piece[0, 3]) * along) / slope


def melt(first: Array, second: Array, width: float) -> Array:
    """Smooth minimum of two distances; the plain one where they differ by more than `width` mm."""
    return np.minimum(first, second) - np.maximum(width - np.abs(first - second), 0) ** 2 / (4 * width + 1e-6)
