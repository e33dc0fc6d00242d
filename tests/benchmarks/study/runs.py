"""Every step of the study as a command of the bundles."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import nibabel as nib
import nibabel.processing
import numpy as np

from shared_networks.datasets.cases import find_cases
from shared_networks.datasets.nifti import is_nifti
from shared_networks.errors import InputError
from shared_networks.files import write_json

from .execution import Run, bundle_run
from .settings import ARMS, CURVE_ARMS, CURVES, MAIN_LABELS, Settings, Variant

PRETRAINING, SEGMENTER = "hi_end_mae_pretrain", "hi_end_mae_btcv_seg"
SYNTHETIC = "synthetic"


class Cell(NamedTuple):
    """What is fine-tuned alike but for the chance of pre-training and seed."""

    variant: str
    labels: int
    steps: int


class Trial(NamedTuple):
    """One fine-tuning: which pre-training it starts from, and the seed of all else."""

    cell: Cell
    pretraining: int
    seed: int


def slug(name: str) -> str:
    """A folder's name."""
    return "_".join("".join(c if c.isalnum() or c == "." else " " for c in name.lower()).split())


def trials(size: Settings, variants: Mapping[str, Variant], pretrainings: Mapping[str, int]) -> list[Trial]:
    """List all fine-tunings: the main measure, one pre-training of the arms elsewhere, curves, ablations, the rest.

    Arms have every pre-training with every seed. Ablations and curves have one fine-tuning for each seed, and a
    pre-training of its own for each.
    """
    steps, seeds = size["fine-tuning"]["steps"], size["seeds"]

    def arms(labels: Sequence[int], numbers: Sequence[int]) -> list[Trial]:
        return [
            Trial(Cell(arm, count, steps), number, seed)
            for count in labels
            for number in numbers
            for seed in seeds
            for arm in size["arms"]
            if number < pretrainings[arm]
        ]

    def others(names: Iterable[str], labels: int, counts: Sequence[int]) -> list[Trial]:
        return [
            Trial(Cell(name, labels, count), position % pretrainings[name], seed)
            for position, seed in enumerate(seeds)
            for name in names
            for count in counts
        ]

    rest = [count for count in size["labels"] if count != MAIN_LABELS]
    numbers = range(max(pretrainings.values()))
    curved = CURVES if {*CURVES} <= {*size["labels"]} and {*CURVE_ARMS} <= {*size["arms"]} else {}
    curves = {labels: [round(share * steps) for share in shares] for labels, shares in curved.items()}
    return [
        *arms([count for count in size["labels"] if count == MAIN_LABELS], numbers),
        *arms(rest, numbers[:1]),
        *(trial for labels, counts in curves.items() for trial in others(CURVE_ARMS, labels, counts)),
        *others([name for name in variants if name not in ARMS], MAIN_LABELS, [steps]),
        *arms(rest, numbers[1:]),
    ]


def phantoms(folder: Path, size: Settings, train: int, test: int, seed: int) -> Run:
    """Make synthetic scans."""
    options = {"train": train, "test": test, "voxel_mm": size["phantoms"]["voxel_mm"], "seed": seed, "num_workers": 16}
    words = [word for key, value in options.items() for word in (f"--{key}", str(value))]
    words = ["-m", "shared_networks.synthetic.phantom", "--out", str(folder), "--label_set", "btcv", *words]
    return Run("synthetic scans", folder.parent / f"{folder.name}_made", ".", words)


def preparing(data: Path, folder: Path, size: Settings) -> Run:
    """Resample the scans that pre-training reads."""
    options = {"dataset_dir": str(data), "prepared_dir": str(folder / "store"), "spacing": size["network"]["spacing"]}
    return bundle_run("preparing", folder, PRETRAINING, ["prepare"], {**options, "min_size": 8, "num_workers": 0})


def pretraining_epochs(steps: int, settings: Mapping[str, Any], cases: int) -> int:
    """Return how many epochs have the steps, with the settings' share of the cases left to validation."""
    validation = max(1, round(settings["val_fraction"] * cases))
    return math.ceil(steps / math.ceil((cases - validation) / settings["batch_size"]))


