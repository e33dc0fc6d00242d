"""Give tissues Hounsfield units, texture and noise, as a scanner shows them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from shared_networks.synthetic.shapes import Array
from shared_networks.synthetic.tissues import TISSUE_ID, TISSUES


def smooth_field(rng: np.random.Generator, shape: tuple[int, ...], spacing: Array, scale: float) -> Array:
    """Draw a random field of zero mean and unit variance that varies over `scale` mm: float32 of `shape`."""
    bases = []
    for size, step in zip(shape, spacing, strict=True):
        knots = np.arange(-scale, size * step + scale, scale)
        basis = np.exp(-((np.arange(size)[:, None] * step - knots) ** 2) / (1.28 * scale**2))
        bases.append((basis / np.linalg.norm(basis, axis=1, keepdims=True)).astype(np.float32))
    field = rng.standard_normal([basis.shape[1] for basis in bases], np.float32)
    for basis in bases:
        field = np.tensordot(field, basis, (0, 1))
    return field


def grain(rng: np.random.Generator, shape: tuple[int, ...], sigma: Array) -> Array:
    """Draw white noise smoothed by a Gaussian of `sigma` voxels an axis, at unit variance: float32 of `shape`."""
    field = gaussian_filter(rng.standard_normal(shape, np.float32), sigma, truncate=3)
    return field / field.std()


def scan(rng: np.random.Generator, tissue: NDArray[np.uint8], spacing: Array) -> NDArray[np.int16]:
    """Scan a tissue map: a contrast phase between any two of the table, texture, blur and noise; int16 HU."""
    table = np.array(list(TISSUES.values()), np.float32)
    phase = np.maximum(0, 1 - np.abs(np.arange(4) - rng.uniform(0, 3)))
    enhancement = table[:, :4] @ phase - table[:, 0]
    mean = table[:, 0] + enhancement * rng.uniform(0.8, 1.2) + rng.normal(0, 4, len(table)) * (table[:, 4] > 0)
    mean[TISSUE_ID["liver"]] -= 35 * rng.beta(1, 4)  # steatosis
    mean[TISSUE_ID["lung"]] += rng.normal(0, 28)  # from emphysema to shallow breath
    image = mean.astype(np.float32)[tissue] + table[:, 4][tissue] * grain(rng, tissue.shape, 2.2 / spacing)
    image = gaussian_filter(image, np.hypot(0.4, rng.uniform(0.4, 0.9) / spacing), truncate=3)
    image += rng.uniform(5, 22) * grain(rng, tissue.shape, np.array([1, 1, 0.4]) * rng.uniform(0.3, 0.8))
    return np.clip(np.rint(image), -1024, 3071).astype(np.int16)
