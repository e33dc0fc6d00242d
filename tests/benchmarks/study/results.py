"""From the reports of all evaluations and pre-trainings to raw numbers, and from these to intervals."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from shared_networks.errors import InputError
from shared_networks.evaluation.tables import CONFIDENCE, RESAMPLES

from .runs import SYNTHETIC, Cell, Trial

Array = NDArray[np.float64]
RAW, PRETRAININGS = "transfer.csv", "pretrainings.csv"
CURVES = ("masked_mse", "val_masked_mse", "probe_dice", "effective_rank")
COLUMNS = ["test set", "variant", "labelled cases", "steps", "pre-training", "seed", "case"]


class Scores(NamedTuple):
    """Dice of a cell on a test set.

    Args:
        trials: pre-training and seed of each row, in order.
        cases: names.
        organs: names.
        dice: `[trials, cases, organs]`, NaN where an organ is not in the truth.
    """

    trials: list[tuple[int, int]]
    cases: list[str]
    organs: list[str]
    dice: Array

    def by_case(self) -> Array:
        """Mean over organs, `[trials, cases]`."""
        return np.nanmean(self.dice, axis=2)


def read_report(file: Path) -> dict[str, dict[str, float]]:
    """Return Dice by organ of each case of a `metrics.csv`, NaN where an organ is not in the truth."""
    found: dict[str, dict[str, float]] = {}
    with file.open(newline="") as stream:
        for row in csv.DictReader(stream):
            dice = float(row["dice"]) if float(row["truth_ml"]) else float("nan")
            found.setdefault(row["case"], {})[row["organ"]] = dice
    return found


class Known(NamedTuple):
    """Raw numbers of earlier sittings.

    Args:
        folder: of their results; None without any.
        organs: names.
        rows: a row a case, as in `transfer.csv`, by fine-tuning.
        pretrainings: what :func:`curves` told, by variant and number.
    """

    folder: Path | None
    organs: list[str]
    rows: dict[Trial, list[list[Any]]]
    pretrainings: dict[tuple[str, int], dict[str, float]]


def read_known(folder: Path | None, test_sets: Iterable[str]) -> Known:
    """Read `transfer.csv` and `pretrainings.csv` of a folder, of fine-tunings that were tested on just these sets.

    Raises:
        InputError: a file is missing.
    """
    known = Known(folder, [], {}, {})
    if folder is None:
        return known
    for name in (RAW, PRETRAININGS):
        if not (folder / name).is_file():
            raise InputError(f"{folder}: has no {name}; give --known the results of an earlier sitting")
    with (folder / RAW).open(newline="") as stream:
        header, *rows = csv.reader(stream)
    found: dict[Trial, list[list[Any]]] = {}
    for row in rows:
        _, variant, labels, steps, number, seed, *_ = row
        found.setdefault(Trial(Cell(variant, int(labels), int(steps)), int(number), int(seed)), []).append(row)
    known.organs.extend(header[len(COLUMNS) :])
    known.rows.update({trial: rows for trial, rows in found.items() if {row[0] for row in rows} == {*test_sets}})
    with (folder / PRETRAININGS).open(newline="") as stream:
        for line in csv.DictReader(stream):
            key = line.pop("variant"), int(line.pop("pre-training"))
            known.pretrainings[key] = {tag: float(value) for tag, value in line.items()}
    return known


def raw_rows(reports: Mapping[Trial, Path], known: Known) -> list[list[Any]]:
    """Return Dice by organ of all evaluations that are there or known, a row a case, below a header."""
    rows: list[list[Any]] = []
    organs = known.organs
    for trial, folder in reports.items():
        if not (folder / "metrics.csv").is_file():
            rows += known.rows.get(trial, [])
            continue
        cell, pretraining, seed = trial
        for case, scores in read_report(folder / "metrics.csv").items():
            organs = list(scores)
            test_set, _, name = case.partition("__")
            dice = ("" if np.isnan(value) else value for value in scores.values())
            rows.append([test_set, *cell, pretraining, seed, name, *dice])
    return [[*COLUMNS, *organs], *rows]


def pretraining_rows(folders: Mapping[tuple[str, int], Path], known: Known) -> list[list[Any]]:
    """Return what all pre-trainings ended with that are there or known, variant by variant, below a header.

    What is known counts, as most fine-tunings began there: on another processor a pre-training ends a little elsewhere.
    """
    others = {key: curves(folder) for key, folder in folders.items() if key not in known.pretrainings}
    ended = known.pretrainings | others
    variants = list(dict.fromkeys(variant for variant, _ in ended))
    order = sorted(ended, key=lambda key: (variants.index(key[0]), key[1]))
    return [
        ["variant", "pre-training", *CURVES],
        *([*key, *(ended[key].get(tag, "") for tag in CURVES)] for key in order),
    ]


def read_scores(file: Path, seeds: Sequence[int]) -> dict[tuple[str, Cell], Scores]:
    """Read what is :func:`whole` of a file of :func:`raw_rows`, by test set and cell; the synthetic CTs come first."""
    found: dict[tuple[str, Cell], dict[tuple[tuple[int, int], str], list[float]]] = {}
    with file.open(newline="") as stream:
        header, *rows = csv.reader(stream)
    for row in rows:
        test_set, variant, labels, steps, number, seed, case, *dice = row
        place = (int(number), int(seed)), case
        cell = Cell(variant, int(labels), int(steps))
        found.setdefault((test_set, cell), {})[place] = [float(value or "nan") for value in dice]
    read = {}
    for key, dice_of in sorted(found.items(), key=lambda item: item[0][0] != SYNTHETIC):
        trials, cases = (list(dict.fromkeys(parts)) for parts in zip(*dice_of, strict=True))
        trials.sort()
        values = np.array([[dice_of[trial, case] for case in cases] for trial in trials])
        if scores := whole(Scores(trials, cases, header[len(COLUMNS) :], values), seeds):
            read[key] = scores
    return read


def whole(scores: Scores, seeds: Sequence[int]) -> Scores | None:
    """Leave the pre-trainings of which every seed is there, or all where each seed has its own; None without any."""
    by_number = {number: {seed for n, seed in scores.trials if n == number} for number, _ in scores.trials}
    complete = [number for number, found in by_number.items() if found >= set(seeds)]
    if not complete and sorted(seed for _, seed in scores.trials) != sorted(seeds):
        return None
    rows = [row for row, (number, _) in enumerate(scores.trials) if number in (complete or by_number)]
    return scores._replace(trials=[scores.trials[row] for row in rows], dice=scores.dice[rows])


def nested(arms: Sequence[Scores]) -> Array:
    """Draw the mean Dice of several arms again and again, `[resamples, arms]`.

    Pre-trainings are drawn with replacement, each arm's by themselves; for each of them seeds; and for all of these the
    same cases. Seeds and cases are the same for all arms, which makes differences paired: a seed draws the labelled
    cases. An arm without pre-trainings has but seeds to draw. From three pre-trainings the interval is too narrow, as
    from any three.
    """
    rng = np.random.default_rng(0)
    seeds = sorted({seed for arm in arms for _, seed in arm.trials})
    count = len(arms[0].cases)
    weights = rng.multinomial(count, np.full(count, 1 / count), size=RESAMPLES) / count
    most = max(len({number for number, _ in arm.trials}) for arm in arms)
    drawn = rng.integers(len(seeds), size=(RESAMPLES, most, len(seeds)))
    means = []
    for arm in arms:
        numbers = sorted({number for number, _ in arm.trials})
        place = {trial: row for row, trial in enumerate(arm.trials)}
        if len(arm.trials) == len(numbers) * len(seeds):
            chosen = rng.integers(len(numbers), size=(RESAMPLES, most, 1))
            grid = np.array([[place[number, seed] for seed in seeds] for number in numbers])
            rows = grid[chosen, drawn]
        else:  # a pre-training for each seed: both are drawn as one
            rows = np.array([next(r for t, r in place.items() if t[1] == seed) for seed in seeds])[drawn]
        means.append(np.einsum("rpsc,rc->r", arm.by_case()[rows], weights) / (most * len(seeds)))
    return np.stack(means, axis=1)


def ends(draws: Array) -> tuple[float, float]:
    """Return the ends of the 95 % percentile interval."""
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(draws, [tail, 1 - tail])
    return float(low), float(high)


def matched(first: Scores, second: Scores) -> tuple[Scores, Scores]:
    """Leave of two cells the trials of the same pre-training and seed, where one has fewer of these.

    A cell from scratch has one for each seed, whatever the pre-training.
    """
    if len({n for n, _ in first.trials}) == 1 or len({n for n, _ in second.trials}) == 1:
        return first, second
    both = [trial for trial in first.trials if trial in second.trials]
    return tuple(  # type: ignore[return-value]
        scores._replace(trials=both, dice=scores.dice[[scores.trials.index(trial) for trial in both]])
        for scores in (first, second)
    )


def curves(folder: Path) -> dict[str, float]:
    """Return what a pre-training ended with: masked errors, the probe's Dice, and the effective rank."""
    read = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    tags = set(read.Tags()["scalars"])
    values = {tag: [event.value for event in read.Scalars(tag)] for tag in CURVES if tag in tags}
    found = {tag: value[-1] for tag, value in values.items()}
    found["masked_mse"] = float(np.mean(values["masked_mse"][-max(1, len(values["masked_mse"]) // 20) :]))
    return found
