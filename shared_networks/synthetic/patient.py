"""Make one patient: habitus, pose, and organs that differ from the next patient's."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from scipy.spatial.transform import Rotation

from shared_networks.synthetic.appearance import smooth_field
from shared_networks.synthetic.canvas import Canvas
from shared_networks.synthetic.hips import pose_hips
from shared_networks.synthetic.shapes import Array, Shape, Structure
from shared_networks.synthetic.tissues import ABSENT, ORGANS, TISSUE_ID
from shared_networks.synthetic.trunk import Habitus, paint_trunk

FIXED = ("aorta", "inferior vena cava", "esophagus")  # they grow in width only
SPREAD = {"liver": 0.09, "spleen": 0.05, "stomach": 0.06, "aorta": 0.04, "inferior vena cava": 0.05, "esophagus": 0.08}


def drift(places: Array, waves: Array, phases: Array, size: Array) -> Array:
    """Return how far organs at `places` `[n, 3]` in mm are moved, `[n, 3]`: smoothly, and least at spine and flanks."""
    x, y, z = places.T
    free = (1 - 0.6 * np.exp(-((x / 45) ** 2) - ((y - 15) / 40) ** 2)) * np.clip((z + 230) / 90, 0, 1)
    aside = np.c_[np.clip(1.25 - np.abs(x) / 110, 0.2, 1), np.ones((len(x), 2))]
    return free[:, None] * aside * (np.sin(places @ waves.T + phases) @ size)


class Change(NamedTuple):
    """How an organ differs from the usual one.

    Attributes:
        centre: `[3]` the point in mm that stretching keeps.
        stretch: `[3]` factors on size; of organs that hang to the spine, the geometric mean widens them only.
        move: `[3]` in mm.
    """

    centre: Array
    stretch: Array
    move: Array


def changed(shape: Shape, change: Change, fixed: bool) -> Shape:
    """Move and stretch a shape with its organ; only widen it if `fixed`."""
    path = shape.path.copy()
    if fixed:
        path[:, 3] *= np.cbrt(change.stretch.prod())
        return shape._replace(path=path)
    path[:, :3] = change.centre + (path[:, :3] - change.centre) * change.stretch + change.move
    x, y, z = change.stretch * shape.flat
    return shape._replace(path=path, flat=(x, y, z))


def varied(structures: Iterable[Structure], rng: np.random.Generator) -> list[Structure]:
    """Move the organs of the belly together, and move and stretch each by itself; some are gone after surgery."""
    waves = rng.normal(0, 2 * np.pi / 280, (5, 3))
    phases, size = rng.uniform(0, 2 * np.pi, 5), rng.normal(0, (4, 4, 6), (5, 3))
    stretch = {o: np.exp(rng.normal(0, SPREAD.get(o, 0.08)) + rng.normal(0, 0.04, 3)) for o in ORGANS[1:]}
    move = {organ: rng.normal(0, (2, 2, 3)) for organ in ORGANS[1:]}
    gone = [organ for organ, chance in ABSENT.items() if rng.random() < chance]
    changes: dict[str, Change] = {}
    result = []

    def drifted(shapes: tuple[Shape, ...]) -> tuple[Shape, ...]:
        paths = [s.path + np.c_[drift(s.path[:, :3], waves, phases, size), np.zeros(len(s.path))] for s in shapes]
        return tuple(s._replace(path=path.astype(np.float32)) for s, path in zip(shapes, paths, strict=True))

    for structure in structures:
        organ = structure.within or structure.organ or structure.part
        if not structure.shapes or organ in gone:
            continue
        if structure.inside:
            structure = structure._replace(shapes=drifted(structure.shapes), carve=drifted(structure.carve))
        if organ in stretch:
            if organ not in changes:
                centre = np.concatenate([s.path[:, :3] for s in structure.shapes]).mean(0)
                changes[organ] = Change(centre, stretch[organ], move[organ])
            shapes, carve = (
                tuple(changed(shape, changes[organ], organ in FIXED) for shape in group)
                for group in (structure.shapes, structure.carve)
            )
            structure = structure._replace(shapes=shapes, carve=carve)
        result.append(structure)
    return result


def bend(points: Array, sideways: float, rng: np.random.Generator) -> None:
    """Bend the spine with what lies next to it `sideways` mm to one side and back, up to 30 mm; the flanks stay."""
    x, _, z = points
    wave = np.sin(2 * np.pi * z / rng.uniform(280, 500) + rng.uniform(0, 2 * np.pi))
    x += np.clip(sideways, -30, 30) * wave * np.exp(-((x / 110) ** 2))


def turn_table(canvas: Canvas) -> None:
    """Take the table from behind a patient who lies prone and put a flat one in front."""
    body = canvas.tissue > TISSUE_ID["gas"]
    canvas.tissue[canvas.tissue == TISSUE_ID["table"]] = TISSUE_ID["air"]
    front = canvas.points[1][body].max() if body.any() else 0
    canvas.tissue[np.abs(canvas.points[1] - front - 3) < 2] = TISSUE_ID["table"]


def scan_range(rng: np.random.Generator) -> tuple[float, float]:
    """Draw the lowest and highest z of a scan in patient mm: mostly an abdomen, also more of the body or a part."""
    kind = rng.random()
    if kind < 0.4:  # the abdomen, its ends cut or whole
        bottom = rng.uniform(-60, -10) if rng.random() < 0.15 else rng.uniform(-200, -120)
        return bottom, rng.uniform(40, 90) if rng.random() < 0.15 else rng.uniform(115, 175)
    if kind < 0.7:  # with the pelvis
        return rng.uniform(-340, -210), rng.uniform(105, 175)
    if kind < 0.8:  # with the chest
        return rng.uniform(-150, -20), rng.uniform(270, 330)
    if kind < 0.9:  # the trunk
        return rng.uniform(-470, -290), rng.uniform(250, 330)
    middle, half = rng.uniform(-380, 240), rng.uniform(60, 120)
    return middle - half, middle + half


def place(
    rng: np.random.Generator, voxel_mm: float, reach: tuple[float, float] | None = None, thickest: float = 5
) -> tuple[Canvas, Array, Array]:
    """Lay a patient with painted trunk on a scanner's grid, RAS up to a slight tilt.

    Args:
        rng: source of all variation.
        voxel_mm: in-plane voxel size in mm, up to 12 % more or less; slices are as thick or up to `thickest`.
        reach: lowest and highest z in patient mm; by default :func:`scan_range`.
        thickest: greatest distance of slices in mm.

    Returns:
        The canvas, the spacing `[3]` in mm and the affine `[4, 4]` from voxels to world mm.
    """
    in_plane = voxel_mm * rng.uniform(0.88, 1.12)
    spacing = np.array([in_plane, in_plane, max(in_plane, rng.uniform(voxel_mm, max(voxel_mm, thickest)))])
    build = rng.beta(1.6, 2.2)  # 0 is thin, 1 obese
    scale = rng.normal(1, 0.02) * np.array([0.97 + 0.08 * build, 0.97 + 0.08 * build, rng.normal(1, 0.02)])
    bottom, top = reach or scan_range(rng)
    habitus = Habitus(
        fat=5 + 38 * build**1.6,
        wall=rng.uniform(10, 15),
        belly=30 * build,
        female=bool(rng.random() < 0.5),
        arms_down=bool(rng.random() < 0.15),
        breath=float(np.clip(rng.normal(-6, 13), -36, 18)),
        prone=bool(rng.random() < 0.06),
        effusion=tuple(rng.uniform(12, 70, 2) * (rng.random(2) < 0.12)),
    )
    fat, belly = habitus.fat, habitus.belly
    width = 300 + 50 * float(np.clip((-120 - bottom) / 100, 0, 1))  # hips are wider
    extent = np.array([width, 196 + belly, top - bottom]) * scale + np.array([2.6 * fat + 30, 2.4 * fat + 50, 0])
    shoulders = 120 * rng.uniform(0.3, 1.1) * (top > 200)  # in view or cut by the field of view
    extent[0] += max(shoulders, (150 + 0.5 * fat) * rng.uniform(0, 1.1) * habitus.arms_down)
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
        point += rng.uniform(3.5, 8.5) * smooth_field(rng, shape, spacing, 75)
        point += rng.uniform(1, 2.5) * smooth_field(rng, shape, spacing, 24)
    bend(points, rng.normal(0, 10) * (rng.random() < 0.35), rng)
    pose_hips(points, rng)
    canvas = Canvas(points, habitus)
    paint_trunk(canvas, habitus, rng)
    if habitus.prone:
        turn_table(canvas)
    affine[:3, 3] += rng.uniform(-300, 300, 3)  # the scanner's origin is anywhere
    return canvas, spacing, affine
