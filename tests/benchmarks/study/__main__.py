"""The command; see the package."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Container, Mapping, Sequence
from pathlib import Path

from shared_networks.errors import InputError

from .. import study
from ..loader import machine
from . import runs
from .execution import Run, Sitting, is_done
from .report import report, time_table
from .results import read_known
from .runs import Trial, slug
from .settings import ABLATIONS, ARMS, SIZES, Settings, Variant, patch_ablations

DESIGN = Path(__file__).with_name("design.md")


def find_folders(given: Sequence[str]) -> dict[str, Path]:
    """Return folders by name, from `NAME=FOLDER`.

    Raises:
        InputError: a text of another form, or no such folder.
    """
    found = {}
    for text in given:
        name, _, folder = text.partition("=")
        if not folder:
            raise InputError(f"--test {text}: give NAME=FOLDER")
        if not Path(folder).is_dir():
            raise InputError(f"--test {text}: {folder} is not there")
        found[name] = Path(folder).resolve()
    return found


def variants_of(size: Settings, real: bool, ablations: bool) -> dict[str, Variant]:
    """Return what is trained: the size's arms, and the ablations that can be made."""
    found = {name: ARMS[name] for name in size["arms"]}
    if ablations:
        found |= {n: v for n, v in (ABLATIONS | patch_ablations(size)).items() if real or v.unlabelled == "synthetic"}
    return found


def run_all(
    out: Path,
    size: Settings,
    variants: Mapping[str, Variant],
    tests: Mapping[str, Path],
    unlabelled: Sequence[Path],
    sitting: Sitting,
    known: Container[Trial] = (),
) -> tuple[dict[tuple[str, int], Path], dict[Trial, Path]]:
    """Run what has not been run and is not known.

    Returns:
        Folders of pre-trainings, by variant and number, and of evaluations; none before all scans are made.

    Raises:
        InputError: see :mod:`.runs`, and :func:`.execution.execute_all`.
    """
    counts, data = size["phantoms"], out / "data"
    patients, synthetic = data / "patients", data / "unlabelled"
    made = [
        # Some more, as one in twenty shows no organ.
        runs.phantoms(patients, size, *(count + count // 5 + 2 for count in (counts["labelled"], counts["test"])), 500),
        runs.phantoms(synthetic, size, counts["unlabelled"], 0, 600),
    ]
    sitting.run([[run] for run in made])
    if not all(map(is_done, made)):
        return {}, {}
    labelled = runs.gather_labelled(data / "labelled", patients, counts)
    cases = runs.gather_tests(data / "tests", labelled, tests, counts["voxel_mm"])
    shown = runs.gather_scans(data / "shown", [data / "tests" / "imagesTs"], 1)
    scans = {"synthetic": [synthetic / "imagesTr"], "real": [folder.resolve() for folder in unlabelled]}
    scans["both"] = scans["synthetic"] + scans["real"]
    used = {variant.unlabelled for variant in variants.values()}
    sources = {name: runs.gather_scans(data / f"scans_{name}", scans[name]) for name in scans if name in used}
    made = [runs.preparing(folder, out / "prepared" / name, size) for name, folder in sources.items()]
    sitting.run([[run] for run in made])
    if not all(map(is_done, made)):
        return {}, {}

    repeats = {name: 1 if variant.pretraining is None else size["pretrainings"] for name, variant in variants.items()}
    pretrainings: dict[tuple[str, int], Run] = {}
    reports: dict[Trial, Path] = {}
    arms: list[Sequence[Run]] = []  # their pre-trainings, on which many fine-tunings wait
    chains: dict[Trial | tuple[str, int], list[Run]] = {}  # by trial; those of an ablation begin with its pre-training
    for trial in runs.trials(size, variants, repeats):
        variant, encoder, key = variants[trial.cell.variant], None, trial
        place = out / "fine-tuning" / slug(" ".join(map(str, trial.cell))) / f"{trial.pretraining}_{trial.seed}"
        reports[trial] = runs.report_folder(place, cases)
        if trial in known:
            continue
        if variant.pretraining is not None:
            owner = variant.encoder_of or trial.cell.variant, trial.pretraining
            encoder = out / "pretraining" / slug(owner[0]) / str(owner[1])
            if owner not in pretrainings:
                store = out / "prepared" / variants[owner[0]].unlabelled / "store"
                first = runs.pretraining(store, labelled, encoder, size, variants[owner[0]], owner[1])
                then = pretrainings[owner] = runs.reconstruction(shown, encoder, size, variants[owner[0]])
                if owner[0] in size["arms"]:
                    arms.append([first, then])
                else:
                    chains[owner] = [first, then]
            key = owner if owner in chains else trial
        chain = runs.fine_tuning(labelled, cases, encoder, place, size, variant, trial)
        chains.setdefault(key, []).extend(chain)
    sitting.run(arms)
    sitting.run(list(chains.values()))
    return {key: run.folder.parent for key, run in pretrainings.items() if is_done(run)}, reports


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        "python -m tests.benchmarks.study",
        description=study.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of all results")
    parser.add_argument("--size", choices=SIZES, default="cpu")
    parser.add_argument("--test", action="append", default=[], metavar="NAME=FOLDER", help="further labelled scans")
    parser.add_argument("--unlabelled", action="append", default=[], type=Path, help="folder of real scans")
    parser.add_argument("--known", type=Path, metavar="FOLDER", help="results of an earlier sitting, not to run again")
    parser.add_argument("--ablations", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--minutes", type=float, help="begin no further run after this time")
    parser.add_argument("--jobs", type=int, help="runs at a time; default: as many as cores, fewer on a GPU")
    args = parser.parse_args()
    size, out, start = SIZES[args.size], args.out.resolve(), time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    sitting = Sitting(args.jobs or size.get("jobs") or len(os.sched_getaffinity(0)), args.minutes)
    try:
        tests = find_folders(args.test)
        variants = variants_of(size, bool(args.unlabelled), args.ablations)
        known = read_known(args.known, [runs.SYNTHETIC, *tests])
        found = run_all(out, size, variants, tests, args.unlabelled, sitting, known.rows)
    except InputError as error:
        sys.exit(f"error: {error}")
    told = ", ".join(f"{key} {value}" for key, value in machine().items() if value is not None)
    minutes = (time.monotonic() - start) / 60
    sections = [
        DESIGN.read_text().strip(),
        "# Results",
        f"Size {args.size}, {sitting.jobs} runs at a time, {minutes:.0f} minutes this time. {told}.",
        time_table(sitting.records),
        *report(out, size, *found, known),
    ]
    text = "\n\n".join(sections)
    (out / "transfer.md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
