"""Organs are measured in the patient's own directions, whatever the order of the voxels."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from nibabel.orientations import apply_orientation, axcodes2ornt, inv_ornt_aff, ornt_transform

from shared_networks.inference.adult_volumes import ADULT_VOLUMES
from shared_networks.inference.statistics import findings, organ_statistics, statistics_table
from tests.conftest import ROOT

NAMES = ["background", "liver", "spleen", "right kidney", "left kidney", "stomach"]
SHAPE = (40, 32, 24)
AFFINE = np.array([[3.0, 0, 0, -50], [0, 4.0, 0, 20], [0, 0, 5.0, -300], [0, 0, 0, 1]])  # RAS
ML = 3 * 4 * 5 / 1000


def body() -> tuple[np.ndarray, np.ndarray]:
    """Labels and HU in RAS order: the first axis runs to the patient's right."""
    labels = np.zeros(SHAPE, np.uint8)
    labels[25:38, 10:25, 8:24] = 1  # liver, at the right, cut off above
    labels[3:9, 5:12, 10:18] = 2  # spleen, at the left
    labels[26:31, 3:8, 2:9] = 3
    labels[8:13, 3:8, 1:8] = 4
    labels[10:12, 20:22, 10:12] = 5
    labels[14:16, 20:22, 10:12] = 5  # in two pieces of one size
    image = np.random.default_rng(0).normal(-80, 30, SHAPE).astype(np.float32)
    image[labels == 1] += 150
    return labels, image


def by_organ(labels: np.ndarray, image: np.ndarray, affine: np.ndarray = AFFINE) -> dict[str, dict[str, Any]]:
    return {row["organ"]: row for row in organ_statistics(labels, image, affine, NAMES)}


def test_an_organ_is_measured() -> None:
    labels, image = body()
    rows = by_organ(labels, image)
    liver = rows["liver"]
    assert liver["volume_ml"] == pytest.approx(13 * 15 * 16 * ML)
    assert liver["mean"] == pytest.approx(image[labels == 1].mean(), abs=0.06)
    assert liver["std"] == pytest.approx(image[labels == 1].std(), abs=0.06)
    assert (liver["pieces"], liver["largest_piece"], liver["touches_edge"]) == (1, 1.0, ["superior"])
    assert (rows["stomach"]["pieces"], rows["stomach"]["largest_piece"]) == (2, 0.5)
    assert {name: row["left_right"] for name, row in rows.items()} == {
        **dict.fromkeys(NAMES[1:5], "plausible"),
        "stomach": None,
    }


@pytest.mark.parametrize("codes", ["LAS", "RPS", "RAI", "LPI", "LPS", "SAR", "IPL", "ASR", "PIL"])
def test_any_order_of_axes_gives_the_same(codes: str) -> None:
    labels, image = body()
    change = ornt_transform(axcodes2ornt("RAS"), axcodes2ornt(codes))
    affine = AFFINE @ inv_ornt_aff(change, SHAPE)
    moved = [apply_orientation(volume, change) for volume in (labels, image)]
    assert by_organ(*moved, affine) == by_organ(labels, image)


