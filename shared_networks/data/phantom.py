"""Synthetic abdominal CT with organ labels: data to start from for those who have none.

Anatomy is a table of smooth implicit shapes in patient millimetres (x right, y anterior, z superior, origin in the
first lumbar vertebra), painted one over another into a randomly scaled, posed and warped patient. A second table turns
tissues into Hounsfield units for a contrast phase; texture, blur and noise make a scan of it. No patient is in it.

Example:
    python -m shared_networks.data.phantom --out phantoms --label_set btcv --train 16 --test 4 --seed 0
"""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import nibabel as nib
import numpy as np
from nibabel.orientations import apply_orientation, axcodes2ornt, inv_ornt_aff, ornt_transform
from numpy.typing import NDArray
from scipy.interpolate import CubicSpline
from scipy.ndimage import gaussian_filter
from scipy.spatial.transform import Rotation
from tqdm import tqdm

Array = NDArray[np.floating[Any]]
Triple = tuple[float, float, float]
Box = tuple[slice, ...]

# fmt: off
BTCV = (
    "background", "spleen", "right kidney", "left kidney", "gallbladder", "esophagus", "liver", "stomach", "aorta",
    "inferior vena cava", "portal vein and splenic vein", "pancreas", "right adrenal gland", "left adrenal gland",
)
FLARE22 = (
    "background", "liver", "right kidney", "spleen", "pancreas", "aorta", "inferior vena cava", "right adrenal gland",
    "left adrenal gland", "gallbladder", "esophagus", "stomach", "duodenum", "left kidney",
)
LABEL_SETS = {"btcv": BTCV, "flare": FLARE22}
ORGANS = (*BTCV, "duodenum")
ABSENT = {"gallbladder": 0.12, "right kidney": 0.03, "left kidney": 0.03, "spleen": 0.03}  # chance of earlier surgery
ORIENTATIONS = ("RAS", "LPS", "LAS", "RPS", "LPI", "PIR", "ASL")

# Mean HU without contrast and in the late arterial, portal venous and delayed phase; standard deviation of the texture.
TISSUES = {
    "air": (-1000, -1000, -1000, -1000, 0), "table": (-120, -120, -120, -120, 15), "gas": (-960, -960, -960, -960, 10),
    "skin": (20, 25, 30, 30, 10), "fat": (-104, -103, -102, -102, 9), "muscle": (52, 57, 62, 62, 9),
    "lung": (-850, -845, -840, -840, 45), "heart": (42, 190, 150, 110, 10), "cortical bone": (650, 650, 655, 655, 90),
    "trabecular bone": (150, 155, 160, 160, 40), "cartilage": (95, 95, 100, 100, 15), "disc": (75, 75, 80, 80, 8),
    "spinal canal": (25, 28, 30, 30, 6), "arterial blood": (42, 310, 160, 112, 4), "caval blood": (40, 85, 140, 110, 6),
    "portal blood": (41, 130, 178, 116, 4), "hepatic blood": (41, 62, 165, 114, 3), "liver": (56, 68, 108, 92, 6),
    "spleen": (48, 130, 121, 94, 6), "pancreas": (40, 104, 94, 74, 16), "adrenal": (28, 74, 68, 50, 5),
    "renal cortex": (34, 185, 178, 140, 7), "renal medulla": (31, 75, 145, 148, 7), "urine": (6, 8, 14, 330, 4),
    "bile": (9, 9, 10, 10, 3), "gallstone": (190, 190, 190, 190, 30), "cyst": (6, 6, 7, 7, 3),
    "metastasis": (38, 52, 66, 66, 8), "gut wall": (38, 84, 90, 74, 8), "oesophageal wall": (40, 58, 64, 60, 8),
    "chyme": (22, 22, 24, 26, 16), "stool": (-10, -10, -10, -10, 90),
}
# fmt: on
TISSUE_ID = {name: number for number, name in enumerate(TISSUES)}
FAR = 1e3  # mm; a distance that is not worth computing


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
        blend: Over how many mm neighbouring shapes melt into each other.
        halo: Width in mm of the fat around the structure.
        gas: Share of the innermost layer's height that is gas, at the front, as the patient lies supine.
        inside: Whether the structure stays within the abdominal wall and below the diaphragm.
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
    inside: bool = True


