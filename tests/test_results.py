"""README and model cards quote measurements as they are on file."""

from __future__ import annotations

import csv
import re

import numpy as np
import pytest

from .benchmarks import quoted, scaling
from .conftest import BUNDLES, ROOT

README = (ROOT / "README.md").read_text()
CARDS = {bundle: " ".join((ROOT / bundle / "docs" / "README.md").read_text().split()) for bundle in BUNDLES}


def test_readme_has_the_tables_of_the_files() -> None:
    assert quoted.speed_table() in README
    assert len(quoted.transfer_tables()) == 2
    assert len(quoted.ablation_tables()) == 1
    for table in quoted.transfer_tables() + quoted.ablation_tables():
        assert table in README


def test_readme_has_what_scaling_prints(capsys: pytest.CaptureFixture[str]) -> None:
    scaling.main([])
    assert capsys.readouterr().out.strip() in README


def test_cards_have_the_figures_of_the_files() -> None:
    assert quoted.step_line() in CARDS["hi_end_mae_pretrain"]
    for bundle in BUNDLES[1:]:
        assert quoted.window_line() in CARDS[bundle]
        assert quoted.memory_line() in CARDS[bundle]


def test_means_of_the_table_are_those_of_the_raw_numbers() -> None:
    with (quoted.RESULTS / "transfer.csv").open(newline="") as stream:
        rows = [row for row in csv.DictReader(stream) if row["dice"]]
    data = list(dict.fromkeys(row["data"] for row in rows))
    for name, table in zip(data, quoted.transfer_tables(), strict=True):
        header, _, *lines = ([cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines())
        for labels, *cells in lines:
            for arm, cell in zip(header[1:], cells, strict=True):
                cases: dict[tuple[str, str], list[float]] = {}
                for row in rows:
                    if (row["data"], row["variant"], row["labelled cases"]) == (name, arm, labels):
                        cases.setdefault((row["seed"], row["case"]), []).append(float(row["dice"]))
                shown = re.match(r"[\d.]+", cell)
                assert shown is not None
                assert float(shown[0]) == pytest.approx(np.mean([np.mean(dice) for dice in cases.values()]), abs=6e-4)
