"""Model the shell of the chest: outline of the rib cage, shoulder girdle, neck base, arms and breasts."""

from __future__ import annotations

import numpy as np

from shared_networks.synthetic.shapes import Array, Shape, Structure, ball, mirrored, tube
from shared_networks.synthetic.spine import spine

# fmt: off
# Outer surface of the ribs at height z: y of the centre, half the width, y of the front and of the back, in mm.
CAGE = np.array((
    (90, 38, 147, 136, -60), (120, 37, 145, 135, -62), (150, 34, 141, 131, -65), (200, 26, 132, 116, -68),
    (240, 16, 116, 94, -66), (270, 8, 97, 76, -62), (290, 4, 79, 62, -56), (310, 0, 57, 48, -48), (330, 0, 38, 40, -40),
    (400, 0, 30, 36, -40),
), np.float32).T
ROUND = 2.3  # exponent of the superellipse
# fmt: on


def cage(z: float | Array) -> Array:
    """Return centre, half width, front and back of the rib cage at heights z, `[4, ...]` in mm."""
    return np.stack([np.interp(z, CAGE[0], row) for row in CAGE[1:]]).astype(np.float32)


def on_cage(turn: float, z: float, out: float) -> tuple[float, float, float]:
    """Return the point `out` mm outside the right ribs, `turn` degrees from the spine round to the sternum."""
    centre, width, front, back = cage(z)
    x, y = np.sin(np.radians(turn)), -np.cos(np.radians(turn))
    depth = front - centre if y > 0 else centre - back
    radius = (abs(x / width) ** ROUND + abs(y / depth) ** ROUND + 1e-9) ** (-1 / ROUND) + out
    return float(x * radius), float(centre + y * radius), z


Point = tuple[float, float, float, float]


def strip(*points: Point, ends: tuple[Point, ...] = (), steps: int = 2) -> Shape:
    """Make a tube along the ribs through (turn, z, out, radius), then straight through `ends` (x, y, z, radius)."""
    line = [(*on_cage(turn, z, out), radius) for turn, z, out, radius in points]
    return tube(*line, *ends, steps=steps)


Strand = tuple[Point, ...]


def fan(count: int, first: Strand, last: Strand, *ends: Point) -> tuple[Shape, ...]:
    """Make `count` strips side by side from one strip to another, points as for `strip`."""
    strands = np.array(first) + np.linspace(0, 1, count)[:, None, None] * (np.array(last) - first)
    return tuple(strip(*strand, ends=ends) for strand in strands)