def ball(x: float, y: float, z: float, *radii: float, turn: Triple = (0, 0, 0)) -> Shape:
    """An ellipsoid about (x, y, z) with one radius or three, in mm."""
    rx, ry, rz = radii * 3 if len(radii) == 1 else radii
    return Shape(np.array([[x, y, z, 1]], np.float32), (rx, ry, rz), turn)


def tube(*points: tuple[float, float, float, float], flat: Triple = (1, 1, 1), steps: int = 4) -> Shape:
    """A tube through points (x, y, z, radius) in mm along a cubic spline, in `steps` straight pieces a point."""
    line = np.array(points, float)
    along = np.r_[0, np.cumsum(np.linalg.norm(np.diff(line[:, :3], axis=0), axis=1))]
    fine = np.interp(np.linspace(0, len(line) - 1, steps * (len(line) - 1) + 1), np.arange(len(line)), along)
    return Shape(CubicSpline(along, line)(fine).astype(np.float32), flat)


def mirrored(*shapes: Shape) -> tuple[Shape, ...]:
    """The shapes and their mirror images on the other side of the body."""
    mirror = np.array([-1, 1, 1, 1], np.float32)
    return shapes + tuple(Shape(s.path * mirror, s.flat, (s.turn[0], -s.turn[1], -s.turn[2])) for s in shapes)


def spine(z: float) -> float:
    """Where the vertebral bodies' centre lies at height z: y in mm (lumbar lordosis, thoracic kyphosis)."""
    return 4 - 16 * ((z + 60) / 150) ** 2


# fmt: off
def vertebra(z: float) -> tuple[Shape, ...]:
    """Body, spinous process, arch and transverse processes of a vertebra at height z."""
    y = spine(z)
    return (
        tube((0, y, z - 8, 1), (0, y, z + 8, 1), flat=(22, 16.5, 6)),
        tube((0, y - 34, z, 1), (0, max(y - 58, -57), z - 10, 1), flat=(3.5, 5, 9)),
        *mirrored(tube((13, y - 8, z + 4, 5), (14, y - 26, z, 6), (2, y - 36, z - 3, 5)),
                  tube((16, y - 22, z + 2, 5), (42, y - 26, z + 4, 3.5))),
    )


def kidney(organ: str, x: float, z: float, rng: np.random.Generator) -> tuple[Structure, ...]:
    """A kidney about (x, 4, z) with pyramids, fatty sinus, renal pelvis and sometimes a cyst."""
    out, turn = np.sign(x), (-12, -14 * np.sign(x), 0)
    fan = enumerate(np.radians(np.linspace(-125, 125, 8)))
    pyramids = tuple(ball(x + out * (9 * np.cos(a) - 1), 5 + 7 * (-1) ** i, z + 28 * np.sin(a), 8) for i, a in fan)
    pelvis = tube((x - out * 4, 6, z + 16, 3), (x - out * 15, 9, z - 2, 5), (x - out * 24, 12, z - 22, 3))
    cyst = ball(x + out * 16, -4, z - 28, rng.uniform(4, 11))
    return (
        Structure("renal cortex", (ball(x, 4, z, 29, 27, 56, turn=turn),), organ, halo=4),
        Structure("renal medulla", pyramids, within=organ),
        Structure("fat", (ball(x - out * 14, 8, z - 1, 13, 10, 24, turn=turn),), "background", within=organ),
        Structure("urine", (pelvis,)),
        Structure("cyst", (cyst,) * (rng.random() < 0.3), organ),
    )


def bowel(rng: np.random.Generator) -> tuple[Structure, ...]:
    """Mesenteric vessels, the small bowel wandering to and fro in layers from back to front, and the colon's frame."""
    ends = rng.uniform((-75, 55, -150), (75, 105, -40), (14, 3))
    vessels = tuple(tube((4, 60, -35, 2.2), (x / 2, 62, z / 2 - 15, 1.8), (x, y, z, 1)) for x, y, z in ends)
    grid = [(x * (-1) ** z, y, z) for y in (52, 78, 102) for z in range(-48, -165, -27) for x in (-68, -34, 0, 34, 68)]
    loops = np.c_[grid + rng.normal(0, (8, 9, 12), (len(grid), 3)), rng.uniform(7, 12, len(grid))]
    colon = tube((92, 8, -165, 24), (100, 10, -110, 25), (98, 12, -62, 23), (84, 42, -40, 20), (62, 90, -52, 19),
                 (10, 104, -62, 19), (-48, 98, -42, 18), (-92, 55, -2, 17), (-106, 18, 14, 17), (-112, 0, -25, 15),
                 (-108, -2, -95, 14), (-98, 2, -165, 14), steps=8)
    colon.path[:, 3] *= 1 + 0.14 * np.sin(2.1 * np.arange(len(colon.path)))  # haustra
    return (
        Structure("portal blood", vessels),
        Structure("gut wall", (tube(*loops, steps=3),), layers=((2.5, "chyme"),), gas=rng.uniform(0, 0.15)),
        Structure("gut wall", (colon,), layers=((2.5, "stool"),), gas=rng.uniform(0.1, 0.4)),
    )


