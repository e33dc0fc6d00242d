"""Model the spine."""

from __future__ import annotations

from shared_networks.synthetic.shapes import Shape, Structure, mirrored, tube


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


SPINE = range(-170, 260, 30)
DISCS = tube(*((0, spine(z), z, 1) for z in SPINE), flat=(21, 15.5, 9))
CANAL = tube(*((0, spine(z) - 24, z, 8) for z in SPINE))
VERTEBRAE = tuple(bone for z in range(-128, 240, 32) for bone in vertebra(z))


def bones() -> tuple[Structure, ...]:
    """List discs, vertebrae and the spinal canal, in the order of painting."""
    return (
        Structure("disc", (DISCS,)),
        Structure("cortical bone", VERTEBRAE, layers=((2.2, "trabecular bone"),)),
        Structure("spinal canal", (CANAL,)),
    )
# fmt: on
