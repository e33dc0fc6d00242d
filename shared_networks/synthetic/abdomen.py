"""Model the solid organs and the vessels of the abdomen."""

from __future__ import annotations

import numpy as np

from shared_networks.synthetic.bowel import colon, duodenum, small_bowel, stomach
from shared_networks.synthetic.kidneys import adrenals, kidney
from shared_networks.synthetic.shapes import Array, Shape, Structure, ball, mirrored, tube

# fmt: off
LIVERS = {  # chance of each kind
    "usual": 0.6, "long left lobe": 0.12, "short left lobe": 0.08, "Riedel": 0.09, "cirrhotic": 0.06,
    "right resected": 0.025, "left resected": 0.025,
}
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
CAVA = tube((20, 26, -95, 10), (20, 28, -40, 11), (20, 32, 10, 11.5), (24, 34, 50, 12.5), (24, 44, 95, 13),
            (18, 58, 125, 15))
PANCREAS = np.array([(34, 46, -30, 12.5), (33, 50, -10, 15.5), (20, 58, 6, 12.5), (-4, 66, 16, 10.5),
                     (-36, 52, 26, 11.5), (-66, 24, 34, 11), (-84, 6, 40, 7.5)])
SPLENIC_VEIN = np.array([(10, 54, 2, 6), (-6, 55, 14, 5.5), (-38, 42, 24, 5), (-66, 14, 32, 5), (-86, -4, 40, 4)])
PORTAL_VEIN = tube((10, 54, 2, 7), (20, 54, 18, 7), (42, 52, 30, 7))
MESENTERIC_VEIN = tube((10, 54, 4, 6), (8, 58, -40, 5.5), (4, 66, -90, 4))
MESENTERIC_ARTERY = tube((-6, 40, -2, 4), (-3, 52, -30, 3.5), (0, 62, -90, 3))
HEPATIC_ARTERY = tube((-8, 36, 22, 4), (-8, 50, 24, 3.5), (18, 62, 26, 2.5), (40, 58, 30, 2))
AORTA = ((-22, 4, 190, 12.5), (-20, 6, 150, 12), (-12, 22, 100, 11.5), (-8, 31, 50, 11), (-7, 33, 0, 10),
         (-7, 33, -45, 9.5), (-6, 31, -85, 9))


def widened(shape: Shape, factor: float) -> Shape:
    """Return a tube of the same course, `factor` times as wide."""
    return shape._replace(path=(shape.path * (1, 1, 1, factor)).astype(np.float32))


def liver(rng: np.random.Generator, kind: str = "") -> tuple[Structure, ...]:
    """Make the liver with vessels and lesions; `kind` is a key of `LIVERS`, drawn if empty.

    Its upper and right sides reach beyond the diaphragm and the wall of the cavity, which cut it to shape.
    """
    kind = kind or str(rng.choice(list(LIVERS), p=list(LIVERS.values())))
    small = kind == "cirrhotic"
    size = float(np.clip(rng.normal(0, 1), 0 if kind.endswith("resected") else -2, 2))  # all extents hang together
    bottom, top = rng.normal(-44 - 20 * size, 14) + 30 * small, 134 - 14 * small
    wide, deep = rng.normal(73 + 5 * size, 4) - 9 * small, rng.normal(87 + 9 * size, 5) - 8 * small
    right = ball(76 + rng.normal(0, 4) + (72 - wide) / 2, 23 + rng.normal(0, 5), (top + bottom) / 2, wide, deep,
                 (top - bottom) / 2, turn=(rng.normal(0, 5), 8 + rng.normal(0, 5), rng.normal(0, 6)))
    reach = {"long left lobe": rng.uniform(92, 122), "short left lobe": rng.uniform(34, 50), "cirrhotic": 84.0,
             "right resected": rng.uniform(80, 110)}.get(kind, rng.normal(78 + 8 * size, 11))
    left = ball(72 - reach, 86 + rng.normal(0, 5), 66 + rng.normal(0, 8), reach, 38 + rng.normal(0, 5),
                35 + rng.normal(4 * size, 5), turn=(0, -8 + rng.normal(0, 5), 12 + rng.normal(0, 5)))
    lobes = {"right resected": (left, ball(44, 60, 58, 54, 58, 58)), "left resected": (right,)}.get(kind, (right, left))
    if kind == "Riedel":
        lobes += (ball(104, 24, rng.uniform(-75, -45), 27, 42, 70),)
    if small:  # a nodular surface
        lumps = rng.uniform((20, -50, -20), (135, 110, 100), (30, 3))
        away = lumps - right.path[0, :3]
        lumps = right.path[0, :3] + away / np.linalg.norm(away / right.flat, axis=1, keepdims=True)
        lobes += tuple(ball(*lump, rng.uniform(7, 14)) for lump in lumps)
    shift = rng.normal(0, 4, (4, 3))
    neighbours = (  # pancreas and bowel, stomach, falciform ligament, spine: what shapes the underside
        ball(*(np.array([18, 30, -30]) + shift[0]), 52, 62, 62), ball(*(np.array([30, 128, 22]) + shift[1]), 5, 30, 38),
        ball(0, -20, 60, 40, 62, 90), *((ball(*(np.array([-70, 40, 35]) + shift[2]), 42, 62, 40),)
                                        if kind != "long left lobe" else ()),
    )
    caudate = ball(24, 44, 50, *(rng.uniform(0.8, 1.2, 3) * (15, 17, 26) * (1.3 if small else 1)))
    lesions = [
        ("cyst", int(rng.integers(0, 4)) + int(rng.integers(8, 25)) * (rng.random() < 0.03)),
        ("metastasis", int(rng.integers(1, 9)) * (rng.random() < 0.25)),
        ("hypervascular mass", int(rng.integers(1, 4)) * (rng.random() < 0.1)),
    ]
    return (
        Structure("liver", (caudate,) * (rng.random() < 0.8), "liver", halo=0.5),
        Structure("liver", lobes, "liver", carve=neighbours, blend=rng.uniform(8, 18), halo=rng.uniform(0, 1.2)),
        Structure("hepatic blood", HEPATIC_VEINS, within="liver"),
        Structure("portal blood", PORTAL_BRANCHES, within="liver"),
        *(Structure(tissue, spots(count, rng), within="liver") for tissue, count in lesions),
    )


