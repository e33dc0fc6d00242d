"""What a body is: the abdomen as a table of tissues and of smooth implicit shapes with organ labels.

Shapes are in patient millimetres: x right, y anterior, z superior, origin in the first lumbar vertebra. `anatomy` lists
the structures of one patient in the order in which they are painted, one over another.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.interpolate import CubicSpline

Array = NDArray[np.floating[Any]]
Triple = tuple[float, float, float]

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


def label_names(label_set: str) -> tuple[str, ...]:
    """Return the organ names of a label set, in order of label value. ValueError if the set is unknown."""
    if label_set not in LABEL_SETS:
        raise ValueError(f"label_set is {label_set!r}; choose one of {', '.join(LABEL_SETS)}")
    return LABEL_SETS[label_set]


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


def spine(z: float) -> float:
    """Return y in mm of the vertebral bodies' centre at height z (lumbar lordosis, thoracic kyphosis)."""
    return 4 - 16 * ((z + 60) / 150) ** 2


# fmt: off
def vertebra(z: float) -> tuple[Shape, ...]:
    """Make body, spinous process, arch and transverse processes of a vertebra at height z."""
    y = spine(z)
    return (
        tube((0, y, z - 8, 1), (0, y, z + 8, 1), flat=(22, 16.5, 6)),
        tube((0, y - 34, z, 1), (0, max(y - 58, -57), z - 10, 1), flat=(3.5, 5, 9)),
        *mirrored(tube((13, y - 8, z + 4, 5), (14, y - 26, z, 6), (2, y - 36, z - 3, 5)),
                  tube((16, y - 22, z + 2, 5), (42, y - 26, z + 4, 3.5))),
    )


def kidney(organ: str, x: float, z: float, rng: np.random.Generator) -> tuple[Structure, ...]:
    """Make a kidney about (x, 4, z) with pyramids, fatty sinus, renal pelvis and sometimes a cyst."""
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
    """Make mesenteric vessels, the small bowel in layers from back to front, and the colon's frame."""
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
    """Make roundish lesions of the liver."""
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
    """List all structures in the order of painting: first those of the belly, then all around it or through it."""
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
