"""Model what lies in the chest: heart, great vessels, airways, esophagus, vessels of the lungs, sternum, devices."""

from __future__ import annotations

import numpy as np

from shared_networks.synthetic.shapes import Array, Shape, Structure, ball, mirrored, tube
from shared_networks.synthetic.shoulders import on_cage
from shared_networks.synthetic.spine import spine

# fmt: off
ESOPHAGUS = tube((-4, 24, 370, 7), (-5, 6, 310, 7), (-6, 2, 265, 7), (-6, 1, 225, 7.5), (-1, 9, 175, 8),
    (-3, 22, 145, 8.5),
                 (-14, 42, 114, 9), (-28, 44, 96, 9.5), (-44, 32, 86, 10), flat=(1.2, 0.85, 1))
MEDIASTINUM = (ball(-10, 76, 142, 80, 56, 46), tube((-8, 16, 84, 24), (-4, 16, 130, 26), (-2, 26, 180, 30),
    (0, 34, 225, 33),
               (0, 32, 262, 31), (0, 24, 295, 28), (0, 18, 340, 30), flat=(1, 1.35, 1)),
               tube((0, 106, 96, 10), (0, 102, 150, 10), (0, 85, 200, 12), (0, 64, 240, 12), (0, 50, 262, 12),
                    flat=(0.8, 1.6, 1)),
               tube(*((-4, spine(z) + 13, z, 20) for z in range(85, 320, 45)), steps=2))
STERNUM = (tube((0, 126, 96, 3), (0, 123, 112, 6), (0, 121, 140, 6.5), (0, 106, 200, 6.5),
    (0, 92, 232, 6.5), flat=(2.6, 0.8, 1)),
           tube((0, 91, 236, 6.5), (0, 80, 256, 7), (0, 70, 274, 7), flat=(3.6, 0.9, 1)))
ARCH = tube((-7, 66, 172, 15), (4, 74, 186, 16.5), (14, 74, 212, 15.5), (8, 58, 240, 14.5), (-14, 36, 250, 13.5),
            (-30, 14, 240, 13), (-28, 4, 215, 12.5), (-23, 4, 186, 12.2))
ARCH_BRANCHES = (
    tube((8, 50, 250, 6), (20, 40, 285, 6), (26, 36, 304, 6)), tube((26, 36, 304, 4), (24, 28, 340, 3.8), (26, 26,
        400, 3.5)),
    tube((26, 36, 304, 5), (46, 16, 310, 4.5), (64, 14, 308, 4.5)),
    tube((-8, 42, 256, 4), (-18, 34, 290, 4), (-24, 28, 340, 3.8), (-26, 26, 400, 3.5)),
    tube((-20, 30, 256, 5), (-28, 14, 290, 5), (-46, 12, 308, 4.5), (-64, 14, 308, 4.5)),
)
SUPERIOR_CAVA = (
    tube((30, 56, 256, 9), (38, 54, 225, 9.5), (42, 56, 190, 10), (42, 60, 165, 12)),
    tube((66, 28, 300, 6.5), (48, 44, 290, 7), (30, 56, 256, 8)), tube((44, 42, 292, 6), (40, 36, 340, 6), (40, 30,
        400, 6)),
    tube((-66, 28, 300, 6.5), (-44, 50, 290, 7), (-10, 70, 268, 6.5), (30, 58, 254, 7.5)),
    tube((-44, 46, 292, 6), (-40, 36, 340, 6), (-40, 30, 400, 6)),
)
AZYGOS = tube((10, 6, 70, 2.5), (9, -2, 130, 3.5), (10, -3, 190, 4), (14, 4, 222, 4.5), (26, 26, 234, 5), (38,
    46, 228, 5))
