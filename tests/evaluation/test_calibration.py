from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from monai.data import DataLoader, Dataset, MetaTensor
from monai.engines import SupervisedEvaluator
from monai.handlers import IgniteMetricHandler, from_engine
from monai.inferers import Inferer
from monai.metrics import CalibrationErrorMetric
from monai.networks import one_hot

from shared_networks.evaluation.calibration import BINS, CalibrationError, errors_of_bins
from shared_networks.evaluation.metrics import OrganMetric
from shared_networks.evaluation.report import EvaluationReport
from shared_networks.inference.sliding_window import SlidingWindowLabels
from tests.evaluation.test_report import read
from tests.inference.test_sliding_window import CLASSES, NAMES, ROI, SCANS, Net, prepared, stock_probabilities, write

SHAPE = (7, 6, 5)


def by_monai(probabilities: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """MONAI's error of each organ of one case, [organs]; it needs [C, X, Y, Z] at once."""
    metric = CalibrationErrorMetric(num_bins=BINS, include_background=False, metric_reduction="none")
    metric(probabilities[None], one_hot(truth[None, None], len(probabilities)))
    return metric.aggregate()[0]


def drawn(seed: int, sharpness: float = 3.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Probabilities [C, X, Y, Z] and a truth [X, Y, Z] in which the last organ has no voxel."""
    generator = torch.Generator().manual_seed(seed)
    truth = torch.randint(0, CLASSES - 1, SHAPE, generator=generator).float()
    return (sharpness * torch.randn(CLASSES, *SHAPE, generator=generator)).softmax(0), truth


def errors_of(probabilities: torch.Tensor, truth: torch.Tensor, step: int) -> torch.Tensor:
    error = CalibrationError(NAMES)
    error.start_case(truth)
    for first in range(0, SHAPE[1], step):
        region = (slice(None), slice(first, first + step), slice(None))
        error(probabilities[(slice(None), *region)], region)
    return errors_of_bins(error.case_bins())


@pytest.mark.parametrize("sharpness", [0.1, 3.0, 40.0])
@pytest.mark.parametrize("step", [1, 4, 6])
def test_sums_of_parts_are_monais_error_of_the_whole(sharpness: float, step: int) -> None:
    probabilities, truth = drawn(0, sharpness)
    probabilities[:, 0] = torch.tensor([0.0, 1.0, 0.0, 0.0, 0.0])[:, None, None]  # at the ends of the bins
    torch.testing.assert_close(
        errors_of(probabilities, truth, step).float(), by_monai(probabilities, truth), rtol=1e-5, atol=1e-7
    )


def test_the_error_is_how_far_probability_and_truth_lie_apart() -> None:
    """Of 8 voxels: 0.72 in four of which two are true, 0.22 in two of which none is, the others 0 and one true."""
    error = CalibrationError(["background", "liver"])
    error.start_case(torch.tensor([1.0, 1, 0, 0, 0, 0, 1, 0]).reshape(2, 2, 2))
    liver = torch.tensor([0.72, 0.72, 0.72, 0.72, 0.22, 0.22, 0, 0]).reshape(2, 2, 2)
    error(torch.stack([1 - liver, liver]), (slice(0, 2),) * 3)
    assert errors_of_bins(error.case_bins()).tolist() == pytest.approx([(4 * 0.22 + 2 * 0.22 + 1) / 8])
    bins = error.case_bins()[0]
    assert bins[[0, 4, 14]].flatten().tolist() == pytest.approx([2, 0, 1, 2, 0.44, 0, 4, 2.88, 2])
    assert bins.sum(dim=0).tolist() == pytest.approx([8, 3.32, 3])


def test_bins_are_those_of_all_voxels_at_once() -> None:
    probabilities, truth = drawn(2)
    error = CalibrationError(NAMES)
    error.start_case(truth)
    for region in (np.s_[:, :2, :], np.s_[:, 2:, :]):
        error(probabilities[(slice(None), *region)], region)
    for value, bins in enumerate(error.case_bins().numpy(), start=1):
        chances, true = probabilities[value].flatten().double().numpy(), truth.flatten().numpy() == value
        for column, weights in enumerate((None, chances, true.astype(float))):
            expected, _ = np.histogram(chances, BINS, (0, 1), weights=weights)
            np.testing.assert_allclose(bins[:, column], expected, atol=1e-5)


def test_voxels_that_are_not_shown_have_probability_0() -> None:
    probabilities, truth = drawn(1)
    probabilities[:, :, 4:] = torch.tensor([1.0, 0, 0, 0, 0])[:, None, None, None]
    error = CalibrationError(NAMES)
    error.start_case(truth)
    region = (slice(None), slice(0, 4), slice(None))
    error(probabilities[(slice(None), *region)], region)
    torch.testing.assert_close(
        errors_of_bins(error.case_bins()).float(), by_monai(probabilities, truth), rtol=1e-5, atol=1e-7
    )


@pytest.mark.parametrize("flips", [(), (1,)])
@pytest.mark.parametrize("name", SCANS)
def test_of_sliding_windows_it_is_that_of_monais_chain(name: str, flips: tuple[int, ...], tmp_path: Path) -> None:
    """Probabilities are shown voxel by voxel of the scan, and labels stay as they are."""
    file = write(tmp_path / "scan.nii.gz", *SCANS[name])
    shape = SCANS[name][2]
    network = Net()
    truth = torch.from_numpy(np.random.default_rng(0).integers(0, CLASSES, shape)).float()
    error = CalibrationError(NAMES)
    shown = torch.zeros(CLASSES, *shape)
    calls = torch.zeros(shape)

    def watch(probabilities: torch.Tensor, region: tuple[slice, ...]) -> None:
        shown[(slice(None), *region)] = probabilities
        calls[region] += 1
        error(probabilities, region)

    error.start_case(truth)
    labels = SlidingWindowLabels(ROI, 2, flip_axes=flips, watch=watch)(prepared(file), network)
    assert calls.max() == 1
    assert torch.equal(labels.as_tensor(), SlidingWindowLabels(ROI, 2, flip_axes=flips)(prepared(file), network))
    torch.testing.assert_close(errors_of_bins(error.case_bins()).float(), by_monai(shown, truth), rtol=1e-4, atol=1e-6)
    if not flips:
        expected = stock_probabilities(file, network, 0.5, "constant")
        torch.testing.assert_close(shown[1:], expected[1:], atol=1e-3, rtol=0)
        torch.testing.assert_close(
            errors_of_bins(error.case_bins()).float(), by_monai(expected, truth), rtol=1e-3, atol=1e-5
        )


def test_a_scan_of_air_has_no_probability_at_all(tmp_path: Path) -> None:
    image = prepared(write(tmp_path / "scan.nii.gz", *SCANS["LPS"]))
    error = CalibrationError(NAMES)
    truth = torch.zeros(SCANS["LPS"][2])
    truth[:2, :3, :5] = 2
    error.start_case(truth)
    SlidingWindowLabels(ROI, watch=error)(image * 0, Net())
    assert errors_of_bins(error.case_bins()).tolist() == pytest.approx([0, 30 / truth.numel(), 0, 0])


class Shown(Inferer):
    """The image holds the probabilities; labels are the largest."""

    def __init__(self, watch: Any) -> None:
        super().__init__()
        self.watch = watch

    def __call__(self, inputs: torch.Tensor, network: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.watch(inputs[0], (slice(None),) * 3)
        return inputs.argmax(1, keepdim=True)


def evaluator_of(names: str, folder: Path) -> SupervisedEvaluator:
    """Of cases a and b, by their letters."""
    cases = {name: drawn(seed) for seed, name in enumerate("ba")}
    items = [
        {
            "image": MetaTensor(cases[name][0], meta={"filename_or_obj": f"{name}.nii.gz"}),
            **{key: MetaTensor(cases[name][1][None]) for key in ("truth", "label")},
        }
        for name in names
    ]
    error = CalibrationError(NAMES)
    return SupervisedEvaluator(
        device=torch.device("cpu"),
        val_data_loader=DataLoader(Dataset(items)),
        network=torch.nn.Identity(),
        inferer=Shown(error),
        key_val_metric={
            "val_mean_dice": IgniteMetricHandler(OrganMetric(NAMES), output_transform=from_engine(["pred", "label"]))
        },
        val_handlers=[error, EvaluationReport(NAMES, folder)],
    )


def test_an_evaluator_reports_it_by_case_and_as_a_mean(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A second run replaces the first."""
    evaluator = evaluator_of("ba", tmp_path)
    for _ in range(2):
        evaluator.run()
        expected = torch.stack([by_monai(*drawn(seed)) for seed in (1, 0)])
        table = read(tmp_path / "metrics.csv")
        assert table[0][9] == "ece"
        assert [float(row[9]) for row in table[1:]] == pytest.approx(expected.flatten().tolist(), abs=1e-6)
        assert evaluator.state.metrics["ece"] == pytest.approx(float(expected.mean()), rel=1e-5)
        assert f"lower is better: {expected.mean():.5f}" in capsys.readouterr().out
        assert evaluator.state.metric_details["ece_bins"].shape == (2, CLASSES - 1, BINS, 3)


def test_reliability_is_of_all_cases_and_of_a_repeated_one_once(tmp_path: Path) -> None:
    drawings = {}
    for names in ("ab", "aba", "a"):
        evaluator_of(names, tmp_path / names).run()
        drawings[names] = (tmp_path / names / "reliability.png").read_bytes()
    assert drawings["ab"] == drawings["aba"] != drawings["a"]
