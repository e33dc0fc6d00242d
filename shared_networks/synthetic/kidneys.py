"""Model the kidneys with their fat, vessels, ureters and adrenal glands."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from scipy.spatial.transform import Rotation

from shared_networks.synthetic.shapes import Shape, Structure, Triple, axes, ball, tube

KINDS = {  # chance, and what else than the usual a kidney is
    "usual": 0.79,
    "low": 0.07,
    "atrophic": 0.04,
    "hydronephrotic": 0.04,
    "polycystic": 0.03,
    "pelvic": 0.01,
    "tumorous": 0.02,
}


def placed(shapes: Iterable[Shape], centre: Triple, turn: Triple, scale: float) -> tuple[Shape, ...]:
    """Turn shapes about the origin by angles about x, y and z in degrees, scale them and move them to `centre`."""
    rotation, result = Rotation.from_euler("xyz", turn, degrees=True), []
    for shape in shapes:
        path = shape.path.copy()
        path[:, :3] = rotation.apply(path[:, :3]) * scale + centre
        flat: Triple = shape.flat
        if len(path) > 1:
            path[:, 3] *= scale
        else:
            flat = (flat[0] * scale, flat[1] * scale, flat[2] * scale)
        angles = Rotation.from_matrix(rotation.as_matrix() @ axes(shape)).as_euler("xyz", degrees=True)
        result.append(Shape(path.astype(np.float32), flat, (angles[0], angles[1], angles[2])))
    return tuple(result)


# fmt: off
def kidney(side: int, fat: float, rng: np.random.Generator, kind: str = "") -> tuple[Structure, ...]:
    """Make the space of fat about a kidney and the kidney with pyramids, sinus, pelvis, ureter, vessels and cysts.

    Args:
        side: 1 for the right kidney, -1 for the left.
        fat: thickness of the fat about it in mm.
        rng: source of all variation.
        kind: a key of `KINDS`; drawn if empty.
    """
    organ = "right kidney" if side > 0 else "left kidney"
    kind = kind or str(rng.choice(list(KINDS), p=list(KINDS.values())))
    scale = rng.normal(1, 0.03) * (rng.uniform(0.5, 0.7) if kind == "atrophic" else 1)
    x, y, z = np.array([65.5 * side, 4 + fat / 4, -22 if side > 0 else 2]) + rng.normal(0, (4, 3, 6))
    if kind in ("low", "pelvic"):
        x, y, z = (x * 0.9, 26, -75) if kind == "low" else (38.0 * side, 38, -150)
    centre, turn = (x, y, z), tuple(rng.normal((-12, -12 * side, 0), (6, 5, 30 if kind in ("low", "pelvic") else 14)))
    wide, deep, tall = rng.normal((29.5, 28, 57), (1.5, 1.5, 4))
    sinus, urine = rng.uniform(0.75, 1.25), rng.uniform(2.2, 3.6) if kind == "hydronephrotic" else rng.uniform(0.5, 1.2)
    bulge, folds = 7 if kind != "hydronephrotic" else 8, enumerate(np.radians(np.linspace(-125, 125, 8)))
    pyramids = [ball(side * (9 * np.cos(a) - 1), 1 + 7 * (-1) ** i, 28 * np.sin(a), bulge) for i, a in folds]
    pelvis = tube((-4 * side, 2, 16, 3 * urine), (-15 * side, 5, -2, 5 * urine), (-22 * side, 8, -22, 2.4 * urine))
    many = int(rng.integers(12, 30)) if kind == "polycystic" else rng.poisson(0.5)
    where = rng.normal(0, 1, (many, 3))
    where *= (wide, deep, tall) / np.linalg.norm(where, axis=1, keepdims=True)
    cysts = [ball(*c, min(36, 4 + rng.exponential(7))) for c in where]
    tumour = [ball(side * wide, rng.normal(0, 8), rng.uniform(-40, 40), rng.uniform(8, 35))] * (kind == "tumorous")

    def at(*shapes: Shape) -> tuple[Shape, ...]:
        return placed(shapes, centre, turn, scale)

    space = at(ball(-2 * side, -fat / 4, -fat / 3, wide + fat, deep + fat, tall + 1.8 * fat))
    hilum = np.asarray(at(ball(-20 * side, 4, 0, 1))[0].path[0, :3])
    leaves = at(pelvis)[0].path[-1, :3]
    down = np.array([(38, 20, -60), (38, 26, -105), (42, 24, -150), (48, -6, -200), (18, 14, -238)]) * (side, 1, 1)
    down = down[down[:, 2] < leaves[2] - 15] + rng.normal(0, 2, 3)
    ureter = tube((*leaves, 2), *((*p, rng.uniform(1.5, 2.4) * max(1, urine / 1.3)) for p in down), steps=5)
    trunk = hilum[2] / 2 - 6 if kind != "pelvic" else -80.0
    half_way = (hilum + np.array([6 * side, 22, trunk])) / 2
    artery = tube((6 * side - 6, 30, trunk, 3.2), (*half_way, 2.8), (*hilum, 2.3))
    vein = tube((20, 30, trunk + 3, 5), *(((-8, 46, trunk + 4, 4.5),) if side < 0 else ()),
                (*(hilum + np.array([-8 * side, 5, 2])), 4.5), (*hilum, 3.5))
    fascia = ((rng.uniform(0.8, 1.6), "fat"),) if rng.random() < 0.4 and fat > 5 else ()
    haze = rng.uniform(0.02, 0.2) * (rng.random() < 0.25)
    return (
        Structure("stranding" if fascia else "fat", space, layers=fascia, mottle=("stranding", haze), part=organ),
        Structure("urine", (ureter,), part=organ),
        Structure("renal cortex", at(ball(0, 0, 0, wide, deep, tall)), organ, halo=min(4, fat)),
        Structure("urine" if kind == "hydronephrotic" else "renal medulla", at(*pyramids), within=organ),
        Structure("fat", at(ball(-14 * side, 4, -1, 13 * sinus, 10 * sinus, 24 * sinus)), "background", within=organ),
        Structure("arterial blood", (artery,), part=organ),
        Structure("caval blood", (vein,), part=organ),
        Structure("urine", at(pelvis), part=organ),
        Structure("cyst", at(*cysts), organ),
        Structure("hypervascular mass", at(*tumour), organ, layers=((9, "metastasis"),)),
    )


LIMB = (1, 1, 4.5)  # the adrenals are sheets: thin from side to side, tall from head to foot
RIGHT_LIMBS = (((37, 30, 47, 2.9), (40, 16, 45, 2.9), (46, 2, 42, 2.4)), ((40, 16, 45, 2.7), (38, 2, 42, 2.4)))
LEFT_LIMBS = (((-32, 36, 44, 2.9), (-36, 22, 42, 2.9), (-46, 8, 40, 2.4)), ((-36, 22, 42, 2.6), (-33, 6, 39, 2.3)))


def adrenals(rng: np.random.Generator, nodule: float = 0.1) -> tuple[Structure, ...]:
    """Make the adrenal glands, each with a nodule by the chance `nodule`."""
    result = []
    for organ, limbs in (("right adrenal gland", RIGHT_LIMBS), ("left adrenal gland", LEFT_LIMBS)):
        thick, tall, splay = rng.lognormal(0, 0.15), rng.lognormal(0, 0.12), rng.normal(0, 3, 2)
        shapes = []
        for sign, limb in zip((-1, 1), limbs, strict=True):
            points = np.array(limb) * (1, 1, 1, thick) + rng.normal(0, 1, (1, 4)) * (1, 1, 1, 0)
            points[1:, 0] += sign * splay[0] * np.arange(1, len(points)) / 2
            shapes.append(tube(*points, flat=(LIMB[0], LIMB[1], LIMB[2] * tall / thick)))
        result.append(Structure("adrenal", tuple(shapes), organ, halo=rng.uniform(1, 3)))
        if rng.random() < nodule:
            spot = rng.normal((39 if organ.startswith("right") else -37, 18, 42), (2, 5, 5))
            result.append(Structure("adrenal nodule", (ball(*spot, rng.uniform(5, 16)),), organ))
    return tuple(result)
# fmt: on
