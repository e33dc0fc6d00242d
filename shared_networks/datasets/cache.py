"""Tell how many cases of a data set can be cached in memory."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

import numpy as np
from monai.utils import ensure_tuple

from shared_networks.datasets.memory import free_memory
from shared_networks.datasets.nifti import read_nifti

_SHARE = 0.5  # of the free memory: the rest is for the network, loading processes and whole scans in validation
_FLOAT = 4  # bytes of a voxel, of images and labels alike, as `LoadImaged` makes them


logger = logging.getLogger(__name__)


def cache_rate(
    cases: Sequence[Mapping[str, Any]],
    spacing: Sequence[float] | None,
    free: int | None = None,
    voxel_bytes: int = _FLOAT,
) -> float:
    """Return the share of cases to keep in memory, so that they take at most half of what is free, and logs why.

    So many fit whichever they are, as the largest are counted first. Where torchrun starts several processes on a
    machine (`LOCAL_WORLD_SIZE`), each keeps cases of its own in its part.

    Args:
        cases: dicts with `image` (a file or a list of files, one a channel) and optionally `label`.
        spacing: voxel size in mm that they are resampled to; `None` keeps their own.
        free: bytes; by default :func:`free_memory`.
        voxel_bytes: of a voxel.
    """
    free = free_memory() if free is None else free
    if free is None:
        logger.info("cache_rate 0: this system does not say how much memory is free; give --cache_rate 1.0 if all fit")
        return 0.0
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    sizes = sorted((cached_bytes(case, spacing, voxel_bytes) for case in cases), reverse=True)
    count = sum(total <= _SHARE * free / processes for total in accumulate(sizes))
    rate = count / len(sizes) if sizes else 0.0
    logger.info(
        "cache_rate %.2f: %d of %d cases, %.1f of %.1f GB, fit in half of the %.1f GB that are free%s",
        rate,
        count,
        len(sizes),
        sum(sizes[:count]) / 1e9,
        sum(sizes) / 1e9,
        free / 1e9,
        f", shared by {processes} processes" if processes > 1 else "",
    )
    return rate


def cached_bytes(case: Mapping[str, Any], spacing: Sequence[float] | None, voxel_bytes: int = _FLOAT) -> int:
    """Return the bytes of a resampled case, before any crop, from its header; 0 where that cannot be read.

    Args:
        case: see :func:`cache_rate`.
        spacing: voxel size in mm that it is resampled to; `None` keeps its own.
        voxel_bytes: of a voxel.
    """
    files = ensure_tuple(case["image"])
    grid = read_nifti(files[0], voxels=False).grid
    if grid is None:  # training refuses such a case before anything is cached
        return 0
    shape, affine = grid
    zoom = abs(np.linalg.det(affine[:3, :3])) / math.prod(spacing) if spacing else 1
    return int(math.prod(shape[:3]) * zoom * voxel_bytes * (len(files) + ("label" in case)))