def lesions(tissue: str, count: int, rng: np.random.Generator) -> Structure:
    """Roundish lesions of the liver."""
    centres = rng.uniform((25, 0, 0), (125, 85, 95), (count, 3))
    radii = rng.uniform(3, 15, (count, 1)) * rng.uniform(0.8, 1.2, (count, 3))
    return Structure(tissue, tuple(ball(*c, *r) for c, r in zip(centres, radii, strict=True)), within="liver")


LIVER = ball(74, 24, 36, 69, 87, 87, turn=(0, 8, 0)), ball(4, 84, 66, 70, 38, 33, turn=(0, -8, 12))
NEAR_LIVER = (  # pancreas and bowel, stomach, falciform ligament, spine: what shapes the liver's underside
    ball(18, 30, -30, 52, 62, 62), ball(-70, 40, 35, 42, 62, 40), ball(30, 128, 22, 5, 30, 38),
    ball(0, -20, 60, 40, 62, 90),
)
HEPATIC_VEINS = (
    tube((26, 40, 96, 6), (60, 32, 88, 4.5), (100, 20, 62, 2)),
    tube((26, 44, 96, 6), (50, 68, 80, 4.5), (72, 92, 48, 2)),
    tube((22, 48, 96, 5), (0, 72, 82, 4), (-24, 90, 70, 2)),
)
PORTAL_BRANCHES = (
    tube((42, 52, 30, 7), (64, 38, 38, 6), (88, 16, 34, 4), (112, 0, 26, 2)),
    tube((64, 38, 38, 5), (84, 50, 52, 4), (102, 52, 70, 2)),
    tube((42, 52, 30, 6), (24, 72, 50, 5), (2, 88, 56, 3), (-14, 92, 66, 2)),
)
GALLBLADDER = tube((46, 62, 22, 4), (54, 76, 6, 13), (62, 90, -16, 16))
STOMACH = tube((-56, 22, 88, 25), (-64, 38, 62, 30), (-56, 70, 28, 26), (-32, 90, 2, 20), (2, 88, -8, 16),
               (28, 74, 0, 10))
DUODENUM = tube((28, 72, 0, 11), (44, 58, 6, 14), (53, 40, -8, 14), (54, 34, -48, 14), (36, 36, -68, 13),
                (0, 41, -66, 12), (-26, 46, -44, 11), (-32, 60, -32, 11))
PANCREAS = tube((34, 46, -30, 12), (33, 50, -10, 15), (20, 58, 6, 12), (-4, 66, 16, 10), (-36, 52, 26, 11),
                (-66, 24, 34, 10.5), (-84, 6, 40, 7), flat=(1, 1, 1.2))
PORTAL_AND_SPLENIC = (
    tube((10, 54, 2, 7), (20, 54, 18, 7), (42, 52, 30, 7)),
    tube((10, 54, 2, 6), (-6, 55, 14, 5.5), (-38, 42, 24, 5), (-66, 14, 32, 5), (-86, -4, 40, 4)),
)
MESENTERIC_VEIN = tube((10, 54, 4, 6), (8, 58, -40, 5.5), (4, 66, -90, 4))
MESENTERIC_ARTERY = tube((-6, 40, -2, 4), (-3, 52, -30, 3.5), (0, 62, -90, 3))
HEPATIC_ARTERY = tube((-8, 36, 22, 4), (-8, 50, 24, 3.5), (18, 62, 26, 2.5), (40, 58, 30, 2))
RENAL_ARTERIES = mirrored(tube((6, 30, -4, 3.5), (30, 10, -8, 3), (48, 4, -6, 2.5)))
RENAL_VEINS = tube((18, 30, -2, 4.5), (-8, 46, 0, 4), (-42, 12, 0, 4)), tube((22, 28, -14, 4.5), (46, 8, -18, 4))
LIMB = (1, 1, 4.5)  # the adrenals are sheets: thin from side to side, tall from head to foot
RIGHT_ADRENAL = (tube((37, 30, 47, 2.9), (40, 16, 45, 2.9), (46, 2, 42, 2.4), flat=LIMB),
                 tube((40, 16, 45, 2.7), (38, 2, 42, 2.4), flat=LIMB))
