"""Compare affines: the grids that voxels lie on."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from nibabel.affines import voxel_sizes

SHEAR_TOLERANCE = 0.1
"""Voxels, from one end of a scan to the other, by which its axes may miss right angles: rounding of affines."""

_AFFINE_TOLERANCE = 1e-3  # of the smallest voxel size


def shear(affine: np.ndarray, shape: Sequence[int]) -> float:
    """Return by how many voxels the axes of a scan miss right angles, from one end to the other.

    Args:
        affine: `[4, 4]`, from voxels to mm.
        shape: (X, Y, Z).
    """
    spacing = voxel_sizes(affine)
    directions = affine[:3, :3] / spacing
    cosines = directions.T @ directions - np.eye(3)
    return float((np.abs(cosines) * spacing * np.asarray(shape[:3]) / spacing[:, None]).max())


def same_affine(affine: np.ndarray, other: np.ndarray) -> bool:
    """Return whether two affines agree to a thousandth of a voxel."""
    return bool(np.abs(affine - other).max() <= _AFFINE_TOLERANCE * voxel_sizes(affine).min())


def affine_rows(affine: np.ndarray) -> str:
    """Return the three rows of an affine as text."""
    return str((np.round(affine[:3], 4) + 0.0).tolist())  # + 0.0 turns -0.0 into 0.0
