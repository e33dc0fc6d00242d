"""Turn planes of logits into labels on the scan's own grid.

`Spacingd` moves the spacings of the axes only, and orientations differ by permutations and flips; so the way from a
scan to the network's grid and back is separable, and neither needs grids of coordinates nor whole copies in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from monai.data.utils import compute_shape_offset
from nibabel.affines import apply_affine, from_matvec
from nibabel.orientations import inv_ornt_aff
from torch import Tensor

from shared_networks.datasets.grid import SHEAR_TOLERANCE
from shared_networks.errors import InputError
from shared_networks.transforms.spacing import Axis


class ScanGrid(NamedTuple):
    """Where the voxels of a scan lie on the grid that it was prepared on.

    Attributes:
        axes: for each axis of the scan the prepared one that it is parallel to.
        positions: for each prepared axis the positions [N] of the scan's voxels, in its voxel indices. Beyond the grid
            that `Spacingd` made lies its border.
    """

    axes: tuple[int, ...]
    positions: tuple[Tensor, ...]

    @classmethod
    def of(cls, affine: np.ndarray, scan_affine: np.ndarray, shape: Sequence[int]) -> ScanGrid:
        """Make the grid from affines, which also hold crops and padding.

        Args:
            affine: [4, 4], from prepared voxels to mm.
            scan_affine: [4, 4], from the scan's voxels to mm.
            shape: (X, Y, Z) of the scan.

        Raises:
            InputError: the axes are not parallel, as of an affine with shear.
        """
        way = np.linalg.solve(affine, scan_affine)
        axes = np.abs(way[:3, :3]).argmax(axis=0)
        off_axis = np.array(way[:3, :3])
        off_axis[axes, range(3)] = 0
        off = np.abs(off_axis) @ np.array(shape)
        if sorted(axes) != [0, 1, 2] or off.max() > SHEAR_TOLERANCE:
            raise InputError(
                f"affine {np.round(scan_affine[:3], 4).tolist()}: its axes are not at right angles, as of a CT with "
                "gantry tilt; resample the scan with a tool that corrects tilt"
            )
        # The grid that Spacingd made, before crops and padding, computed as it does: from the scan turned alike.
        turn = np.stack([axes, np.sign(way[axes, range(3)])], axis=1)
        turned_affine = scan_affine @ inv_ornt_aff(turn, shape)
        whole_affine = from_matvec(affine[:3, :3], turned_affine[:3, 3])
        turned_shape = np.array(shape)[np.argsort(axes)]
        whole_shape, origin = compute_shape_offset(turned_shape, turned_affine, whole_affine)
        first = np.round(apply_affine(np.linalg.inv(affine), origin))
        positions = [torch.empty(0)] * 3
        for scan_axis, axis in enumerate(axes):
            position = way[axis, scan_axis] * torch.arange(shape[scan_axis], dtype=torch.float64) + way[axis, 3]
            positions[axis] = position.clamp(first[axis], first[axis] + whole_shape[axis] - 1)
        return cls(tuple(axes.tolist()), tuple(positions))

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the scan's shape, its axes in the prepared volume's order."""
        return tuple(len(position) for position in self.positions)


class LogitPlane(NamedTuple):
    """A plane of windows' sums, finished.

    Attributes:
        sums: [C, A, B] of logits or of probabilities, each times its weight.
        weights: [A, B], 0 where no window was.
    """

    sums: Tensor
    weights: Tensor

    def probabilities(self, rows: slice, columns: slice, from_logits: bool) -> Tensor:
        """Return the probabilities of a rectangle, [C, rows, columns]; background where no window was."""
        sums, weights = self.sums[:, rows, columns], self.weights[rows, columns]
        unseen = weights == 0
        means = sums / weights.masked_fill(unseen, 1)
        chances = means.softmax(dim=0) if from_logits else means
        if unseen.any():
            chances.masked_fill_(unseen, 0)
            chances[0].masked_fill_(unseen, 1)
        return chances


Rectangle = tuple[int, int, int, int]
"""First row, row after the last, first column, column after the last."""

Watch = Callable[[Tensor, tuple[slice, ...]], None]
"""Takes probabilities [C, x, y, z] of a part of the scan, and which part that is: a slice for each of [X, Y, Z]."""