LEFT_ADRENAL = (tube((-32, 36, 44, 2.9), (-36, 22, 42, 2.9), (-46, 8, 40, 2.4), flat=LIMB),
                tube((-36, 22, 42, 2.6), (-33, 6, 39, 2.3), flat=LIMB))
CAVA = tube((20, 26, -95, 10), (20, 28, -40, 11), (20, 32, 10, 11.5), (24, 34, 50, 12.5), (24, 44, 95, 13),
            (18, 58, 125, 15), flat=(1.1, 0.9, 1))
AORTA = tube((-22, 4, 190, 12.5), (-20, 6, 150, 12), (-12, 22, 100, 11.5), (-8, 31, 50, 11), (-7, 33, 0, 10),
             (-6, 31, -85, 9))
ILIAC_ARTERIES = mirrored(tube((-4, 31, -84, 6.5), (-24, 28, -116, 6), (-46, 26, -150, 5.5), (-60, 40, -190, 5)))
ILIAC_VEINS = (tube((18, 26, -92, 8), (36, 18, -122, 7.5), (52, 16, -155, 7)),
               tube((18, 26, -92, 8), (-14, 18, -120, 7.5), (-42, 14, -155, 7)))
ESOPHAGUS = tube((-4, 24, 240, 8), (-6, 30, 160, 8.5), (-14, 44, 112, 9), (-28, 44, 96, 9.5), (-44, 32, 86, 10))
HEART = ball(-16, 74, 150, 68, 50, 42)
MEDIASTINUM = (ball(-10, 72, 152, 74, 58, 48), tube((-8, 20, 80, 30), (-8, 16, 240, 34)))
MUSCLES = mirrored(
    tube((26, 4, 20, 6), (36, 2, -40, 15), (46, 4, -110, 19), (62, 16, -180, 20)),  # psoas
    tube((56, -36, 10, 8), (62, -36, -60, 10), (72, -32, -120, 10), flat=(1.6, 0.8, 1)),  # quadratus lumborum
    # erector spinae
    tube((34, -44, 240, 18), (36, -46, 60, 20), (34, -46, -60, 23), (26, -48, -200, 18), flat=(1.35, 0.85, 1)),
    tube((9, -42, 240, 12), (9, -42, 0, 12), (9, -44, -200, 12)),  # multifidus
    tube((10, 18, 78, 5), (14, 22, 40, 6), (12, 18, -20, 4), flat=(0.8, 1, 1)),  # crura of the diaphragm
)
SPINE = range(-170, 260, 30)
DISCS = tube(*((0, spine(z), z, 1) for z in SPINE), flat=(21, 15.5, 9))
CANAL = tube(*((0, spine(z) - 24, z, 8) for z in SPINE))
VERTEBRAE = tuple(bone for z in range(-160, 240, 32) for bone in vertebra(z))
STERNUM = tube((0, 124, 85, 7), (0, 128, 240, 7), flat=(2.2, 0.8, 1))
SACRUM = ball(0, -14, -182, 46, 20, 34, turn=(-25, 0, 0))
ILIA = mirrored(ball(92, -6, -172, 9, 58, 58, turn=(0, 18, -38)))


