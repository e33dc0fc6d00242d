"""Model stomach, duodenum, small bowel and colon, each with wall, calibre, course and contents of its own."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from shared_networks.synthetic.shapes import Array, Structure, tube


class Filling(NamedTuple):
    """What a stretch of gut holds, and how wide that makes it.

    Attributes:
        tissue: the contents; "" where the gut is collapsed.
        width: lowest and highest factor on the radius.
        gas: lowest and highest share of the height that is gas.
        mottle: tissue in patches, and its largest share.
        sediment: tissue on the ground, and its largest share.
    """

    tissue: str
    width: tuple[float, float] = (0.8, 1.2)
    gas: tuple[float, float] = (0, 0)
    mottle: tuple[str, float] = ("", 0)
    sediment: tuple[str, float] = ("", 0)


# fmt: off
SMALL = {  # chance as the main filling of a patient's small bowel, and the fillings
    "collapsed": (0.25, Filling("", (0.45, 0.7))),
    "chyme": (0.2, Filling("chyme", gas=(-0.6, 0.3))),
    "water": (0.15, Filling("water", (0.9, 1.3), (-0.6, 0.3))),
    "soft chyme": (0.15, Filling("soft chyme", (0.6, 1.1), (-0.6, 0.2))),
    "thin oral contrast": (0.08, Filling("thin oral contrast", (0.8, 1.3), (-0.6, 0.3))),
    "oral contrast": (0.1, Filling("oral contrast", (0.8, 1.3), (-0.6, 0.3))),
    "dense oral contrast": (0.04, Filling("dense oral contrast", (0.8, 1.3), (-0.6, 0.2))),
    "gas": (0.03, Filling("chyme", (0.8, 1.3), (0.4, 0.9))),
}
COLON = {
    "stool": (0.34, Filling("stool", (0.8, 1.3), (-0.3, 0.3), ("gas", 0.3))),
    "soft stool": (0.18, Filling("soft stool", (0.8, 1.5), (-0.5, 0.3), ("gas", 0.04))),
    "dense stool": (0.06, Filling("dense stool", (0.6, 1.1), (0, 0), ("gas", 0.15))),
    "gas": (0.14, Filling("chyme", (0.9, 1.5), (0.5, 1))),
    "water": (0.07, Filling("water", (0.9, 1.4), (-0.3, 0.5))),
    "chyme": (0.07, Filling("chyme", (0.8, 1.3), (-0.3, 0.5))),
    "oral contrast": (0.06, Filling("oral contrast", (0.8, 1.2), (-0.3, 0.4), ("stool", 0.3))),
    "collapsed": (0.08, Filling("", (0.4, 0.6))),
}
STOMACH = {
    "chyme": (0.22, Filling("chyme", (0.6, 1.15), (0, 0.6))),
    "water": (0.2, Filling("water", (0.7, 1.3), (0, 0.45))),
    "food": (0.2, Filling("food", (0.8, 1.4), (0, 0.4), ("gas", 0.15))),
    "soft chyme": (0.1, Filling("soft chyme", (0.6, 1.2), (0, 0.5))),
    "gas": (0.08, Filling("chyme", (0.9, 1.35), (0.6, 0.95))),
    "collapsed": (0.1, Filling("chyme", (0.48, 0.62), (0, 0.8))),
    "thin oral contrast": (0.04, Filling("thin oral contrast", (0.7, 1.2), (0, 0.5))),
    "oral contrast": (0.04, Filling("oral contrast", (0.7, 1.2), (0, 0.5), ("food", 0.3))),
    "sediment": (0.02, Filling("water", (0.7, 1.3), (0, 0.5), sediment=("dense oral contrast", 0.5))),
}


def choose(fillings: dict[str, tuple[float, Filling]], rng: np.random.Generator) -> str:
    """Draw the name of a filling."""
    chances = np.array([chance for chance, _ in fillings.values()])
    return str(rng.choice(list(fillings), p=chances / chances.sum()))


def gut(points: Array, filling: Filling, wall: float, rng: np.random.Generator, **more: Any) -> Structure:
    """Make a stretch of gut through points `[n, 4]` (x, y, z, radius in mm) with a wall of `wall` mm."""
    path = np.array(points, float)
    path[:, 3] *= rng.uniform(*filling.width)
    least = 0.35 * path[:, 3].min()
    contents = ((min(wall, least), filling.tissue),) if filling.tissue else ()
    made = Structure(
        "gut wall", (tube(*path, steps=3),), layers=contents, gas=max(0, rng.uniform(*filling.gas)),
        mottle=(filling.mottle[0], rng.uniform(0, 1) * filling.mottle[1]),
        sediment=(filling.sediment[0], rng.uniform(0, 1) * filling.sediment[1]),
    )
    return made._replace(**more)


def stomach(rng: np.random.Generator, kind: str = "") -> tuple[Structure, ...]:
    """Make the stomach from the end of the gullet to the pylorus; `kind` is a key of `STOMACH`, drawn if empty."""
    kind = kind or choose(STOMACH, rng)
    sag, hang, cascade = rng.choice((-14, 0, 30, 75)) + rng.normal(0, 10), rng.normal(0, 7), rng.random() < 0.15
    points = np.array([(-52, 32, 84, 27), (-63, 44, 64, 34), (-58, 72, 28, 28), (-32, 90, 2, 21), (2, 88, -8, 16),
                       (28, 74, 0, 9)], float)
    points[2:5, 2] -= sag * np.array([0.5, 1, 0.9])
    points[1:4, 0] -= hang
    points[:5, :3] += rng.normal(0, 4, (5, 3))
    points[:5, 3] *= rng.uniform(0.85, 1.15, 5)
    if cascade:  # the fundus falls back over the body
        points[1, 1:] += (-28, -18, 4)
        points[2, 1:3] += (14, 14)
    thick = rng.uniform(5, 8) if kind == "collapsed" else rng.uniform(2.5, 5)
    return (gut(points, STOMACH[kind][1], thick, rng, organ="stomach", halo=rng.uniform(0, 2)),)


def duodenum(rng: np.random.Generator, kind: str = "") -> tuple[Structure, ...]:
    """Make the duodenum from pylorus to jejunum; `kind` is a key of `SMALL`, drawn if empty."""
    points = np.array([(28, 72, 0, 10), (44, 58, 6, 13), (53, 40, -8, 13.5), (54, 34, -48, 13.5), (36, 36, -68, 12.5),
                       (0, 41, -66, 11.5), (-26, 46, -44, 11), (-32, 60, -32, 11)], float)
    points[1:, :3] += rng.normal(0, 2.5, (7, 3))
    points[3:6, 2] -= rng.normal(4, 9)
    filling = SMALL[kind or choose(SMALL, rng)][1]
    filling = filling._replace(width=(max(0.65, filling.width[0]), min(1.1, max(0.85, filling.width[1]))))
    return (gut(points, filling, rng.uniform(2, 3), rng, organ="duodenum", halo=rng.uniform(0, 1.5)),)


def small_bowel(rng: np.random.Generator, lean: float, kind: str = "", dilated: bool = False) -> tuple[Structure, ...]:
    """Make mesenteric vessels and loops from the left upper belly to the pelvis, each of one calibre and filling.

    Args:
        rng: source of all variation.
        lean: from 0, loops far apart in fat, to 1, loops packed tightly.
        kind: a key of `SMALL` for all loops; drawn if empty.
        dilated: whether the loops are as wide as above an obstruction.
    """
    count, calibre = int(24 + 40 * lean + rng.normal(0, 4)), rng.uniform(17, 21) if dilated else rng.uniform(8.5, 14.5)
    main = [kind] if kind else [choose(SMALL, rng) for _ in range(rng.integers(1, 4))]
    depth = rng.uniform(0, 12)
    ends = rng.uniform((-80, 45, -200), (80, 105, -20), (int(rng.integers(12, 30)), 3))
    result = [
        Structure("portal blood" if i % 3 else "arterial blood", tuple(
            tube((4, 60, -35, 2.4), (x / 2, 62, z / 2 - 15, 2), (x, y, z, 1.2)) for x, y, z in ends[i::4]))
        for i in range(4)
    ]
    levels = rng.permuted(np.linspace(-235, -5, count))
    for z in levels:
        heading, points = rng.normal(0, (1, 0.5, 0.6)), []
        half = np.interp(z, (-240, -160, -90, 0), (42, 62, 88, 70))
        at = np.array([rng.uniform(-half, min(half, -z)), rng.uniform(38 + depth, 106), z])
        for _ in range(rng.integers(4, 8)):
            at = np.clip(at, (-half, 36, -242), (half, 112, 8)) + rng.normal(0, 2, 3)
            points.append((*at, calibre * rng.uniform(0.85, 1.15)))
            heading = heading / np.linalg.norm(heading) + rng.normal(0, (0.55, 0.4, 0.55))
            at = at + 24 * heading / np.linalg.norm(heading)
            if abs(at[0]) > half:
                heading[0] *= -1
        name = str(rng.choice(main)) if kind or rng.random() < 0.85 else choose(SMALL, rng)
        wall, halo = rng.uniform((1.2, -1), (2.8, 1.5))
        result.append(gut(np.array(points), SMALL[name][1], wall, rng, halo=max(0, halo)))
    return tuple(result)


def colon(rng: np.random.Generator, right: str = "", width: float = 0) -> tuple[Structure, ...]:
    """Make caecum, appendix and colon down to the sigmoid, in four stretches of one or more fillings.

    Args:
        rng: source of all variation.
        right: filling of caecum and ascending colon, a key of `COLON`; drawn if empty.
        width: radius of the ascending colon in mm; drawn if 0.
    """
    wide = width or rng.choice((rng.uniform(14, 24), rng.uniform(22, 36)), p=(0.75, 0.25))
    out, back, low = max(82, 122 - wide) + rng.normal(0, 3), 4 + wide * 0.5, rng.normal(-155, 16)
    dip = rng.choice((-40, -75, -150)) + rng.normal(0, 18)
    flexures, thin = rng.normal((-36, 26), (20, 22)), rng.uniform(0.75, 1.2)
    loop = rng.uniform((-50, 20, -235), (55, 85, -120), (int(rng.integers(1, 5)), 3))
    line = np.array([
        (out - 10, back + 8, low, wide), (out, back, low + 30, wide), (out, back, min(low + 75, -70), wide * 0.95),
        (out - 8, back + 22, flexures[0], wide * 0.85), (62, 88, min(flexures[0], dip / 2 - 20), 18 * thin),
        (32, 100, 0.8 * dip, 18 * thin), (-8, 104, dip, 18 * thin), (-52, 98, dip / 2, 18 * thin),
        (-88, 60, flexures[1], 17 * thin), (-106, 22, flexures[1] + 8, 16 * thin), (-112, 0, -30, 14 * thin),
        (-109, -2, -95, 13 * thin), (-96, 4, -145, 13 * thin), (-76, 24, -172, 13 * thin),
        *((x, y, z, 14 * thin) for x, y, z in loop), (0, 18, -205, 14 * thin),
    ])
    line[1:-1, :3] += rng.normal(0, 5, (len(line) - 2, 3))
    ends = (0, 3, 8, 12, len(line) - 1)
    prepared = rng.random() < 0.15
    parts = []
    for part, (first, last) in enumerate(pairwise(ends)):
        name = str(rng.choice(("water", "gas", "collapsed"))) if prepared else choose(COLON, rng)
        name = right if right and part == 0 else name
        filling = COLON[name][1]
        if part == 0:
            filling = filling._replace(width=(1, 1) if filling.tissue else filling.width)
        fine = tube(*line[first : last + 1], steps=4).path.astype(float)
        fine[:, 3] *= 1 + rng.uniform(0.06, 0.2) * np.sin(2.1 * np.arange(len(fine)) + rng.uniform(0, 6))  # haustra
        parts.append(gut(fine[::2], filling, rng.uniform(1.5, 3), rng, halo=max(0, rng.uniform(-1, 1.5))))
    tip = line[0, :3] + rng.normal((-25, 0, -25), (20, 20, 25))
    appendix = tube((*line[0, :3], 4), (*((line[0, :3] + tip) / 2 + rng.normal(0, 8, 3)), 3.5), (*tip, 3))
    return (Structure("gut wall", (appendix,)), *(parts[i] for i in rng.permutation(4)))
# fmt: on