def spots(count: int, rng: np.random.Generator) -> tuple[Shape, ...]:
    """Make roundish lesions of the liver of 3 to 40 mm radius."""
    centres = rng.uniform((-30, -20, 0), (125, 95, 100), (count, 3))
    radii = np.minimum(3 + rng.exponential(8, (count, 1)), 40) * rng.uniform(0.8, 1.2, (count, 3))
    return tuple(ball(*c, *r) for c, r in zip(centres, radii, strict=True))


def spleen(rng: np.random.Generator, size: float = 0) -> tuple[Structure, ...]:
    """Make the spleen, `size` times as wide as the usual one, drawn if 0, with notches and sometimes splenules."""
    size = size or min(1.5, max(0.8, rng.lognormal(0, 0.12) + rng.uniform(0.2, 0.5) * (rng.random() < 0.1)))
    long = rng.lognormal(0, 0.12)
    radii = np.array([33, 54, 62]) * size * (long**-0.5, long**-0.5, long)
    centre = np.array([-103, -8, 45]) + (size - 1) * np.array([14, 30, -60]) + rng.normal(0, (2, 6, 6))
    angles = np.array([-22, -8, -24]) + rng.normal(0, (12, 5, 10))
    notches = centre + rng.uniform((15, 0, -0.8), (32, 55, 0.8), (int(rng.integers(0, 4)), 3)) * (1, 1, radii[2])
    hilum = ball(*(centre + size * rng.normal((41, 30, -5), (1, 4, 5))), *(size * np.array([34, 34, 48])))
    extra = rng.normal((-72, 20, 15), (10, 12, 15), (rng.poisson(0.25), 3))
    body = ball(*centre, *radii, turn=(angles[0], angles[1], angles[2]))
    return (
        Structure("spleen", (body,), "spleen", carve=(hilum, *(ball(*n, rng.uniform(7, 14)) for n in notches)),
                  blend=rng.uniform(4, 9), halo=rng.uniform(0, 1)),
        Structure("spleen", tuple(ball(*c, rng.uniform(3.5, 8)) for c in extra), "background", halo=1),
        Structure("cyst", (ball(*centre, rng.uniform(4, 16)),) * (rng.random() < 0.05), within="spleen"),
    )


def gallbladder(rng: np.random.Generator) -> tuple[Structure, ...]:
    """Make the gallbladder, contracted to distended, with clear, dense or layered bile and sometimes stones."""
    full, down = float(np.clip(rng.normal(0.95, 0.25), 0.4, 1.5)), rng.normal(0, 10)
    tip = (62 + rng.normal(0, 5), 90 + rng.normal(0, 5), -16 - down * full)
    sac = tube((46, 62, 22, 4), (54, 76, 6, 13 * full), (*tip, 16 * full))
    stones = [ball(*(np.array(tip) + rng.normal(0, (4, 3, 5)) - (0, 5, 0)), rng.uniform(2, 9) * full)
              for _ in range(int(rng.integers(1, 6)) * (rng.random() < 0.2))]
    bile, sludge = "dense bile" if rng.random() < 0.12 else "bile", "gallstone" if rng.random() < 0.3 else "dense bile"
    return (
        Structure("gut wall", (sac,), "gallbladder", layers=((rng.uniform(0.8, 2.5), bile),), halo=rng.uniform(0, 1.5),
                  sediment=(sludge, rng.uniform(0.1, 0.45) * (rng.random() < 0.15))),
        Structure("gallstone", tuple(stones), within="gallbladder"),
    )


