"""Put a body together."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from shared_networks.synthetic import abdomen, pelvis, spine, thorax
from shared_networks.synthetic.shapes import Shape, Structure
from shared_networks.synthetic.trunk import Habitus

Knots = tuple[tuple[float, ...], tuple[float, ...]]

BELLY: Knots = (
    (-200, -80, 140, 290),
    (0, 1, 1, 0),
)  # heights in mm, and which share of the diaphragm's way organs move there
VESSELS: Knots = (-60, 40, 140, 290), (0, 1, 1, 0)


def breathe(structures: Iterable[Structure], breath: float, along: Knots) -> tuple[Structure, ...]:
    """Move structures up by `breath` mm, as the diaphragm moves, less with distance from it."""

    def lift(shape: Shape) -> Shape:
        path = shape.path.copy()
        path[:, 2] += breath * np.interp(path[:, 2], *along)
        return shape._replace(path=path)

    return tuple(s._replace(shapes=tuple(map(lift, s.shapes)), carve=tuple(map(lift, s.carve))) for s in structures)


def anatomy(rng: np.random.Generator, habitus: Habitus) -> tuple[Structure, ...]:
    """List all structures in the order of painting: first those of the belly, then all around it or through it."""
    breath = habitus.breath
    vessels = (*thorax.contents(habitus.effusion, rng), *abdomen.great_vessels(rng), thorax.aorta())
    belly = breathe((*abdomen.organs(rng, habitus.belly / 30), *pelvis.viscera(rng, habitus.female)), breath, BELLY)
    around = (
        *abdomen.muscles(rng),
        *pelvis.muscles(rng),
        *breathe(vessels, breath, VESSELS),
        *pelvis.vessels(rng),
        *pelvis.surface(rng, habitus.female),
        *spine.bones(),
        *thorax.bones(),
        *pelvis.bones(rng),
        *thorax.devices(habitus.fat, rng),
    )
    return (*belly, *(structure._replace(inside=False) for structure in around))
