"""Model the chest."""

from __future__ import annotations

from shared_networks.synthetic.shapes import Structure, ball, tube

# fmt: off
ESOPHAGUS = tube((-4, 24, 240, 8), (-6, 30, 160, 8.5), (-14, 44, 112, 9), (-28, 44, 96, 9.5), (-44, 32, 86, 10))
HEART = ball(-16, 74, 150, 68, 50, 42)
MEDIASTINUM = (ball(-10, 72, 152, 74, 58, 48), tube((-8, 20, 80, 30), (-8, 16, 240, 34)))
STERNUM = tube((0, 124, 85, 7), (0, 128, 240, 7), flat=(2.2, 0.8, 1))


def contents() -> tuple[Structure, ...]:
    """List what lies between the lungs, in the order of painting."""
    return (
        Structure("fat", MEDIASTINUM),
        Structure("muscle", (HEART,), layers=((8, "heart"),)),
        Structure("oesophageal wall", (ESOPHAGUS,), "esophagus", layers=((7, "gas"),)),
    )


def bones() -> tuple[Structure, ...]:
    """List the bones of the chest, but for ribs and spine."""
    return (Structure("cortical bone", (STERNUM,), layers=((2.5, "trabecular bone"),)),)
# fmt: on
