"""README, guides and model cards quote measurements as the files have them."""

from __future__ import annotations

import csv
import re
from collections import Counter

import numpy as np
import pytest

from tests.benchmarks import quoted, scaling
from tests.benchmarks.study import report, results
from tests.benchmarks.study.runs import SYNTHETIC
from tests.benchmarks.study.settings import ARMS, MAIN_LABELS, OURS, SCRATCH, SIZES
from tests.conftest import BUNDLES, ROOT

README = (ROOT / "README.md").read_text()
PAGE = (quoted.RESULTS / "README.md").read_text()
CARDS = {bundle: " ".join((ROOT / bundle / "docs" / "README.md").read_text().split()) for bundle in BUNDLES}


def guide(name: str) -> str:
    return " ".join((ROOT / "docs" / f"{name}.md").read_text().split())


def test_readme_has_the_table_of_the_files() -> None:
    assert quoted.readme_table() in README


def test_results_have_the_tables_of_the_files() -> None:
    assert quoted.speed_table() in PAGE
    assert len(quoted.dice_tables()) == 2
    for table in quoted.dice_tables():
        assert table.strip() in PAGE


def test_ranges_are_of_the_measured_machine_and_of_others() -> None:
    assert quoted.machines_table() in PAGE
    here, others = quoted.speed_ups(), quoted.other_machines()
    assert here.keys() == others.keys()
    for name, span in quoted.ranges().items():
        low, high = map(float, span.split(" to "))
        measured = [float(f"{here[name]:.3g}"), *others[name]]
        assert (low, high) == (min(measured), max(measured))


def test_speed_up_of_a_setting_that_the_bundles_leave_out_is_that_of_the_file() -> None:
    ratio = quoted.figures("Pre-training step")["variants"]["float32, matmul precision medium"]["ratio"]
    assert f"brought the float32 step to {ratio:.3g} times the baseline's speed" in " ".join(PAGE.split())
    configs = [file.read_text() for bundle in BUNDLES for file in (ROOT / bundle / "configs").glob("*.json")]
    assert not any("float32_matmul_precision" in config for config in configs)


def test_cost_is_what_scaling_prints(capsys: pytest.CaptureFixture[str]) -> None:
    scaling.main([])
    assert capsys.readouterr().out.strip() in (quoted.RESULTS / "cost.md").read_text()


def test_cards_and_guides_have_the_figures_of_the_files() -> None:
    assert quoted.step_line() in CARDS["hi_end_mae_pretrain"]
    assert quoted.memory_line() in guide("inference")
    assert quoted.fast_line() in guide("inference")


def test_crops_a_second_have_one_source() -> None:
    measured = {f"{quoted.crops(row)['crops/s a core']:.0f}" for row in (quoted.STORE, quoted.WHOLE_VOLUMES)}
    said: dict[str, set[str]] = {}
    for folder in (".", "docs", *BUNDLES, "shared_networks", "tests/benchmarks"):
        for file in (ROOT / folder).glob("*" if folder == "." else "**/*"):
            if file.suffix in (".md", ".py", ".json", ".sh") and "outputs" not in file.parts:
                text = re.sub(r"\s+", " ", file.read_text())
                figures = re.findall(r"(\d[\d,.]*)\+? (?:augmented )?crops(?: of [\d^³]+)?(?:/s| a second)", text)
                said.setdefault(str(file.relative_to(ROOT)), set()).update(figures)
    assert {file: figures for file, figures in said.items() if figures - measured} == {}
    assert said["README.md"] and said["hi_end_mae_pretrain/docs/README.md"] and said["docs/pretraining.md"]
    assert quoted.crops_line() in guide("pretraining")
    assert quoted.crops(quoted.STORE)["crops/s a core"] == scaling.CROPS_A_CORE


def test_tables_and_intervals_are_those_of_the_raw_numbers() -> None:
    size = SIZES["cpu"]
    sections = report.dice_sections(results.read_scores(quoted.RESULTS / "transfer.csv", size["seeds"]), size)
    assert len(sections) >= 10
    text = (quoted.RESULTS / "transfer.md").read_text()
    assert [section for section in sections if section not in text] == []


def test_no_p_value_is_given_and_what_the_intervals_cover_is_said() -> None:
    section = PAGE.split("## Does pre-training help?")[1]
    for text in (section, (quoted.RESULTS / "transfer.md").read_text()):
        assert not re.search(r"\bp\s*[<=|]|Wilcoxon|Holm|significan", text)
    for text in (section, README.split("## Results")[1].split("## Limits")[0]):
        assert "transfer.png)" in text and "pre-trainings, seeds and test cases" in " ".join(text.split())
        assert quoted.difference(MAIN_LABELS, f"{OURS} less {SCRATCH}") in " ".join(text.split())
        assert set(re.findall(r"(?<![\d.])[+-]?0\.\d{3}(?!\d)", text)) <= quoted.dice_figures()


def test_means_of_the_table_are_those_of_the_raw_numbers() -> None:
    """Worked out anew: each case's mean over organs, then the mean over cases and trainings."""
    with (quoted.RESULTS / "transfer.csv").open(newline="") as stream:
        rows = [row for row in csv.DictReader(stream) if (row["steps"], row["labelled cases"]) == ("384", "4")]
    organs = list(rows[0])[len(results.COLUMNS) :]
    names = sorted({row["test set"] for row in rows}, key=lambda name: name != SYNTHETIC)
    for name, table in zip(names, quoted.dice_tables(), strict=True):
        (line,) = (line for line in table.splitlines() if line.startswith("| 4 |"))
        for arm, cell in zip(ARMS, line.strip("| ").split(" | ")[1:], strict=True):
            cases = [row for row in rows if (row["test set"], row["variant"]) == (name, arm)]
            seeds = Counter(number for number, _ in {(row["pre-training"], row["seed"]) for row in cases})
            cases = [row for row in cases if seeds[row["pre-training"]] == 3]  # others wait for their seeds
            dice = [np.mean([float(row[organ]) for organ in organs if row[organ]]) for row in cases]
            mean, count = cell.split()[0], int(cell.split()[-1])
            assert len({(row["pre-training"], row["seed"]) for row in cases}) == count
            assert float(mean) == pytest.approx(np.mean(dice), abs=6e-4)
