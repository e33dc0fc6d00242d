from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from scipy.stats import bootstrap

from shared_networks.datasets.pairs import source_file
from shared_networks.errors import InputError
from shared_networks.evaluation.tables import (
    COLUMNS,
    dice_rows,
    dice_table,
    extremes,
    format_organ_table,
    format_overall,
    measure_rows,
    presence_counts,
    summarise,
    summary,
)
from shared_networks.files import write_csv, write_json

NAN = math.nan
ORGANS = ["liver", "portal vein", "aorta"]
# Case a: liver found, portal vein missed, aorta in neither; case b: all found but an aorta that is not there.
MEASURED = torch.tensor(
    [
        [
            [0.9, 3.456, 0.8, 1500, 1400, -100, -100 / 15, 0.02],
            [0, NAN, 0, 20, 0, -20, -100, 0.01],
            [NAN, NAN, NAN, 0, 0, 0, NAN, 0.0000006],
        ],
        [
            [0.7, 6, 0.5, 1000, 1200, 200, 20, 0.04],
            [0.5, 4, 0.6, 10, 5, -5, -50, 0.01],
            [0, NAN, 0, 0, 3, 3, NAN, 0.004],
        ],
    ],
    dtype=torch.float64,
)
DICE = MEASURED[..., 0]


def test_dice_table_averages_only_what_is_there() -> None:
    table = dice_table(torch.tensor([[0.5, NAN], [1.0, NAN]]))

    torch.testing.assert_close(
        table, torch.tensor([[0.5, NAN, 0.5], [1.0, NAN, 1.0], [0.75, NAN, 0.75]]), equal_nan=True
    )


def test_dice_rows_have_means_of_both() -> None:
    assert dice_rows(["a", "b"], ORGANS, DICE) == [
        ["case", *ORGANS, "mean"],
        ["a", "0.9000", "0.0000", "", "0.4500"],
        ["b", "0.7000", "0.5000", "0.0000", "0.4000"],
        ["mean", "0.8000", "0.2500", "0.0000", "0.4250"],
    ]


def test_measure_rows_are_a_line_for_each_case_and_organ() -> None:
    header, *rows = measure_rows(["a", "b"], ORGANS, MEASURED)
    assert header == ["case", "organ", *COLUMNS, "presence"]
    assert rows == [
        ["a", "liver", "0.9000", "3.46", "0.8000", "1500.00", "1400.00", "-100.00", "-6.7", "0.020000", "found"],
        ["a", "portal vein", "0.0000", "", "0.0000", "20.00", "0.00", "-20.00", "-100.0", "0.010000", "missed"],
        ["a", "aorta", "", "", "", "0.00", "0.00", "0.00", "", "0.000001", "absent"],
        ["b", "liver", "0.7000", "6.00", "0.5000", "1000.00", "1200.00", "200.00", "20.0", "0.040000", "found"],
        ["b", "portal vein", "0.5000", "4.00", "0.6000", "10.00", "5.00", "-5.00", "-50.0", "0.010000", "found"],
        ["b", "aorta", "0.0000", "", "0.0000", "0.00", "3.00", "3.00", "", "0.004000", "false positive"],
    ]
    assert presence_counts(ORGANS, MEASURED) == {
        "liver": {"cases": 2, "missed": 0, "false_positives": 0},
        "portal vein": {"cases": 2, "missed": 1, "false_positives": 0},
        "aorta": {"cases": 0, "missed": 0, "false_positives": 1},
    }


def test_interval_is_the_bootstraps() -> None:
    values = torch.from_numpy(np.random.default_rng(3).beta(8, 2, size=12))
    ours = summarise(torch.cat([values, torch.tensor([NAN])]), seed=1)
    theirs = bootstrap((values.numpy(),), np.mean, method="percentile", n_resamples=20_000).confidence_interval

    assert ours["n"] == 12
    assert ours["mean"] == pytest.approx(values.mean().item(), abs=1e-4)
    assert ours["median"] == pytest.approx(np.median(values), abs=1e-4)
    assert ours["std"] == pytest.approx(np.std(values.numpy(), ddof=1), abs=1e-4)
    assert ours["interval_95"] == pytest.approx(list(theirs), abs=0.005)
    assert ours == summarise(values, seed=1)
    assert ours != summarise(values, seed=2)


def test_few_cases_are_described_as_far_as_they_go() -> None:
    assert summarise(torch.tensor([NAN])) == {"n": 0, "mean": None, "median": None, "std": None, "interval_95": None}
    assert summarise(torch.tensor([0.5]))["mean"] == 0.5
    assert summarise(torch.tensor([0.5]))["std"] is None
    assert summarise(torch.tensor([0.5, 0.5]))["interval_95"] == [0.5, 0.5]


