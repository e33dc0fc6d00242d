from __future__ import annotations

import csv
import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from monai.bundle import ConfigParser
from PIL import Image

from shared_networks.errors import InputError
from shared_networks.evaluation.tables import COLUMNS, measure_rows
from shared_networks.files import write_csv
from shared_networks.networks.hi_end_mae import HiEndMAE
from tests.benchmarks.study import report, results, runs
from tests.benchmarks.study.__main__ import DESIGN, find_folders, variants_of
from tests.benchmarks.study.execution import Run
from tests.benchmarks.study.results import Scores
from tests.benchmarks.study.runs import Cell, Trial
from tests.benchmarks.study.settings import ABLATIONS, ARMS, CROP, FROZEN, OURS, PLAIN, SCRATCH, SIZES, Variant
from tests.conftest import ROOT

CELL = Cell(OURS, 4, 512)


@pytest.fixture
def store(tmp_path: Path) -> Path:
    (tmp_path / "manifest.jsonl").write_text("{}\n" * 128)
    return tmp_path


def options(run: Run) -> dict[str, str]:
    """Overrides of a bundle's command."""
    words = run.words[run.words.index("--config_file") + 2 :]
    return {key.removeprefix("--"): value for key, value in zip(words[::2], words[1::2], strict=True)}


def commands(size: str, store: Path) -> list[Run]:
    """One of each kind, of every variant."""
    settings, found = SIZES[size], []
    for variant in variants_of(settings, real=True, ablations=True).values():
        found += [runs.pretraining(store, store, store, settings, variant, 1)]
        found += [runs.reconstruction(store, store, settings, variant)]
        found += runs.fine_tuning(store, store, store, store, settings, variant, Trial(CELL, 0, 0))
    return found


@pytest.mark.parametrize("size", SIZES)
def test_every_override_is_in_the_configs(size: str, store: Path) -> None:
    for run in commands(size, store):
        files = re.findall(r"configs/\w+\.json", run.words[run.words.index("--config_file") + 1])
        config = ConfigParser.load_config_files([str(ROOT / run.bundle / file) for file in files])
        for key in options(run):
            *parents, last = key.split("#")
            node = ConfigParser(config)["#".join(parents)] if parents else config
            there = int(last) < len(node) if isinstance(node, list) else last in node or last == "_disabled_"
            assert there, f"{run.bundle}: {key}"


@pytest.mark.parametrize("size", SIZES)
def test_arms_are_fine_tuned_alike(size: str, store: Path) -> None:
    def of(arm: str, encoder: Path | None) -> dict[str, str]:
        trial = Trial(CELL, 0, 0)
        return options(runs.fine_tuning(store, store, encoder, store, SIZES[size], ARMS[arm], trial)[0])

    scratch, plain, ours, frozen = of(SCRATCH, None), of(PLAIN, store), of(OURS, store), of(FROZEN, store)
    assert scratch.pop("pretrained_encoder") == ""
    assert plain == ours == scratch | {"pretrained_encoder": str(store / "model.pt")}
    assert frozen == ours | {"optimizer#params#freeze_encoder": "True"}


def test_arms_differ_in_the_decoder_only_and_its_blocks_are_of_a_size() -> None:
    def blocks(variant: Variant) -> tuple[int, int]:
        changes = {key.removeprefix("network_def#"): value for key, value in (variant.pretraining or {}).items()}
        network = HiEndMAE(hidden_size=96, num_heads=4, decoder_hidden_size=48, decoder_num_heads=2, **changes)
        of_decoder = [*network.decoder.blocks.parameters(), *network.decoder.cross_blocks.parameters()]
        return sum(p.numel() for p in network.vit.parameters()), sum(p.numel() for p in of_decoder)

    plain, ours = blocks(ARMS[PLAIN]), blocks(ARMS[OURS])
    assert plain[0] == ours[0]
    assert plain[1] == pytest.approx(ours[1], rel=0.2)


def test_strong_augmentation_is_the_overlays(store: Path) -> None:
    """But for what its crops are centred on: an override by number must not meet another transform."""
    configs = ROOT / "hi_end_mae_btcv_seg" / "configs"
    overlay = ConfigParser.load_config_files([str(configs / f"{n}.json") for n in ("train", "strong_augmentation")])
    variant = ABLATIONS["strong augmentation"]
    trial = Trial(Cell("strong augmentation", 4, 384), 0, 0)
    words = options(runs.fine_tuning(store, store, None, store, SIZES["cpu"], variant, trial)[0])
    config = ConfigParser(overlay)
    for key, value in words.items():
        if key.startswith("train#random_transforms#") and key != CROP:
            assert config[key] == float(value)
    assert f"'spatial_size': '{config[CROP]['spatial_size']}'" in words[CROP]


