"""Paint the outline of the body and the cavities in it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from shared_networks.synthetic.canvas import FAR, Box, Canvas
from shared_networks.synthetic.hips import merge_hips, open_planes
from shared_networks.synthetic.shapes import Array, Shape, Structure, melt, mirrored
from shared_networks.synthetic.shoulders import Girdle, breasts, cage
from shared_networks.synthetic.spine import THORACIC
from shared_networks.synthetic.tissues import TISSUE_ID


class Habitus(NamedTuple):
    """The build of a patient.

    Attributes:
        fat: thickness of the subcutaneous fat in mm.
        wall: thickness of the muscle wall at the flanks in mm.
        belly: how far the belly bulges forward in mm.
        female: sex, where it shows.
        arms_down: whether the arms lie beside the body, else raised above the head.
        breath: how far the diaphragm lies above its middle position, in mm; negative after breathing in.
        prone: whether the patient lies on the belly.
        effusion: height in mm of fluid in the back of the right and the left half of the chest.
    """

    fat: float
    wall: float
    belly: float
    female: bool = False
    arms_down: bool = False
    breath: float = 0
    prone: bool = False
    effusion: tuple[float, float] = (0, 0)


# The chest above z = 90 differs from the trunk's common outline: in mm, for each mm of height.
_HEIGHTS = np.arange(90, 400, dtype=np.float32)
_CENTRE, _WIDTH, _FRONT, _BACK = cage(_HEIGHTS)
CHEST_SHIFT = _CENTRE - 38
CHEST_NARROWING = 141 + 9 * np.cos((_HEIGHTS - 40) / 60) - _WIDTH
CHEST_FLATTENING = np.stack([98 - (_FRONT - _CENTRE), 98 - (_CENTRE - _BACK)])
CHEST_NARROWING[0] = CHEST_SHIFT[0] = 0
CHEST_FLATTENING[:, 0] = 0
_RIB_PHASE = np.interp(np.arange(-100, 480), np.array(THORACIC[:12]) + 13, np.arange(12), -0.5, 11.5)
IS_RIB = np.abs(_RIB_PHASE - np.rint(_RIB_PHASE)) < 0.21


def paint_chest(canvas: Canvas, habitus: Habitus, core: Array, lining: Array, height: Array) -> Array:
    """Paint ribs, lungs, fluid and the diaphragm, whose distance it returns in mm, negative below.

    Args:
        canvas: with the shell of the trunk painted.
        habitus: of the patient.
        core: distance from the outer surface of the wall's muscles.
        lining: distance from the inner surface of the wall.
        height: y from the middle of the trunk.
    """
    below = np.full_like(core, -FAR)
    box = canvas.box(np.array([(-FAR, -FAR, -85), (FAR, FAR, FAR)]))
    x, y, z = canvas.points[(slice(None), *box)]
    core, lining = core[box], lining[box]
    if not core.size:
        return below
    dome = np.full_like(core, FAR)
    for cx, cy, rx, ry, top in ((62, 42, 76, 108, 122), (-62, 42, 76, 108, 106), (0, 62, 62, 98, 94)):
        level = ((x - cx) / rx) ** 2 + ((y - cy) / ry) ** 2 + (np.maximum(z, 0) / (top + habitus.breath)) ** 2
        dome = melt(dome, 70 * (np.sqrt(level) - 1), 12)
    dome[z < 0] = -FAR

    turn = np.arctan2(np.abs(x), -height[box])  # from the spine, 0, round the flank to the sternum, pi
    rib = np.abs(core + 6) < 4 + 0.5 * np.cos(3 * turn)
    rib &= IS_RIB[np.clip(z + 26 * turn + 100, 0, len(IS_RIB) - 1).astype(np.int16)]
    rib &= (z > 70 * turn - 85) & (turn > 0.35) & (turn < 2.85)
    apex = ((np.abs(x) - 44) / 95) ** 2 + ((y - 8) / 105) ** 2 + (np.maximum(z - 190, 0) / 112) ** 2
    chest = (lining < 0) & (dome > 3)
    air = chest & ((apex < 1) | (z < 190)) & (np.abs(x) > 3.6)  # fat parts the lungs
    tissue = canvas.tissue[box]
    for name, where in (
        ("cortical bone", rib),
        ("trabecular bone", rib & (np.abs(core + 6) < 2)),
        ("cartilage", rib & (turn > 1.95)),
        ("muscle", lining < 0),
        ("fat", chest),
        ("lung", air),
    ):
        tissue[where] = TISSUE_ID[name]
    for side, fluid in zip((1, -1), habitus.effusion, strict=True):
        if fluid:
            depth = y + 62 - fluid * np.clip(1.6 - (z - 60) / 150, 0, 1.4)  # the patient lies on the back
            half = air & (x * side > 0)
            tissue[half & (depth < 14 + 6 * np.sin(x / 9) * np.sin(z / 11))] = TISSUE_ID["atelectasis"]
            tissue[half & (depth < 0)] = TISSUE_ID["effusion"]
    below[box] = dome
    return below


def coarse_distance(canvas: Canvas, shapes: Iterable[Shape], box: Box, blend: float, margin: float) -> Array:
    """Return what `canvas.distance` does, computed about every 7 mm and interpolated between."""
    points = canvas.points[(slice(None), *box)]
    shape: tuple[int, ...] = points.shape[1:]
    if not points.size:
        return np.full(shape, FAR, np.float32)
    widths = [float(np.ptp(points[axis])) / max(shape[axis] - 1, 1) for axis in range(3)]
    steps = [max(1, int(7 / max(width, 0.1))) for width in widths]
    picked = [np.r_[0 : size - 1 : step, size - 1] for size, step in zip(shape, steps, strict=True)]
    few = Canvas(points[(slice(None), *np.ix_(*picked))], canvas.habitus)
    result = few.distance(shapes, tuple(slice(0, len(known)) for known in picked), blend, margin)
    for axis, known in enumerate(picked):
        where = np.interp(np.arange(shape[axis]), known, np.arange(len(known)))
        low = np.minimum(where.astype(int), max(len(known) - 2, 0))
        share = (where - low).astype(np.float32).reshape([-1 if a == axis else 1 for a in range(3)])
        first, second = result.take(low, axis), result.take(np.minimum(low + 1, len(known) - 1), axis)
        result = first + (second - first) * share
    return result


def paint_shell(canvas: Canvas, habitus: Habitus, core: Array, skin: Array, rng: np.random.Generator) -> None:
    """Lower `skin` to the shoulders, breasts and arms, and paint skin, fat, muscles and bones outside the rib cage."""
    girdle = Girdle(habitus.arms_down, habitus.fat, rng)
    box = canvas.box(np.array([(-FAR, -FAR, 60), (FAR, FAR, FAR)]))
    if core[box].size:
        cover = skin[box] - core[box]
        flesh = melt(core[box], coarse_distance(canvas, girdle.flesh(), box, 14, 20 + 1.4 * habitus.fat), 14)
        skin[box] = np.minimum(skin[box], flesh + cover * (1 - 0.35 * (core[box] > 20)))
    gland = None
    if habitus.female:
        shapes, gland = breasts(habitus.fat, rng)
        skin[box] = melt(skin[box], coarse_distance(canvas, shapes, box, 10, 22), 20)
    everywhere = tuple(slice(0, size) for size in core.shape)
    sleeve = 2.5 + 0.45 * habitus.fat
    np.minimum(skin, canvas.distance(girdle.arm(sleeve), everywhere, 0, 0), out=skin)
    canvas.tissue[skin < 0] = TISSUE_ID["skin"]
    canvas.tissue[skin < -2.5] = TISSUE_ID["fat"]
    sides = [sheet for right in girdle.muscles() for sheet in (right, mirrored(*right)[len(right) :])]
    muscles = [Structure("fat", sheet, layers=((0.8, "muscle"),), blend=9) for sheet in sides]
    muscles.append(Structure("muscle", girdle.arm(0)))
    for structure in (*([gland] if gland else []), *muscles, *girdle.vessels(), *girdle.bones()):
        canvas.paint(structure._replace(inside=False))


def paint_trunk(canvas: Canvas, habitus: Habitus, rng: np.random.Generator) -> None:
    """Paint table, skin, fat, muscle wall, ribs, lungs and diaphragm, and leave the belly full of fat.

    Sets `canvas.roof`, the distance in mm from the lining of the belly, negative inside, and `canvas.core`, that from
    what lies beneath the subcutaneous fat.

    Args:
        canvas: an empty canvas.
        habitus: of the patient.
        rng: source of the variation of shoulders and arms.
    """
    fat, wall, belly = habitus.fat, habitus.wall, habitus.belly
    x, z = canvas.points[0], canvas.points[2]
    up = np.clip(z - 90, 0, len(_HEIGHTS) - 1).astype(np.int16)
    y = canvas.points[1] - 38 - CHEST_SHIFT[up]
    radius = np.hypot(x, y) + 1e-3
    width = 141 + 9 * np.cos((z - 40) / 60) - CHEST_NARROWING[up]
    front = 98 + (y > 0) * belly * np.exp(-(((z + 30) / 110) ** 2)) - CHEST_FLATTENING[(y < 0).astype(np.int8), up]
    core = radius * (1 - (np.abs(x / width) ** 2.3 + np.abs(y / front) ** 2.3 + 1e-6) ** (-1 / 2.3))
    skin = core - fat * (1 + 0.35 * np.abs(x) / radius - 0.25 * y / radius)
    linea_alba = 0.6 * np.exp(-((x / 6) ** 2)) * (y > 0) * np.clip((80 - z) / 40, 0, 1)
    lining = core + wall * (0.7 + 0.4 * np.abs(x) / radius - linea_alba)
    lower = merge_hips(canvas, core, skin, lining, fat, wall, belly, habitus.female)

    canvas.tissue[np.abs(canvas.points[1] + 82 + 1.25 * fat - x * x / 1500) < 2] = TISSUE_ID["table"]
    paint_shell(canvas, habitus, core, skin, rng)
    canvas.tissue[core < 0] = TISSUE_ID["muscle"]
    canvas.core = core
    canvas.roof = np.maximum(lining, paint_chest(canvas, habitus, core, lining, y))
    canvas.tissue[canvas.roof < 0] = TISSUE_ID["fat"]
    open_planes(canvas, lower, core, skin, lining, wall)