def anatomy(rng: np.random.Generator) -> tuple[Structure, ...]:
    """All structures in the order of painting: first those of the belly, then what lies around it or passes through."""
    belly = (
        *bowel(rng),
        Structure("spleen", (ball(-102, -10, 45, 35, 56, 65, turn=(-22, -8, -24)),), "spleen",
                  carve=(ball(-62, 22, 40, 34, 34, 48),), blend=8),
        Structure("gut wall", (STOMACH,), "stomach", layers=((4, "chyme"),), gas=rng.uniform(0.1, 0.55), halo=2),
        Structure("liver", LIVER, "liver", carve=NEAR_LIVER, blend=16, halo=1),
        Structure("hepatic blood", HEPATIC_VEINS, within="liver"),
        Structure("portal blood", PORTAL_BRANCHES, within="liver"),
        lesions("cyst", int(rng.integers(0, 3)), rng),
        lesions("metastasis", int(rng.integers(1, 6)) * (rng.random() < 0.25), rng),
        Structure("gut wall", (GALLBLADDER,), "gallbladder", layers=((1.5, "bile"),), halo=1),
        Structure("gallstone", (ball(60, 74, -16, rng.uniform(3, 8)),) * (rng.random() < 0.2), within="gallbladder"),
        *kidney("right kidney", 66, -22, rng),
        *kidney("left kidney", -65, 2, rng),
        Structure("gut wall", (DUODENUM,), "duodenum", layers=((2.5, "chyme"),), gas=rng.uniform(0, 0.3), halo=1),
        Structure("pancreas", (PANCREAS,), "pancreas", halo=1),
        Structure("portal blood", (MESENTERIC_VEIN,), halo=1),
        Structure("arterial blood", (MESENTERIC_ARTERY,), halo=1),
        Structure("portal blood", PORTAL_AND_SPLENIC, "portal vein and splenic vein", halo=0.5),
        Structure("arterial blood", (HEPATIC_ARTERY, *RENAL_ARTERIES)),
        Structure("caval blood", RENAL_VEINS),
        Structure("adrenal", RIGHT_ADRENAL, "right adrenal gland", halo=2),
        Structure("adrenal", LEFT_ADRENAL, "left adrenal gland", halo=2),
    )
    around = (
        Structure("caval blood", (CAVA,), "inferior vena cava", halo=1.5),
        Structure("fat", MEDIASTINUM),
        Structure("muscle", (HEART,), layers=((8, "heart"),)),
        Structure("oesophageal wall", (ESOPHAGUS,), "esophagus", layers=((7, "gas"),)),
        Structure("arterial blood", (AORTA,), "aorta", halo=1.5),
        Structure("arterial blood", ILIAC_ARTERIES),
        Structure("caval blood", ILIAC_VEINS),
        Structure("muscle", MUSCLES),
        Structure("disc", (DISCS,)),
        Structure("cortical bone", VERTEBRAE, layers=((2.2, "trabecular bone"),)),
        Structure("cortical bone", (STERNUM, SACRUM, *ILIA), layers=((2.5, "trabecular bone"),)),
        Structure("spinal canal", (CANAL,)),
    )
    return (*belly, *(structure._replace(inside=False) for structure in around))
# fmt: on


def label_names(label_set: str) -> tuple[str, ...]:
    """Organ names of a label set; each one's position is its label value. ValueError if the set is unknown."""
    if label_set not in LABEL_SETS:
        raise ValueError(f"label_set is {label_set!r}; choose one of {', '.join(LABEL_SETS)}")
    return LABEL_SETS[label_set]


def pieces(shape: Shape) -> Array:
    """The straight pieces of a shape's path, `[n, 2, 4]`; an ellipsoid has one, of no length."""
    path = shape.path if len(shape.path) > 1 else shape.path[[0, 0]]
    return np.stack([path[:-1], path[1:]], 1)


def axes(shape: Shape) -> Array:
    """The directions of a shape's own axes as the columns of a matrix."""
    return Rotation.from_euler("xyz", shape.turn, degrees=True).as_matrix().astype(np.float32)


def bounds(shape: Shape, piece: Array, margin: float) -> Array:
    """Lowest and highest corner, `[2, 3]` in mm, around a piece of a shape and `margin` mm more."""
    reach = np.linalg.norm(axes(shape) * shape.flat, axis=1) * piece[:, 3:] + margin
    return np.stack([(piece[:, :3] - reach).min(0), (piece[:, :3] + reach).max(0)])


def distance(shape: Shape, piece: Array, points: Array) -> Array:
    """Distance in mm from the surface of a piece of a shape, negative inside, exact to first order.

    Args:
        shape: The shape, for its flattening and turn.
        piece: `[2, 4]` ends of the piece.
        points: `[3, ...]` positions in mm.
    """
    flat = np.array(shape.flat, np.float32)
    to_round = (axes(shape) / flat).T
    start, step = to_round @ piece[0, :3], to_round @ (piece[1, :3] - piece[0, :3])
    away = np.tensordot(to_round, points, 1) - start.reshape(3, 1, 1, 1)
    along = np.clip(np.tensordot(step, away, 1) / max(float(step @ step), 1e-6), 0, 1)
    away -= step.reshape(3, 1, 1, 1) * along
    length = np.linalg.norm(away, axis=0) + 1e-6
    slope = np.linalg.norm(away / flat.reshape(3, 1, 1, 1), axis=0) / length + 1e-6
    return (length - piece[0, 3] - (piece[1, 3] - piece[0, 3]) * along) / slope


