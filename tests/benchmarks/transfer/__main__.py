"""The command; see the package."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shared_networks.errors import InputError
from shared_networks.files import write_csv

from .. import transfer
from ..loader import machine
from . import results
from .runs import PRETRAINING, SEGMENTER, Run, bundle_run, execute_all, preparing, pretraining_epochs
from .settings import ABLATION_LABELS, ABLATIONS, ARMS, SIZES, Settings


def find_data(given: Sequence[str], out: Path) -> dict[str, Path]:
    """Folders of data sets by name, from `synthetic` and `NAME=FOLDER`.

    Raises:
        InputError: a name without a folder, or a folder that is no data set.
    """
    folders = {}
    for text in given:
        name, _, folder = text.partition("=")
        if text != "synthetic" and not folder:
            raise InputError(f"--data {text}: give synthetic, or NAME=FOLDER")
        for part in ("imagesTr", "labelsTr", "imagesTs", "labelsTs") if folder else ():
            if not Path(folder, part).is_dir():
                raise InputError(f"--data {text}: {folder} has no {part}")
        folders[name] = Path(folder).resolve() if folder else out / "synthetic" / "data"
    return folders


def slug(name: str) -> str:
    """A folder's name."""
    return "_".join(name.lower().replace(":", "").replace("-", " ").split())


def phantoms(folder: Path, size: Settings) -> Run:
    """Makes the synthetic scans."""
    options = [word for key, value in size["phantoms"].items() for word in (f"--{key}", str(value))]
    words = ["-m", "shared_networks.synthetic.phantom", "--out", str(folder), *options]
    return Run("synthetic scans", folder.parent / "phantoms", ".", words)