def test_summary_has_both_orders_of_means(tmp_path: Path) -> None:
    content = summary(["a", "b"], ORGANS, MEASURED, {"nsd_tolerance_mm": {"liver": 2.0}}, seed=4)
    write_json(tmp_path / "new" / "metrics.json", content)

    assert json.loads((tmp_path / "new" / "metrics.json").read_text()) == content
    assert content["cases"] == ["a", "b"]
    assert content["settings"]["nsd_tolerance_mm"] == {"liver": 2.0}
    assert content["settings"]["bootstrap"]["seed"] == 4
    dice = content["overall"]["dice"]
    assert dice["mean"] == 0.425
    assert dice["n"] == 2
    assert dice["mean_of_organs"] == 0.35
    assert dice["interval_95"] == [0.4, 0.45]
    assert content["overall"]["ece"]["mean"] == 0.014  # (0.03 / 3 + 0.054 / 3) / 2, of all organs
    liver, aorta = content["organs"]["liver"], content["organs"]["aorta"]
    assert liver["hd95_mm"]["mean"] == 4.73
    assert liver["volume_error_percent"]["median"] == pytest.approx(6.7, abs=0.05)
    assert aorta["hd95_mm"] == {"n": 0, "mean": None, "median": None, "std": None, "interval_95": None}
    assert aorta["false_positives"] == 1
    assert "truth_ml" not in liver


def test_prints_means_and_counts_of_each_organ() -> None:
    assert format_organ_table(ORGANS, MEASURED).splitlines() == [
        "organ          Dice  HD95 mm     NSD  cases  missed  false",
        "----------------------------------------------------------",
        "liver        0.8000     4.73  0.6500      2       0      0",
        "portal vein  0.2500     4.00  0.3000      2       1      0",
        "aorta        0.0000        -  0.0000      0       0      1",
        "----------------------------------------------------------",
        "mean         0.4250     4.23  0.3833      2       1      1",
    ]


def test_prints_what_the_mean_is_worth() -> None:
    assert format_overall(summary(["a", "b"], ORGANS, MEASURED, {})).splitlines() == [
        "means are over each case's organs first, then over cases; 95 % bootstrap interval of the mean Dice over 2 "
        "cases: 0.4000 to 0.4500",
        "over cases first, then over organs, the mean Dice is 0.3500",
        "expected calibration error, lower is better: 0.014000",
    ]
    uncalibrated = torch.cat([MEASURED[:1, :, :-1], torch.full((1, 3, 1), NAN)], dim=-1)
    assert format_overall(summary(["a"], ORGANS, uncalibrated, {})) == (
        "means are over each case's organs first, then over cases"
    )


def test_organ_table_shows_an_organ_in_no_case() -> None:
    table = format_organ_table(["aorta"], MEASURED[:1, 2:])
    assert table.splitlines()[2].split() == ["aorta", "-", "-", "-", "0", "0", "0"]


def test_extremes_are_by_mean_dice() -> None:
    dice = torch.tensor([[0.5, NAN], [0.9, 0.7], [NAN, NAN], [0.6, 0.7], [0.1, 0.3]])
    assert extremes(list("abcde"), dice) == {"best": "b", "median": "a", "worst": "e"}
    assert extremes(["a"], dice[:1]) == {"best": "a", "median": "a", "worst": "a"}
    assert extremes(["c"], dice[2:3]) == {}


def test_a_table_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    write_csv(tmp_path / "t.csv", [["case", "mean"], ["a,b", 1]])
    assert list(csv.reader((tmp_path / "t.csv").open(newline=""))) == [["case", "mean"], ["a,b", "1"]]

    with pytest.raises(ZeroDivisionError):
        write_csv(tmp_path / "t.csv", ([1 // 0] for _ in range(1)))
    assert (tmp_path / "t.csv").read_text().startswith("case,mean")
    (tmp_path / "folder.csv").mkdir()
    (tmp_path / "folder.csv" / "file").touch()
    with pytest.raises(InputError, match=r"folder.csv: cannot be written \(Is a directory\); make room there or give"):
        write_csv(tmp_path / "folder.csv", [["a"]])
    assert sorted(file.name for file in tmp_path.iterdir()) == ["folder.csv", "t.csv"]


@pytest.mark.parametrize("image", [torch.zeros(1, 2, 2, 2), MetaTensor(torch.zeros(1, 2, 2, 2))])
def test_source_file_rejects_an_image_without_file(image: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="no 'filename_or_obj' to name its case after"):
        source_file(image)