def pretraining(store: Path, probe: Path, folder: Path, size: Settings, variant: Variant, seed: int) -> Run:
    """Pre-train for the size's steps, on however many cases; the last weights are taken."""
    cases = len((store / "manifest.jsonl").read_text().splitlines())
    settings = dict(size["pretraining"])
    epochs = pretraining_epochs(settings.pop("steps"), settings, cases)
    options = {
        "prepared_dir": str(store),
        "probe_dir": str(probe),
        "ckpt_dir": str(folder),
        "output_dir": str(folder),
        "resume": True,
        "seed": seed,
        "epochs": epochs,
        "warmup_epochs": max(1, epochs // 20),
        "val_interval": max(1, epochs // 4),
    }
    options |= size["network"] | size["encoder"] | settings | variant.network | (variant.pretraining or {})
    return bundle_run("pre-training", folder, PRETRAINING, ["train", "prepared"], options)


def reconstruction(scan: Path, folder: Path, size: Settings, variant: Variant) -> Run:
    """Draw what a pre-training makes of a folder's scan."""
    options = {"dataset_dir": str(scan), "checkpoint": str(folder / "model.pt"), "output_dir": str(folder / "drawn")}
    network = {key: value for key, value in size["pretraining"].items() if key.startswith("network_def#")}
    options |= size["network"] | size["encoder"] | network | variant.network | (variant.pretraining or {})
    return bundle_run("reconstruction", folder / "drawn", PRETRAINING, ["inference"], options)


def report_folder(folder: Path, tests: Path) -> Path:
    """Return the folder of a fine-tuning's evaluation on one of the test data sets of :func:`gather_tests`."""
    return folder / tests.name.replace("tests", "report")


def fine_tuning(
    data: Path, tests: Path, encoder: Path | None, folder: Path, size: Settings, variant: Variant, trial: Trial
) -> list[Run]:
    """Fine-tune for the trial's steps, on however many cases, without validation, and evaluate on all test cases."""
    settings = size["fine-tuning"] | variant.fine_tuning
    del settings["steps"]
    cases = min(trial.cell.labels, 4, crops := settings.pop("crops"))
    epochs = max(1, trial.cell.steps * cases // trial.cell.labels)
    network = size["network"] | size["encoder"] | variant.network
    training = {
        "dataset_dir": str(data),
        "label_names": "@dataset_labels",
        "pretrained_encoder": str(encoder / "model.pt") if encoder else "",
        "ckpt_dir": str(folder),
        "output_dir": str(folder),
        "resume": True,
        "split#val_cases": [],
        "split#val_fraction": 0.0,
        "split#num_train_cases": trial.cell.labels,
        "seed": trial.seed,
        "batch_size": cases,
        "num_samples": crops // cases,
        "epochs": epochs,
        "warmup_epochs": max(1, epochs // 20),
        "val_interval": epochs,
    }
    report = report_folder(folder, tests)
    evaluation = {
        "dataset_dir": str(tests),
        "label_names": "@model_labels",
        "checkpoint": str(folder / "model.pt"),
        "output_dir": str(report),
        "overlap": 0.25,
        "sw_batch_size": 4,
        "num_workers": 0,
        "validate#postprocessing#transforms#1#_disabled_": True,  # pictures, which nobody would look at
    }
    shape = {key: value for key, value in settings.items() if key.startswith("network_def#")}
    configs = ["train", *variant.configs]
    return [
        bundle_run("fine-tuning", folder, SEGMENTER, configs, training | network | settings),
        bundle_run("evaluation", report, SEGMENTER, ["train", "evaluate"], evaluation | network | shape),
    ]


def made_of(folder: Path) -> Any:
    """Return what is noted beside a folder, None where nothing is."""
    note = folder.with_name(f"{folder.name}.json")
    return json.loads(note.read_text()) if note.is_file() else None


def claim(folder: Path, sources: Any) -> None:
    """Note beside a folder what it is made of.

    Raises:
        InputError: it was made of something else.
    """
    before = made_of(folder)
    if before not in (None, sources):
        raise InputError(f"{folder}: made of {before}, and not of {sources}; give another --out, or remove it")
    write_json(folder.with_name(f"{folder.name}.json"), sources)


def link(file: Path, target: Path) -> None:
    """Give a file a second name, unless it has it."""
    target.parent.mkdir(exist_ok=True)
    if not target.exists():
        os.link(file, target)


def gather_labelled(folder: Path, made: Path, counts: Mapping[str, int]) -> Path:
    """Link the first synthetic scans, `labelled` to train and `test` to test, that show an organ: a cut leg has none.

    Raises:
        InputError: too few do.
    """
    write_json(folder / "dataset.json", json.loads((made / "dataset.json").read_text()))
    for part, count in (("Tr", counts["labelled"]), ("Ts", counts["test"])):
        files = sorted((made / f"labels{part}").iterdir())
        labels = list(islice((file for file in files if np.any(nib.load(file).dataobj)), count))
        if len(labels) < count:
            raise InputError(f"{made}: {len(labels)} scans of labels{part} show an organ; {count} are needed")
        for label in labels:
            scan = made / f"images{part}" / f"{label.name.split('.')[0]}_0000.nii.gz"
            for file in (label, scan):
                link(file, folder / file.parent.name / file.name)
    return folder


def gather_tests(folder: Path, labelled: Path, others: Mapping[str, Path], voxel_mm: float) -> Path:
    """Put all test cases into one data set, so that a network is loaded once for all of them.

    A case's name begins with its set's, as in `real CT__ct_001`. Scans of other sets are resampled to cubes of
    `voxel_mm` at least, labels to the nearest voxel, so that their size does not rule the time.

    Returns:
        The folder, or where it has other sets, the next one: `tests_2` after `tests`.

    Raises:
        InputError: a set has no labelled scans, or other labels than the synthetic ones.
    """
    sources = {name: str(data) for name, data in others.items()}
    first, number = folder, 1
    while made_of(folder) not in (None, sources):
        number += 1
        folder = first.with_name(f"{first.name}_{number}")
    claim(folder, sources)
    description = json.loads((labelled / "dataset.json").read_text())
    names = description["labels"]
    write_json(folder / "dataset.json", description)
    for part in ("imagesTs", "labelsTs"):
        for file in sorted((labelled / part).iterdir()):
            link(file, folder / part / f"{SYNTHETIC}__{file.name}")
    for name, data in others.items():
        file = data / "dataset.json"
        if file.is_file() and (theirs := json.loads(file.read_text()).get("labels")) != names:
            raise InputError(f"{file}: its labels are {theirs}; give a set with {names}")
        for case in find_cases(data):
            stem = Path(case["label"]).name.split(".")[0]
            image, label = (folder / part / f"{name}__{stem}{end}.nii.gz" for part, end in
                            (("imagesTs", "_0000"), ("labelsTs", "")))  # fmt: skip
            if not label.exists():
                resample(Path(case["image"]), image, voxel_mm, 1)
                resample(Path(case["label"]), label, voxel_mm, 0)
    return folder


def resample(source: Path, target: Path, voxel_mm: float, order: int) -> None:
    """Write a scan, or with `order` 0 labels, with cubic voxels in RAS order."""
    outside, kind = (-1000, np.int16) if order else (0, np.uint8)
    made = nibabel.processing.resample_to_output(nib.load(source), [voxel_mm] * 3, order, cval=outside)
    nib.save(nib.Nifti1Image(np.asarray(made.dataobj).round().astype(kind), made.affine), target)


def gather_scans(folder: Path, sources: Sequence[Path], most: int | None = None) -> Path:
    """Link the scans of several folders, or the first of each, into one.

    Raises:
        InputError: a folder has no NIfTI file, or there were other folders.
    """
    claim(folder, [str(source) for source in sources])
    folder.mkdir(parents=True, exist_ok=True)
    for number, source in enumerate(sources):
        files = [file for file in sorted(source.iterdir()) if is_nifti(file.name)]
        if not files:
            raise InputError(f"{source}: has no .nii.gz file")
        for file in files[:most]:
            link = folder / f"{number}_{file.name}"
            if not link.exists():
                link.symlink_to(file.resolve())
    return folder