def test_steps_do_not_depend_on_the_number_of_cases(store: Path) -> None:
    size = SIZES["cpu"]
    for labels in size["labels"]:
        run, _ = runs.fine_tuning(store, store, None, store, size, Variant(), Trial(Cell(OURS, labels, 384), 0, 0))
        found = {key: int(options(run)[key]) for key in ("epochs", "batch_size", "num_samples")}
        assert found["epochs"] * labels / found["batch_size"] == 384
        assert found["batch_size"] * found["num_samples"] == size["fine-tuning"]["crops"]
    epochs = int(options(runs.pretraining(store, store, store, size, Variant(), 0))["epochs"])
    training = 128 - round(0.1 * 128)
    assert size["pretraining"]["steps"] <= epochs * -(-training // 4) < size["pretraining"]["steps"] + training


def test_pre_trainings_and_seeds_are_crossed_and_ablations_are_not() -> None:
    size = SIZES["cpu"]
    steps = size["fine-tuning"]["steps"]
    variants = variants_of(size, real=True, ablations=True)
    repeats = {name: 1 if variant.pretraining is None else 3 for name, variant in variants.items()}
    found = runs.trials(size, variants, repeats)
    assert len(found) == len(set(found))
    count = Counter(trial.cell for trial in found)
    for labels in size["labels"]:
        assert [count[Cell(arm, labels, steps)] for arm in (SCRATCH, PLAIN, OURS, FROZEN)] == [3, 9, 9, 9]
    for labels, most in ((16, 3072), (4, 1536)):
        curve = [96, 192, 384, 768, 1536, 3072]
        assert [count[Cell(SCRATCH, labels, number)] for number in curve] == [3 * (number <= most) for number in curve]
    assert {t[1:] for t in found if t.cell == Cell(OURS, 16, 2 * steps)} == {(0, 0), (1, 1), (2, 2)}
    assert {t[1:] for t in found if t.cell == Cell("taps: all 12 blocks", 4, steps)} == {(0, 0), (1, 1), (2, 2)}
    assert {t[1:] for t in found if t.cell.variant == "strong augmentation, from scratch"} == {(0, 0), (0, 1), (0, 2)}
    # The main measure comes first: every arm with 4 labels.
    assert [t.cell for t in found[:4]] == [Cell(arm, 4, steps) for arm in ARMS]
    assert {t.cell.labels for t in found[:30]} == {4}
    assert {t.pretraining for t in found[30:66]} == {0} and {t.cell.labels for t in found[30:66]} == {1, 16, 64}
    assert {t.cell.variant for t in found[66:120]} == {SCRATCH, OURS}
    assert [{t.cell.labels for t in part} for part in (found[66:96], found[96:120])] == [{16}, {4}]
    assert {t.cell.variant for t in found[-54:]} == {PLAIN, OURS, FROZEN}


def test_ablations_of_real_scans_need_some() -> None:
    without = variants_of(SIZES["cpu"], real=False, ablations=True)
    assert set(ABLATIONS) - set(without) == {"real CTs", "real and synthetic CTs"}
    assert "patches of 36 mm, from scratch" in without
    assert list(variants_of(SIZES["cpu"], real=True, ablations=False)) == list(ARMS)


def scores(values: np.ndarray, trials: list[tuple[int, int]]) -> Scores:
    """Of one organ, `values` `[trials, cases]`."""
    return Scores(trials, [f"c{n}" for n in range(values.shape[1])], ["liver"], values[..., None].astype(float))


GRID = [(number, seed) for number in range(3) for seed in range(3)]


def test_interval_draws_pre_trainings_and_for_each_seeds() -> None:
    # All the spread lies between pre-trainings: a mean of three draws with replacement of 0, 0 and 0.9.
    between = np.repeat([0.0, 0.0, 0.9], 3)[:, None] * np.ones((1, 5))
    draws = results.nested([scores(between, GRID)])[:, 0]
    assert set(draws.round(6)) == {0, 0.3, 0.6, 0.9}
    assert draws.std() == pytest.approx(0.9 * np.sqrt(2 / 9 / 3), rel=0.05)
    # All of it between seeds: each of three pre-trainings draws three, so nine draws are averaged.
    within = np.tile([0.0, 0.0, 0.9], 3)[:, None] * np.ones((1, 5))
    assert results.nested([scores(within, GRID)]).std() == pytest.approx(0.9 * np.sqrt(2 / 9 / 9), rel=0.05)
    # Cases that are hard for all are no new cases.
    cases = np.random.default_rng(1).normal(0.5, 0.1, 8)
    of_cases = results.nested([scores(np.tile(cases, (9, 1)), GRID)])
    assert of_cases.std() == pytest.approx(cases.std() / np.sqrt(8), rel=0.05)


def test_a_difference_of_nothing_has_no_minus() -> None:
    assert report.shown((-0.0002, (-0.0114, 0.0116)), "+") == "+0.000 (-0.011 to +0.012)"
    assert report.shown((0.5, (0.25, -0.0001))) == "0.500 (0.250 to 0.000)"


def test_difference_is_paired_by_seed_and_case() -> None:
    rng = np.random.default_rng(0)
    hard = rng.normal(0.5, 0.2, (3, 6))  # by seed and case
    scratch = scores(hard, [(0, seed) for seed in range(3)])
    ours = scores(np.concatenate([hard + 0.1] * 3), GRID)
    assert report.shown(report.difference(ours, scratch), "+") == "+0.100 (+0.100 to +0.100)"
    diagonal = scores(hard + 0.3, [(0, 0), (1, 1), (2, 2)])
    assert report.shown(report.difference(diagonal, ours), "+") == "+0.200 (+0.200 to +0.200)"


def test_pre_trainings_that_are_not_whole_are_left_out() -> None:
    values = np.arange(5.0)[:, None]
    part = results.whole(scores(values, [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]), [0, 1, 2])
    assert part is not None and part.trials == [(0, 0), (0, 1), (0, 2)]
    np.testing.assert_array_equal(part.dice[:, 0, 0], [0, 1, 2])
    assert results.whole(scores(values[:3], [(0, 0), (1, 1), (2, 2)]), [0, 1, 2]) is not None
    assert results.whole(scores(values[:2], [(0, 0), (1, 1)]), [0, 1, 2]) is None


def test_curve_has_the_steps_of_which_both_arms_are_there() -> None:
    diagonal = [(0, 0), (1, 1), (2, 2)]
    read = {
        ("synthetic", Cell(SCRATCH, 16, 8)): scores(np.full((3, 4), 0.5), [(0, 0), (0, 1), (0, 2)]),
        ("synthetic", Cell(OURS, 16, 8)): scores(np.full((9, 4), 0.6), GRID),
        ("synthetic", Cell(SCRATCH, 16, 16)): scores(np.full((3, 4), 0.7), [(0, 0), (0, 1), (0, 2)]),
        ("synthetic", Cell(OURS, 16, 16)): scores(np.full((3, 4), 0.725), diagonal),
        ("synthetic", Cell(OURS, 16, 4)): scores(np.full((3, 4), 0.1), diagonal),
        ("synthetic", Cell(OURS, 4, 32)): scores(np.full((3, 4), 0.1), diagonal),
    }
    assert report.curve_rows(read, "synthetic", 16) == [
        [8, "0.500 (0.500 to 0.500)", "0.600 (0.600 to 0.600)", "+0.100 (+0.100 to +0.100)"],
        [16, "0.700 (0.700 to 0.700)", "0.725 (0.725 to 0.725)", "+0.025 (+0.025 to +0.025)"],
    ]
    (upper, lower) = report.figure(read, report.curve_cells((cell for _, cell in read), 16), "steps").axes
    assert [label.get_text() for label in lower.get_xticklabels()] == ["8", "16"]
    assert lower.get_xlabel() == "steps"
    heights = [list(container.lines[0].get_ydata()) for container in (*upper.containers, *lower.containers)]
    assert heights == [pytest.approx(means) for means in ([0.5, 0.7], [0.6, 0.725], [0.1, 0.025])]


@pytest.fixture
def reports(tmp_path: Path) -> dict[Trial, Path]:
    """Evaluations as the bundle writes them, of two arms; one has not been run."""
    found = {}
    for arm, number, seed in [(SCRATCH, 0, 0), (SCRATCH, 0, 1), (OURS, 0, 0), (OURS, 0, 1), (OURS, 1, 0)]:
        folder = found[Trial(Cell(arm, 4, 8), number, seed)] = tmp_path / f"{arm}{number}{seed}"
        measures = torch.full((3, 2, len(COLUMNS)), 0.5)
        measures[..., COLUMNS.index("dice")] = torch.tensor([[0.5, 0.1], [0.6, 0.0], [0.7, 0.3]]) + (arm == OURS) / 10
        measures[1, 1, COLUMNS.index("truth_ml")] = 0  # found where there is none
        if number == 0:
            folder.mkdir()
            names = ["synthetic__a", "synthetic__b", "real CT__ct_001"]
            write_csv(folder / "metrics.csv", measure_rows(names, ["liver", "spleen"], measures))
    return found


def drawn(panel: Axes) -> dict[str, list[float]]:
    """Mean and ends of the one interval of each arm."""
    found = {}
    for container in panel.containers:
        line, _, (bars,) = container.lines
        found[container.get_label()] = [*line.get_ydata(), *bars.get_segments()[0][:, 1]]
    return found


def test_raw_numbers_are_read_again(reports: dict[Trial, Path], tmp_path: Path) -> None:
    rows = results.raw_rows(reports, results.read_known(None, []))
    assert rows[0] == [*results.COLUMNS, "liver", "spleen"]
    assert len(rows) == 1 + 4 * 3
    assert ["real CT", OURS, 4, 8, 0, 1, "ct_001", 0.8, 0.4] in rows
    assert ["synthetic", SCRATCH, 4, 8, 0, 1, "b", 0.6, ""] in rows
    write_csv(tmp_path / "raw.csv", rows)
    read = results.read_scores(tmp_path / "raw.csv", [0, 1])
    found = read["synthetic", Cell(SCRATCH, 4, 8)]
    assert (found.trials, found.cases, found.organs) == ([(0, 0), (0, 1)], ["a", "b"], ["liver", "spleen"])
    np.testing.assert_allclose(found.dice, [[[0.5, 0.1], [0.6, np.nan]]] * 2, atol=1e-6)
    _, means, _, differences = report.arms_tables(read, "synthetic", [SCRATCH, OURS], 8)
    assert means.splitlines()[2].startswith("| 4 | 0.450 (")
    assert differences.splitlines()[2] == "| 4 | Hi-End-MAE less from scratch | +0.100 (+0.100 to +0.100) |"
    assert report.organ_table(read, "real CT", [Cell(SCRATCH, 4, 8), Cell(OURS, 4, 8)]).splitlines()[2:] == [
        "| liver | 0.70 | 0.80 |",
        "| spleen | 0.30 | 0.40 |",
    ]
    figure = report.figure(read, {arm: {4: Cell(arm, 4, 8)} for arm in (SCRATCH, OURS)}, "labelled cases")
    assert [panel.get_title() for panel in figure.axes] == ["synthetic CTs", "real CT", "", ""]
    for column, name in enumerate(("synthetic", "real CT")):
        scratch, ours = (read[name, Cell(arm, 4, 8)] for arm in (SCRATCH, OURS))
        wanted = {SCRATCH: report.mean_of(scratch), OURS: report.mean_of(ours)}
        assert drawn(figure.axes[column]) == {arm: pytest.approx([mean, *ends]) for arm, (mean, ends) in wanted.items()}
        mean, ends = report.difference(ours, scratch)
        assert drawn(figure.axes[2 + column]) == {OURS: pytest.approx([mean, *ends])}


def test_numbers_of_an_earlier_sitting_are_not_made_again(reports: dict[Trial, Path], tmp_path: Path) -> None:
    """Of those tested on the same sets; what is there is taken from there."""
    nothing = results.read_known(None, [])
    write_csv(tmp_path / "transfer.csv", before := results.raw_rows(reports, nothing))
    ends = dict(zip(results.CURVES, (0.5, 0.9, 0.1, 40.5), strict=True))
    write_csv(
        tmp_path / "pretrainings.csv", results.pretraining_rows({}, nothing._replace(pretrainings={(OURS, 1): ends}))
    )
    known = results.read_known(tmp_path, ["synthetic", "real CT"])
    assert known.pretrainings == {(OURS, 1): ends}
    assert list(known.rows) == [trial for trial, folder in reports.items() if folder.is_dir()]
    assert results.read_known(tmp_path, ["synthetic", "another"]).rows == {}
    gone = {trial: tmp_path / "nowhere" for trial in reports}
    assert results.raw_rows(gone, known) == [[str(value) for value in row] for row in before]
    here = dict(list(reports.items())[:2])
    assert results.raw_rows(gone | here, known)[1:7] == before[1:7]

    (tmp_path / "reconstructions").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "reconstructions" / "hi_end_mae_1.jpg")
    (out := tmp_path / "out").mkdir()
    size = SIZES["smoke"] | {"arms": [SCRATCH, OURS], "labels": [4], "seeds": [0, 1], "fine-tuning": {"steps": 8}}
    sections = report.report(out, size, {}, gone, known)
    assert sections[0] == (
        "4 of 5 fine-tunings are done, and 1 pre-trainings. "
        "4 fine-tunings are of earlier sittings, whose times are not in the table."
    )
    picture = "![what Hi-End-MAE 1 makes of a test scan](reconstructions/hi_end_mae_1.jpg)"
    assert sections[2].endswith(f"| Hi-End-MAE | 1 | 0.500 | 0.900 | 0.100 | 40.5 | {picture} |")
    for name in ("transfer.csv", "pretrainings.csv", "reconstructions/hi_end_mae_1.jpg"):
        assert (out / name).read_bytes() == (tmp_path / name).read_bytes()

    with pytest.raises(
        InputError, match=r"nowhere: has no transfer\.csv; give --known the results of an earlier sitting"
    ):
        results.read_known(tmp_path / "nowhere", [])