def melt(first: Array, second: Array, width: float) -> Array:
    """Smooth minimum of two distances; the plain one where they differ by more than `width` mm."""
    return np.minimum(first, second) - np.maximum(width - np.abs(first - second), 0) ** 2 / (4 * width + 1e-6)


class Canvas:
    """A patient on a voxel grid: where in the body each voxel lies, its tissue and its organ.

    Args:
        points: `[3, H, W, D]` positions in patient mm; axis i of the grid runs along coordinate i, up to small angles.
    """

    def __init__(self, points: Array) -> None:
        self.points = points
        self.tissue = np.zeros(points.shape[1:], np.uint8)
        self.organ = np.zeros(points.shape[1:], np.uint8)
        across = ((1, 2), (0, 2), (0, 1))
        self.low, self.high = ([f(p, a) for p, a in zip(points, across, strict=True)] for f in (np.min, np.max))

    def box(self, corners: Array) -> Box:
        """The voxels that may lie between two corners, `[2, 3]` in mm; empty slices where there are none."""
        found = [
            np.flatnonzero((top >= low) & (bottom <= high))
            for bottom, top, low, high in zip(self.low, self.high, *corners, strict=True)
        ]
        return tuple(slice(f[0], f[-1] + 1) if f.size else slice(0, 0) for f in found)

    def distance(self, shapes: Iterable[Shape], box: Box, blend: float, margin: float) -> Array:
        """Distance in mm from the melted union of shapes over a box; `FAR` where it is more than `margin`."""
        union = np.full(self.tissue[box].shape, FAR, np.float32)
        for shape in shapes:
            single = np.full_like(union, FAR)
            for piece in pieces(shape):
                near = tuple(
                    slice(max(a.start, b.start), max(min(a.stop, b.stop), a.start, b.start))
                    for a, b in zip(self.box(bounds(shape, piece, margin)), box, strict=True)
                )
                part = single[tuple(slice(n.start - b.start, n.stop - b.start) for n, b in zip(near, box, strict=True))]
                if part.size:
                    np.minimum(part, distance(shape, piece, self.points[:, *near]), out=part)
            union = melt(union, single, blend)
        return union

    def paint_trunk(self, fat: float, wall: float, belly: float) -> None:
        """Paint table, skin, fat, muscle wall, ribs, lungs and diaphragm, and leave the belly full of fat.

        Args:
            fat: Thickness of the subcutaneous fat in mm.
            wall: Thickness of the muscle wall at the flanks in mm.
            belly: How far the belly bulges forward in mm.
        """
        x, y, z = self.points[0], self.points[1] - 38, self.points[2]
        radius = np.hypot(x, y) + 1e-3
        width = 141 + 9 * np.cos((z - 40) / 60) - 0.15 * np.maximum(z - 120, 0)
        front = 98 + (y > 0) * belly * np.exp(-(((z + 30) / 110) ** 2))
        core = radius * (1 - (np.abs(x / width) ** 2.3 + np.abs(y / front) ** 2.3 + 1e-6) ** (-1 / 2.3))
        skin = core - fat * (1 + 0.35 * np.abs(x) / radius - 0.25 * y / radius)
        linea_alba = 0.6 * np.exp(-((x / 6) ** 2)) * (y > 0) * np.clip((80 - z) / 40, 0, 1)
        lining = core + wall * (0.7 + 0.4 * np.abs(x) / radius - linea_alba)

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
            self.tissue[where] = TISSUE_ID[name]
        self.roof = np.maximum(lining, dome)

    def paint(self, structure: Structure) -> None:
        """Paint a structure over what is there."""
        margin = max(structure.halo, structure.blend)
        corners = np.stack([bounds(s, p, margin) for s in structure.shapes for p in pieces(s)])
        box = self.box(np.stack([corners[:, 0].min(0), corners[:, 1].max(0)]))
        tissue, organ, roof = self.tissue[box], self.organ[box], self.roof[box]
        outside = self.distance(structure.shapes, box, structure.blend, margin)
        if structure.carve:
            outside = -melt(-outside, self.distance(structure.carve, box, structure.blend, 30), structure.blend)
        if structure.inside:
            outside = np.maximum(outside, roof + 0.5)
        if structure.within:
            outside[organ != ORGANS.index(structure.within)] = FAR
        around = (outside < structure.halo) & (roof < -1)
        if structure.halo:
            tissue[around], organ[around] = TISSUE_ID["fat"], 0
        if structure.organ or not structure.within:
            organ[outside < 0] = ORGANS.index(structure.organ or "background")
        for depth, name in ((0, structure.tissue), *structure.layers):
            tissue[outside < -depth] = TISSUE_ID[name]
        lumen = outside < -structure.layers[-1][0] if structure.gas else np.zeros(0, bool)
        if lumen.any():
            height = self.points[1][box]
            front, back = height[lumen].max(), height[lumen].min()
            tissue[lumen & (height > front - structure.gas * (front - back))] = TISSUE_ID["gas"]