def pancreas(rng: np.random.Generator) -> tuple[Structure, ...]:
    """Make the pancreas, level to steep and thick to thin and fatty, with the veins that run along it."""
    tilt, arch, thick = rng.normal(0, 14), rng.normal(2, 8), float(np.clip(rng.normal(1.04, 0.12), 0.6, 1.35))

    def course(points: Array, radius: float) -> Shape:
        line = points * (1, 1, 1, radius)
        far = np.clip(-line[:, 0] / 84, 0, 1)
        line[:, 2] += tilt * far + arch * np.sin(np.pi * far)
        return tube(*line)

    line = course(PANCREAS, thick)
    atrophy = rng.uniform(0.1, 0.45) if thick < 0.95 and rng.random() < 0.6 else rng.uniform(0, 0.1)
    duct = line._replace(path=line.path * (1, 1, 1, 0) + np.array([0, 0, 0, rng.uniform(1, 4)], np.float32))
    spot = line.path[rng.integers(len(line.path)), :3]
    mass = rng.choice(("cyst", "metastasis", "hypervascular mass"))
    vein = rng.lognormal(0, 0.12)
    return (
        Structure("pancreas", (line._replace(flat=(1, 1, 1.2)),), "pancreas", halo=rng.uniform(0, 2),
                  mottle=("fat", atrophy)),
        Structure("water", (duct,) * (rng.random() < 0.15), within="pancreas"),
        Structure(mass, (ball(*spot, rng.uniform(4, 14)),) * (rng.random() < 0.08), within="pancreas"),
        Structure("portal blood", (widened(MESENTERIC_VEIN, vein),), halo=1, part="pancreas"),
        Structure("arterial blood", (MESENTERIC_ARTERY,), halo=1, part="pancreas"),
        Structure("portal blood", (widened(PORTAL_VEIN, vein), course(SPLENIC_VEIN, vein)),
                  "portal vein and splenic vein", halo=0.5),
        Structure("arterial blood", (HEPATIC_ARTERY,), part="pancreas"),
    )


def fluid(amount: float, rng: np.random.Generator) -> tuple[Structure, ...]:
    """Make ascites: none up to 0, about the liver and in the hollows below 0.5, through the belly above."""
    pools = (*mirrored(ball(118, 0, -70, 16, 26, 110)), ball(0, 40, -225, 90, 60, 40 + 60 * amount),
             ball(85, 25, 40, 62 + 60 * amount, 92, 100 + 40 * amount), ball(-108, -5, 45, 42, 62, 70))
    if amount > 0.5:
        pools = (*pools, ball(0, 75, -60, 150, 55 + 20 * rng.random(), 190))
    return (Structure("ascites", pools * (amount > 0)),)


def fat_and_nodes(rng: np.random.Generator) -> tuple[Structure, ...]:
    """Make hazy mesentery and omentum, and lymph nodes."""
    haze = rng.uniform(0.05, 0.35) * (rng.random() < 0.25)
    big = rng.random() < 0.07
    spots = rng.normal((5, 40, -30), (25, 14, 50), (int(rng.integers(8, 25)) if big else rng.poisson(4), 3))
    size = (5, 14) if big else (2, 4.5)
    nodes = tuple(ball(*s, *(rng.uniform(0.7, 1.3, 3) * rng.uniform(*size))) for s in spots)
    omentum = rng.uniform((-90, 95, -170), (90, 125, -30), (int(rng.integers(4, 12)), 2, 3))
    threads = tuple(tube((*a, 1.2), (*(a * 0.6 + b * 0.4), 1.2), (*(a * 0.3 + b * 0.7), 1)) for a, b in omentum)
    return (
        Structure("fat", (ball(0, 60, -60, 120, 70, 140),) * (haze > 0), mottle=("stranding", haze)),
        Structure("portal blood", threads),
        Structure("lymph node", nodes),
    )


def metal(rng: np.random.Generator, kind: str = "") -> tuple[Structure, ...]:
    """Make clips or a bile duct stent; `kind` is "clips", "stent" or "none", drawn if empty."""
    kind = kind or str(rng.choice(("none", "clips", "stent"), p=(0.86, 0.11, 0.03)))
    if kind == "stent":
        duct = tube((50, 40, -20, 3), (44, 50, 8, 3), (42, 54, 32, 3))
        return (Structure("metal", (duct,), layers=((1.2, "water"),)),)
    middle = rng.choice(((46, 58, 22), (-60, 40, 40), (0, 40, -60)))
    clips = rng.normal(middle, (7, 7, 7), (int(rng.integers(2, 8)) * (kind == "clips"), 3))
    return (Structure("metal", tuple(tube((*c, 1.2), (*(c + rng.normal(0, 3, 3)), 1.2), steps=1) for c in clips)),)


