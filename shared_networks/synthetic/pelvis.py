"""Model the pelvis and what lies in it."""

from __future__ import annotations

from shared_networks.synthetic.shapes import Structure, ball, mirrored, tube

# fmt: off
ILIAC_ARTERIES = mirrored(tube((-4, 31, -84, 6.5), (-24, 28, -116, 6), (-46, 26, -150, 5.5), (-60, 40, -190, 5)))
ILIAC_VEINS = (tube((18, 26, -92, 8), (36, 18, -122, 7.5), (52, 16, -155, 7)),
               tube((18, 26, -92, 8), (-14, 18, -120, 7.5), (-42, 14, -155, 7)))
SACRUM = ball(0, -14, -182, 46, 20, 34, turn=(-25, 0, 0))
ILIA = mirrored(ball(92, -6, -172, 9, 58, 58, turn=(0, 18, -38)))




def vessels() -> tuple[Structure, ...]:
    """List the vessels of the pelvis."""
    return Structure("arterial blood", ILIAC_ARTERIES), Structure("caval blood", ILIAC_VEINS)


def bones() -> tuple[Structure, ...]:
    """List the bones of the pelvis."""
    return (Structure("cortical bone", (SACRUM, *ILIA), layers=((2.5, "trabecular bone"),)),)
# fmt: on