def test_times_add_up_by_part() -> None:
    records = [
        {"part": "fine-tuning", "seconds": 60.0, "processor_seconds": 90.0},
        {"part": "evaluation", "seconds": 12.0, "processor_seconds": 6.0},
        {"part": "fine-tuning", "seconds": 120.0, "processor_seconds": 90.0},
    ]
    assert report.time_table(records).splitlines()[2:] == [
        "| fine-tuning | 2 | 3.0 | 3.0 | 120 |",
        "| evaluation | 1 | 0.1 | 0.2 | 12 |",
    ]


def test_scans_without_an_organ_are_left_out(tmp_path: Path) -> None:
    for part in ("imagesTr", "labelsTr", "imagesTs", "labelsTs"):
        (tmp_path / "made" / part).mkdir(parents=True)
    (tmp_path / "made" / "dataset.json").write_text("{}")
    for name, organ in (("train_0", 0), ("train_1", 3), ("train_2", 2), ("test_0", 1)):
        end = "Tr" if name.startswith("train") else "Ts"
        for file in (f"labels{end}/{name}", f"images{end}/{name}_0000"):
            nib.save(nib.Nifti1Image(np.full((2, 3, 4), organ, np.uint8), np.eye(4)), tmp_path / f"made/{file}.nii.gz")
    made, folder = tmp_path / "made", tmp_path / "labelled"
    for _ in range(2):
        runs.gather_labelled(folder, made, {"labelled": 1, "test": 1})
    assert sorted(str(file.relative_to(folder)) for file in folder.rglob("*.*")) == [
        "dataset.json",
        "imagesTr/train_1_0000.nii.gz",
        "imagesTs/test_0_0000.nii.gz",
        "labelsTr/train_1.nii.gz",
        "labelsTs/test_0.nii.gz",
    ]
    with pytest.raises(InputError, match=re.escape(f"{made}: 2 scans of labelsTr show an organ; 3 are needed")):
        runs.gather_labelled(folder, made, {"labelled": 3, "test": 1})