class LabelPlanes:
    """Turn planes of logits on the prepared grid, as they come, into labels on the scan's grid.

    Within the planes, labels equal those that MONAI's chain makes by softmax, `Invertd` (linear, of all classes) and
    argmax. Outside of the box they are background, as after the inverse of `CropForegroundd`. Where the corners of a
    cell agree in their largest class, no convex combination of them has another; so all classes are interpolated only
    in cells whose corners differ.

    Args:
        grid: where the scan's voxels lie.
        axis: the prepared axis that planes follow each other along.
        box: first voxel and the one after the last of the foreground on each prepared axis; planes are cut to it.
        from_logits: whether planes hold logits, or probabilities already.
        organ: label value whose probability is kept as well.
        keep_probability: whether each voxel's probability of its label is kept too, in `label_probability`.
        watch: called with the probabilities of each plane of the scan as it is labelled, on the device that computes.
            Voxels that no call shows are background: their probabilities of all organs are 0.
    """

    def __init__(
        self,
        grid: ScanGrid,
        axis: int,
        box: Sequence[tuple[int, int]],
        from_logits: bool = True,
        organ: int | None = None,
        keep_probability: bool = False,
        watch: Watch | None = None,
    ) -> None:
        self.grid, self.axis, self.from_logits, self.organ, self.watch = grid, axis, from_logits, organ, watch
        self.in_plane = [other for other in range(3) if other != axis]
        # A margin of one voxel without any class stands for all that is outside of the box.
        within = [
            Axis.at((position - (first - 1)).clamp(0, end - first + 1), end - first + 2)
            for position, (first, end) in zip(grid.positions, box, strict=True)
        ]
        self.planes, self.rows, self.columns = (within[a] for a in (axis, *self.in_plane))
        order = range(len(self.planes.lower))
        self.waiting = list(order if self.planes.lower[0] <= self.planes.lower[-1] else reversed(order))[::-1]
        shape = [grid.shape[a] for a in (axis, *self.in_plane)]
        self.labels = torch.zeros(shape, dtype=torch.uint8)
        self.organ_probability = None if organ is None else torch.zeros(shape, dtype=torch.float16)
        self.label_probability = torch.zeros(shape, dtype=torch.float16) if keep_probability else None
        self.count = 0
        self.last: LogitPlane | None = None
        self.last_organs: Rectangle | None = None

    def add(self, plane: LogitPlane | None) -> None:
        """Take the next plane of the box; `None` is one without any class."""
        organs = None if plane is None else self._organs(plane)
        while self.waiting and int(self.planes.lower[self.waiting[-1]]) == self.count:
            self._write(self.waiting.pop(), plane, organs)
        self.last, self.last_organs = plane, organs
        self.count += 1

    def label(self, planes: Iterable[LogitPlane | None]) -> Tensor:
        """Take all planes, and return the labels [X, Y, Z] of the scan, uint8, or int16 of more than 256 classes."""
        for plane in planes:
            self.add(plane)
        self.add(None)
        return self.on_scan(self.labels)

    def on_scan(self, planes: Tensor) -> Tensor:
        """Permute [planes, rows, columns] to the scan's order of axes."""
        return planes.permute(self._places())

    def _places(self) -> list[int]:
        """Return for each axis of the scan its place in [planes, rows, columns]."""
        place = {self.axis: 0, self.in_plane[0]: 1, self.in_plane[1]: 2}
        return [place[axis] for axis in self.grid.axes]

    def _organs(self, plane: LogitPlane) -> Rectangle | None:
        """What is no background, and a voxel around."""
        height, width = plane.weights.shape
        if self.organ is not None or self.watch is not None:  # then air has a probability too
            return 0, height, 0, width
        labels = plane.sums.max(dim=0).indices
        rows, columns = (labels.any(dim=dim).nonzero() for dim in (1, 0))
        if not len(rows):
            return None
        return (
            max(int(rows[0]) - 1, 0),
            min(int(rows[-1]) + 2, height),
            max(int(columns[0]) - 1, 0),
            min(int(columns[-1]) + 2, width),
        )

    def _write(self, index: int, plane: LogitPlane | None, organs: Rectangle | None) -> None:
        """Label one plane of the scan, which lies between the last plane and this one."""
        found = [rectangle for rectangle in (self.last_organs, organs) if rectangle is not None]
        if not found:
            return
        first_rows, end_rows, first_columns, end_columns = zip(*found, strict=True)
        top, bottom, left, right = min(first_rows), max(end_rows), min(first_columns), max(end_columns)
        weight = float(self.planes.weight[index])
        chances = torch.zeros(())
        for part, share in ((self.last, 1 - weight), (plane, weight)):
            if part is not None and share > 0:
                rectangle = part.probabilities(slice(top, bottom), slice(left, right), self.from_logits)
                chances = torch.add(chances.to(rectangle.device), rectangle, alpha=share)
        if not chances.ndim:  # exactly on a plane without classes
            return
        chances = F.pad(chances, (1, 1, 1, 1))
        chances[0].clamp_(min=1e-30)  # where there is no class at all, background and not any
        rows, row_span = _part(self.rows, top, bottom, chances.device)
        columns, column_span = _part(self.columns, left, right, chances.device)
        labels, probability = _labels(chances, rows, columns, self.label_probability is not None)
        self.labels = self.labels.to(labels.dtype)
        self.labels[index, row_span, column_span] = labels.cpu()
        if self.label_probability is not None and probability is not None:
            self.label_probability[index, row_span, column_span] = probability.half().cpu()
        if self.organ_probability is not None:
            organ = resample_plane(chances[self.organ], rows, columns)
            self.organ_probability[index, row_span, column_span] = organ.half().cpu()
        if self.watch is not None:
            places, spans = self._places(), (slice(index, index + 1), row_span, column_span)
            shown = resample_plane(chances, rows, columns)[:, None].permute(0, *(place + 1 for place in places))
            self.watch(shown, tuple(spans[place] for place in places))