def varied(structures: Iterable[Structure], rng: np.random.Generator) -> list[Structure]:
    """The structures with each organ, and what lies within it, a little resized and moved, or gone after surgery."""
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


def smooth_field(rng: np.random.Generator, shape: tuple[int, ...], spacing: Array, scale: float) -> Array:
    """Random field of zero mean and unit variance that varies over `scale` mm: float32 of `shape`."""
    bases = []
    for size, step in zip(shape, spacing, strict=True):
        knots = np.arange(-scale, size * step + scale, scale)
        basis = np.exp(-((np.arange(size)[:, None] * step - knots) ** 2) / (1.28 * scale**2))
        bases.append((basis / np.linalg.norm(basis, axis=1, keepdims=True)).astype(np.float32))
    field = rng.standard_normal([basis.shape[1] for basis in bases], np.float32)
    for basis in bases:
        field = np.tensordot(field, basis, (0, 1))
    return field


def grain(rng: np.random.Generator, shape: tuple[int, ...], sigma: Array) -> Array:
    """White noise smoothed by a Gaussian of `sigma` voxels an axis, at unit variance: float32 of `shape`."""
    field = gaussian_filter(rng.standard_normal(shape, np.float32), sigma, truncate=3)
    return field / field.std()


def scan(rng: np.random.Generator, tissue: NDArray[np.uint8], spacing: Array) -> NDArray[np.int16]:
    """Scan a tissue map: a contrast phase between any two of the table, texture, blur and noise; int16 HU."""
    table = np.array(list(TISSUES.values()), np.float32)
    phase = np.maximum(0, 1 - np.abs(np.arange(4) - rng.uniform(0, 3)))
    enhancement = table[:, :4] @ phase - table[:, 0]
    mean = table[:, 0] + enhancement * rng.uniform(0.8, 1.2) + rng.normal(0, 4, len(table)) * (table[:, 4] > 0)
    mean[TISSUE_ID["liver"]] -= 35 * rng.beta(1, 4)  # steatosis
    image = mean.astype(np.float32)[tissue] + table[:, 4][tissue] * grain(rng, tissue.shape, 2.2 / spacing)
    image = gaussian_filter(image, np.hypot(0.4, rng.uniform(0.4, 0.9) / spacing), truncate=3)
    image += rng.uniform(5, 22) * grain(rng, tissue.shape, np.array([1, 1, 0.4]) * rng.uniform(0.3, 0.8))
    return np.clip(np.rint(image), -1024, 3071).astype(np.int16)


def place(rng: np.random.Generator, voxel_mm: float) -> tuple[Canvas, Array, Array]:
    """Lay a patient with painted trunk on a scanner's grid, RAS up to a slight tilt.

    Returns:
        The canvas, the spacing `[3]` in mm and the affine `[4, 4]` from voxels to world mm.
    """
    in_plane = voxel_mm * rng.uniform(0.88, 1.12)
    spacing = np.array([in_plane, in_plane, max(in_plane, rng.uniform(voxel_mm, max(voxel_mm, 5)))])
    habitus = rng.beta(1.6, 2.2)  # 0 is thin, 1 obese
    scale = rng.normal(1, 0.02) * np.array([0.97 + 0.08 * habitus, 0.97 + 0.08 * habitus, rng.normal(1, 0.02)])
    fat, belly = 5 + 38 * habitus**1.6, 30 * habitus
    bottom = rng.uniform(-60, -10) if rng.random() < 0.12 else rng.uniform(-200, -120)
    top = rng.uniform(40, 90) if rng.random() < 0.12 else rng.uniform(125, 175)
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
    canvas.paint_trunk(fat, rng.uniform(10, 15), belly)
    affine[:3, 3] += rng.uniform(-300, 300, 3)  # the scanner's origin is anywhere
    return canvas, spacing, affine