def pretraining(prepared: Path, folder: Path, size: Settings, variant: Settings, cases: int) -> Run:
    """Pre-trains for the size's steps, on however many cases; as in fine-tuning, the last weights are taken."""
    settings = dict(size["pretraining"])
    epochs = pretraining_epochs(settings.pop("steps"), settings, cases)
    options = {
        "prepared_dir": str(prepared / "store"),
        "ckpt_dir": str(folder),
        "output_dir": str(folder),
        "resume": True,
        "epochs": epochs,
        "warmup_epochs": max(1, epochs // 10),
        "val_interval": epochs,
    }
    options |= size["network"] | size["encoder"] | settings | variant
    return bundle_run("pre-training", folder, PRETRAINING, ["train", "prepared"], options)


def fine_tuning(data: Path, encoder: Path | None, folder: Path, size: Settings, labels: int, seed: int) -> list[Run]:
    """Fine-tunes for the size's steps, on however many cases, and evaluates on `imagesTs`."""
    settings = dict(size["fine-tuning"])
    epochs = max(1, settings.pop("steps") // labels)
    network = size["network"] | size["encoder"]
    training = {
        "dataset_dir": str(data),
        "label_names": "@dataset_labels",
        "pretrained_encoder": str(encoder / "model.pt") if encoder else "",
        "ckpt_dir": str(folder),
        "output_dir": str(folder),
        "resume": True,
        "split#num_train_cases": labels,
        "seed": seed,
        "split#val_fraction": 0.01,
        "epochs": epochs,
        "warmup_epochs": max(1, epochs // 10),
        "val_interval": epochs,
    }
    report = folder / "report"
    evaluation = {
        "dataset_dir": str(data),
        "label_names": "@model_labels",
        "checkpoint": str(folder / "model.pt"),
        "output_dir": str(report),
        "num_workers": 0,
        "validate#postprocessing#transforms#0#_disabled_": True,  # pictures, which nobody would look at
    }
    feature_size = {"network_def#feature_size": settings["network_def#feature_size"]}
    return [
        bundle_run("fine-tuning", folder, SEGMENTER, ["train"], training | network | settings),
        bundle_run("evaluation", report, SEGMENTER, ["train", "evaluate"], evaluation | network | feature_size),
    ]


def run_all(
    out: Path, size: Settings, data: dict[str, Path], ablated: str | None, jobs: int
) -> tuple[list[dict[str, Any]], dict[str, dict[str, Path]], dict[results.Cell, dict[int, Path]]]:
    """Runs what has not been run.

    Returns:
        Records of all runs; folders of pre-trainings by data set and variant; and of evaluations by cell and seed.

    Raises:
        InputError: a data set has too few cases, or see :func:`.runs.execute_all`.
    """
    arms = {name: ARMS[name] for name in size["arms"]}
    records = []
    if "synthetic" in data and data["synthetic"].is_relative_to(out):
        records += execute_all([[phantoms(data["synthetic"], size)]], jobs)
    prepared = {name: preparing(folder, out / name / "prepared", size) for name, folder in data.items()}
    records += execute_all([[run] for run in prepared.values()], jobs)

    first, then = [], []
    pretrainings: dict[str, dict[str, Path]] = {name: {} for name in data}
    reports: dict[results.Cell, dict[int, Path]] = {}
    for name, folder in data.items():
        cases = len((prepared[name].folder / "store" / "manifest.jsonl").read_text().splitlines())
        if cases <= max(size["labels"]):
            raise InputError(f"{folder}: has {cases} scans in imagesTr; give more than {max(size['labels'])}")
        for variant, settings in (arms | (ABLATIONS if name == ablated else {})).items():
            encoder = None
            if settings is not None:
                encoder = pretrainings[name][variant] = out / name / "pretraining" / slug(variant)
                first.append([pretraining(prepared[name].folder, encoder, size, settings, cases)])
            for labels in size["labels"] if variant in arms else [ABLATION_LABELS]:
                for seed in size["seeds"]:
                    place = out / name / "fine-tuning" / f"{slug(variant)}_{labels}_labels_seed_{seed}"
                    then.append(fine_tuning(folder, encoder, place, size, labels, seed))
                    reports.setdefault(results.Cell(name, variant, labels), {})[seed] = then[-1][-1].folder
    records += execute_all(first, jobs)
    records += execute_all(then, jobs)
    return records, pretrainings, reports


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        "python -m tests.benchmarks.transfer",
        description=transfer.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of all results")
    parser.add_argument("--size", choices=SIZES, default="cpu")
    parser.add_argument("--data", action="append", metavar="synthetic|NAME=FOLDER", help="default: synthetic")
    parser.add_argument("--ablations", metavar="NAME", help="of taps, decoder depth and mask ratio, on this data set")
    parser.add_argument("--jobs", type=int, help="runs at a time; default: as many as cores, 4 on a GPU")
    args = parser.parse_args()
    size, out, start = SIZES[args.size], args.out.resolve(), time.monotonic()
    jobs = args.jobs or size.get("jobs") or len(os.sched_getaffinity(0))
    try:
        data = find_data(args.data or ["synthetic"], out)
        if args.ablations and args.ablations not in data:
            raise InputError(f"--ablations {args.ablations}: give one of {', '.join(data)}")
        records, pretrainings, reports = run_all(out, size, data, args.ablations, jobs)
    except InputError as error:
        sys.exit(f"error: {error}")
    write_csv(out / "transfer.csv", results.raw_rows(reports))
    dice = results.read_dice(out / "transfer.csv")
    results.figure(dice, size["arms"]).savefig(out / "transfer.png")
    told = ", ".join(f"{key} {value}" for key, value in machine().items() if value is not None)
    sections = [
        f"Size {args.size}, {jobs} runs at a time, {(time.monotonic() - start) / 60:.0f} minutes this time. {told}.",
        results.time_table(records),
        *(
            results.data_section(
                name,
                {cell: read for cell, read in dice.items() if cell.data == name},
                {variant: results.masked_errors(folder) for variant, folder in pretrainings[name].items()},
                size["arms"],
            )
            for name in data
        ),
    ]
    text = "\n\n".join(sections)
    (out / "transfer.md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
