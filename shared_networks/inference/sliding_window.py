"""Segment a scan by sliding windows, without holding the probabilities of the whole scan."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from itertools import combinations, groupby, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from monai.data import MetaTensor
from monai.data.utils import compute_importance_map, dense_patch_slices
from monai.inferers import Inferer, SimpleInferer
from monai.utils import convert_to_numpy, ensure_tuple_rep
from torch import Tensor
from tqdm import tqdm

from shared_networks.errors import InputError, not_finite
from shared_networks.inference.background import consume_in_background
from shared_networks.inference.label_planes import LabelPlanes, LogitPlane, ScanGrid, Watch
from shared_networks.networks.checkpoints import read_weights
from shared_networks.networks.cpu import fast_cpu
from shared_networks.networks.precision import AutocastInferer

Window = tuple[slice, ...]
Network = Callable[..., Any]


class Labels(NamedTuple):
    """What a scan's windows give.

    Attributes:
        labels: [1, 1, X, Y, Z] with the scan's affine, uint8, or int16 of more than 256 classes.
        organ_probability: [X, Y, Z] float16, if it was asked for.
        label_probability: [X, Y, Z] float16, each voxel's probability of its label, if it was asked for.
    """

    labels: MetaTensor
    organ_probability: Tensor | None
    label_probability: Tensor | None = None


class SlidingWindowLabels(Inferer):
    """Labels a scan on its own grid while a window slides over the prepared scan.

    Windows lie where `monai.inferers.SlidingWindowInferer` has them, and are weighted alike. They go along the longest
    axis first: logits are summed in a slab as thick as a window, and planes that no later window reaches become labels
    at once (:class:`LabelPlanes`). Memory so grows with the scan's cross-section, not with its length times the number
    of classes. Windows of nothing but the floor of the intensity range (air) are not shown to the network and count as
    background. Labels are those of MONAI's chain wherever no such window reaches, so in all tissue; and everywhere, if
    the network has learnt that air is background.

    With test-time flips or several checkpoints the mean of probabilities is taken, in each window and of the windows.

    Args:
        roi_size: window in voxels.
        sw_batch_size: windows at a time.
        overlap: share of a window that the next one covers too, 0 to below 1.
        blending: `constant` weights all of a window alike, `gaussian` its middle most.
        flip_axes: prepared axes (0 left-right, 1 back-front, 2 foot-head) along which windows are mirrored too, in all
            combinations. Labels are not exchanged: along axis 0 the network sees a left kidney where the right one is.
        checkpoints: files of weights to average the probabilities of; one network is in memory at a time. None takes
            the network's own weights.
        dtype: of mixed precision, see :func:`shared_networks.networks.precision.autocast_type`.
        organ: name or value of the label whose probabilities are kept in `organ_probability`, [X, Y, Z] float16 of the
            last scan.
        label_names: names in order of label value, background first.
        label_probability: whether :meth:`begin` also gives each voxel's probability of its label.
        watch: shown the probabilities of the scan part by part, all before its labels are returned; see
            :class:`shared_networks.inference.label_planes.LabelPlanes`. Labelling then takes longer.

    Raises:
        InputError: a setting makes no sense.
    """

    def __init__(
        self,
        roi_size: Sequence[int] | int,
        sw_batch_size: int = 1,
        overlap: float = 0.5,
        blending: str = "constant",
        flip_axes: Sequence[int] = (),
        checkpoints: Sequence[str | Path] = (),
        dtype: torch.dtype | None = None,
        organ: str | int | None = None,
        label_names: Sequence[str] = (),
        label_probability: bool = False,
        watch: Watch | None = None,
    ) -> None:
        super().__init__()
        if not 0 <= overlap < 1:
            raise InputError(f"overlap is {overlap}; give --overlap a share from 0 to below 1")
        if blending not in ("constant", "gaussian"):
            raise InputError(f"blending is {blending!r}; give --blending constant or --blending gaussian")
        if set(flip_axes) - {0, 1, 2}:
            raise InputError(f"tta_flip_axes is {list(flip_axes)}; give axes among 0, 1 and 2")
        if sw_batch_size < 1:
            raise InputError(f"sw_batch_size is {sw_batch_size}; give --sw_batch_size 1 or more")
        self.roi_size = ensure_tuple_rep(roi_size, 3)
        self.sw_batch_size = sw_batch_size
        self.overlap = overlap
        self.blending = blending
        self.flips = [flip for count in range(len(flip_axes) + 1) for flip in combinations(sorted(flip_axes), count)]
        self.ensemble = CheckpointEnsemble(checkpoints)
        self.predict = AutocastInferer(SimpleInferer(), dtype)
        self.organ = None if organ is None else organ_value(organ, label_names)
        self.organ_probability: Tensor | None = None
        self.label_probability = label_probability
        self.watch = watch

    @property
    def averages_probabilities(self) -> bool:
        """Return whether probabilities are summed, and not logits."""
        return len(self.flips) * len(self.ensemble) > 1

    def __call__(self, inputs: Tensor, network: Network, *args: Any, **kwargs: Any) -> MetaTensor:
        """Label a scan; see :meth:`begin`."""
        found = self.begin(inputs, network, *args, **kwargs).result()
        self.organ_probability = found.organ_probability
        return found.labels

    @torch.no_grad()
    def begin(self, inputs: Tensor, network: Network, *args: Any, **kwargs: Any) -> Future[Labels]:
        """Show a scan to the network, and return while the last labels are made.

        Args:
            inputs: [1, C, h, w, d] MetaTensor, prepared (0 is the floor of the intensity range), with the affines and
                the shape of the scan as `LoadImaged` notes them.
            network: from [B, C, *roi_size] to logits [B, classes, *roi_size].
            args: further ones of the network.
            kwargs: further ones of the network.

        Returns:
            The labels, or why there are none.

        Raises:
            InputError: the scan's axes are not at right angles.
            ValueError: the input is no batch of one scan that knows its grid.
        """
        grid = scan_grid(inputs)
        volume = inputs.as_tensor() if isinstance(inputs, MetaTensor) else inputs
        short = [max(roi - size, 0) for roi, size in zip(self.roi_size, volume.shape[2:], strict=True)]
        before = [gap // 2 for gap in short]
        volume = F.pad(volume, [pad for b, s in zip(before[::-1], short[::-1], strict=True) for pad in (b, s - b)])
        volume = volume.contiguous()  # a file's order of axes is another; windows are cut from rows many times faster
        grid = ScanGrid(grid.axes, tuple(p + b for p, b in zip(grid.positions, before, strict=True)))
        foreground = (volume[0] > 0).any(dim=0)
        self.ensemble.start()
        if not foreground.any():
            shape = [grid.shape[axis] for axis in grid.axes]
            probability = None if self.organ is None else torch.zeros(shape, dtype=torch.float16)
            labels = with_scan_meta(torch.zeros(shape, dtype=torch.uint8)[None, None], inputs)
            done: Future[Labels] = Future()
            done.set_result(Labels(labels, probability))
            return done
        axis, box = int(np.argmax(volume.shape[2:])), bounding_box(foreground)
        from_logits = not self.averages_probabilities
        planes = LabelPlanes(grid, axis, box, from_logits, self.organ, self.label_probability, self.watch)
        groups = self._groups(volume, foreground, axis)

        def label(outputs: Iterator[tuple[Window, Tensor]]) -> Labels:
            finished = self._planes(volume, groups, outputs, axis, box)
            labels = consume_in_background(planes.label, finished, _PLANES).result()
            chances = [planes.organ_probability, planes.label_probability]
            probabilities = [None if chance is None else planes.on_scan(chance) for chance in chances]
            return Labels(with_scan_meta(labels[None, None], inputs), *probabilities)

        # Windows are summed in one thread and planes labelled in another, while the network is at the next window.
        with fast_cpu(network, volume.device):
            outputs = self._outputs(volume, groups, network, args, kwargs)
            return consume_in_background(label, outputs, _WINDOWS)

    def _groups(self, volume: Tensor, foreground: Tensor, axis: int) -> list[tuple[int, list[Window]]]:
        """Return where windows start along the axis, in order, and the windows that start there."""
        windows = sorted(window_slices(volume.shape[2:], self.roi_size, self.overlap), key=lambda w: w[axis].start)
        windows = [window for window in windows if _is_true_within(foreground, window)]
        return [(start, list(group)) for start, group in groupby(windows, lambda window: window[axis].start)]

    def _planes(
        self,
        volume: Tensor,
        groups: Sequence[tuple[int, Sequence[Window]]],
        outputs: Iterator[tuple[Window, Tensor]],
        axis: int,
        box: Sequence[tuple[int, int]],
    ) -> Iterator[LogitPlane | None]:
        """Yield the planes of the box along the axis, each finished; `None` is one that no window was at."""
        size, roi = volume.shape[2:], self.roi_size
        cut = [slice(first, end) for other, (first, end) in enumerate(box) if other != axis]
        weight = compute_importance_map(roi, mode=self.blending, device=volume.device)
        thick = list(size)
        thick[axis] = roi[axis]
        sums, weights = torch.empty(0), torch.zeros(thick, device=volume.device)
        at = box[axis][0]  # the next plane to yield
        for index, (start, group) in enumerate(groups):
            for window, output in islice(outputs, len(group) * len(self.ensemble)):
                if not len(sums):
                    sums = torch.zeros((output.shape[0], *thick), device=volume.device)
                place = list(window)
                place[axis] = slice(0, roi[axis])
                target = sums[(slice(None), *place)]
                finite(output)
                if self.blending == "constant":
                    target += output
                else:
                    target.addcmul_(output, weight)
            for window in group:
                place = list(window)
                place[axis] = slice(0, roi[axis])
                weights[tuple(place)] += weight * len(self.ensemble)
            following = groups[index + 1][0] if index + 1 < len(groups) else size[axis]
            end = min(following, box[axis][1])
            for first in range(max(at, start), min(end, start + roi[axis]), _PLANES):
                last = min(first + _PLANES, end, start + roi[axis])
                yield from _cut_planes(sums, weights, axis, slice(first - start, last - start), cut)
            yield from (None for _ in range(start + roi[axis], end))
            at = max(at, end)
            _advance(sums, axis + 1, following - start)
            _advance(weights, axis, following - start)

    def _outputs(
        self,
        volume: Tensor,
        groups: Sequence[tuple[int, Sequence[Window]]],
        network: Network,
        args: Any,
        kwargs: Any,
    ) -> Iterator[tuple[Window, Tensor]]:
        """Yield what each network makes of each window, [C, *roi_size]: logits, or the flips' mean probabilities.

        Group by group, all networks of a group one after the other.
        """
        total = sum(len(group) for _, group in groups) * len(self.ensemble)
        with tqdm(total=total, desc="windows", unit="window", leave=False, disable=None) as bar:
            for _, group in groups:
                for _ in self.ensemble.in_turn(network):
                    for first in range(0, len(group), self.sw_batch_size):
                        some = group[first : first + self.sw_batch_size]
                        batches = [volume[(slice(None), slice(None), *window)] for window in some]
                        batch = torch.cat(batches) if len(some) > 1 else batches[0]
                        yield from zip(some, self._predict(batch, network, args, kwargs), strict=True)
                        bar.update(len(some))

    def _predict(self, batch: Tensor, network: Network, args: Any, kwargs: Any) -> Tensor:
        """Return logits [B, C, *roi_size] of a batch of windows, or the flips' mean probabilities."""
        total: Any = 0
        for flip in self.flips:
            dims = [axis + 2 for axis in flip]
            # torch copies even where there is nothing to flip
            output = self.predict(batch.flip(dims) if flip else batch, network, *args, **kwargs).float()
            output = output.flip(dims) if flip else output
            total = total + output.softmax(1) / len(self.flips) if self.averages_probabilities else output
        return total


