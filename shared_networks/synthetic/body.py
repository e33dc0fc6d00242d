"""Put a body together."""

from __future__ import annotations

import numpy as np

from shared_networks.synthetic import abdomen, pelvis, spine, thorax
from shared_networks.synthetic.shapes import Structure


def anatomy(rng: np.random.Generator) -> tuple[Structure, ...]:
    """List all structures in the order of painting: first those of the belly, then all around it or through it."""
    around = (
        *thorax.contents(),
        *abdomen.great_vessels(rng),
        *pelvis.vessels(),
        *abdomen.muscles(rng),
        *spine.bones(),
        *thorax.bones(),
        *pelvis.bones(),
    )
    return (*abdomen.organs(rng), *(structure._replace(inside=False) for structure in around))
