"""Measure how well a label map agrees with the truth, organ by organ."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import product, zip_longest
from typing import Any

import numpy as np
import torch
from ignite.engine import Engine, Events
from monai.data import MetaTensor
from monai.handlers import IgniteMetricHandler, from_engine
from monai.metrics import CumulativeIterationMetric
from monai.metrics.utils import create_table_neighbour_code_to_surface_area
from monai.utils import convert_to_numpy
from nibabel.affines import voxel_sizes
from scipy.ndimage import find_objects
from scipy.spatial import KDTree

from shared_networks.datasets.organs import name_in_files
from shared_networks.errors import InputError

MEASURES = ("dice", "hd95_mm", "nsd", "truth_ml", "predicted_ml", "volume_error_ml", "volume_error_percent")
"""What :func:`organ_measures` returns, in order."""

_ROUNDING = 1e-4  # of a tolerance: affines on file are float32, in which 2 mm may be 2.0000002 mm, or rounded in print
_SLAB_VOXELS = 2**22  # counted at a time, so that indices of 8 bytes never fill a whole scan

Slices = tuple[slice, ...]


def tolerances_of(organs: Sequence[str], nsd_tolerance: float | Mapping[str, float]) -> dict[str, float]:
    """Return the tolerance of each organ's normalised surface Dice, in mm.

    Args:
        organs: names, without the background.
        nsd_tolerance: one for all organs, or one by name for each.

    Raises:
        InputError: an organ has none, a name is no organ's, or a tolerance is not a positive number.
    """
    given = nsd_tolerance if isinstance(nsd_tolerance, Mapping) else dict.fromkeys(organs, nsd_tolerance)
    if missing := [name for name in organs if name not in given]:
        raise InputError(f"nsd_tolerance has no {', '.join(missing)}; give mm for every organ, or one number for all")
    if unknown := [str(name) for name in given if name not in organs]:
        raise InputError(f"nsd_tolerance names {', '.join(unknown)}; the organs are {', '.join(organs)}")
    for name, value in given.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise InputError(f"nsd_tolerance is {value!r} for {name}; give millimetres above 0, such as 2.0")
    return {name: float(given[name]) for name in organs}


def confusion_counts(prediction: np.ndarray, truth: np.ndarray, num_classes: int) -> np.ndarray:
    """Count voxels by both labels.

    Args:
        prediction: `[X, Y, Z]` integers below `num_classes`.
        truth: `[X, Y, Z]` integers below `num_classes`.
        num_classes: label values, background included.

    Returns:
        `[num_classes, num_classes]`: rows by predicted, columns by true value.
    """
    counts = np.zeros(num_classes**2, dtype=np.int64)
    step = max(1, _SLAB_VOXELS // max(1, math.prod(truth.shape[1:])))
    for start in range(0, len(truth), step):
        pairs = prediction[start : start + step].astype(np.intp)
        pairs *= num_classes
        pairs += truth[start : start + step]
        counts += np.bincount(pairs.ravel(), minlength=num_classes**2)
    return counts.reshape(num_classes, num_classes)


def surface_voxels(mask: np.ndarray) -> np.ndarray:
    """Return indices [N, 3] of the voxels of a mask `[X, Y, Z]` that have a face outside it."""
    padded = np.pad(mask, 1)
    inner = mask.copy()
    for axis, start in product(range(3), (0, 2)):
        shifted = tuple(slice(start, start + n) if a == axis else slice(1, n + 1) for a, n in enumerate(mask.shape))
        inner &= padded[shifted]
    return np.argwhere(mask & ~inner)


def surface_cells(mask: np.ndarray, spacing: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Find the surface of a mask between its voxels, as marching cubes do.

    Args:
        mask: `[X, Y, Z]` bool.
        spacing: mm between voxels along each axis.

    Returns:
        Indices [N, 3] of the cells between eight voxels that the surface passes, and its area in each, [N] in mm2.
    """
    padded = np.pad(mask, 1).view(np.uint8)
    codes = np.zeros([n + 1 for n in mask.shape], dtype=np.uint8)
    for bit, corner in enumerate(product((0, 1), repeat=3)):  # in the order of MONAI's table
        codes |= padded[tuple(slice(c, c + n + 1) for c, n in zip(corner, mask.shape, strict=True))] << (7 - bit)
    cells = np.argwhere((codes != 0) & (codes != 255))
    areas = convert_to_numpy(create_table_neighbour_code_to_surface_area(tuple(spacing))[0])
    return cells, areas[codes[tuple(cells.T)]].astype(float)


