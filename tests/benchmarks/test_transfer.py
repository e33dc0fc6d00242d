from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser

from shared_networks.errors import InputError
from shared_networks.evaluation.tables import COLUMNS, measure_rows
from shared_networks.files import write_csv
from shared_networks.networks.hi_end_mae import HiEndMAE
from tests.benchmarks.transfer import results
from tests.benchmarks.transfer.__main__ import find_data, fine_tuning, pretraining
from tests.benchmarks.transfer.results import Cell
from tests.benchmarks.transfer.runs import Run, execute, execute_all
from tests.benchmarks.transfer.settings import ABLATIONS, ARMS, SIZES
from tests.conftest import ROOT

PLAIN, OURS = ARMS["plain MAE"], ARMS["Hi-End-MAE"]


def options(run: Run) -> dict[str, str]:
    """Overrides of a bundle's command."""
    words = run.words[run.words.index("--config_file") + 2 :]
    return {key.removeprefix("--"): value for key, value in zip(words[::2], words[1::2], strict=True)}


def commands(size: str) -> list[Run]:
    """One of each kind."""
    folder = Path("/out")
    variants = [OURS, PLAIN, *ABLATIONS.values()]
    first = [pretraining(folder, folder, SIZES[size], variant, 64) for variant in variants]
    return [*first, *fine_tuning(folder, None, folder, SIZES[size], 1, 0)]


@pytest.mark.parametrize("size", SIZES)
def test_every_override_is_in_the_configs(size: str) -> None:
    for run in commands(size):
        files = re.findall(r"configs/\w+\.json", run.words[run.words.index("--config_file") + 1])
        config = ConfigParser.load_config_files([str(ROOT / run.bundle / file) for file in files])
        for key in options(run):
            place = ConfigParser(config)
            *parents, last = key.split("#")
            node = place["#".join(parents)] if parents else config
            if last != "_disabled_":
                assert last in node, f"{run.bundle}: {key}"