def test_an_oblique_scan() -> None:
    labels, image = body()
    angle = np.deg2rad(20)
    turn = np.eye(4)
    turn[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    rows = by_organ(labels, image, turn @ AFFINE)
    assert rows["liver"]["touches_edge"] == ["superior"] and rows["liver"]["left_right"] == "plausible"
    assert rows["liver"]["volume_ml"] == pytest.approx(13 * 15 * 16 * ML, abs=1e-3)


def test_organs_of_the_wrong_side() -> None:
    labels, image = body()
    rows = by_organ(labels[::-1], image[::-1])
    assert {row["left_right"] for name, row in rows.items() if name != "stomach"} == {"implausible"}
    said = findings(list(rows.values()))
    assert "right kidney and left kidney: left and right look swapped" in said
    assert "liver and spleen: left and right look swapped" in said


def test_one_organ_of_a_pair_has_no_side() -> None:
    labels, image = body()
    labels[labels == 4] = 0
    rows = by_organ(labels, image)
    assert rows["right kidney"]["left_right"] is None and rows["left kidney"]["left_right"] is None


def test_a_missing_organ() -> None:
    labels, image = body()
    labels[labels == 3] = 0
    row = by_organ(labels, image)["right kidney"]
    assert row == {
        "organ": "right kidney", "volume_ml": 0.0, "mean": None, "std": None, "pieces": 0, "largest_piece": None,
        "touches_edge": [], "left_right": None, "adult_range_ml": [86.2, 237.8], "in_adult_range": None,
    }  # fmt: skip
    assert "right kidney: not found" in findings([row])


def row(organ: str, ml: float, **changed: Any) -> dict[str, Any]:
    labels = np.ones((3, 4, 5), np.uint8)
    padded = np.pad(labels, 0 if changed.pop("cut", False) else 1)
    size = (ml * 1000 / labels.size) ** (1 / 3)
    return {
        **organ_statistics(padded, padded * 1.0, np.diag([-size, size, size, 1]), ["background", organ])[0],
        **changed,
    }


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (row("liver", 1500), []),
        (row("liver", 600), ["liver: 600 ml, below the range of adults, 735 to 2275 ml"]),
        (row("liver", 3000), ["liver: 3000 ml, above the range of adults, 735 to 2275 ml"]),
        (row("stomach", 3000), []),
        (row("stomach", 3000, cut=True), []),
        (row("stomach", 300, pieces=3, largest_piece=0.9), ["stomach: 3 pieces, the largest has 90 % of it"]),
        (row("stomach", 300, pieces=3, largest_piece=0.97), []),
    ],
)
def test_what_deserves_a_look(made: dict[str, Any], said: list[str]) -> None:
    assert findings([made]) == said


def test_a_cut_off_organ_can_only_be_too_large() -> None:
    cut = "liver: cut off by the edge of the scan (left, right, posterior, anterior, inferior, superior)"
    assert findings([row("liver", 100, cut=True)]) == [cut]
    assert findings([row("liver", 3000, cut=True)]) == [
        cut,
        "liver: 3000 ml, above the range of adults, 735 to 2275 ml",
    ]


def test_the_table_has_a_row_an_organ_and_no_value_where_none_is() -> None:
    rows = [row("liver", 1500), row("stomach", 0.06, cut=True)]
    table = statistics_table({"b": rows, "a": rows[:1]}, hounsfield=True)
    assert table[0] == ["case", "organ", "volume_ml", "mean_hu", "std_hu", "pieces", "largest_piece", "touches_edge",
                        "left_right", "adult_range_ml", "in_adult_range"]  # fmt: skip
    assert [line[:2] for line in table[1:]] == [["a", "liver"], ["b", "liver"], ["b", "stomach"]]
    assert table[1][7:] == ["", "", "735-2275", "yes"]
    assert table[3][7:] == ["left right posterior anterior inferior superior", "", "", ""]
    assert statistics_table({}, hounsfield=False)[0][3:5] == ["mean", "std"]


def test_ranges_are_of_organs_that_the_bundles_have_and_the_guide_lists_them() -> None:
    text = (ROOT / "docs" / "inference.md").read_text()
    for name, known in ADULT_VOLUMES.items():
        low, high = known.range_ml
        assert 0 < low < known.low[0] <= known.high[0] < high
        assert f"{low:g} to {high:g}" in text, name
        assert known.study.partition("doi:")[2].partition(" ")[0] in text


def test_names_in_other_spellings_are_measured_alike() -> None:
    labels, image = body()
    names = ["background", "LIVER", "Spleen ", "Right_Kidney", "kidney-left", "stomach"]
    for order in (1, -1):
        known = organ_statistics(labels[::order], image[::order], AFFINE, NAMES)
        rows = organ_statistics(labels[::order], image[::order], AFFINE, names)
        assert rows == [{**row, "organ": name} for row, name in zip(known, names[1:], strict=True)]
        assert [row["adult_range_ml"] for row in rows[:3]] == [[735, 2275], [22, 374], [86.2, 237.8]]
        assert len(findings(rows)) == len(findings(known))
    assert "Right_Kidney and kidney-left: left and right look swapped" in findings(rows)
    assert "LIVER and Spleen : left and right look swapped" in findings(rows)
