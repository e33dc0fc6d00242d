from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch
from monai.data import DataLoader, Dataset, MetaTensor
from monai.engines import SupervisedEvaluator
from monai.handlers import MeanDice, from_engine
from monai.transforms import AsDiscreted

from shared_networks.reports import DiceReport, dice_table, format_organ_table, source_file

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


def evaluate(
    tmp_path: Path,
    label_names: list[str] = NAMES,
    files: list[str] | None = None,
    metric: str = "val_mean_dice",
    include_background: bool = False,
) -> SupervisedEvaluator:
    items = [
        {"image": MetaTensor(image, meta={"filename_or_obj": f"scans/{file}"}), "label": MetaTensor(label)}
        for file, (image, label) in ((file, CASES[file]) for file in files or CASES)
    ]
    evaluator = SupervisedEvaluator(
        device=torch.device("cpu"),
        val_data_loader=DataLoader(Dataset(items), batch_size=2),
        network=torch.nn.Identity(),
        postprocessing=AsDiscreted(keys=["pred", "label"], to_onehot=4),
        key_val_metric={
            metric: MeanDice(include_background=include_background, output_transform=from_engine(["pred", "label"]))
        },
        val_handlers=[DiceReport(label_names, tmp_path / "eval")],
    )
    evaluator.run()
    return evaluator


def read(tmp_path: Path) -> list[list[str]]:
    with (tmp_path / "eval" / "dice.csv").open(newline="") as stream:
        return list(csv.reader(stream))


def test_csv_has_each_case_by_name_and_the_means(tmp_path: Path) -> None:
    evaluator = evaluate(tmp_path)

    assert read(tmp_path) == [
        ["case", "liver", "portal vein", "spleen", "mean"],
        ["a", "0.6667", "", "1.0000", "0.8333"],
        ["b", "0.0000", "0.8571", "", "0.4286"],
        ["mean", "0.3333", "0.8571", "1.0000", "0.6310"],
    ]
    assert evaluator.state.metrics["val_mean_dice"] == pytest.approx(0.6310, abs=1e-4)


def test_prints_mean_and_cases_of_each_organ(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evaluate(tmp_path)

    assert capsys.readouterr().out.splitlines() == [
        "organ          Dice   cases",
        "---------------------------",
        "liver        0.3333       2",
        "portal vein  0.8571       1",
        "spleen       1.0000       1",
        "---------------------------",
        "mean         0.6310       2",
    ]


def test_a_repeated_case_counts_once(tmp_path: Path) -> None:
    evaluate(tmp_path, files=["a_0000.nii.gz", "b_0000.nii.gz", "a_0000.nii.gz"])

    assert [row[0] for row in read(tmp_path)] == ["case", "a", "b", "mean"]
    assert read(tmp_path)[-1][-1] == "0.6310"


def test_a_second_run_replaces_the_first(tmp_path: Path) -> None:
    evaluator = evaluate(tmp_path)
    first = read(tmp_path)
    evaluator.run()

    assert read(tmp_path) == first


def test_rejects_names_that_do_not_fit_the_columns(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has 3 columns but label_names has 2 organs"):
        evaluate(tmp_path, label_names=NAMES[:3])
    with pytest.raises(ValueError, match="has 4 columns but label_names has 3 organs"):
        evaluate(tmp_path, include_background=True)


def test_rejects_an_unknown_metric(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no metric 'val_mean_dice', it has \['other'\]"):
        evaluate(tmp_path, metric="other")


def test_dice_table_averages_only_what_is_there() -> None:
    nan = float("nan")
    table = dice_table(torch.tensor([[0.5, nan], [1.0, nan]]))

    torch.testing.assert_close(
        table, torch.tensor([[0.5, nan, 0.5], [1.0, nan, 1.0], [0.75, nan, 0.75]]), equal_nan=True
    )


def test_organ_table_shows_an_organ_in_no_case() -> None:
    table = format_organ_table(["aorta"], torch.tensor([[float("nan")]]))

    assert table.splitlines()[2].split() == ["aorta", "-", "0"]


@pytest.mark.parametrize("image", [torch.zeros(1, 2, 2, 2), MetaTensor(torch.zeros(1, 2, 2, 2))])
def test_source_file_rejects_an_image_without_file(image: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="no 'filename_or_obj' to name its case after"):
        source_file(image)