def organs(rng: np.random.Generator, build: float) -> tuple[Structure, ...]:
    """List the structures of the belly in the order of painting: solid organs push aside the fat about the kidneys.

    Args:
        rng: source of all variation.
        build: from 0, thin, to 1, obese.
    """
    lean = float(np.clip(0.85 - 0.8 * build + rng.normal(0, 0.2), 0, 1))
    fat = 1 + 16 * (1 - lean) * rng.uniform(0.5, 1.2)  # about the kidneys, in mm
    kind = str(rng.choice(list(LIVERS), p=list(LIVERS.values())))
    wet = rng.uniform(0, 1) if rng.random() < (0.6 if kind == "cirrhotic" else 0.07) else 0
    (right_space, *right_kidney), (left_space, *left_kidney) = kidney(1, fat, rng), kidney(-1, fat, rng)
    return (
        *fat_and_nodes(rng),
        *fluid(wet, rng),
        *small_bowel(rng, lean, dilated=rng.random() < 0.06),
        *colon(rng),
        right_space,
        left_space,
        *spleen(rng),
        *stomach(rng),
        *liver(rng, kind),
        *gallbladder(rng),
        *right_kidney,
        *left_kidney,
        *pancreas(rng),
        *duodenum(rng),
        *adrenals(rng),
        *metal(rng),
    )


def great_vessels(rng: np.random.Generator, aneurysm: float = 0) -> tuple[Structure, ...]:
    """List the vena cava and the aorta with wall calcifications; `aneurysm` is its radius in mm, drawn if 0."""
    points = np.array(AORTA, float)
    points[2:6, :2] += rng.normal(0, rng.choice((1.5, 6)), (4, 2)) * (1, 0.4)
    points[:, 3] *= rng.lognormal(0, 0.1)
    tree = tube(*points)
    aneurysm = aneurysm or rng.uniform(15, 30) * (rng.random() < 0.06)
    x, y, z = points[5, :3] + rng.normal(0, (2, 1, 8))
    sac = ball(x, y + max(0, aneurysm - 12), z, aneurysm, aneurysm, 1.6 * aneurysm)
    lumen = ball(x, y + max(0, aneurysm - 14), z, *(rng.uniform(0.5, 0.9) * aneurysm * np.array([1, 1, 1.7])))
    plaques = []
    for _ in range(int(rng.integers(3, 30)) * (rng.random() < 0.45)):
        x, y, z, radius = tree.path[rng.integers(len(tree.path))]
        across = radius * np.array([np.cos(angle := rng.uniform(0, 2 * np.pi)), np.sin(angle)])
        plaques.append(ball(x + across[0], y + across[1], z + rng.normal(0, 5), rng.uniform(1.5, 3.5)))
    flat = rng.uniform(0.45, 1.1)
    cava = widened(CAVA, rng.lognormal(0, 0.08))._replace(flat=(flat**-0.6, flat**0.6, 1))
    return (
        Structure("caval blood", (cava,), "inferior vena cava", halo=1.5),
        Structure("thrombus", (sac,) * (aneurysm > 0), "aorta", halo=1.5),
        Structure("arterial blood", (tree, lumen) if aneurysm else (tree,), "aorta", halo=0 if aneurysm else 1.5),
        Structure("calcification", tuple(plaques), within="aorta"),
    )


def muscles(rng: np.random.Generator) -> tuple[Structure, ...]:
    """List the muscles along the spine: wasted to athletic, lean to fatty."""
    psoas, back = rng.normal(1, 0.16, 2).clip(0.6, 1.35)
    fatty = 0.5 * rng.beta(0.6, 5)
    front = mirrored(
        tube((26, 4, 20, 6 * psoas), (36, 2, -40, 15 * psoas), (46, 4, -110, 19 * psoas), (62, 16, -180, 20 * psoas)),
        # quadratus lumborum
        tube((56, -36, 10, 8), (62, -36, -60, 10 * back), (72, -32, -120, 10), flat=(1.6, 0.8, 1)),
        tube((10, 18, 78, 5), (14, 22, 40, 6), (12, 18, -20, 4), flat=(0.8, 1, 1)),  # crura of the diaphragm
    )
    behind = mirrored(
        tube((34, -46, 90, 17), (36, -46, 60, 20 * back), (34, -46, -60, 23 * back), (26, -48, -200, 18),
             flat=(1.35, 0.85, 1)),  # erector spinae
        tube((9, -44, 90, 10), (9, -42, 0, 12), (9, -44, -200, 12)),  # multifidus
    )
    return (Structure("muscle", front, mottle=("fat", fatty / 3)), Structure("muscle", behind, mottle=("fat", fatty)))
# fmt: on
