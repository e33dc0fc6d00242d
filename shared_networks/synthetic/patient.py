"""Make one patient: habitus, pose, and organs that differ from the next patient's."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from scipy.spatial.transform import Rotation

from shared_networks.synthetic.appearance import smooth_field
from shared_networks.synthetic.canvas import Canvas
from shared_networks.synthetic.shapes import Array, Structure
from shared_networks.synthetic.tissues import ABSENT, ORGANS
from shared_networks.synthetic.trunk import Habitus, paint_trunk


def varied(structures: Iterable[Structure], rng: np.random.Generator) -> list[Structure]:
    """Resize and move each organ a little, with what lies within it; some are gone after surgery."""
    grow = {organ: rng.normal(1, 0.035) for organ in ORGANS[1:]}
    move = {organ: rng.normal(0, (1.5, 1.5, 1.5, 0)) for organ in ORGANS[1:]}
    gone = [organ for organ, chance in ABSENT.items() if rng.random() < chance]
    result = []
    for structure in structures:
        organ = structure.within or structure.organ
        if organ in grow:
            paths = [(s.path * (1, 1, 1, grow[organ]) + move[organ]).astype(np.float32) for s in structure.shapes]
            shapes = [s._replace(path=path) for s, path in zip(structure.shapes, paths, strict=True)]
            structure = structure._replace(shapes=tuple(shapes))
        if structure.shapes and organ not in gone:
            result.append(structure)
    return result


def place(
    rng: np.random.Generator, voxel_mm: float, reach: tuple[float, float] | None = None, thickest: float = 5
) -> tuple[Canvas, Array, Array]:
    """Lay a patient with painted trunk on a scanner's grid, RAS up to a slight tilt.

    Args:
        rng: source of all variation.
        voxel_mm: in-plane voxel size in mm, up to 12 % more or less; slices are as thick or up to `thickest`.
        reach: lowest and highest z in patient mm; by default an abdomen, cut somewhere near its ends.
        thickest: greatest distance of slices in mm.

    Returns:
        The canvas, the spacing `[3]` in mm and the affine `[4, 4]` from voxels to world mm.
    """
    in_plane = voxel_mm * rng.uniform(0.88, 1.12)
    spacing = np.array([in_plane, in_plane, max(in_plane, rng.uniform(voxel_mm, max(voxel_mm, thickest)))])
    habitus = rng.beta(1.6, 2.2)  # 0 is thin, 1 obese
    scale = rng.normal(1, 0.02) * np.array([0.97 + 0.08 * habitus, 0.97 + 0.08 * habitus, rng.normal(1, 0.02)])
    fat, belly = 5 + 38 * habitus**1.6, 30 * habitus
    bottom = rng.uniform(-60, -10) if rng.random() < 0.12 else rng.uniform(-200, -120)
    top = rng.uniform(40, 90) if rng.random() < 0.12 else rng.uniform(125, 175)
    if reach:
        bottom, top = reach
    extent = np.array([300, 196 + belly, top - bottom]) * scale + np.array([2.4 * fat + 30, 2.4 * fat + 50, 0])
    shape = tuple(int(n) for n in np.ceil(extent / spacing))

    affine, tilt = np.eye(4), rng.normal(0, 3, 3) * (rng.random() < 0.3)
    affine[:3, :3] = Rotation.from_euler("xyz", tilt, degrees=True).as_matrix() * spacing
    centre = np.array([0, 32 + belly / 2, (bottom + top) / 2]) * scale + rng.normal(0, 4, 3)
    affine[:3, 3] = centre - affine[:3, :3] @ (np.array(shape) - 1) / 2
    pose = Rotation.from_euler("xyz", rng.normal(0, (2, 2.5, 2.5)), degrees=True).as_matrix() * scale
    to_body = (np.linalg.inv(pose) @ affine[:3]).astype(np.float32)
    points = np.empty((3, *shape), np.float32)
    for point, row in zip(points, to_body, strict=True):
        i, j, k = np.ogrid[tuple(map(slice, shape))]
        point[...] = row[0] * i + row[1] * j + row[2] * k + row[3]
        point += rng.uniform(3, 5) * smooth_field(rng, shape, spacing, 75)
        point += rng.uniform(0.9, 1.6) * smooth_field(rng, shape, spacing, 24)
    canvas = Canvas(points)
    paint_trunk(canvas, Habitus(fat, rng.uniform(10, 15), belly))
    affine[:3, 3] += rng.uniform(-300, 300, 3)  # the scanner's origin is anywhere
    return canvas, spacing, affine
