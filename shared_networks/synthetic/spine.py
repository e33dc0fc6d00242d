"""Model the spine."""

from __future__ import annotations

import numpy as np

from shared_networks.synthetic.shapes import Shape, Structure, mirrored, tube


def spine(z: float) -> float:
    """Return y in mm of the vertebral bodies' centre at height z (lumbar lordosis, thoracic kyphosis)."""
    if z > 90:
        return -12 - 0.213 * (z - 90) + 0.0008 * (z - 90) ** 2
    return 4 - 16 * ((z + 60) / 150) ** 2


# fmt: off
def thoracic(z: float) -> tuple[Shape, ...]:
    """Make a vertebra of the chest or lower neck at height z: smaller than those of the loin, its spine slanted."""
    y, small = spine(z), 1 - 0.3 * np.clip((z - 60) / 240, 0, 1)
    deep, lateral = (62, 34 - 12 * (z > 310)) if z > 320 or z < 250 else (58, 38)
    return (
        tube((0, y, z - 6, 1), (0, y, z + 6, 1), flat=(22 * small, 17 * small, 5.5)),
        tube((0, y - 30, z, 1), (0, y - deep + 6, z - 18, 1), flat=(3.2, 4, 8)),
        *mirrored(tube((11, y - 8, z + 4, 4.5), (12, y - 24, z, 5.5), (2, y - 33, z - 3, 4.5)),
                  tube((13, y - 20, z + 3, 5), (lateral, y - 30, z + 6, 4))),
    )


def vertebra(z: float) -> tuple[Shape, ...]:
    """Make body, spinous process, arch and transverse processes of a vertebra at height z."""
    y = spine(z)
    return (
        tube((0, y, z - 8, 1), (0, y, z + 8, 1), flat=(22, 16.5, 6)),
        tube((0, y - 34, z, 1), (0, max(y - 58, -57), z - 10, 1), flat=(3.5, 5, 9)),
        *mirrored(tube((13, y - 8, z + 4, 5), (14, y - 26, z, 6), (2, y - 36, z - 3, 5)),
                  tube((16, y - 22, z + 2, 5), (42, y - 26, z + 4, 3.5))),
    )


THORACIC = tuple(31 + float(z) for z in np.cumsum([0, *np.linspace(29, 22, 11), *[18] * 3]))  # T12 up to T1, C7 to C5
SPINE = (*range(-170, 110, 30), *THORACIC[3:])
DISCS = tube(*((0, spine(z), z, 1) for z in SPINE), flat=(17, 13, 9))
CANAL = tube(*((0, spine(z) - 24, z, 8) for z in SPINE))
BESIDE = mirrored(tube(*((15, spine(z) - 32, z, 15) for z in range(70, 371, 50)), flat=(1.25, 1, 1)))
VERTEBRAE = tuple(bone for z in range(-128, 20, 32) for bone in vertebra(z)) + tuple(
    bone for z in THORACIC for bone in thoracic(z)
)


def bones() -> tuple[Structure, ...]:
    """List discs, vertebrae and the spinal canal, in the order of painting."""
    return (
        Structure("muscle", BESIDE),
        Structure("disc", (DISCS,)),
        Structure("cortical bone", VERTEBRAE, layers=((2.2, "trabecular bone"),)),
        Structure("spinal canal", (CANAL,)),
    )
# fmt: on
