"""Measure how well probabilities agree with how often they are right, organ by organ."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from ignite.engine import Engine, Events
from monai.metrics.metric import Cumulative
from monai.utils import convert_to_tensor
from torch import Tensor

from shared_networks.evaluation.metrics import macro_mean

BINS = 20


class CalibrationError(Cumulative):
    """Add the expected calibration error to an evaluator's metrics, as `ece`, from probabilities as they come.

    Voxels are put into bins of equal width by the probability of an organ. The error of the organ is the distance
    between mean probability and share of true voxels in a bin, averaged over bins by their numbers of voxels (Guo et
    al., "On calibration of modern neural networks", ICML 2017). The background is left out. Values are those of
    `monai.metrics.CalibrationErrorMetric(include_background=False)`, which needs the probabilities of all voxels at
    once. Here sums by organ and bin are enough.

    `engine.state.metric_details["ece"]` then hold `[cases, organs]`, and the metric is the mean over each case's
    organs first, then over cases. `metric_details["ece_bins"]` hold `[cases, organs, bins, 3]`: of each bin the number
    of voxels, the sum of their probabilities, and how many are true. Handlers that read them must come after it.

    Args:
        label_names: names in order of label value, background first.
        truth_key: item of the batch that holds the truth, [1, 1, X, Y, Z] on the scan's grid.

    Example:
        >>> error = CalibrationError(["background", "liver"])
        >>> inferer = SlidingWindowLabels(96, watch=error)  # doctest: +SKIP
        >>> error.attach(evaluator)  # doctest: +SKIP
    """

    def __init__(self, label_names: Sequence[str], truth_key: str = "truth") -> None:
        super().__init__()
        self.organs = len(label_names) - 1
        self.truth_key = truth_key
        self.start_case(torch.zeros(0, 0, 0))

    def attach(self, engine: Engine) -> None:
        """Attach to an evaluator of batches of one, whose inferer shows its probabilities to this object."""
        engine.add_event_handler(Events.EPOCH_STARTED, lambda _: self.reset())
        engine.add_event_handler(Events.ITERATION_STARTED, self.start)
        engine.add_event_handler(Events.ITERATION_COMPLETED, lambda _: self.append(self.case_bins()))
        engine.add_event_handler(Events.EPOCH_COMPLETED, self.report)

    def start(self, engine: Any) -> None:
        """Take the truth of the next case."""
        self.start_case(convert_to_tensor(engine.state.batch[self.truth_key], track_meta=False)[0, 0])

    def start_case(self, truth: Tensor) -> None:
        """Take the truth of a case, [X, Y, Z]."""
        self.truth = truth
        self.chances = torch.zeros(self.organs, dtype=torch.float64)
        self.bins = torch.zeros(3, self.organs, BINS, dtype=torch.float64)  # but the first, which is what is left

    def __call__(self, probabilities: Tensor, region: tuple[slice, ...]) -> None:
        """Take a part of a case; no voxel may come twice.

        Args:
            probabilities: [C, x, y, z] of all classes, background first.
            region: where it lies in the case's truth.
        """
        chances = probabilities[1:].flatten(1)
        ends = torch.linspace(0, 1 + torch.finfo(torch.float32).eps, BINS + 1, device=chances.device)[1:]
        # Nearly all voxels are in the first bin, of which sums over the whole case are known without looking at each.
        organs, voxels = (chances > ends[0]).nonzero(as_tuple=True)
        higher = chances[organs, voxels]
        hits = self.truth[region].to(chances.device).flatten()[voxels] == organs + 1
        bins = organs * BINS + torch.bucketize(higher, ends).clamp_(max=BINS - 1)
        for sums, weights in zip(self.bins, (None, higher.double(), hits.double()), strict=True):
            sums += torch.bincount(bins, weights, minlength=sums.numel()).view(sums.shape).cpu()
        self.chances += chances.sum(dim=1, dtype=torch.float64).cpu()

    def case_bins(self) -> Tensor:
        """Return the sums of the case, [organs, bins, 3]. Voxels that never came have probability 0."""
        true = torch.stack([(self.truth == value).sum() for value in range(1, self.organs + 1)])
        whole = torch.stack([torch.full_like(self.chances, self.truth.numel()), self.chances, true.double()])
        bins = self.bins.clone()
        bins[..., 0] += whole - bins.sum(dim=-1)
        return bins.permute(1, 2, 0)

    def aggregate(self) -> Tensor:
        """Return the mean of all cases and processes, 0-dimensional."""
        return macro_mean(errors_of_bins(self.get_buffer()))

    def report(self, engine: Any) -> None:
        """Add the metric and its details."""
        engine.state.metrics["ece"] = self.aggregate().item()
        engine.state.metric_details["ece_bins"] = self.get_buffer()
        engine.state.metric_details["ece"] = errors_of_bins(self.get_buffer())


def errors_of_bins(bins: Tensor) -> Tensor:
    """Return the expected calibration error, [...], of bins [..., bins, 3]."""
    voxels, chances, true = bins.unbind(dim=-1)
    return (chances - true).abs().sum(dim=-1) / voxels.sum(dim=-1)