HEMIAZYGOS = tube((-12, 2, 80, 2), (-11, -4, 150, 2.5), (8, -4, 172, 2.5))
TRACHEA = tube((0, 48, 400, 9.5), (0, 34, 340, 9.5), (0, 22, 290, 9.5), (2, 17, 250, 9.5), (3, 16, 226, 10))
BRONCHI = (
    tube((4, 16, 224, 8.5), (22, 16, 208, 8), (42, 18, 194, 7.5)), tube((2, 16, 224, 8), (-20, 18, 208, 7),
        (-46, 18, 192, 7)),
    tube((42, 18, 194, 6), (50, 14, 170, 5), (56, 2, 140, 3)), tube((30, 16, 203, 5.5), (50, 20, 216, 4.5),
        (64, 22, 236, 3)),
    tube((-46, 18, 192, 5.5), (-52, 12, 168, 5), (-58, 0, 136, 3)), tube((-40, 18, 195, 5), (-56, 26, 208, 4.5),
        (-66, 34, 230, 3)),
)
PULMONARY = (
    tube((-16, 86, 176, 14), (-17, 78, 194, 14), (-20, 58, 210, 13)),
    tube((-20, 58, 210, 12), (-40, 36, 208, 10.5), (-54, 20, 194, 9), (-60, 8, 168, 6)),
    tube((-18, 56, 206, 12), (10, 45, 205, 10.5), (44, 36, 199, 9.5), (58, 22, 186, 8), (62, 8, 160, 6)),
)
PULMONARY_VEINS = mirrored(tube((28, 44, 176, 6.5), (52, 44, 182, 6), (72, 52, 200, 4)),
                           tube((28, 40, 160, 6.5), (52, 28, 152, 6), (72, 16, 130, 4)))


def heart(rng: np.random.Generator) -> tuple[Structure, ...]:
    """List sac, chambers and their walls, larger or smaller, squeezed or relaxed."""
    size, wall = rng.normal(1, 0.06), rng.uniform(7.5, 11.5)
    centre = np.array((-8, 70, 145)) + rng.normal(0, (4, 2, 2))

    def chamber(*points: tuple[float, float, float, float]) -> Shape:
        moved = [(*(centre + size * (np.array(p[:3]) - (-8, 70, 145))), size * p[3]) for p in points]
        return tube(*moved, steps=3)

    left = chamber((-20, 56, 158, 27), (-46, 70, 141, 31), (-70, 84, 124, 21))
    right = chamber((24, 88, 140, 22), (-10, 100, 131, 23), (-48, 104, 119, 14))
    outflow = chamber((-6, 98, 140, 20), (-14, 94, 162, 17), (-16, 86, 180, 14))
    right_atrium = chamber((34, 66, 126, 20), (38, 68, 146, 28), (38, 72, 168, 19))
    left_atrium = chamber((22, 48, 166, 21), (0, 46, 168, 23), (-24, 50, 166, 20))._replace(flat=(1, 0.9, 1.1))
    chambers = left, right, outflow, right_atrium, left_atrium
    grown = [shape._replace(path=(shape.path + np.array((0, 0, 0, 4), np.float32))) for shape in chambers]
    return (
        Structure("fat", tuple(grown), blend=18),
        Structure("myocardium", (left_atrium,), layers=((2.5, "arterial blood"),)),
        Structure("myocardium", (right_atrium,), layers=((2.5, "pulmonary blood"),)),
        Structure("myocardium", (right, outflow), layers=((3.5, "pulmonary blood"),), blend=6),
        Structure("myocardium", (left,), layers=((wall, "arterial blood"),)),
    )


def lung_vessels(effusion: tuple[float, float], rng: np.random.Generator) -> tuple[Structure, ...]:
    """List arteries, veins and small bronchi that branch from the hilum to all of each lung, and rarely nodules."""
    vessels: list[Shape] = []
    airways: list[Shape] = []
    for side, fluid in zip((1, -1), effusion, strict=True):
        floor = 1.6 * fluid - 62  # y in mm; fluid lies behind
        hilum = np.array((48, 24, 186)) + rng.normal(0, 2, 3)
        for turn, low in ((35, 150), (45, 100), (70, 120), (75, 175), (60, 235), (100, 95), (105, 160), (95, 215),
            (30, 210),
                          (120, 240), (135, 190), (140, 140), (20, 120), (85, 260)):
            tip = leaf(turn + rng.normal(0, 5), low + rng.normal(0, 6), 26, floor)
            middle = (hilum + tip) / 2 + rng.normal(0, 5, 3)
            for away, name in ((0, vessels), (9, vessels), (-5, airways)):
                first, last = (3.4, 1.6) if name is vessels else (3, 1.8)
                ends = tip + away * rng.normal(0, 1, 3)
                points = [(*hilum, first + 1), (*(middle + away * rng.normal(0, 0.7, 3)), first * 0.75),
                    (*ends, last * 0.6)]
                if name is vessels or len(airways) < 12:
                    name.append(flipped(side, tube(*points, steps=1)))
            for _ in range(4):
                start = hilum + rng.uniform(0.35, 0.85) * (tip - hilum)
                twig = leaf(turn + rng.normal(0, 22), low + rng.normal(0, 26), rng.uniform(16, 30), floor)
                fork = start + 0.45 * (twig - start) + rng.normal(0, 4, 3)
                vessels.append(flipped(side, tube((*start, 2.2), (*fork, 1.5), (*twig, 0.8), steps=1)))
    nodules = [flipped(side, ball(*leaf(rng.uniform(30, 140), rng.uniform(130, 250), 40, 0), rng.uniform(3, 13)))
               for side in rng.choice((1, -1), rng.integers(1, 5) * (rng.random() < 0.15))]
    return (
        Structure("pulmonary blood", tuple(vessels[::2])), Structure("arterial blood", tuple(vessels[1::2])),
        Structure("cartilage", tuple(airways), layers=((1.2, "gas"),)), Structure("metastasis", tuple(nodules)),
    )