class Girdle:
    """The right shoulder; the left one mirrors it.

    Args:
        arms_down: whether the arm lies beside the body, else it is raised above the head.
        fat: thickness of the subcutaneous fat in mm.
        rng: source of variation.
    """

    def __init__(self, arms_down: bool, fat: float, rng: np.random.Generator) -> None:
        self.arms_down, self.fat = arms_down, fat
        joint = np.array([168, -8, 276] if arms_down else [150, -4, 300]) + rng.normal(0, (4, 5, 6))
        self.x, self.y, self.z = (float(v) for v in joint)
        self.bulk = rng.uniform(0.75, 1.15)  # thickness of the muscles
        self.limb: list[tuple[float, float, float]]
        if arms_down:
            out, bend = self.x + 22 + 1.4 * fat, rng.uniform(0, 40)
            self.limb = [
                (self.x + 6, self.y, 270), (out, -20, 110), (out + 12, -28, -40), (out + 2, -10 + bend, -150),
                (out - 8, 2 + 2 * bend, -265), (out - 10, 6 + 2.3 * bend, -345),
            ]  # fmt: skip
            self.girth = [38, 37, 34, 33, 22, 24]
        else:
            self.limb = [(self.x + 4, self.y, self.z), (self.x + 26, self.y + 14, self.z + 70),
                         (self.x + 40, self.y + 30, self.z + 170)]  # fmt: skip
            self.girth = [38, 36, 33]

    def at(self, x: float, y: float, z: float, radius: float) -> Point:
        """Return a point given from the shoulder joint, with a radius."""
        return self.x + x, self.y + y, self.z + z, radius

    # fmt: off
    def muscles(self) -> tuple[tuple[Shape, ...], ...]:
        """List the muscles of the shoulder, back of the chest and neck: what melts into one sheet stands together."""
        b, low = self.bulk, 48 if self.arms_down else 62
        groove, pit, back = self.at(-4, 22, -36, 9), self.at(-10, 4, -42, 9), self.at(-4, -26, -2, 9)
        top = self.at(-6, -26, 30, 7)
        ridge = [(z, spine(z)) for z in (130, 190, 250, 290, 340, 400)]
        middle = [(6, y - 57 - 0.02 * (z - 130), z) for z, y in ridge]
        return (
            fan(5, ((166, 155, 0, 4 * b), (140, 195, 5, 6 * b), (112, 226, 22, 9 * b)),
                ((163, 256, 2, 5 * b), (140, 262, 9, 7 * b), (112, 264, 30, 9 * b)), groove),  # pectoralis major
            fan(2, ((138, 185, 0, 3), (124, 230, 5, 6)), ((140, 225, 0, 3), (126, 245, 6, 6)), self.at(-26, 28, -2, 6)),
            fan(5, ((18, 76, 2, 4), (50, 128, 3, 4 * b), (78, 185, 15, 9 * b)),
                ((70, 56, 1, 3), (80, 125, 3, 4 * b), (88, 180, 13, 9 * b)), pit),  # latissimus
            fan(5, ((116, 92, 0, 3), (96, 150, 2, 4), (66, 200, 3, 4)), ((112, 205, 0, 3), (88, 240, 3, 5),
                (45, 275, 3, 4))),
            fan(4, ((low - 4, 182, 5, 5), (64, 215, 8, 9 * b)), ((28, 268, 5, 5), (54, 268, 7, 9 * b)),
                self.at(-18, 4, -10, 9)),  # subscapularis
            fan(4, ((low, 168, 20, 6), (68, 206, 27, 9 * b)), ((28, 252, 19, 5),
                (52, 256, 24, 8 * b)), back),  # infraspinatus
            (strip((low, 172, 21, 6), (74, 200, 24, 10 * b), ends=(pit,)),),  # teres major
            (strip((26, 280, 20, 6), ends=(self.at(-34, -20, 14, 12),)),
                tube(self.at(-34, -20, 14, 12), self.at(0, -4, 26, 7))),
            (tube((*middle[0], 2), (*on_cage(19, 190, 14), 4), (*on_cage(25, 246, 27), 5), top, steps=2),  # trapezius
             tube((*middle[1], 3), (*on_cage(20, 235, 19), 5), (*on_cage(28, 264, 32), 6), top, steps=2),
             tube((*middle[2], 4), (*on_cage(22, 268, 30), 6), top, steps=2),
             tube((*middle[3], 5), (52, -72, 298, 9), top, steps=2),
             tube((*middle[4], 7), (56, -56, 322, 13), top, steps=2), tube((*middle[5], 8),
                 (46, -50, 350, 12), top, steps=2)),
            fan(3, ((14, 240, 8, 3), (30, 210, 8, 4)), ((10, 285, 10, 3), (24, 258, 10, 5))),  # rhomboid
            (tube((34, -46, 88, 17), *((26, y - 43, z, 14) for z, y in ridge), steps=2),),  # erector
            (tube((9, -46, 88, 9), *((9, y - 43, z, 9) for z, y in ridge), steps=2),),
            (tube((15, 74, 272, 6), (32, 52, 312, 8), (50, 14, 380, 9), steps=2),),  # sternomastoid
            (tube((60, 6, 298, 9), (36, 4, 340, 11), (28, 2, 400, 11), steps=2),),  # scalene
            (tube((*on_cage(24, 288, 16), 7), (40, -34, 340, 11), (34, -26, 400, 11), steps=2),),  # levator
            (ball(*self.at(8, -2, -6 if self.arms_down else 8, 0)[:3], 38 * b, 43 * b, 52),),  # deltoid
        )

    def scapula(self) -> tuple[Structure, ...]:
        """List the shoulder blade."""
        low = 48 if self.arms_down else 62
        socket = self.at(-27, -10, -4, 3)
        near, far = (24, 287, 14, 2.2), (low - 1, 166, 15, 2.2)
        blade = fan(9, (near, (0.35 * near[0] + 42, 284, 17, 2.6)), (far, (0.35 * far[0] + 42, 220, 17, 2.6)), socket)
        thick = (
            strip((low, 164, 16, 4), (72, 222, 20, 5), ends=(self.at(-26, -8, -14, 8),)),
            tube((*on_cage(26, 262, 20), 4), self.at(-40, -36, 8, 6), self.at(6, -18, 30, 6), steps=3),
            tube(self.at(-28, -6, 4, 9), self.at(-30, 16, 8, 6), self.at(-20, 30, -4, 5), steps=2),
            tube(self.at(-28, -9, -12, 8), self.at(-27, -8, 8, 8)),
        )
        return (Structure("cortical bone", mirrored(*(s._replace(flat=(1, 1, 3.5)) for s in blade))),
                Structure("cortical bone", mirrored(*thick), layers=((2.4, "trabecular bone"),)))

    def bones(self) -> tuple[Structure, ...]:
        """List clavicle, shoulder blade and the bones of the arm."""
        clavicle = tube((17, 71, 272, 9),
            (55, 70, 284, 6.5), self.at(-46, 24, 18, 6), self.at(-8, -4, 30, 6.5), steps=3)
        shaft = tube(*((*p, r) for p, r in zip(self.limb[:3], (14, 11, 12), strict=True)), steps=2)
        head = ball(*self.at(0, 0, 0, 0)[:3], 24, 24, 24)
        below: tuple[Structure, ...] = ()
        if self.arms_down:
            lines = [[(x + s * 9, y, z) for x, y, z in self.limb[2:5]] for s in (-1, 1)]
            pair = [tube(*((*p, r) for p, r in zip(line, (10, 7, 8), strict=True)), steps=2) for line in lines]
            x, y, z = self.limb[5]
            rays = [tube((x, y - 20 + 13 * k, z + 65, 5), (x - 2, y - 26 + 17 * k, z - 30, 4)) for k in range(4)]
            below = (Structure("cortical bone", mirrored(*pair, *rays), layers=((3, "trabecular bone"),)),)
        return (
            Structure("cortical bone", mirrored(clavicle), layers=((2.2, "trabecular bone"),)),
            *self.scapula(),
            Structure("cortical bone", mirrored(head), layers=((2, "trabecular bone"),)),
            Structure("cortical bone", mirrored(shaft), layers=((4.5, "fat"),)),
            *below,
        )

    def vessels(self) -> tuple[Structure, ...]:
        """List the vessels of the armpit."""
        line = (64, 14, 308, 4), self.at(-50, 30, -14, 4), self.at(-18, 12, -32, 4)
        artery = tube(*line, steps=2)
        vein = tube(*((x, y + 10, z - 8, 5) for x, y, z, _ in line), steps=2)
        return Structure("arterial blood", mirrored(artery)), Structure("caval blood", mirrored(vein))
    # fmt: on

    def flesh(self) -> tuple[Shape, ...]:
        """List what makes the surface of muscle bulge over the rib cage, with the neck."""
        neck = tube((0, 12, 296, 48), (0, 8, 335, 58), (0, 6, 400, 60), steps=2)
        return (*mirrored(*(shape for sheet in self.muscles() for shape in sheet)), neck)

    def arm(self, more: float) -> tuple[Shape, ...]:
        """List both arms, `more` mm thicker than their muscles."""
        line = [(*p, r * self.bulk + more) for p, r in zip(self.limb, self.girth, strict=True)]
        hand = [tube(*line[4:], steps=2)._replace(flat=(0.55, 1.5, 1))] if self.arms_down else []
        return mirrored(tube(*line[:5], steps=2), *hand)


def breasts(fat: float, rng: np.random.Generator) -> tuple[tuple[Shape, ...], Structure]:
    """Make breasts upon the skin, and the glandular tissue in them."""
    turn, z, size = rng.uniform(122, 140), rng.uniform(155, 185), 26 + 0.9 * fat + rng.uniform(0, 10)
    x, y, _ = on_cage(turn, z, 0.4 * fat + 6)
    gland = rng.beta(1.2, 1.8) * size
    lobes = [ball(x + dx, y + size * 0.5 + dy, z + dz, *rng.uniform(1, 0.4 * gland + 2, 3))
             for dx, dy, dz in rng.normal(0, (0.5 * gland, 0.22 * gland, 0.5 * gland), (14, 3))]  # fmt: skip
    ducts = tube((x, y + 0.4 * size, z, 4), (x + 3, y + size + 2, z - 6, 3))
    shape = ball(x, y - 6, z - 4, 42 + 0.6 * size, 6 + size, 44 + 0.6 * size, turn=(0, 0, -0.4 * (180 - turn)))
    return mirrored(shape), Structure("gland", mirrored(*lobes, ducts))