@pytest.mark.parametrize(("cases", "labels"), [(20, 1), (64, 4), (65, 16)])
def test_steps_do_not_depend_on_the_number_of_cases(cases: int, labels: int) -> None:
    size = {
        **SIZES["smoke"],
        "pretraining": {**SIZES["smoke"]["pretraining"], "steps": 480, "batch_size": 4, "val_fraction": 0.05},
        "fine-tuning": {**SIZES["smoke"]["fine-tuning"], "steps": 160},
    }
    training = cases - max(1, round(0.05 * cases))
    epochs = int(options(pretraining(Path(), Path(), size, {}, cases))["epochs"])
    assert 480 <= epochs * -(-training // 4) < 480 + training
    assert int(options(fine_tuning(Path(), None, Path(), size, labels, 0)[0])["epochs"]) * labels == 160


@pytest.mark.parametrize("size", SIZES)
def test_arms_are_fine_tuned_alike(size: str) -> None:
    scratch, ours = (options(fine_tuning(Path(), of, Path(), SIZES[size], 1, 0)[0]) for of in (None, Path("encoder")))
    assert (scratch.pop("pretrained_encoder"), ours.pop("pretrained_encoder")) == ("", "encoder/model.pt")
    assert scratch == ours


def test_arms_differ_in_the_decoder_only_and_its_blocks_are_of_a_size() -> None:
    def blocks(variant: dict[str, Any]) -> tuple[int, int]:
        changes = {key.removeprefix("network_def#"): value for key, value in variant.items()}
        network = HiEndMAE(hidden_size=96, num_heads=4, decoder_hidden_size=96, decoder_num_heads=4, **changes)
        of_decoder = [*network.decoder.blocks.parameters(), *network.decoder.cross_blocks.parameters()]
        return sum(p.numel() for p in network.vit.parameters()), sum(p.numel() for p in of_decoder)

    plain, ours = blocks(PLAIN), blocks(OURS)
    assert plain[0] == ours[0]
    assert plain[1] == pytest.approx(ours[1], rel=0.01)


def python(folder: Path, code: str) -> Run:
    return Run("testing", folder, ".", ["-c", code])


def test_a_run_is_done_once_and_recorded(tmp_path: Path) -> None:
    run = python(tmp_path / "a", f"open({str(tmp_path / 'times')!r}, 'a').write('x'); print('said')")
    record = execute(run)
    assert execute(run) == record == json.loads((tmp_path / "a" / "run.json").read_text())
    assert (tmp_path / "times").read_text() == "x"
    assert (tmp_path / "a" / "log.txt").read_text() == "said\n"
    assert record["words"] == run.words


def test_a_record_has_the_time_taken_and_the_processors(tmp_path: Path) -> None:
    record = execute(
        python(
            tmp_path,
            "import time; time.sleep(0.5); start = time.process_time()\nwhile time.process_time() < start + 0.5: pass",
        )
    )
    assert record["seconds"] >= 1
    assert 0.5 <= record["processor_seconds"] < record["seconds"]


def test_an_interrupted_run_is_done_again(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"log\.txt: exit code 3: last words"):
        execute(python(tmp_path, "print('last words'); raise SystemExit(3)"))
    run = Run("testing", tmp_path, ".", json.loads((tmp_path / "run.json").read_text())["words"])
    with pytest.raises(InputError, match="exit code 3"):
        execute(run)


def test_results_of_other_settings_are_refused(tmp_path: Path) -> None:
    execute(python(tmp_path, "pass"))
    with pytest.raises(InputError, match=rf"{tmp_path}: made with other settings \(.*1 \+ 1.*\); give another --out"):
        execute(python(tmp_path, "1 + 1"))


def test_chains_run_side_by_side_and_their_commands_in_turn(tmp_path: Path) -> None:
    pipe, file = str(tmp_path / "pipe"), str(tmp_path / "file")
    os.mkfifo(pipe)  # opening it waits for the other side
    chains = [
        [
            python(tmp_path / "1", f"import signal; signal.alarm(60); open({pipe!r}, 'w'); open({file!r}, 'w')"),
            python(tmp_path / "2", f"open({file!r})"),
        ],
        [python(tmp_path / "3", f"import signal; signal.alarm(60); open({pipe!r})")],
    ]
    records = execute_all(chains, 2)
    assert [record["words"] for record in records] == [run.words for chain in chains for run in chain]


def test_after_a_failure_no_chain_begins(tmp_path: Path) -> None:
    chains = [[python(tmp_path / str(number), "raise SystemExit(number)")] for number in range(3)]
    with pytest.raises(InputError, match="NameError: name 'number' is not defined"):
        execute_all(chains, 1)
    assert not (tmp_path / "2").exists()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("cohort", "--data cohort: give synthetic, or NAME=FOLDER"),
        ("cohort=/nowhere", "--data cohort=/nowhere: /nowhere has no imagesTr"),
    ],
)
def test_folders_that_are_no_data_are_refused(given: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        find_data([given], tmp_path)


def test_data_sets_go_by_name(datasets: dict[str, Path], tmp_path: Path) -> None:
    found = find_data(["synthetic", f"cohort={datasets['btcv']}"], tmp_path)
    assert found == {"synthetic": tmp_path / "synthetic" / "data", "cohort": datasets["btcv"]}


ORGANS, CASES, LABELS, SEEDS = ["liver", "spleen"], ["a", "b", "c", "d"], [1, 4], [0, 7]


def dice_of(cell: Cell, seed: int) -> np.ndarray:
    """Dice `[cases, organs]`; one spleen is in neither truth nor prediction."""
    arm = {"from scratch": 0.0, "Hi-End-MAE": 0.1}.get(cell.variant, 0.2)
    dice = np.array([[0.5, 0.1], [0.6, 0.3], [0.7, np.nan], [0.6, 0.2]]) + arm * np.array([[1], [1], [-0.5], [2]])
    return np.round(dice + 0.01 * cell.labels + 0.001 * seed, 4)


@pytest.fixture
def reports(tmp_path: Path) -> dict[Cell, dict[int, Path]]:
    """Reports as evaluation writes them."""
    cells = [Cell("x", arm, count) for arm in ("from scratch", "Hi-End-MAE") for count in LABELS]
    found: dict[Cell, dict[int, Path]] = {}
    for cell in [*cells, Cell("x", "taps: last block", 4)]:
        for seed in SEEDS:
            folder = found.setdefault(cell, {})[seed] = tmp_path / f"{cell.variant}_{cell.labels}_{seed}"
            folder.mkdir()
            measures = torch.zeros(len(CASES), len(ORGANS), len(COLUMNS))
            measures[..., COLUMNS.index("dice")] = torch.from_numpy(dice_of(cell, seed))
            write_csv(folder / "metrics.csv", measure_rows(CASES, ORGANS, measures))
    return found


def test_raw_numbers_have_a_row_each(reports: dict[Cell, dict[int, Path]]) -> None:
    header, *rows = results.raw_rows(reports)
    assert header == ["data", "variant", "labelled cases", "seed", "case", "organ", "dice"]
    assert len(rows) == 5 * len(SEEDS) * len(CASES) * len(ORGANS)
    assert rows[0] == ["x", "from scratch", 1, 0, "a", "liver", 0.51]
    assert ["x", "Hi-End-MAE", 4, 7, "c", "spleen", ""] in rows


def read(reports: dict[Cell, dict[int, Path]], tmp_path: Path) -> dict[Cell, tuple[list[str], np.ndarray]]:
    """What the raw numbers on file say."""
    write_csv(tmp_path / "transfer.csv", results.raw_rows(reports))
    return results.read_dice(tmp_path / "transfer.csv")


def test_dice_is_by_seed_case_and_organ(reports: dict[Cell, dict[int, Path]], tmp_path: Path) -> None:
    dice = read(reports, tmp_path)
    assert list(dice) == list(reports)
    for cell, (organs, found) in dice.items():
        assert organs == ORGANS
        np.testing.assert_allclose(found, [dice_of(cell, seed) for seed in SEEDS])


def test_interval_draws_seeds_and_cases() -> None:
    assert results.interval(np.array([[0.0, 0.0], [1.0, 1.0]])) == (0, 1)  # a quarter of the draws is one seed alone
    assert results.interval(np.array([[0.0, 1.0], [0.0, 1.0]])) == (0, 1)
    # Cases that are hard for every seed are no new cases: copies of a seed leave the interval as wide as it was.
    cases = np.random.default_rng(1).normal(0.5, 0.1, 8)
    assert results.interval(np.tile(cases, (50, 1))) == pytest.approx(results.interval(cases[None]), abs=0.003)
    scores = np.random.default_rng(0).normal(0.5, 0.1, (50, 1))
    half = 1.96 * scores.std() / np.sqrt(50)
    assert results.interval(scores) == pytest.approx((scores.mean() - half, scores.mean() + half), abs=0.003)


def test_comparison_is_paired(reports: dict[Cell, dict[int, Path]]) -> None:
    cells = Cell("x", "Hi-End-MAE", 4), Cell("x", "from scratch", 4)
    scores = {cell: np.nanmean([dice_of(cell, seed) for seed in SEEDS], axis=2) for cell in cells}
    found = results.compare(*cells, scores)
    differences = [0.1, 0.1, -0.05, 0.2]
    assert found.mean == pytest.approx(np.mean(differences))
    assert found.interval[0] < found.mean < found.interval[1]
    assert found.interval == results.interval(scores[cells[0]] - scores[cells[1]])
    assert results.compare(cells[0], cells[0], scores) == ((cells[0], cells[0]), 0, (0, 0))


def test_section_tells_means_organs_and_ablations(reports: dict[Cell, dict[int, Path]], tmp_path: Path) -> None:
    text = results.data_section(
        "x", read(reports, tmp_path), {"Hi-End-MAE": (0.7, 0.9)}, ["from scratch", "Hi-End-MAE"]
    )
    assert "| Hi-End-MAE | 0.700 | 0.900 |" in text and "one pre-training an arm" in text
    cells = {line.split(" | ")[0]: line.split(" | ") for line in text.splitlines()}
    scratch, ours = (
        np.nanmean([dice_of(Cell("x", arm, 4), seed) for seed in SEEDS], axis=2)
        for arm in ("from scratch", "Hi-End-MAE")
    )
    tables = text.split("\n\n")
    assert f"| 4 | {scratch.mean():.3f} (" in tables[2] and f" | {ours.mean():.3f} (" in tables[2]
    assert f"| 4 | Hi-End-MAE less from scratch | +{(ours - scratch).mean():.3f} (" in tables[4]
    assert cells["| liver"][1:3] == ["0.61", "0.70"]
    assert tables[-1].splitlines()[2].startswith("| 4 | taps: last block less Hi-End-MAE | +0.088 (")


def test_figure_has_a_line_an_arm_with_its_interval(reports: dict[Cell, dict[int, Path]], tmp_path: Path) -> None:
    figure = results.figure(read(reports, tmp_path), ["from scratch", "Hi-End-MAE"])
    (panel,) = figure.axes
    assert "one pre-training an arm" in figure.get_supxlabel()
    assert [text.get_text() for text in panel.get_legend().get_texts()] == ["from scratch", "Hi-End-MAE"]
    for container, arm in zip(panel.containers, ("from scratch", "Hi-End-MAE"), strict=True):
        line, _, (bars,) = container.lines
        for place, count in enumerate(LABELS):
            scores = np.nanmean([dice_of(Cell("x", arm, count), seed) for seed in SEEDS], axis=2)
            assert line.get_ydata()[place] == pytest.approx(scores.mean())
            assert bars.get_segments()[place][:, 1] == pytest.approx(results.interval(scores))


def test_times_add_up_by_part() -> None:
    records = [
        {"part": "fine-tuning", "seconds": 60.0, "processor_seconds": 90.0},
        {"part": "evaluation", "seconds": 12.0, "processor_seconds": 6.0},
        {"part": "fine-tuning", "seconds": 120.0, "processor_seconds": 90.0},
    ]
    assert results.time_table(records).splitlines()[2:] == [
        "| fine-tuning | 2 | 3.0 | 3.0 | 120 |",
        "| evaluation | 1 | 0.1 | 0.2 | 12 |",
    ]


@pytest.mark.slow
def test_the_whole_chain_runs_once(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "tests.benchmarks.transfer", "--size", "smoke", "--out", str(tmp_path)]
    subprocess.run(words, cwd=ROOT, check=True)
    with (tmp_path / "transfer.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert {(row["variant"], row["case"]) for row in rows} == {
        (arm, case) for arm in ("from scratch", "Hi-End-MAE") for case in ("test_000", "test_001")
    }
    assert len(rows) == 2 * 2 * 13
    assert all(0 <= float(row["dice"]) <= 1 for row in rows if row["dice"])
    assert "| 1 | Hi-End-MAE less from scratch | " in (tmp_path / "transfer.md").read_text()
    assert (tmp_path / "transfer.png").stat().st_size > 10_000
    models = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("model.pt")}
    assert len(models) == 3
    subprocess.run(words, cwd=ROOT, check=True)
    assert {file: file.stat().st_mtime_ns for file in models} == models