def distances_between(points: np.ndarray, others: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the distance of each point [N, 3] to the nearest of the others [M, 3], [N], and the reverse, [M]."""
    return KDTree(others).query(points)[0], KDTree(points).query(others)[0]


def surface_measures(
    prediction: np.ndarray, truth: np.ndarray, spacing: Sequence[float], tolerance: float
) -> tuple[float, float]:
    """Measure how far the surfaces of two masks, neither empty, lie apart.

    The 95 % Hausdorff distance is the larger of the two directed 95th percentiles, taken over the voxels at the
    surfaces. The normalised surface Dice (Nikolov et al., "Clinically applicable segmentation of head and neck anatomy
    for radiotherapy", JMIR 2021) weighs each piece of surface by its area, as in the authors' code: a count of voxels
    would let the finely spaced axes of an anisotropic scan decide.

    These are MONAI's `compute_hausdorff_distance` and `compute_surface_dice(use_subvoxels=True)`, but computed on
    the surface alone: MONAI's take some 150 bytes for each voxel of the box, and one stray voxel makes the box large.

    Args:
        prediction: `[X, Y, Z]` bool.
        truth: `[X, Y, Z]` bool.
        spacing: mm between voxels along each axis.
        tolerance: mm up to which surfaces agree; a ten thousandth more still does, as files round voxel sizes.

    Returns:
        The distance in mm, and the surface Dice from 0 to 1.
    """
    directed = distances_between(*(surface_voxels(mask) * np.asarray(spacing) for mask in (prediction, truth)))
    hd95 = max(float(np.percentile(distances, 95)) for distances in directed)
    surfaces = [surface_cells(mask, spacing) for mask in (prediction, truth)]
    distances = distances_between(*(cells * np.asarray(spacing) for cells, _ in surfaces))
    areas = [area for _, area in surfaces]
    limit = tolerance * (1 + _ROUNDING)
    near = sum(area[distance <= limit].sum() for area, distance in zip(areas, distances, strict=True))
    return hd95, float(near / sum(area.sum() for area in areas))


def organ_measures(
    prediction: np.ndarray,
    truth: np.ndarray,
    spacing: Sequence[float],
    num_classes: int,
    tolerances: Sequence[float] | None,
) -> np.ndarray:
    """Measure every organ of a case.

    ================================  ==========  ====
    the organ is in                   Dice, NSD   HD95
    ================================  ==========  ====
    truth and prediction              0 to 1      mm
    truth alone (missed)              0           NaN
    prediction alone (false positive) 0           NaN
    neither (absent)                  NaN         NaN
    ================================  ==========  ====

    Scores have a worst value, and an organ that is missed or made up gets it. A distance has none: infinity would make
    every mean infinite, and a penalty such as the scan's diagonal would depend on the field of view. So means of
    distances are over organs found, to be read beside the number of those missed.

    Args:
        prediction: `[X, Y, Z]` integers below `num_classes`, 0 the background.
        truth: `[X, Y, Z]` integers below `num_classes`.
        spacing: mm between voxels along each axis.
        num_classes: label values, background included.
        tolerances: of the surface Dice, mm by organ; `None` leaves out what is measured at surfaces, which becomes NaN.

    Returns:
        `[num_classes - 1, len(MEASURES)]` float64. The volume error is predicted minus true, in ml and in percent of
        the true volume (NaN where that is 0).
    """
    counts = confusion_counts(prediction, truth, num_classes)
    ml = math.prod(spacing) / 1000
    limits: Sequence[float | None] = tolerances or [None] * (num_classes - 1)
    boxes = zip_longest(*(find_objects(labels, num_classes - 1) for labels in (prediction, truth)))
    measures = np.full((num_classes - 1, len(MEASURES)), np.nan)
    for row, value, (predicted_box, true_box), tolerance in zip(
        measures, range(1, num_classes), boxes, limits, strict=True
    ):
        predicted, true, both = int(counts[value].sum()), int(counts[:, value].sum()), int(counts[value, value])
        dice = 2 * both / (predicted + true) if predicted + true else math.nan
        hd95, nsd = math.nan, math.nan if tolerance is None else dice  # 0 where one is empty, NaN where both are
        if predicted and true and tolerance is not None:
            box = _union(predicted_box, true_box)
            hd95, nsd = surface_measures(prediction[box] == value, truth[box] == value, spacing, tolerance)
        error = (predicted - true) * ml
        row[:] = dice, hd95, nsd, true * ml, predicted * ml, error, 100 * error / (true * ml) if true else math.nan
    return measures


def _union(box: Slices, other: Slices) -> Slices:
    return tuple(slice(min(a.start, b.start), max(a.stop, b.stop)) for a, b in zip(box, other, strict=True))


def macro_mean(values: torch.Tensor) -> torch.Tensor:
    """Average `[cases, organs]` over each case's organs first, then over cases, NaN left out."""
    return values.nanmean(dim=1).nanmean()


class OrganMetric(CumulativeIterationMetric):
    """Metric of MONAI that holds :func:`organ_measures` of every case; its value is the mean Dice.

    With :class:`monai.handlers.IgniteMetricHandler` it is attached to an evaluator, whose `state.metric_details` then
    hold `[cases, organs, len(MEASURES)]`. The mean is over each case's organs first, then over cases.

    Args:
        label_names: names in order of label value, background first.
        nsd_tolerance: see :func:`tolerances_of`; `None` measures no surfaces, as in validations while training.

    Raises:
        InputError: for a wrong tolerance; on call, if a map holds a value that has no name.
        ValueError: on call, if the maps differ in shape or the truth does not know its spacing.

    Example:
        >>> metric = OrganMetric(["background", "liver"])
        >>> metric([prediction], [truth])  # each [1, X, Y, Z], the truth a MetaTensor  # doctest: +SKIP
    """

    def __init__(self, label_names: Sequence[str], nsd_tolerance: float | Mapping[str, float] | None = 2.0) -> None:
        super().__init__()
        self.label_names = list(label_names)
        organs = self.label_names[1:]
        self.tolerances = None if nsd_tolerance is None else list(tolerances_of(organs, nsd_tolerance).values())

    def _compute_tensor(self, y_pred: torch.Tensor, y: torch.Tensor | None = None, **_: Any) -> torch.Tensor:
        if not isinstance(y, MetaTensor):
            raise ValueError(f"the truth is a {type(y).__name__} without spacing: load it with LoadImaged.")
        if y_pred.shape != y.shape:
            raise ValueError(
                f"the prediction has shape {list(y_pred.shape)} but the truth has {list(y.shape)}: invert predictions "
                "to the scan's grid."
            )
        # Not `y.pixdim`, which after batches of one and their decollation knows the first axis only (monai 1.6).
        affines = np.broadcast_to(convert_to_numpy(y.affine).reshape(-1, 4, 4), (len(y), 4, 4))
        cases = [
            organ_measures(prediction, truth, voxel_sizes(affine).tolist(), len(self.label_names), self.tolerances)
            for prediction, truth, affine in zip(self._labels(y_pred), self._labels(y), affines, strict=True)
        ]
        return torch.from_numpy(np.stack(cases))

    def _labels(self, volumes: torch.Tensor) -> np.ndarray:
        """[B, 1, X, Y, Z] of any type to [B, X, Y, Z] integers."""
        values = convert_to_numpy(volumes[:, 0])
        low, high = values.min(), values.max()
        if not 0 <= low <= high < len(self.label_names):
            raise InputError(
                f"label values {low:g} to {high:g} are not among 0 to {len(self.label_names) - 1}, the values that "
                "label_names names; map them to those"
            )
        return values.astype(np.uint8 if high < 256 else np.int32, copy=False)

    def aggregate(self) -> torch.Tensor:
        """Return the mean Dice of all cases and ranks, 0-dimensional."""
        return macro_mean(self.get_buffer()[..., MEASURES.index("dice")])


class OrganDice:
    """Add each organ's mean Dice to an evaluator's metrics, as `dice_NAME`, for a curve of its own.

    Args:
        label_names: names in order of label value, background first.
    """

    def __init__(self, label_names: Sequence[str]) -> None:
        self.organs = label_names[1:]

    def attach(self, engine: Engine) -> None:
        """Attach to an evaluator whose key metric is a :class:`shared_networks.evaluation.metrics.OrganMetric`."""
        engine.add_event_handler(Events.EPOCH_COMPLETED, self)

    def __call__(self, engine: Any) -> None:
        """Add the metrics, of organs that some case has, in truth or in prediction."""
        dice = engine.state.metric_details[engine.state.key_metric_name][..., MEASURES.index("dice")]
        for organ, value in zip(self.organs, dice.nanmean(dim=0).tolist(), strict=True):
            if not math.isnan(value):
                engine.state.metrics[f"dice_{name_in_files(organ)}"] = value


class OrganMetricHandler(IgniteMetricHandler):
    """Attach an :class:`OrganMetric` to an evaluator, whose predictions and truths it takes.

    Args:
        label_names: names in order of label value, background first.
        nsd_tolerance: see :func:`tolerances_of`; `None` measures no surfaces.
        truth_key: item of the evaluator's output that holds the truth.
    """

    def __init__(
        self,
        label_names: Sequence[str],
        nsd_tolerance: float | Mapping[str, float] | None = 2.0,
        truth_key: str = "label",
    ) -> None:
        super().__init__(
            metric_fn=OrganMetric(label_names, nsd_tolerance), output_transform=from_engine(["pred", truth_key])
        )