def _part(axis: Axis, first: int, end: int, device: torch.device) -> tuple[Axis, slice]:
    """The samples of an axis that lie in a range widened by one at both ends, and which these are."""
    inside = ((axis.lower >= first) & (axis.lower <= end)).nonzero()
    span = slice(int(inside[0]), int(inside[-1]) + 1) if len(inside) else slice(0, 0)
    return Axis((axis.lower[span] - first).to(device), axis.weight[span].to(device)), span


def resample_plane(plane: Tensor, rows: Axis, columns: Axis) -> Tensor:
    """Interpolate [..., A, B] bilinearly at [..., rows, columns]."""
    below = torch.lerp(plane[..., rows.lower, :], plane[..., rows.lower + 1, :], rows.weight[:, None])
    return torch.lerp(below[..., columns.lower], below[..., columns.lower + 1], columns.weight)


def _labels(chances: Tensor, rows: Axis, columns: Axis, keep_probability: bool) -> tuple[Tensor, Tensor | None]:
    """The largest class of [C, A, B] interpolated at [rows, columns], and its value there if it is to be kept."""
    kind = torch.uint8 if len(chances) <= 256 else torch.int16
    largest = chances.max(dim=0)
    corners = largest.indices.to(kind)
    # Where the corners of a cell agree, their largest values are all the same class's.
    probability = resample_plane(largest.values, rows, columns) if keep_probability else None
    cell = corners[:-1, :-1]
    differ = (cell != corners[1:, :-1]) | (cell != corners[:-1, 1:]) | (cell != corners[1:, 1:])
    labels = cell[rows.lower][:, columns.lower]
    row, column = differ[rows.lower][:, columns.lower].nonzero(as_tuple=True)
    by_voxel = chances.permute(1, 2, 0).contiguous().flatten(0, 1)  # so that a voxel's classes are one piece
    corner = rows.lower[row] * chances.shape[2] + columns.lower[column]
    across, along = columns.weight[column, None], rows.weight[row, None]
    width = chances.shape[2]
    below = torch.lerp(by_voxel[corner], by_voxel[corner + 1], across)
    above = torch.lerp(by_voxel[corner + width], by_voxel[corner + width + 1], across)
    found = torch.lerp(below, above, along).max(dim=1)
    labels[row, column] = found.indices.to(kind)
    if probability is not None:
        probability[row, column] = found.values
    return labels, probability