def phantom_case(
    rng: np.random.Generator, label_set: str = "btcv", voxel_mm: float = 3.0
) -> tuple[NDArray[np.int16], NDArray[np.uint8], Array]:
    """Make one scan. The same generator state gives the same patient and scan in either label set.

    Args:
        rng: Source of all variation.
        label_set: Order of the label values, "btcv" or "flare".
        voxel_mm: In-plane voxel size in mm, up to 12 % more or less; slices are as thick or up to 5 mm.

    Returns:
        Image `[H, W, D]` in HU within [-1024, 3071], label `[H, W,
                                                              D]` and their affine `[4, 4]` to RAS world mm. The axes
        of the arrays run in one of `ORIENTATIONS`.

    Raises:
        ValueError: If `label_set` is unknown or `voxel_mm` is not from 0.4 to 6.
    """
    names = label_names(label_set)
    if not 0.4 <= voxel_mm <= 6:
        raise ValueError(f"voxel_mm is {voxel_mm}; choose a size from 0.4 to 6 mm")
    canvas, spacing, affine = place(rng, voxel_mm)
    for structure in varied(anatomy(rng), rng):
        canvas.paint(structure)
    values = np.array([names.index(organ) if organ in names else 0 for organ in ORGANS], np.uint8)
    volumes = scan(rng, canvas.tissue, spacing), values[canvas.organ]
    turn = ornt_transform(axcodes2ornt("RAS"), axcodes2ornt(rng.choice(ORIENTATIONS)))
    image, label = (np.ascontiguousarray(apply_orientation(volume, turn)) for volume in volumes)
    return image, label, affine @ inv_ornt_aff(turn, canvas.tissue.shape)


def write_whole(path: Path, content: bytes) -> None:
    """Write a file under another name and then rename it, so that an interrupted run leaves no half file."""
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(content)
    os.replace(partial, path)


def write_dataset(
    out: str | Path, label_set: str = "btcv", train: int = 16, test: int = 4, seed: int = 0, voxel_mm: float = 3.0
) -> None:
    """Write phantoms as an nnU-Net folder: imagesTr, labelsTr, imagesTs, labelsTs and, last, dataset.json.

    Each case depends on the seed, its split and its number only, not on how many are made.

    Args:
        out: Folder to write to; made if missing, files of the same names are replaced.
        label_set: Order of the label values, "btcv" or "flare".
        train: Number of training cases, `train_000` and on.
        test: Number of test cases, `test_000` and on.
        seed: Seed of the whole set.
        voxel_mm: In-plane voxel size: 3 makes a case in about half a second, 0.8 is clinical resolution.

    Raises:
        ValueError: As `phantom_case`.
        FileExistsError: If the folder already holds other scans.
    """
    folder, names = Path(out), label_names(label_set)
    planned = {
        (split, i): (folder / f"images{end}/{name}_{i:03d}_0000.nii.gz", folder / f"labels{end}/{name}_{i:03d}.nii.gz")
        for split, (name, end, count) in enumerate((("train", "Tr", train), ("test", "Ts", test)))
        for i in range(count)
    }
    others = set(folder.glob("*T[rs]/*.nii.gz")) - {path for paths in planned.values() for path in paths}
    if others:
        raise FileExistsError(f"{folder} already holds other scans, such as {min(others)}; choose an empty folder")
    for kind in ("imagesTr", "labelsTr", "imagesTs", "labelsTs"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
    for (split, number), paths in tqdm(planned.items(), desc="phantoms", unit="case"):
        image, label, affine = phantom_case(np.random.default_rng([seed, split, number]), label_set, voxel_mm)
        for path, volume in zip(paths, (image, label), strict=True):
            write_whole(path, gzip.compress(nib.Nifti1Image(volume, affine).to_bytes(), 1, mtime=0))
    summary = {
        "name": folder.resolve().name,
        "channel_names": {"0": "CT"},
        "labels": {name: value for value, name in enumerate(names)},
        "numTraining": train,
        "file_ending": ".nii.gz",
    }
    write_whole(folder / "dataset.json", json.dumps(summary, indent=2).encode())


if __name__ == "__main__":
    import fire

    fire.Fire(write_dataset)
