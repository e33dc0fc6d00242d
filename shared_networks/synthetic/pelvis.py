"""Model the pelvis and thighs: bones, muscles, vessels and what the pelvis holds."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from shared_networks.synthetic.shapes import Shape, Structure, ball, mirrored, tube

# fmt: off
ILIAC_ARTERIES = mirrored(
    tube((-4, 31, -84, 6.5), (-22, 30, -116, 6), (-40, 34, -150, 5.5), (-47, 46, -190, 5), (-64, 70, -225, 4.5),
         (-75, 80, -250, 4.5), (-80, 76, -290, 4.5), (-76, 66, -350, 4), (-66, 48, -430, 3.5), (-60, 36, -500, 3)),
    tube((-78, 76, -280, 4), (-100, 48, -335, 3), (-98, 26, -420, 2.5), (-92, 20, -480, 2)),
    tube((-39, 32, -148, 4.5), (-44, 4, -178, 4.5), (-50, -10, -212, 3), (-54, -16, -245, 2.5), (-84, -30, -262, 2)),
    tube((-44, 4, -178, 3), (-50, 12, -215, 2.2), (-38, 16, -248, 1.8)),
)
ILIAC_VEINS = (
    tube((18, 26, -92, 8), (30, 18, -122, 7.5), (40, 18, -155, 7)),
    tube((18, 26, -92, 8), (-12, 18, -120, 7.5), (-34, 17, -150, 7), (-40, 18, -158, 6)),
    *mirrored(
        tube((40, 18, -155, 7), (44, 32, -190, 6.5), (56, 58, -224, 6.5), (62, 74, -250, 6.5), (68, 68, -292, 6),
             (72, 56, -350, 5.5), (68, 38, -430, 5), (60, 26, -500, 4.5)),
        tube((40, 16, -158, 5.5), (47, -4, -185, 5), (52, -16, -218, 3.5), (44, -6, -250, 3)),
        tube((66, 76, -285, 4), (58, 82, -305, 3), (42, 62, -380, 2.6), (36, 44, -480, 2.6)),
    ),
)
TENDED = (1.5, 1, 1)  # wider than deep

SACRUM = (
    tube((0, -4, -157, 15), (0, -17, -186, 12.5), (0, -32, -212, 10), (0, -43, -234, 8), (0, -47, -252, 6),
         flat=(1.7, 1, 1)),
    *mirrored(tube((14, -12, -158, 9), (36, -24, -166, 14), (38, -30, -184, 12), (24, -38, -208, 8),
                   (15, -44, -234, 5)),
              tube((10, -42, -160, 4), (9, -50, -195, 4), (6, -54, -220, 3))),
    tube((0, -48, -158, 4), (0, -57, -185, 4), (0, -56, -215, 4)),
    tube((0, -46, -258, 5), (0, -42, -270, 4), (0, -34, -283, 3), flat=TENDED),
)
FORAMINA = mirrored(*(tube((x, y + 6, z - 1, r), (x, y, z, r), (x + 2, y - 20, z + 2, r - 1))
                      for x, y, z, r in ((23, -20, -174, 5), (20, -32, -198, 4.5), (17, -42, -220, 4))))
SACRAL_CANAL = tube((0, -24, -148, 9), (0, -34, -180, 7), (0, -46, -212, 4), flat=TENDED)
BLADE = (1, 1, 2.8)  # the iliac wing is a sheet: stacked tubes, taller than thick
HIP_BONES = (
    tube((126, 44, -122, 5), (128, 18, -109, 6), (120, -12, -107, 6), (100, -32, -116, 5.5), flat=(1, 1, 1.6)),
    tube((122, 64, -140, 5), (124, 36, -134, 4.2), (113, 0, -134, 4.2), (86, -32, -138, 5), (58, -49, -148, 7),
         flat=BLADE),
    tube((117, 76, -163, 6), (112, 50, -164, 4.5), (99, 14, -164, 4), (74, -24, -166, 6), (46, -50, -172, 8),
         flat=BLADE),
    tube((105, 64, -190, 7), (98, 44, -190, 6), (87, 14, -190, 6.5), (66, -16, -190, 8), (50, -42, -186, 6),
         flat=(1, 1, 2)),
    tube((92, 52, -212, 9), (86, 28, -212, 12), (74, 2, -210, 11), (64, -14, -208, 7), flat=(1, 1, 1.5)),
    ball(83, 27, -232, 29, 30, 30),
    tube((72, 2, -232, 14), (66, -10, -258, 10), (52, -22, -248, 4)),
    tube((68, -8, -255, 11), (64, -17, -292, 13), (61, -15, -306, 11), (48, 12, -302, 6), (28, 44, -288, 6),
         (14, 61, -277, 6.5)),
    tube((80, 48, -236, 13), (56, 62, -244, 8), (24, 67, -251, 8), (10, 66, -256, 8)),
    tube((9, 66, -254, 8), (8.5, 65, -268, 7), (9, 62, -281, 7), flat=(0.9, 1.3, 1)),
)
SOCKET = (ball(90, 28, -236, 26), ball(126, 34, -250, 42, 40, 40))
SYMPHYSIS = ball(0, 65, -267, 2.6, 12, 17)
FEMUR_ENDS = (
    ball(89, 28, -236, 23.5),
    tube((89, 28, -236, 17), (112, 23, -252, 14), (132, 14, -268, 18), (132, 12, -285, 16)),
    ball(145, 7, -256, 13, 16, 18), ball(117, 0, -304, 9),
)
FEMUR_SHAFTS = tube((134, 12, -282, 16), (130, 13, -310, 15), (126, 19, -360, 14), (118, 25, -470, 14),
                    (112, 26, -520, 15))

WING = (0, 0, -28)  # turn of what lies along the iliac wing
# Muscles of the right side that lie against each other with fat between.
MUSCLES = {
    "gluteus maximus": tube((54, -44, -160, 9), (70, -41, -205, 19), (85, -38, -255, 23), (104, -32, -300, 20),
                            (128, -12, -350, 7), flat=(2.2, 0.9, 1), steps=3),
    "gluteus medius": Shape(tube((122, 8, -104, 5), (119, 0, -140, 14), (123, -2, -180, 20), (136, 2, -215, 19),
                                 (148, 8, -250, 8), steps=3).path, (0.9, 2.2, 1), WING),
    "gluteus minimus": Shape(tube((110, 18, -150, 6), (110, 18, -190, 12), (120, 26, -225, 11), (138, 24, -252, 6),
                                  steps=3).path, (0.75, 2.1, 1), WING),
    "tensor of fascia lata": tube((124, 74, -165, 5), (140, 60, -215, 12), (150, 46, -265, 12), (156, 26, -340, 4),
                                  flat=(0.8, 1.5, 1)),
    "sartorius": tube((120, 80, -165, 4), (114, 84, -225, 10), (94, 84, -285, 11), (70, 74, -350, 11),
                      (46, 52, -430, 12), (36, 34, -500, 12), flat=(1.3, 0.85, 1)),
    "rectus femoris": tube((104, 64, -205, 4), (112, 72, -250, 13), (108, 76, -300, 16), (102, 76, -380, 18),
                           (98, 74, -480, 14), flat=(1.2, 0.9, 1)),
    "vastus lateralis": tube((150, 12, -275, 8), (150, 14, -320, 18), (142, 24, -390, 24), (130, 30, -490, 24),
                             flat=(0.9, 1.6, 1)),
    "vastus intermedius": tube((124, 40, -300, 8), (118, 46, -360, 17), (108, 50, -490, 18), flat=(1.3, 0.8, 1)),
    "vastus medialis": tube((106, 38, -330, 5), (88, 46, -400, 14), (74, 46, -490, 22)),
    "pectineus": tube((42, 68, -248, 8), (66, 58, -275, 13), (102, 32, -312, 8), flat=(1.3, 0.9, 1)),
    "long adductor": tube((16, 66, -270, 5), (44, 62, -312, 14), (78, 46, -365, 14), (98, 34, -430, 6)),
    "short adductor": tube((24, 50, -280, 6), (56, 38, -315, 14), (96, 22, -350, 8)),
    "great adductor": tube((42, 14, -304, 8), (58, 10, -335, 22), (76, 6, -390, 27), (84, 4, -490, 18),
                           flat=(1.2, 0.9, 1)),
    "gracilis": tube((12, 52, -288, 5), (33, 38, -345, 9), (38, 20, -410, 10), (40, 6, -490, 10), flat=(0.8, 1.5, 1)),
    "biceps femoris": tube((66, -24, -308, 7), (90, -34, -360, 16), (102, -34, -420, 20), (106, -32, -490, 20)),
    "semitendinosus": tube((58, -28, -310, 7), (66, -38, -360, 15), (70, -40, -420, 17), (68, -38, -490, 15)),
    "semimembranosus": tube((58, -18, -318, 7), (58, -18, -380, 12), (54, -20, -440, 18), (52, -18, -490, 19)),
    "piriformis": tube((20, -30, -206, 7), (52, -32, -222, 11), (92, -20, -240, 11), (136, 4, -248, 5)),
    "external obturator": tube((44, 42, -282, 9), (74, 24, -288, 12), (116, 4, -272, 6)),
    "gemelli": tube((62, -18, -256, 6), (100, -8, -258, 9), (138, 4, -256, 4)),
    "square of the thigh": tube((76, -8, -298, 9), (122, -4, -298, 9), flat=(1, 0.9, 1.6)),
}
ANAL_CANAL = tube((0, -26, -288, 13), (0, -30, -316, 12), (0, -34, -326, 11))
INNER_MUSCLES = {  # at the lining of the belly
    "iliacus": Shape(tube((110, 24, -118, 6), (99, 24, -150, 12), (90, 28, -190, 14), (86, 52, -225, 13),
                          steps=3).path, (0.8, 2.1, 1), WING),
    "iliopsoas": tube((60, 20, -172, 17), (74, 44, -212, 17), (86, 62, -240, 16), (100, 50, -275, 13),
                      (114, 14, -304, 8)),
    "internal obturator": tube((57, 30, -218, 4), (54, 22, -245, 6.5), (50, 20, -280, 6), flat=(1, 4.4, 1)),
}


def muscles(rng: np.random.Generator) -> tuple[Structure, ...]:
    """List the muscles of pelvis and thighs, of either side, with more or less bulk and fat between them."""
    grow, bulk, apart = rng.uniform(1, 1.1), rng.uniform(0, 7), rng.uniform(0.6, 3.5)

    def both(group: dict[str, Shape], more: float) -> Iterable[tuple[Shape, ...]]:
        paths = [(s.path * (1, 1, 1, grow) + (0, 0, 0, more)).astype(np.float32) for s in group.values()]
        full = (s._replace(path=path) for s, path in zip(group.values(), paths, strict=True))
        return zip(*map(mirrored, full), strict=True)

    nodes = rng.uniform((62, 88, -300), (100, 96, -250), (4, 3))
    return (
        *(Structure("muscle", side, blend=-apart, deep=True) for side in both(MUSCLES, bulk)),
        *(Structure("muscle", side, blend=-apart) for side in both(INNER_MUSCLES, 0)),
        Structure("muscle", mirrored(*(ball(*node, *rng.uniform(2, 5, 3)) for node in nodes)), deep=True),  # nodes
        Structure("muscle", (ANAL_CANAL,), layers=((7, "gut wall"),)),
    )


def vessels(rng: np.random.Generator) -> tuple[Structure, ...]:
    """List the vessels of pelvis and thighs, the arteries of some with plaques of calcium."""
    plaques: list[Shape] = []
    for artery in ILIAC_ARTERIES[:2] * (rng.random() < 0.35):
        x, y, z, radius = artery.path[rng.choice(len(artery.path), 7)].T
        angle = rng.uniform(-np.pi, np.pi, 7)
        plaques += map(ball, x + radius * np.cos(angle), y + radius * np.sin(angle), z, rng.uniform(1, 2.4, 7))
    return (
        Structure("caval blood", ILIAC_VEINS, halo=0.5),
        Structure("arterial blood", ILIAC_ARTERIES, halo=0.5),
        Structure("cortical bone", tuple(plaques)),
    )


def bones(rng: np.random.Generator) -> tuple[Structure, ...]:
    """List the bones of pelvis and thighs, sometimes with a hip replaced."""
    hip = Structure("cortical bone", HIP_BONES, layers=((2.4, "trabecular bone"),), carve=SOCKET, blend=7)
    thigh = (
        Structure("cortical bone", FEMUR_ENDS, layers=((2.4, "trabecular bone"),), blend=6),
        Structure("cortical bone", (FEMUR_SHAFTS,), layers=((rng.uniform(4, 6.5), "fat"),)),
    )
    side, replaced = rng.choice([0, 1]), rng.random() < 0.06
    stem = tube((89, 28, -236, 7), (116, 22, -254, 8), (129, 14, -285, 9), (126, 18, -350, 7), (123, 21, -385, 4))
    cup = Structure("metal", (ball(88, 28, -235, 28),), carve=(ball(89, 28, -236, 24), *SOCKET[1:]))
    implant = (cup, Structure("metal", (ball(89, 28, -236, 15), stem)))
    return (
        Structure("cartilage", mirrored(ball(90, 28, -237, 27))),
        Structure("cortical bone", SACRUM, layers=((2.2, "trabecular bone"),), blend=5),
        Structure("fat", FORAMINA),
        Structure("spinal canal", (SACRAL_CANAL,)),
        *(s for bone in (hip, *thigh) for s in sides(bone)),
        Structure("cartilage", (SYMPHYSIS,)),
        *(sides(s)[side] for s in implant * replaced),
    )


def sides(structure: Structure) -> tuple[Structure, Structure]:
    """Return a structure of the right side and its mirror image."""
    count = len(structure.shapes), len(structure.carve)
    shapes, carve = mirrored(*structure.shapes), mirrored(*structure.carve)
    return structure, structure._replace(shapes=shapes[count[0] :], carve=carve[count[1] :])


def filled(rng: np.random.Generator, shape: Shape, halo: float) -> Structure:
    """Make a piece of bowel that is empty or holds fluid, stool or gas."""
    kind = str(rng.choice(["empty", "chyme", "stool", "gas"], p=(0.3, 0.15, 0.35, 0.2)))
    wall = 6 if kind == "empty" else 2.5
    gas = rng.uniform(0.6, 1) if kind == "gas" else rng.uniform(0, 0.4)
    content = "stool" if kind in ("stool", "gas") else "chyme"
    return Structure("gut wall", (shape,), layers=((wall, content),), gas=gas, halo=halo)


def bowel(rng: np.random.Generator) -> tuple[Structure, ...]:
    """Make loops of small bowel, the sigmoid and the rectum."""
    loops = rng.uniform((-56, 15, -222), (56, 100, -150), (int(rng.integers(4, 14)), 3))
    loops = np.c_[loops[np.argsort(-loops[:, 2] + rng.normal(0, 15, len(loops)))], rng.uniform(7, 12, len(loops))]
    way = np.array([(-98, 2, -158), (-90, 26, -182), (-58, 52, -200), (-14, 58, -200), (24, 40, -188), (18, 14, -180),
                    (2, -2, -190)]) + rng.normal(0, 1, (7, 3)) * np.array([[0], [5], [12], [16], [14], [7], [2]])
    sigmoid = tube(*np.c_[way, rng.uniform(9, 17) * np.array([1, 1, 1, 1.1, 1, 0.9, 0.9])], steps=6)
    sigmoid.path[:, 3] *= 1 + 0.12 * np.sin(2.1 * np.arange(len(sigmoid.path)))
    width = rng.uniform(10, 22)
    rectum = tube((2, -2, -190, 10), (0, -8, -212, 0.8 * width), (4, -16, -236, width), (0, -14, -262, width),
                  (0, -16, -285, 10), (0, -26, -300, 8))
    return (
        Structure("gut wall", (tube(*loops, steps=3),), layers=((2.5, "chyme"),), gas=rng.uniform(0, 0.3)),
        filled(rng, sigmoid, 2),
        filled(rng, rectum, 3),
    )


def bladder(rng: np.random.Generator) -> tuple[Structure, ...]:
    """Make a bladder of 30 to 700 ml, sometimes with layered contrast or a catheter."""
    radius = (750 / np.pi * np.exp(rng.uniform(np.log(30), np.log(700)))) ** (1 / 3)
    wide, deep, tall = radius * np.array([rng.uniform(1.05, 1.2), rng.uniform(0.85, 1), 1 / rng.uniform(0.95, 1.05)])
    centre = np.array([rng.normal(0, 3), 48 - 0.75 * deep + 0.4 * tall, -268 + tall])
    wall = rng.uniform(2, 3) + 3 * (radius < 28)
    shape, (x, y, z) = ball(*centre, wide, deep, tall), centre
    lumen = ball(*centre, wide - wall, deep - wall, tall - wall)
    level = y + rng.uniform(-0.4, 0.5) * deep
    catheter = Structure("cartilage", (ball(x, y - 4, -268 + wall + 13, 13),), layers=((1.5, "cyst"),))
    return (
        Structure("gut wall", (shape,), layers=((wall, "urine"),), halo=2.5),
        Structure("cyst", (lumen,) * (rng.random() < 0.3), carve=(ball(x, level - 400, z, 400),)),  # unmixed, in front
        *(catheter, Structure("cartilage", (tube((x, y - 4, -262, 3.5), (0, 30, -290, 3.5)),))) * (rng.random() < 0.1),
    )


VAGINA = tube((0, 6, -258, 8), (0, 4, -285, 8), (0, 14, -312, 6), flat=(1.9, 0.7, 1))


def genitals(rng: np.random.Generator, female: bool) -> tuple[Structure, ...]:
    """List uterus and ovaries, or prostate and seminal vesicles."""
    if female:
        lean, size, ovaries = rng.normal(0, 12), rng.uniform(0.6, 1.25), []
        uterus = tube((0, 6, -262, 11), (lean / 3, 12, -242, 14 * size), (lean, 30 * size, -218, 23 * size),
                      flat=(1.15, 0.9, 1))
        for x in (-42, 42):
            cyst = rng.uniform(3, 9) if rng.random() < 0.85 else rng.uniform(12, 24)
            place = x, rng.uniform(4, 22), rng.uniform(-230, -212)
            ovaries.append(Structure("gut wall", (ball(*place, cyst + 5, cyst + 3, cyst + 5),), layers=((4, "cyst"),)))
        return (
            Structure("gut wall", (VAGINA,)),
            Structure("gut wall", (uterus,) * (rng.random() < 0.8), layers=((14 * size, "chyme"),), halo=1),
            *ovaries,
        )
    size = rng.uniform(0.85, 1.4)
    return (
        Structure("gut wall", mirrored(tube((4, 14, -252, 5), (30, 8, -244, 5), flat=(1, 0.9, 1.3)))),
        Structure("gut wall", (ball(0, 24, -268 + 4 * size, 23 * size, 16 * size, 18 * size),)),
    )


def viscera(rng: np.random.Generator, female: bool) -> tuple[Structure, ...]:
    """List what the pelvis holds, in the order of painting."""
    organs = genitals(rng, female)
    return (*bowel(rng), *organs, *bladder(rng)) if female else (*bowel(rng), *bladder(rng), *organs)


def surface(rng: np.random.Generator, female: bool) -> tuple[Structure, ...]:
    """List what hangs at the pelvis: penis and scrotum, or labia; and an inguinal hernia."""
    side, width = rng.choice([-1, 1]), rng.uniform(9, 18)
    hernia = tube((side * 50, 84, -232, 5), (side * 34, 96, -262, width), (side * 24, 92, -290, width))
    content = ((1.2, "fat"), *((width - 7, "gut wall"),) * (rng.random() < 0.3))
    hernias = (Structure("muscle", (hernia,), layers=content),) * (rng.random() < (0.03 if female else 0.1))
    if female:
        return (Structure("skin", mirrored(ball(10, 48, -318, 11, 34, 26)), layers=((2.5, "fat"),)), *hernias)
    y = rng.uniform(60, 78)
    penis = tube((0, 78, -292, 13), (rng.normal(0, 8), 108, -302, 15), (rng.normal(0, 14), 116, -345, 14))
    return (
        Structure("muscle", mirrored(tube((56, 82, -225, 4), (24, 88, -262, 5), (18, y - 6, -318, 5)))),  # cords
        *hernias,
        Structure("skin", (ball(0, y, -338, 38, 26, 32),), layers=((3, "fat"),)),
        Structure("gut wall", mirrored(ball(17, y, -342, 13, 15, 20))),
        Structure("muscle", (tube((0, 24, -316, 11), (0, 44, -306, 12), (0, 72, -296, 11)),
                             *mirrored(tube((44, 0, -312, 7), (24, 36, -302, 8), (6, 66, -292, 9))))),  # root
        Structure("skin", (penis,), layers=((2.5, "gut wall"),)),
    )
# fmt: on
