"""Put a body together."""

from __future__ import annotations

import numpy as np

from shared_networks.synthetic import abdomen, pelvis, spine, thorax
from shared_networks.synthetic.shapes import Structure


def anatomy(rng: np.random.Generator, female: bool = False) -> tuple[Structure, ...]:
    """List all structures in the order of painting: first those of the belly, then all around it or through it."""
    belly = (*abdomen.organs(rng), *pelvis.viscera(rng, female))
    around = (
        *thorax.contents(),
        *abdomen.muscles(),
        *pelvis.muscles(rng),
        *abdomen.great_vessels(),
        *pelvis.vessels(rng),
        *pelvis.surface(rng, female),
        *spine.bones(),
        *thorax.bones(),
        *pelvis.bones(rng),
    )
    return (*belly, *(structure._replace(inside=False) for structure in around))
