"""Shape the outline of the body below the navel: lower belly, hips and two thighs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from shared_networks.synthetic.canvas import FAR, Box, Canvas
from shared_networks.synthetic.shapes import Array, melt
from shared_networks.synthetic.tissues import TISSUE_ID

TOP, MERGED = (
    -95,
    -130,
)  # z in mm: the trunk's own outline holds above the first, the outline of this file below the other

# fmt: off
# Half width, front and back in mm of what lies beneath the fat, at heights z.
HIPS = {-95: (135, 136, -60), -130: (141, 134, -61), -165: (149, 123, -62), -200: (157, 110, -62), -240: (163, 96, -61),
        -270: (164, 90, -60), -300: (160, 84, -58), -320: (128, 74, -54), -340: (60, 56, -40)}
# Centre x and y and half widths in x and y of a thigh beneath its fat.
THIGH = {-225: (102, 26, 48, 52), -300: (102, 20, 66, 78), -340: (101, 18, 67, 77), -400: (97, 18, 66, 73),
         -470: (92, 20, 63, 68), -560: (86, 22, 56, 60)}
# Half width, front and back of the cavity within bones and pelvic floor.
CAVITY = {-95: (170, 190, -90), -120: (135, 170, -60), -140: (112, 150, -40), -170: (97, 140, -26),
          -200: (80, 128, -20), -225: (62, 112, -29), -245: (54, 78, -37), -260: (44, 54, -36), -275: (30, 48, -30),
          -290: (10, 26, -12)}
WALL_BACK = {-95: (-80,), -112: (-15,), -135: (40,), -165: (66,), -270: (70,)}  # the abdominal wall lies before this y
SEMILUNAR = {-95: (70,), -165: (58,), -220: (38,), -260: (24,)}  # half width of both rectus muscles
CLEFT = {-228: (-99,), -245: (-62,), -275: (-46,), -310: (-26,), -335: (0,), -340: (99,)}  # it lies behind this y
# fmt: on


def at(table: Mapping[int, Sequence[float]], z: Array) -> Array:
    """Return a table's columns, `[columns, ...]`, at heights z in mm, to the nearest mm."""
    heights = sorted(table)
    fine = np.arange(heights[0], heights[-1] + 1)
    columns = np.array([np.interp(fine, heights, column) for column in zip(*(table[h] for h in heights), strict=True)])
    return columns.astype(np.float32)[:, np.clip(np.rint(z).astype(np.int16), fine[0], fine[-1]) - fine[0]]


def oval(x: Array, y: Array, half_width: Array, front: Array, back: Array) -> Array:
    """Return the distance in mm from an oval section, along the ray from its centre; negative inside."""
    y = y - (front + back) / 2
    level = np.abs(x / half_width) ** 2.3 + np.abs(y / ((front - back) / 2)) ** 2.3 + 1e-6
    return np.hypot(x, y) * (1 - level ** (-1 / 2.3))


def pose_hips(points: Array, rng: np.random.Generator) -> None:
    """Make hips wider or narrower and lay the thighs apart or together, in place: `[3, H, W, D]` in patient mm."""
    wider, apart = rng.normal(0, 0.04), rng.normal(0.01, 0.025)
    below = np.count_nonzero(points[2].min((0, 1)) < TOP)  # slices, from the lowest
    x, z = points[0, ..., :below], points[2, ..., :below]
    x *= 1 - wider * np.clip((TOP - z) / 120, 0, 1)
    x -= apart * np.tanh(x / 25) * np.maximum(-270 - z, 0)


def merge_hips(
    canvas: Canvas, core: Array, skin: Array, lining: Array, fat: float, wall: float, belly: float, female: bool
) -> Box:
    """Let the trunk's distances pass into those of hips and thighs, in place, and return the box of the lower body.

    Args:
        canvas: The canvas, for its points.
        core: Distance in mm from what lies beneath the subcutaneous fat, negative inside.
        skin: Distance from the skin.
        lining: Distance from the lining of the belly.
        fat: Thickness of the fat in mm, as `wall` and `belly` of a `Habitus`.
        wall: Thickness of the muscle wall.
        belly: How far the belly bulges forward.
        female: Whether the hips are those of a woman.
    """
    box = canvas.box(np.array([[-FAR, -FAR, -FAR], [FAR, FAR, TOP]]))
    x, y, z = canvas.points[(slice(None), *box)]
    if not x.size:
        return box
    x = np.abs(x)
    half_width, front, back = at(HIPS, z)
    front += belly * np.exp(-(((z + 30) / 110) ** 2))
    hips = np.maximum(oval(x, y, half_width, front, back), -340 - z)
    cx, cy, rx, ry = at(THIGH, z)
    thigh = np.hypot(x - cx, y - cy) * (1 - 1 / (np.hypot((x - cx) / rx, (y - cy) / ry) + 1e-6))
    lower = melt(hips, np.maximum(thigh, z + 225), 24)
    radius = np.hypot(x, y - 20) + 1e-3
    slim = np.interp(z, (-470, -280, -180), (0.65, 1.15 if female else 0.9, 1)).astype(np.float32)
    outer = lower - fat * slim * (1 + 0.35 * x / radius - 0.25 * (y - 20) / radius)
    outer = np.maximum(outer, np.where(z < -332, 0.08, 1) * (-332 - z) - x)  # between the thighs
    outer = np.maximum(outer, x * x / 1500 - 64 - 1.25 * fat - y)  # flat on the table
    thick = wall * (0.7 + 0.4 * x / radius - 0.6 * np.exp(-((x / 6) ** 2)) * (y > 20))
    inner = np.maximum(lower + thick, oval(x, y, *at(CAVITY, z)))
    inner = np.maximum(inner, -293 - z)
    share = np.clip((TOP - z) / (TOP - MERGED), 0, 1)
    for upper, new in ((core, lower), (skin, outer), (lining, inner)):
        upper[box] += share * (new - upper[box])
    return box


def open_planes(canvas: Canvas, box: Box, core: Array, skin: Array, lining: Array, wall: float) -> None:
    """Replace muscle by fat wherever single muscles will lie, and paint pelvic floor and natal cleft.

    Args:
        canvas: A canvas painted by `paint_trunk`.
        box: The lower body.
        core: Distances as for `merge_hips`, of the whole canvas, as are `skin` and `lining`.
        skin: Distance from the skin.
        lining: Distance from the lining of the belly.
        wall: Thickness of the muscle wall in mm.
    """
    x, y, z = canvas.points[(slice(None), *box)]
    if not x.size:
        return
    x, tissue, core, lining = np.abs(x), canvas.tissue[box], core[box], lining[box]
    groin = z > -250 + np.maximum(x - 22, 0) * 0.9  # above the inguinal ligament
    in_wall = groin & (y > at(WALL_BACK, z)[0]) & (core > -1.3 * wall)
    seam = (np.abs(x - at(SEMILUNAR, z)[0]) < 2.5) & (y > 20) & (z < -100)
    deep = (core < 0) & (lining > 0)
    tissue[deep & (~in_wall | seam) & (z < TOP)] = TISSUE_ID["fat"]
    tissue[deep & (lining < 4.5) & (z < -256) & (y < 45)] = TISSUE_ID["muscle"]  # pelvic floor
    cleft = (skin[box] < 0) & (x < 2.5) & (y < at(CLEFT, z)[0]) & (core > -40) & (z < -228)
    tissue[cleft] = TISSUE_ID["skin"]
