"""Paint structures on a voxel grid."""

from __future__ import annotations

from collections.abc import Iterable
from statistics import NormalDist
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from shared_networks.synthetic.shapes import Array, Shape, Structure, bounds, distance, melt, pieces
from shared_networks.synthetic.tissues import ORGANS, TISSUE_ID

if TYPE_CHECKING:
    from shared_networks.synthetic.trunk import Habitus

Box = tuple[slice, ...]

FAR = 1e3  # mm; a distance that is not worth computing
WAVES = np.array(  # of the mottled texture, in 1/mm
    [(0.62, 0.13, -0.2), (-0.2, 0.55, 0.21), (0.11, -0.31, 0.43), (0.2, 0.26, 0.08), (-0.83, 0.37, 0.3),
     (0.45, -0.8, 0.1), (0.09, 0.15, -0.14), (-0.33, -0.19, 0.07), (0.27, 0.71, -0.5)], np.float32
)  # fmt: skip


def overlap(first: Box, second: Box) -> Box:
    """Return the box common to two boxes, empty where they do not meet."""
    starts = [max(a.start, b.start) for a, b in zip(first, second, strict=True)]
    return tuple(slice(n, max(min(a.stop, b.stop), n)) for n, a, b in zip(starts, first, second, strict=True))


def within(inner: Box, outer: Box) -> Box:
    """Return a box counted from the corner of the box around it."""
    return tuple(slice(a.start - b.start, a.stop - b.start) for a, b in zip(inner, outer, strict=True))


class Canvas:
    """A patient on a voxel grid: where in the body each voxel lies, its tissue and its organ.

    Args:
        points: `[3, H, W, D]` positions in patient mm; axis i of the grid runs along coordinate i, up to small angles.
        habitus: the build of the patient.
    """

    def __init__(self, points: Array, habitus: Habitus) -> None:
        self.points, self.habitus = points, habitus
        self.up = -1 if habitus.prone else 1  # gas rises along y times this
        self.tissue = np.zeros(points.shape[1:], np.uint8)
        self.organ = np.zeros(points.shape[1:], np.uint8)
        self.roof = np.full(points.shape[1:], FAR, np.float32)
        self.core = np.full(points.shape[1:], -FAR, np.float32)
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
        """Return the distance in mm from the union of shapes, joined by `blend`, over a box; `FAR` beyond `margin`."""
        union = np.full(self.tissue[box].shape, FAR, np.float32)
        other = union.copy() if blend < 0 else union
        for shape in shapes:
            corners = bounds(shape, margin)
            here = overlap(self.box(np.stack([corners[:, 0].min(0), corners[:, 1].max(0)])), box)
            single = np.full(self.tissue[here].shape, FAR, np.float32)
            for piece, corner in zip(pieces(shape), corners, strict=True):
                near = overlap(self.box(corner), here)
                part = single[within(near, here)]
                if part.size:
                    np.minimum(part, distance(shape, piece, self.points[(slice(None), *near)]), out=part)
            nearest, second = union[within(here, box)], other[within(here, box)]
            if blend < 0:
                np.minimum(second, np.maximum(nearest, single), out=second)
                np.minimum(nearest, single, out=nearest)
            else:
                nearest[...] = melt(nearest, single, blend)
        return np.maximum(union, (union - other - blend) / 2) if blend < 0 else union

    def paint(self, structure: Structure) -> None:
        """Paint a structure over what is there."""
        margin = max(structure.halo, abs(structure.blend))
        corners = np.concatenate([bounds(shape, margin) for shape in structure.shapes])
        box = self.box(np.stack([corners[:, 0].min(0), corners[:, 1].max(0)]))
        tissue, organ, roof = self.tissue[box], self.organ[box], self.roof[box]
        outside = self.distance(structure.shapes, box, structure.blend, margin)
        if structure.carve:
            outside = -melt(-outside, self.distance(structure.carve, box, structure.blend, 30), structure.blend)
        if structure.inside:
            outside = np.maximum(outside, roof + 0.5)
        if structure.deep:
            outside = np.maximum(outside, np.maximum(self.core[box], -2 - roof))
        if structure.within:
            outside[organ != ORGANS.index(structure.within)] = FAR
        around = (outside < structure.halo) & (roof < -1)
        if structure.halo:
            tissue[around], organ[around] = TISSUE_ID["fat"], 0
        if structure.organ or not structure.within:
            organ[outside < 0] = ORGANS.index(structure.organ or "background")
        for depth, name in ((0, structure.tissue), *structure.layers):
            tissue[outside < -depth] = TISSUE_ID[name]
        if structure.gas or structure.sediment[1] or structure.mottle[1]:
            self.fill(structure, box, outside < -(structure.layers[-1][0] if structure.layers else 0))

    def fill(self, structure: Structure, box: Box, lumen: NDArray[np.bool_]) -> None:
        """Paint patches, sediment and gas into the innermost layer of a structure, given as a mask of the box."""
        tissue = self.tissue[box]
        inner = np.flatnonzero(lumen)
        if not inner.size:
            return
        places = self.points[(slice(None), *box)].reshape(3, -1)[:, inner]
        height = self.up * places[1]
        top, deep = height.max(), height.max() - height.min()
        patch, share = structure.mottle
        if share:
            waves = np.sin(WAVES @ (places + structure.shapes[0].path[0, :3, None])).sum(0)
            tissue.flat[inner[waves > np.sqrt(len(WAVES) / 2) * NormalDist().inv_cdf(1 - share)]] = TISSUE_ID[patch]
        for name, where in (
            (structure.sediment[0], height < top - (1 - structure.sediment[1]) * deep),
            ("gas", height > top - structure.gas * deep),
        ):
            if name:
                tissue.flat[inner[where]] = TISSUE_ID[name]
