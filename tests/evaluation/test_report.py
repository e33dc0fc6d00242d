from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

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

from shared_networks.datasets.labels import label_colour
from shared_networks.errors import InputError
from shared_networks.evaluation.metrics import OrganMetric, organ_measures
from shared_networks.evaluation.report import EvaluationReport
from shared_networks.figures.boxplot import dice_boxplot
from tests.conftest import ROOT

pytestmark = pytest.mark.integration

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


def test_pictures_of_best_and_worst_are_copied_and_those_of_inference_left(tmp_path: Path) -> None:
    cases = ("a", "b", "best", "evaluation")
    for case in cases:
        (tmp_path / f"{case}_evaluation.png").write_text(case)
        (tmp_path / f"{case}_overlay.png").write_text(f"inference of {case}")
    evaluate(tmp_path)

    assert {rank: (tmp_path / f"evaluation_{rank}.png").read_text() for rank in ("best", "median", "worst")} == {
        "best": "a",
        "median": "b",
        "worst": "b",
    }
    assert all((tmp_path / f"{case}_evaluation.png").read_text() == case for case in cases)
    assert all((tmp_path / f"{case}_overlay.png").read_text() == f"inference of {case}" for case in cases)


def test_pictures_of_an_earlier_report_do_not_stay(tmp_path: Path) -> None:
    evaluate(tmp_path)
    for name in (*(f"evaluation_{rank}.png" for rank in ("best", "median", "worst")), "reliability.png", "c.png"):
        (tmp_path / name).touch()
    evaluate(tmp_path)
    assert sorted(file.name for file in tmp_path.glob("*.png")) == ["c.png", "dice_boxplot.png"]


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


@pytest.mark.parametrize("file", ["dice.csv", "metrics.csv", "metrics.json", "reliability.png", "evaluation_best.png"])
def test_a_file_of_someone_else_is_not_replaced(file: str, tmp_path: Path) -> None:
    content = '{"cases": ["mine"]}'
    (tmp_path / file).write_text(content)
    with pytest.raises(InputError) as caught:
        evaluate(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path / file}: is of no earlier run, as far as metrics.json says, and would be lost; give another "
        "--output_dir, or rename it"
    )
    assert [path.name for path in tmp_path.iterdir()] == [file] and (tmp_path / file).read_text() == content


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
    errors = [float(line[9]) for line in read(tmp_path / "metrics.csv")[1:]]
    assert all(0 < error < 1 for error in errors)
    assert content["overall"]["ece"]["mean"] == pytest.approx(np.mean(errors), abs=1e-6)
    for rank in ("best", "median", "worst"):
        picture = imread(tmp_path / f"evaluation_{rank}.png")
        assert (picture == imread(tmp_path / "test_000_evaluation.png")).all()


def bundle_flow(bundle: str, data: Path, *configs: str, **settings: Any) -> ConfigWorkflow:
    root = ROOT / bundle
    return ConfigWorkflow(
        config_file=[str(root / "configs" / f"{name}.json") for name in (*configs, "tiny")],
        workflow_type="infer" if configs == ("inference",) else "train",
        logging_file=False,
        bundle_root=str(root),
        dataset_dir=str(data),
        **settings,
    )


def test_evaluation_scores_what_inference_writes(tmp_path: Path, datasets: dict[str, Path]) -> None:
    """With settings other than the defaults, each of which changes the labels of random networks."""
    bundle, data = "hi_end_mae_btcv_seg", datasets["btcv"]
    weights = [str(tmp_path / f"fold_{fold}.pt") for fold in range(2)]
    network = bundle_flow(bundle, data, "train").parser.get_parsed_content("network_def")
    for seed, file in enumerate(weights):
        torch.manual_seed(seed)
        for parameter in network.parameters():
            parameter.data.normal_(0, 0.3)
        torch.save(network.state_dict(), file)
    settings = {
        "checkpoints": weights,
        "overlap": 0.25,
        "blending": "gaussian",
        "tta_flip_axes": [1],
        "largest_component": True,
        "amp": True,
    }
    maps = {}
    for name, given in (("default", {"checkpoint": weights[0]}), ("other", settings)):
        out = tmp_path / name
        segmentation = bundle_flow(bundle, data, "inference", output_dir=str(out), **given)
        segmentation.initialize()
        segmentation.run()
        evaluation = bundle_flow(bundle, data, "train", "evaluate", output_dir=str(out / "report"), **given)
        evaluation.initialize()
        evaluation.run()
        maps[name] = np.asanyarray(nib.load(out / "test_000_seg.nii.gz").dataobj)
        truth = np.asanyarray(nib.load(data / "labelsTs" / "test_000.nii.gz").dataobj)
        expected = organ_measures(maps[name], truth, (1, 1, 1), 14, None)[:, 0]
        written = [float(cell) if cell else np.nan for cell in read(out / "report" / "dice.csv")[1][1:14]]
        np.testing.assert_allclose(written, expected, atol=6e-5)
        content = json.loads((out / "report" / "metrics.json").read_text())["made_with"]
        assert [model["file"] for model in content["models"]] == (weights if name == "other" else weights[:1])
        assert {**content["settings"], "checkpoints": settings["checkpoints"]}.items() >= (
            settings.items() if name == "other" else {"overlap": 0.5, "blending": "constant"}.items()
        )
    assert (maps["default"] != maps["other"]).mean() > 0.1


@pytest.mark.parametrize("bundle", ["hi_end_mae_btcv_seg", "hi_end_mae_flare_seg"])
def test_evaluation_and_inference_share_settings_and_parts(bundle: str) -> None:
    """So that neither can be changed alone."""
    configs = ROOT / bundle / "configs"
    evaluation, inference = (json.loads((configs / f"{name}.json").read_text()) for name in ("evaluate", "inference"))
    for setting in ("checkpoints", "overlap", "blending", "tta_flip_axes", "largest_component"):
        assert evaluation[setting] == inference[setting]
    scoring = {"organ", "label_names", "label_probability", "watch", "_target_", "_desc_"}
    ours, theirs = ({k: v for k, v in part.items() if k not in scoring}
                    for part in (evaluation["validate#inferer"], inference["inferer"]))  # fmt: skip
    assert ours == theirs
    assert evaluation["validate#postprocessing"]["transforms"][0] == inference["postprocessing"]["transforms"][0]
    saved = {key: value for key, value in inference["saver"]["settings"].items() if key != "organ_probability"}
    parts = [part for part in evaluation["validate#handlers"] if isinstance(part, dict)]
    (report,) = (part for part in parts if part["_target_"].endswith("EvaluationReport"))
    assert report["settings"] == saved


def test_training_selects_by_what_evaluation_reports(datasets: dict[str, Path]) -> None:
    """An organ that is made up counts 0 in both, so that the mean of a perfect organ and a made-up one is 0.5."""
    truth = MetaTensor(torch.zeros(1, 6, 5, 4), affine=torch.diag(torch.tensor([-2.0, 2.0, 5.0, 1.0])))
    truth[:, :2] = 1
    made_up = truth.clone()
    made_up[:, 4:] = 2
    values = {}
    for configs in (("train",), ("train", "evaluate")):
        flow = bundle_flow("hi_end_mae_btcv_seg", datasets["btcv"], *configs, device="cpu")
        handlers = flow.parser.get_parsed_content("validate#key_metric")
        metric = handlers["val_mean_dice"].metric_fn
        metric([made_up], [truth])
        values[configs] = float(metric.aggregate())
    assert set(values.values()) == {0.5}