def test_test_cases_of_other_sources_are_resampled_with_their_labels(tmp_path: Path) -> None:
    """To cubes; a case keeps its place in the patient, whatever the order of its axes."""
    names = {"background": 0, "spleen": 1}
    for data, part in (("labelled", "Ts"), ("real", "Tr")):
        for kind in ("images", "labels"):
            (tmp_path / data / f"{kind}{part}").mkdir(parents=True)
        (tmp_path / data / "dataset.json").write_text(json.dumps({"labels": names}))
    affine = nib.affines.from_matvec(np.array([[0, -2.0, 0], [0, 0, 3.0], [-1.0, 0, 0]]), [5, -7, 11])
    image = np.full((24, 20, 16), 40, np.int16)
    label = np.zeros(image.shape, np.uint8)
    label[8:16, 4:10, 6:12] = 1
    for name, values in (("imagesTr/x_0000", image), ("labelsTr/x", label)):
        nib.save(nib.Nifti1Image(values, affine), tmp_path / "real" / f"{name}.nii.gz")
    for name, values in (("imagesTs/test_000_0000", image), ("labelsTs/test_000", label)):
        nib.save(nib.Nifti1Image(values, affine), tmp_path / "labelled" / f"{name}.nii.gz")
    made = runs.gather_tests(tmp_path / "tests", tmp_path / "labelled", {"real CT": tmp_path / "real"}, 2.0)
    assert sorted(file.name for file in (made / "imagesTs").iterdir()) == [
        "real CT__x_0000.nii.gz",
        "synthetic__test_000_0000.nii.gz",
    ]
    scan, truth = (nib.load(made / f"{name}.nii.gz") for name in ("imagesTs/real CT__x_0000", "labelsTs/real CT__x"))
    np.testing.assert_array_equal(scan.affine, truth.affine)
    np.testing.assert_allclose(scan.affine[:3, :3], 2 * np.eye(3))
    assert scan.get_data_dtype() == np.int16 and truth.get_data_dtype() == np.uint8
    here = nib.affines.apply_affine(truth.affine, np.argwhere(np.asarray(truth.dataobj) == 1).mean(0))
    there = nib.affines.apply_affine(affine, np.argwhere(label == 1).mean(0))
    np.testing.assert_allclose(here, there, atol=1)
    volume = (np.asarray(truth.dataobj) == 1).sum() * 8
    assert volume == pytest.approx((label == 1).sum() * 6, rel=0.15)

    # Other sets have a folder of their own, so that they may come later, and the networks are evaluated again.
    other = runs.gather_tests(made, tmp_path / "labelled", {}, 2.0)
    assert other.name == "tests_2" and [file.name for file in (other / "labelsTs").iterdir()] == [
        "synthetic__test_000.nii.gz"
    ]
    for _ in range(2):
        assert runs.gather_tests(made, tmp_path / "labelled", {"real CT": tmp_path / "real"}, 2.0) == made
        assert runs.gather_tests(made, tmp_path / "labelled", {}, 2.0) == other
    first, then = (
        [
            run.folder
            for run in runs.fine_tuning(made, tests, None, tmp_path, SIZES["cpu"], ARMS[OURS], Trial(CELL, 0, 0))
        ]
        for tests in (made, other)
    )
    assert first == [tmp_path, tmp_path / "report"] and then == [tmp_path, tmp_path / "report_2"]
    (tmp_path / "real" / "dataset.json").write_text(json.dumps({"labels": {"background": 0, "liver": 1}}))
    with pytest.raises(InputError, match=r"dataset\.json: its labels are .*'liver': 1"):
        runs.gather_tests(tmp_path / "again", tmp_path / "labelled", {"real CT": tmp_path / "real"}, 2.0)


