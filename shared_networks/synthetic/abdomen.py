"""Model the organs and vessels of the abdomen."""

from __future__ import annotations

import numpy as np

from shared_networks.synthetic.shapes import Structure, ball, mirrored, tube


# fmt: off
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
MUSCLES = mirrored(
    tube((26, 4, 20, 6), (36, 2, -40, 15), (46, 4, -110, 19), (62, 16, -180, 20)),  # psoas
    tube((56, -36, 10, 8), (62, -36, -60, 10), (72, -32, -120, 10), flat=(1.6, 0.8, 1)),  # quadratus lumborum
    # erector spinae
    tube((34, -46, 90, 17), (36, -46, 60, 20), (34, -46, -60, 23), (26, -48, -200, 18), flat=(1.35, 0.85, 1)),
    tube((9, -44, 90, 10), (9, -42, 0, 12), (9, -44, -200, 12)),  # multifidus
    tube((10, 18, 78, 5), (14, 22, 40, 6), (12, 18, -20, 4), flat=(0.8, 1, 1)),  # crura of the diaphragm
)


def organs(rng: np.random.Generator) -> tuple[Structure, ...]:
    """List the structures of the belly in the order of painting."""
    return (
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


def great_vessels() -> tuple[Structure, ...]:
    """List the vena cava and the aorta."""
    return (
        Structure("caval blood", (CAVA,), "inferior vena cava", halo=1.5),
        Structure("arterial blood", (AORTA,), "aorta", halo=1.5),
    )


def muscles() -> tuple[Structure, ...]:
    """List the muscles along the spine."""
    return (Structure("muscle", MUSCLES),)
# fmt: on
