from __future__ import annotations

import csv
import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb
from matplotlib.image import imread
from monai.bundle import ConfigWorkflow
from monai.data import DataLoader, Dataset, MetaTensor
from monai.engines import SupervisedEvaluator
from monai.handlers import IgniteMetricHandler, from_engine

from shared_networks.errors import InputError
from shared_networks.evaluation import EvaluationReport
from shared_networks.figures import dice_boxplot, label_colour
from shared_networks.metrics import OrganMetric

from .conftest import ROOT

NAMES = ["background", "liver", "portal vein", "spleen"]


def label_map(**voxels: int) -> torch.Tensor:
    """A [1, 2, 3, 4] label map that starts with so many voxels of each value: ``label_map(v1=2)``."""
    flat = torch.zeros(24)
    start = 0
    for value, count in voxels.items():
        flat[start : start + count] = int(value[1:])
        start += count
    return flat.reshape(1, 2, 3, 4)


# The network hands on its input, so the image is the prediction. Dice: a: liver 2*2/(2+4), spleen 1;
# b: liver 0 (never predicted), portal vein 2*3/(3+3+1) as the prediction spills one voxel over.
CASES = {
    "b_0000.nii.gz": (label_map(v0=2, v2=4), label_map(v1=2, v2=3)),
    "a_0000.nii.gz": (label_map(v1=2, v0=2, v3=5), label_map(v1=4, v3=5)),
}
AFFINE = torch.diag(torch.tensor([-2.0, -1.0, 5.0, 1.0]).double())


def evaluate(
    folder: Path,
    label_names: list[str] = NAMES,
    files: list[str] | None = None,
    metric: str = "val_mean_dice",
) -> SupervisedEvaluator:
    items = [
        {
            "image": MetaTensor(image, affine=AFFINE, meta={"filename_or_obj": f"scans/{file}"}),
            "label": MetaTensor(label, affine=AFFINE),
        }
        for file, (image, label) in ((file, CASES[file]) for file in files or CASES)
    ]
    values = OrganMetric(NAMES)
    evaluator = SupervisedEvaluator(
        device=torch.device("cpu"),
        val_data_loader=DataLoader(Dataset(items), batch_size=2),
        network=torch.nn.Identity(),
        key_val_metric={metric: IgniteMetricHandler(values, output_transform=from_engine(["pred", "label"]))},
        val_handlers=[EvaluationReport(label_names, folder)],
    )
    evaluator.run()
    return evaluator


def read(file: Path) -> list[list[str]]:
    with file.open(newline="") as stream:
        return list(csv.reader(stream))


def test_report_has_each_case_by_name_and_the_means(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evaluator = evaluate(tmp_path / "eval")

    assert read(tmp_path / "eval" / "dice.csv") == [
        ["case", "liver", "portal vein", "spleen", "mean"],
        ["a", "0.6667", "", "1.0000", "0.8333"],
        ["b", "0.0000", "0.8571", "", "0.4286"],
        ["mean", "0.3333", "0.8571", "1.0000", "0.6310"],
    ]
    assert evaluator.state.metrics["val_mean_dice"] == pytest.approx(0.6310, abs=1e-4)
    lines = read(tmp_path / "eval" / "metrics.csv")
    assert [line[:2] for line in lines[1:]] == [[case, organ] for case in "ab" for organ in NAMES[1:]]
    assert lines[1][5:7] == ["0.04", "0.02"]  # ml: 4 and 2 voxels of 2 x 1 x 5 mm
    assert lines[4][2:5] == ["0.0000", "", "0.0000"]
    assert lines[4][-1] == "missed"
    content = json.loads((tmp_path / "eval" / "metrics.json").read_text())
    assert content["overall"]["dice"]["mean"] == 0.631
    assert content["settings"]["nsd_tolerance_mm"] == dict.fromkeys(NAMES[1:], 2.0)
    assert (tmp_path / "eval" / "dice_boxplot.png").stat().st_size > 10_000
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].split() == ["organ", "Dice", "HD95", "mm", "NSD", "cases", "missed", "false"]
    assert printed[6].startswith("mean         0.6310")
    assert "mean Dice is 0.7302" in printed[-1]
    assert sorted(file.name for file in (tmp_path / "eval").iterdir()) == [
        "dice.csv",
        "dice_boxplot.png",
        "metrics.csv",
        "metrics.json",
    ]


def test_overlays_of_best_and_worst_are_copied(tmp_path: Path) -> None:
    for case in "ab":
        (tmp_path / f"{case}_overlay.png").write_text(case)
    evaluate(tmp_path)

    assert {rank: (tmp_path / f"{rank}_overlay.png").read_text() for rank in ("best", "median", "worst")} == {
        "best": "a",
        "median": "b",
        "worst": "b",
    }


