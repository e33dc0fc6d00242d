"""Compare affines, the grids that voxels lie on, and tell those that no scan has."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from nibabel.affines import voxel_sizes

SHEAR_TOLERANCE = 0.1
"""Voxels, from one end of a scan to the other, by which its axes may miss right angles: rounding of affines."""

_SHORTEST, _LONGEST = 1.0, 3000.0
"""mm of the longest side of a scan: beyond these its unit is wrong, as of micrometres or metres for mm."""

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


def size_problem(affine: np.ndarray, shape: Sequence[int]) -> str:
    """Return what is wrong with a scan that would be as small as a grain or longer than a room; nothing otherwise.

    Args:
        affine: `[4, 4]`, from voxels to mm.
        shape: (X, Y, Z).
    """
    spacing = voxel_sizes(affine)
    longest = float((spacing * np.asarray(shape[:3])).max())
    if _SHORTEST <= longest <= _LONGEST:
        return ""
    voxel = " x ".join(f"{size:.4g}" for size in spacing)
    return f"voxels of {voxel} mm make a scan {longest:.5g} mm long; put the voxel size, or its unit, right"


def same_affine(affine: np.ndarray, other: np.ndarray) -> bool:
    """Return whether two affines agree to a thousandth of a voxel."""
    return bool(np.abs(affine - other).max() <= _AFFINE_TOLERANCE * voxel_sizes(affine).min())


def affine_rows(affine: np.ndarray) -> str:
    """Return the three rows of an affine as text."""
    return str((np.round(affine[:3], 4) + 0.0).tolist())  # + 0.0 turns -0.0 into 0.0