def leaf(turn: float, z: float, deep: float, floor: float) -> Array:
    """Return a point `deep` mm within the right ribs and above the diaphragm, not behind y = `floor`, `[3]`."""
    x, y, _ = on_cage(turn, z, -deep)
    dome = 122 * np.sqrt(max(0.0, 1 - ((x - 62) / 76) ** 2 - ((y - 42) / 108) ** 2)) + 10
    return np.array((x, max(y, floor), max(z, dome)))


def flipped(side: int, shape: Shape) -> Shape:
    """Return a shape of the right side, or its mirror image for side -1."""
    return mirrored(shape)[0 if side > 0 else 1]


def contents(effusion: tuple[float, float], rng: np.random.Generator) -> tuple[Structure, ...]:
    """List what lies in and between the lungs in the order of painting, but for aorta and inferior vena cava."""
    nodes = rng.uniform((-34, 6, 170), (34, 66, 255), (8, 3))
    thyroid = rng.uniform(7, 13, 2)
    return (
        *lung_vessels(effusion, rng),
        Structure("fat", MEDIASTINUM),
        Structure("lymph node", tuple(ball(*p, *rng.uniform(2, 5, 3)) for p in nodes)),
        Structure("muscle", mirrored(tube((12, spine(310) + 18, 300, 6), (12, 16, 340, 7), (12, 18,
            400, 7)))),  # of the neck
        Structure("arterial blood", PULMONARY_VEINS),
        Structure("myocardium", PULMONARY[:1], layers=((1, "pulmonary blood"),)),
        Structure("pulmonary blood", PULMONARY[1:]),
        *heart(rng),
        Structure("pulmonary blood", (SUPERIOR_CAVA[0],)), Structure("caval blood", (AZYGOS, HEMIAZYGOS,
            *SUPERIOR_CAVA[1:])),
        Structure("thyroid", tuple(ball(s * 19, 40, 340, r, r * 1.2, 26) for s, r
            in zip((1, -1), thyroid, strict=True))),
        Structure("oesophageal wall", (ESOPHAGUS,), "esophagus", layers=((rng.uniform(4, 9), "gas"),)),
        Structure("cartilage", (TRACHEA, *BRONCHI), layers=((1.7, "gas"),)),
        Structure("arterial blood", ARCH_BRANCHES),
    )


def aorta() -> Structure:
    """Make the aorta from the heart over the arch down to where that of the belly begins."""
    return Structure("arterial blood", (ARCH,), "aorta")


def bones() -> tuple[Structure, ...]:
    """List the bones of the chest, but for ribs and spine."""
    return (Structure("cortical bone", STERNUM, layers=((2, "trabecular bone"),)),)


def devices(fat: float, rng: np.random.Generator) -> tuple[Structure, ...]:
    """List a port with its catheter, or a pacemaker with its lead, that few patients carry."""
    kind, side = rng.random(), int(rng.choice((1, -1)))
    x, y, z = on_cage(138, rng.uniform(225, 245), 18 + 0.5 * fat)
    line: list[tuple[float, float, float, float]]
    line = [(x, y, z, 1.6), (52, 70, 288, 1.6), (36, 52, 250, 1.6), (40, 56, 190, 1.6)]
    if side < 0:
        line = [*((-x, y, z, r) for x, y, z, r in line[:2]), (10, 66, 272, 1.6), *line[2:]]
    if kind > 0.07:
        return ()
    if kind > 0.04:
        lead = tube(*line, (34, 80, 150, 1.4), (-40, 104, 118, 1.4), steps=3)
        return Structure("metal", (lead,)), Structure("metal", (flipped(side, ball(x, y, z, 22, 5, 24,
            turn=(0, 0, -40))),))
    port = flipped(side, ball(x, y, z, 13, 7, 13, turn=(0, 0, -40)))
    return Structure("gallstone", (tube(*line, steps=3),)), Structure("metal", (port,), layers=((3, "chyme"),))
# fmt: on