def test_a_repeated_case_counts_once(tmp_path: Path) -> None:
    evaluate(tmp_path, files=["a_0000.nii.gz", "b_0000.nii.gz", "a_0000.nii.gz"])

    rows = read(tmp_path / "dice.csv")
    assert [row[0] for row in rows] == ["case", "a", "b", "mean"]
    assert rows[-1][-1] == "0.6310"


def test_a_second_run_replaces_the_first(tmp_path: Path) -> None:
    evaluator = evaluate(tmp_path)
    first = {file.name: file.read_bytes() for file in tmp_path.glob("*.[cj]s*")}
    evaluator.run()

    assert len(first) == 3
    assert {file.name: file.read_bytes() for file in tmp_path.glob("*.[cj]s*")} == first


def test_rejects_a_metric_that_is_not_of_these_organs(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds \[3, 7\] numbers a case, not 2 organs by 7 measures"):
        evaluate(tmp_path, label_names=NAMES[:3])
    with pytest.raises(ValueError, match=r"no metric 'val_mean_dice', it has \['other'\]"):
        evaluate(tmp_path, metric="other")
    with pytest.raises(InputError, match="nsd_tolerance is -1 for liver"):
        EvaluationReport(NAMES, tmp_path, nsd_tolerance=-1)


def test_rejects_details_of_a_plain_mean_dice(tmp_path: Path) -> None:
    evaluator = evaluate(tmp_path)
    evaluator.state.metric_details["val_mean_dice"] = torch.zeros(2, 3)  # as train.json's metric has under that name
    with pytest.raises(ValueError, match="attach an OrganMetric with the same label_names"):
        EvaluationReport(NAMES, tmp_path)(evaluator)


def test_says_at_the_start_that_nothing_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"file/eval: no folder can be made there .*; give another --output_dir"):
        evaluate(tmp_path / "file" / "eval")


@pytest.mark.parametrize("cases", [1, 6])
def test_boxplot_has_colours_counts_and_every_case(cases: int) -> None:
    dice = np.linspace(0.3, 0.9, cases * 3).reshape(cases, 3)
    dice[:, 2] = np.nan
    dice[0, 0] = np.nan if cases > 1 else 0.4
    figure = dice_boxplot(NAMES[1:], dice, {"n": cases, "mean": 0.6, "interval_95": [0.5, 0.7] if cases > 1 else None})

    (panel,) = figure.axes
    present = max(cases - 1, 1)
    labels = [label.get_text() for label in panel.get_xticklabels()]
    assert labels == [f"liver (n={present})", f"portal vein (n={cases})", "spleen (n=0)"]
    assert ("interval 0.500 to 0.700" in panel.get_title()) == (cases > 1)
    dots = [collection.get_offsets() for collection in panel.collections]
    assert [len(offsets) for offsets in dots] == [present, cases, 0]
    np.testing.assert_allclose(dots[1][:, 1], dice[:, 1])
    assert [patch.get_facecolor()[:3] for patch in panel.patches] == [to_rgb(label_colour(v)) for v in (1, 2, 3)]


def test_evaluate_config_reports_on_the_scans_grid(tmp_path: Path, datasets: dict[str, Path]) -> None:
    """With random weights: what is measured must agree with the labels that lie on file."""
    bundle = ROOT / "hi_end_mae_btcv_seg"
    flow = ConfigWorkflow(
        config_file=[str(bundle / "configs" / file) for file in ("train.json", "evaluate.json", "tiny.json")],
        workflow_type="train",
        logging_file=False,
        bundle_root=str(bundle),
        dataset_dir=str(datasets["btcv"]),
        output_dir=str(tmp_path),
        checkpoint=str(tmp_path / "model.pt"),
        pretrained_encoder="",
        nsd_tolerance=4.0,
        sw_batch_size=1,
    )
    torch.manual_seed(0)
    torch.save(flow.parser.get_parsed_content("network_def").state_dict(), tmp_path / "model.pt")
    flow.initialize()
    flow.run()

    rows = read(tmp_path / "dice.csv")
    assert [row[0] for row in rows[1:]] == ["test_000", "mean"]
    content = json.loads((tmp_path / "metrics.json").read_text())
    assert set(content["settings"]["nsd_tolerance_mm"].values()) == {4.0}
    truth = nib.load(datasets["btcv"] / "labelsTs" / "test_000.nii.gz")
    ml = np.prod(truth.header.get_zooms()) / 1000
    for value, line in enumerate(read(tmp_path / "metrics.csv")[1:], start=1):
        assert float(line[5]) == pytest.approx((np.asanyarray(truth.dataobj) == value).sum() * ml, abs=0.006)
    for rank in ("best", "median", "worst"):
        assert (imread(tmp_path / f"{rank}_overlay.png") == imread(tmp_path / "test_000_overlay.png")).all()
