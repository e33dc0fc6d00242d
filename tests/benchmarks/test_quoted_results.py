"""README, guides and model cards quote measurements as the files have them."""

from __future__ import annotations

import csv
import re

import numpy as np
import pytest

from tests.benchmarks import quoted, scaling
from tests.benchmarks.transfer import results
from tests.benchmarks.transfer.settings import SIZES
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
    assert len(quoted.transfer_tables()) == 2
    assert len(quoted.ablation_tables()) == 1
    for table in quoted.transfer_tables() + quoted.ablation_tables():
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
    dice = results.read_dice(quoted.RESULTS / "transfer.csv")
    text = (quoted.RESULTS / "transfer.md").read_text()
    for data in dict.fromkeys(cell.data for cell in dice):
        read = {cell: found for cell, found in dice.items() if cell.data == data}
        section = results.data_section(data, read, {}, SIZES["cpu"]["arms"])
        blocks = [block for block in section.split("\n\n") if "training crops" not in block]
        assert len(blocks) >= 8
        for block in blocks:
            assert block in text


def test_no_p_value_is_given_and_what_the_intervals_cover_is_said() -> None:
    section = PAGE.split("## Does pre-training help?")[1]
    for text in (section, (quoted.RESULTS / "transfer.md").read_text()):
        assert not re.search(r"\bp\s*[<=|]|Wilcoxon|Holm|significan", text)
        assert "one pre-training" in text
    figure = section.index("](transfer.png)")
    assert "one pre-training an arm" in section[:figure].splitlines()[-3]
    quotes = re.findall(r"[+-]\d\.\d+ to\s[+-]\d\.\d+", section)
    assert len(quotes) >= 10
    assert {" ".join(quote.split()) for quote in quotes} <= quoted.differences()


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
