"""Paint the outline of the body and the cavities in it."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from shared_networks.synthetic.canvas import FAR, Canvas
from shared_networks.synthetic.hips import merge_hips, open_planes
from shared_networks.synthetic.shapes import melt
from shared_networks.synthetic.tissues import TISSUE_ID


class Habitus(NamedTuple):
    """The build of a patient.

    Attributes:
        fat: thickness of the subcutaneous fat in mm.
        wall: thickness of the muscle wall at the flanks in mm.
        belly: how far the belly bulges forward in mm.
        female: whether the patient is a woman.
    """

    fat: float
    wall: float
    belly: float
    female: bool = False


def paint_trunk(canvas: Canvas, habitus: Habitus) -> None:
    """Paint table, skin, fat, muscle wall, ribs, lungs and diaphragm, and leave the belly full of fat.

    Sets `canvas.roof`, the distance in mm from the lining of the belly, negative inside, and `canvas.core`, that from
    what lies beneath the subcutaneous fat.

    Args:
        canvas: an empty canvas.
        habitus: of the patient.
    """
    fat, wall, belly, _ = habitus
    x, y, z = canvas.points[0], canvas.points[1] - 38, canvas.points[2]
    radius = np.hypot(x, y) + 1e-3
    width = 141 + 9 * np.cos((z - 40) / 60) - 0.15 * np.maximum(z - 120, 0)
    front = 98 + (y > 0) * belly * np.exp(-(((z + 30) / 110) ** 2))
    core = radius * (1 - (np.abs(x / width) ** 2.3 + np.abs(y / front) ** 2.3 + 1e-6) ** (-1 / 2.3))
    skin = core - fat * (1 + 0.35 * np.abs(x) / radius - 0.25 * y / radius)
    linea_alba = 0.6 * np.exp(-((x / 6) ** 2)) * (y > 0) * np.clip((80 - z) / 40, 0, 1)
    lining = core + wall * (0.7 + 0.4 * np.abs(x) / radius - linea_alba)
    lower = merge_hips(canvas, core, skin, lining, *habitus)

    dome = np.full_like(core, FAR)
    for cx, cy, rx, ry, top in ((62, 4, 76, 108, 122), (-62, 4, 76, 108, 106), (0, 24, 62, 98, 94)):
        level = np.sqrt(((x - cx) / rx) ** 2 + ((y - cy) / ry) ** 2 + (np.maximum(z, 0) / top) ** 2)
        dome = melt(dome, 70 * (level - 1), 12)
    dome[z < 0] = -FAR

    turn = np.arctan2(np.abs(x), -y)  # from the spine, 0, round the flank to the sternum, pi
    rib = (np.abs(core + 6) < 4 + 0.5 * np.cos(3 * turn)) & (np.mod(z + 26 * turn, 29) < 11)
    rib &= (z > 70 * turn - 85) & (turn > 0.35) & (turn < 2.75)
    for name, where in (
        ("table", np.abs(y + 105 + 1.25 * fat - x * x / 1500) < 2),
        ("skin", skin < 0),
        ("fat", skin < -2.5),
        ("muscle", core < 0),
        ("cortical bone", rib),
        ("trabecular bone", rib & (np.abs(core + 6) < 2)),
        ("cartilage", rib & (turn > 1.95)),
        ("lung", lining < 0),
        ("muscle", (lining < 0) & (dome < 3)),
        ("fat", (lining < 0) & (dome < 0)),
    ):
        canvas.tissue[where] = TISSUE_ID[name]
    open_planes(canvas, lower, core, skin, lining, wall)
    canvas.roof, canvas.core = np.maximum(lining, dome), core