def test_scans_of_several_folders_have_names_of_their_own(tmp_path: Path) -> None:
    for folder in "ab":
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "ct.nii.gz").write_bytes(folder.encode())
    made = runs.gather_scans(tmp_path / "all", [tmp_path / "a", tmp_path / "b"])
    assert [file.read_text() for file in sorted(made.iterdir())] == ["a", "b"]
    assert runs.gather_scans(made, [tmp_path / "a", tmp_path / "b"]) == made
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=re.escape("empty: has no .nii.gz file")):
        runs.gather_scans(tmp_path / "none", [tmp_path / "empty"])
    with pytest.raises(InputError, match=re.escape(f"{made}: made of [")):
        runs.gather_scans(made, [tmp_path / "a"])


@pytest.mark.parametrize(
    ("given", "message"),
    [("cohort", "--test cohort: give NAME=FOLDER"), ("x=/nowhere", "--test x=/nowhere: /nowhere is not there")],
)
def test_test_sets_that_are_none_are_refused(given: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        find_folders([given])


def test_design_says_what_the_sizes_do() -> None:
    design = DESIGN.read_text()
    for name in ("cpu", "small", "gpu"):
        size = SIZES[name]
        network, tuning, phantoms = size["network"], size["fine-tuning"], size["phantoms"]
        assert (phantoms["unlabelled"], phantoms["labelled"], phantoms["test"]) == (128, 64, 12)
        assert (size["labels"], size["pretrainings"], size["seeds"]) == ([1, 4, 16, 64], 3, [0, 1, 2])
        assert network["patch_size"] * network["spacing"][0] == 18
        (row,) = (line for line in design.splitlines() if line.startswith(f"| `{name}`"))
        assert f"| {network['spacing'][0]:g} mm, crops of {network['img_size'][0]} |" in row
        assert f" of {size['encoder']['network_def#hidden_size']:,}" in row
        assert f"| {tuning['steps']:,} steps of {tuning['crops']} crops |" in row
    for text in ("128 are pre-trained on", "64 others", "1, 4, 16 or all", "12 further ones", "3 times", "of 18 mm"):
        assert text in design


def test_results_begin_with_the_design() -> None:
    assert (ROOT / "docs" / "results" / "transfer.md").read_text().startswith(DESIGN.read_text().strip())


@pytest.mark.slow
def test_the_whole_chain_runs_once(tmp_path: Path) -> None:
    """With real scans of another grid to pre-train and to test on, in two sittings."""
    real = tmp_path / "real"
    words = ["-m", "shared_networks.synthetic.phantom", "--out", str(real), "--label_set", "btcv", "--seed", "9"]
    subprocess.run([sys.executable, *words, "--train", "2", "--test", "0", "--voxel_mm", "5"], cwd=ROOT, check=True)
    words = [sys.executable, "-m", "tests.benchmarks.study", "--size", "smoke", "--out", str(tmp_path / "out")]
    words += ["--test", f"real CT={real}", "--no-ablations"]
    subprocess.run([*words, "--minutes", "0"], cwd=ROOT, check=True)
    assert "The scans are not all made yet." in (tmp_path / "out" / "transfer.md").read_text()
    subprocess.run(words, cwd=ROOT, check=True)
    with (tmp_path / "out" / "transfer.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert {row["variant"] for row in rows} == {OURS, FROZEN}
    assert {(row["test set"], row["case"]) for row in rows} == {
        ("synthetic", "test_000"),
        ("real CT", "train_000"),
        ("real CT", "train_001"),
    }
    dice = [float(value) for row in rows for value in list(row.values())[len(results.COLUMNS) :] if value]
    assert dice and all(0 <= value <= 1 for value in dice)
    text = (tmp_path / "out" / "transfer.md").read_text()
    assert text.startswith(DESIGN.read_text().strip()) and "2 of 2 fine-tunings are done, and 1 pre-trainings." in text
    assert "| 1 | Hi-End-MAE, frozen less Hi-End-MAE | " in text
    for picture in ("transfer.png", "reconstructions/hi_end_mae_0.jpg"):
        assert (tmp_path / "out" / picture).stat().st_size > 10_000
    drawn = {picture.name for picture in (tmp_path / "out" / "fine-tuning").rglob("*.png")}
    assert drawn == {"dice_boxplot.png", "reliability.png"}  # and no cases, which nobody would look at
    models = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("model.pt")}
    assert len(models) == 3
    subprocess.run(words, cwd=ROOT, check=True)
    assert {file: file.stat().st_mtime_ns for file in models} == models

    # What a worker made is what the command makes by itself.
    folder = tmp_path / "out" / "fine-tuning" / "hi_end_mae_1_4" / "0_0"
    record = json.loads((folder / "run.json").read_text())
    command = [word.replace(str(folder), str(tmp_path / "alone")) for word in record["words"]]
    subprocess.run([sys.executable, *command], cwd=ROOT / record["bundle"], check=True)
    here, alone = (torch.load(place / "model.pt", weights_only=True) for place in (folder, tmp_path / "alone"))
    assert here.keys() == alone.keys() and all(torch.equal(here[name], alone[name]) for name in here)

    # On another machine nothing of it is run again.
    words[words.index("--out") + 1] = str(tmp_path / "other")
    subprocess.run([*words, "--known", str(tmp_path / "out")], cwd=ROOT, check=True)
    assert not list((tmp_path / "other").rglob("model.pt"))
    for name in ("transfer.csv", "pretrainings.csv"):
        assert (tmp_path / "other" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()