def _is_true_within(mask: Tensor, window: Window) -> bool:
    """Return whether any voxel of a window is true; mostly its middle is, which takes no time to see."""
    middle = tuple((part.start + part.stop) // 2 for part in window)
    return bool(mask[middle]) or bool(mask[window].any())


def finite(output: Tensor) -> Tensor:
    """Return a network's output if it is finite: labels of NaN would mean nothing.

    Raises:
        InputError: it is not.
    """
    if not bool(output.sum().isfinite()):  # no mask of the output's size: NaN and infinity pass through a sum
        raise not_finite("the network's output")
    return output


_PLANES = 16  # turned at a time, so that they fit a processor's cache; as many wait to be labelled
_WINDOWS = 2  # whose logits wait to be summed


def _cut_planes(sums: Tensor, weights: Tensor, axis: int, span: slice, cut: Sequence[slice]) -> Iterator[LogitPlane]:
    """Copies of planes of the slab, cut to rows and columns, each in one piece of memory."""
    some = sums.movedim(axis + 1, 0)[(span, slice(None), *cut)]
    turned = torch.empty(some.shape, device=sums.device)
    for row in range(some.shape[2]):
        turned[:, :, row] = some[:, :, row]
    yield from map(LogitPlane, turned, weights.movedim(axis, 0)[(span, *cut)].clone())


def _advance(slab: Tensor, dim: int, step: int) -> None:
    """Move a slab's content by `step` planes towards its start, and clear what comes free."""
    kept = max(slab.shape[dim] - step, 0)
    for first in range(0, kept, max(step, 1)):  # pieces that do not overlap with where they go
        count = min(step, kept - first)
        slab.narrow(dim, first, count).copy_(slab.narrow(dim, first + step, count))
    slab.narrow(dim, kept, slab.shape[dim] - kept).zero_()


def window_slices(size: Sequence[int], roi_size: Sequence[int], overlap: float) -> list[Window]:
    """List the windows of MONAI's sliding window inference.

    Args:
        size: of the volume, at least the window's.
        roi_size: of the window.
        overlap: 0 to below 1.
    """
    steps = [roi if roi == n else max(int(roi * (1 - overlap)), 1) for n, roi in zip(size, roi_size, strict=True)]
    return dense_patch_slices(size, roi_size, steps)


def bounding_box(mask: Tensor) -> list[tuple[int, int]]:
    """Return the first true voxel and the one after the last on each axis of [h, w, d], of which some are true."""
    found = [mask.movedim(axis, 0).flatten(1).any(dim=1).nonzero() for axis in range(3)]
    return [(int(places[0]), int(places[-1]) + 1) for places in found]


def scan_grid(inputs: Tensor) -> ScanGrid:
    """Read the scan's grid from the metadata of [1, C, h, w, d], collated or not; see :class:`SlidingWindowLabels`."""
    meta = getattr(inputs, "meta", {})
    if inputs.ndim != 5 or inputs.shape[0] != 1 or not {"original_affine", "spatial_shape"} <= set(meta):
        raise ValueError(
            f"input of shape {tuple(inputs.shape)} with metadata {sorted(meta)}: one scan at a time is labelled, "
            "[1, C, h, w, d], loaded with LoadImaged and kept a MetaTensor."
        )
    affine, scan_affine = (
        convert_to_numpy(matrix).astype(float).reshape(-1, 4, 4)[0]
        for matrix in (meta["affine"], meta["original_affine"])
    )
    return ScanGrid.of(affine, scan_affine, convert_to_numpy(meta["spatial_shape"]).reshape(-1)[:3].tolist())


def with_scan_meta(labels: Tensor, inputs: Any) -> MetaTensor:
    """Label with the metadata of the prepared scan, and the affine that the scan has on file."""
    out = MetaTensor(labels)
    out.copy_meta_from(inputs)
    out.affine = torch.as_tensor(convert_to_numpy(inputs.meta["original_affine"]), dtype=torch.float64)
    out.applied_operations = [[]] if inputs.is_batch else []
    return out


def organ_value(organ: str | int, label_names: Sequence[str]) -> int:
    """Return the value of a label given by name or value.

    Raises:
        InputError: there is no such label.
    """
    if organ in label_names:
        return list(label_names).index(str(organ))
    if str(organ).isdigit() and int(organ) < len(label_names):
        return int(organ)
    raise InputError(f"organ_probability is {organ!r}; give one of {', '.join(label_names)}")


class CheckpointEnsemble:
    """The weights of an ensemble, one network of which is in memory at a time.

    Each file is opened once a scan and mapped: what the network takes over comes from memory as long as there is room
    for all files, and the system drops their pages where there is none.

    Args:
        checkpoints: files; none stands for the network's own weights.
    """

    def __init__(self, checkpoints: Sequence[str | Path]) -> None:
        self.checkpoints: list[str | Path | None] = [*checkpoints] or [None]
        self.start()

    def start(self) -> None:
        """Forget the scan before: files may have changed, and the network's weights may be any."""
        self.loaded: str | Path | None = None
        self.mapped: dict[str | Path, dict[str, Tensor]] = {}

    def __len__(self) -> int:
        return len(self.checkpoints)

    def in_turn(self, network: Any) -> Iterator[None]:
        """Yield once for each, its weights loaded; what is loaded already comes first.

        Weights are loaded strictly; `check_weights` has said whether they fit.
        """
        for checkpoint in sorted(self.checkpoints, key=lambda checkpoint: checkpoint != self.loaded):
            if checkpoint is not None and checkpoint != self.loaded:
                if checkpoint not in self.mapped:
                    self.mapped[checkpoint] = read_weights(checkpoint)
                network.load_state_dict(self.mapped[checkpoint])
                self.loaded = checkpoint
            yield
