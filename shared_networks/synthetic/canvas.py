"""Paint structures on a voxel grid."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from shared_networks.synthetic.shapes import Array, Shape, Structure, bounds, distance, melt, pieces
from shared_networks.synthetic.tissues import ORGANS, TISSUE_ID

if TYPE_CHECKING:
    from shared_networks.synthetic.trunk import Habitus

Box = tuple[slice, ...]

FAR = 1e3  # mm; a distance that is not worth computing


def overlap(first: Box, second: Box) -> Box:
    """Return the voxels that two boxes share; empty slices where they share none."""
    pairs = [(max(a.start, b.start), min(a.stop, b.stop)) for a, b in zip(first, second, strict=True)]
    return tuple(slice(start, max(start, stop)) for start, stop in pairs)


def shifted(box: Box, frame: Box) -> Box:
    """Return a box as indices into an array that covers a larger one."""
    return tuple(slice(b.start - f.start, b.stop - f.start) for b, f in zip(box, frame, strict=True))


class Canvas:
    """A patient on a voxel grid: where in the body each voxel lies, its tissue and its organ.

    Args:
        points: `[3, H, W, D]` positions in patient mm; axis i of the grid runs along coordinate i, up to small angles.
        habitus: the build of the patient.
    """

    def __init__(self, points: Array, habitus: Habitus) -> None:
        self.points, self.habitus = points, habitus
        self.tissue = np.zeros(points.shape[1:], np.uint8)
        self.organ = np.zeros(points.shape[1:], np.uint8)
        self.roof = np.full(points.shape[1:], FAR, np.float32)
        across = ((1, 2), (0, 2), (0, 1))
        self.low, self.high = ([f(p, a) for p, a in zip(points, across, strict=True)] for f in (np.min, np.max))

    def box(self, corners: Array) -> Box:
        """Return the voxels that may lie between two corners, `[2, 3]` in mm; empty slices where there are none."""
        found = [
            np.flatnonzero((top >= low) & (bottom <= high))
            for bottom, top, low, high in zip(self.low, self.high, *corners, strict=True)
        ]
        return tuple(slice(f[0], f[-1] + 1) if f.size else slice(0, 0) for f in found)

    def distance(self, shapes: Iterable[Shape], box: Box, blend: float, margin: float) -> Array:
        """Return the distance in mm from the melted union of shapes over a box; `FAR` beyond `margin`."""
        union = np.full(self.tissue[box].shape, FAR, np.float32)
        for shape in shapes:
            corners = np.stack([bounds(shape, piece, margin) for piece in pieces(shape)])
            whole = overlap(self.box(np.stack([corners[:, 0].min(0), corners[:, 1].max(0)])), box)
            local = union[shifted(whole, box)]
            single = np.full_like(local, FAR) if blend else local
            for piece, around in zip(pieces(shape), corners, strict=True):
                near = overlap(self.box(around), whole)
                part = single[shifted(near, whole)]
                if part.size:
                    np.minimum(part, distance(shape, piece, self.points[(slice(None), *near)]), out=part)
            if blend:
                local[...] = melt(local, single, blend)
        return union

    def paint(self, structure: Structure) -> None:
        """Paint a structure over what is there."""
        margin = max(structure.halo, structure.blend)
        corners = np.stack([bounds(s, p, margin) for s in structure.shapes for p in pieces(s)])
        box = self.box(np.stack([corners[:, 0].min(0), corners[:, 1].max(0)]))
        tissue, organ, roof = self.tissue[box], self.organ[box], self.roof[box]
        outside = self.distance(structure.shapes, box, structure.blend, margin)
        if structure.carve:
            outside = -melt(-outside, self.distance(structure.carve, box, structure.blend, 30), structure.blend)
        if structure.inside:
            outside = np.maximum(outside, roof + 0.5)
        if structure.within:
            outside[organ != ORGANS.index(structure.within)] = FAR
        around = (outside < structure.halo) & (roof < -1)
        if structure.halo:
            tissue[around], organ[around] = TISSUE_ID["fat"], 0
        if structure.organ or not structure.within:
            organ[outside < 0] = ORGANS.index(structure.organ or "background")
        for depth, name in ((0, structure.tissue), *structure.layers):
            tissue[outside < -depth] = TISSUE_ID[name]
        lumen = outside < -structure.layers[-1][0] if structure.gas else np.zeros(0, bool)
        if lumen.any():
            height = self.points[1][box]
            front, back = height[lumen].max(), height[lumen].min()
            tissue[lumen & (height > front - structure.gas * (front - back))] = TISSUE_ID["gas"]
