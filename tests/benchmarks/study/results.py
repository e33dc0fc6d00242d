"""From the reports of all evaluations to raw numbers, and from these to intervals, tables and figures."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import imread
from numpy.typing import NDArray
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from shared_networks.evaluation.tables import CONFIDENCE, RESAMPLES
from shared_networks.figures.planes import TEXT_COLOUR

from ..transfer.results import dice_figure, read_report, shown, table
from .runs import SYNTHETIC, Cell, Trial

Array = NDArray[np.float64]
COLUMNS = ["test set", "variant", "labelled cases", "steps", "pre-training", "seed", "case", "organ", "dice"]


class Scores(NamedTuple):
    """Dice of a cell on a test set.

    Args:
        trials: pre-training and seed of each row, in order.
        cases: names.
        organs: names.
        dice: `[trials, cases, organs]`, NaN where an organ is in neither truth nor prediction.
    """

    trials: list[tuple[int, int]]
    cases: list[str]
    organs: list[str]
    dice: Array

    def by_case(self) -> Array:
        """Mean over organs, `[trials, cases]`."""
        return np.nanmean(self.dice, axis=2)


def raw_rows(reports: Mapping[Trial, Path]) -> list[list[Any]]:
    """Return every Dice that is there, a row each, below a header."""
    rows: list[list[Any]] = [COLUMNS]
    for (cell, pretraining, seed), folder in reports.items():
        if not (folder / "metrics.csv").is_file():
            continue
        for (case, organ), dice in read_report(folder / "metrics.csv").items():
            test_set, _, name = case.partition("__")
            rows.append([test_set, *cell, pretraining, seed, name, organ, "" if np.isnan(dice) else dice])
    return rows


def read_scores(file: Path) -> dict[tuple[str, Cell], Scores]:
    """Read a file of :func:`raw_rows`, by test set and cell."""
    found: dict[tuple[str, Cell], dict[tuple[tuple[int, int], str, str], float]] = {}
    with file.open(newline="") as stream:
        for row in csv.DictReader(stream):
            cell = Cell(row["variant"], int(row["labelled cases"]), int(row["steps"]))
            place = (int(row["pre-training"]), int(row["seed"])), row["case"], row["organ"]
            found.setdefault((row["test set"], cell), {})[place] = float(row["dice"] or "nan")
    read = {}
    for key, dice in found.items():
        trials, cases, organs = (list(dict.fromkeys(parts)) for parts in zip(*dice, strict=True))
        trials.sort()
        read[key] = Scores(
            trials, cases, organs, np.array([[[dice[t, c, o] for o in organs] for c in cases] for t in trials])
        )
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


def mean_of(scores: Scores) -> str:
    """Return a mean with its interval, as text."""
    return shown(float(scores.by_case().mean()), ends(nested([scores])[:, 0]))


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


def difference(first: Scores, second: Scores) -> str:
    """Return first less second with its interval, as text."""
    first, second = matched(first, second)
    draws = nested([first, second])
    return shown(float(first.by_case().mean() - second.by_case().mean()), ends(draws[:, 0] - draws[:, 1]), "+")


def curves(folder: Path) -> dict[str, float]:
    """Return what a pre-training ended with: masked errors, the probe's Dice, and the effective rank."""
    read = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    tags = set(read.Tags()["scalars"])
    wanted = ("masked_mse", "val_masked_mse", "probe_dice", "effective_rank")
    values = {tag: [event.value for event in read.Scalars(tag)] for tag in wanted if tag in tags}
    found = {tag: value[-1] for tag, value in values.items()}
    found["masked_mse"] = float(np.mean(values["masked_mse"][-max(1, len(values["masked_mse"]) // 20) :]))
    return found


def pretraining_table(folders: Mapping[tuple[str, int], Path]) -> str:
    """Return a row for each pre-training."""
    header = ["", "pre-training", "masked error, training", "masked error, validation", "probe, Dice", "effective rank"]
    rows = []
    for (variant, number), folder in folders.items():
        found = curves(folder)
        ended = [found.get(tag, float("nan")) for tag in ("masked_mse", "val_masked_mse", "probe_dice")]
        rows.append([variant, number, *(f"{value:.3f}" for value in ended), f"{found.get('effective_rank', 0):.1f}"])
    return table(header, rows)


def arms_tables(read: Mapping[tuple[str, Cell], Scores], test_set: str, arms: Sequence[str], steps: int) -> list[str]:
    """Return means by number of labelled cases, and the differences of all pairs of arms."""
    labels = sorted({cell.labels for name, cell in read if name == test_set and cell.variant in arms})
    cells = {(arm, count): read.get((test_set, Cell(arm, count, steps))) for arm in arms for count in labels}
    means, differences = [], []
    for count in labels:
        row = [cells[arm, count] for arm in arms]
        means.append([count, *(f"{mean_of(s)}, {len(s.trials)}" if s else "not run" for s in row)])
        for later in range(len(arms)):
            for earlier in range(later):
                first, second = row[later], row[earlier]
                if first and second:
                    differences.append([count, f"{arms[later]} less {arms[earlier]}", difference(first, second)])
    return [
        table(["labelled cases", *(f"{arm}, fine-tunings" for arm in arms)], means),
        table(["labelled cases", "compared", "difference of mean Dice"], differences),
    ]


def ablation_table(
    read: Mapping[tuple[str, Cell], Scores], test_set: str, names: Iterable[str], base: Cell, scratch: Cell
) -> str:
    """Return ablations against Hi-End-MAE, or from scratch against from scratch."""
    rows = []
    for name in names:
        found = read.get((test_set, base._replace(variant=name)))
        other = read.get((test_set, scratch if name.endswith("from scratch") else base))
        if found and other:
            rows.append([name, mean_of(found), difference(found, other)])
    return table(["", "mean Dice", "less Hi-End-MAE, or from scratch"], rows)


def organ_table(read: Mapping[tuple[str, Cell], Scores], test_set: str, cells: Sequence[Cell]) -> str:
    """Return mean Dice by organ that is in some case's truth."""
    there = [(cell, read[test_set, cell]) for cell in cells if (test_set, cell) in read]
    organs = [o for n, o in enumerate(there[0][1].organs) if any(not np.isnan(s.dice[..., n]).all() for _, s in there)]
    rows = []
    for organ in organs:
        values = (s.dice[..., s.organs.index(organ)] for _, s in there)
        rows.append([organ, *("" if np.isnan(v).all() else f"{np.nanmean(v):.2f}" for v in values)])
    return table(["organ", *(f"{cell.variant}, {cell.labels}" for cell, _ in there)], rows)


def curve_table(read: Mapping[tuple[str, Cell], Scores], test_set: str, arms: Sequence[str], labels: int) -> str:
    """Return mean Dice of two arms, and the second less the first, by the number of steps."""
    steps = sorted({cell.steps for name, cell in read if name == test_set and cell.labels == labels})
    rows = []
    for count in steps:
        first, second = (read.get((test_set, Cell(arm, labels, count))) for arm in arms)
        if first and second:
            rows.append([count, mean_of(first), mean_of(second), difference(second, first)])
    return table(["steps", *arms, f"{arms[1]} less {arms[0]}"], rows)


def figure(read: Mapping[tuple[str, Cell], Scores], arms: Sequence[str], steps: int) -> Figure:
    """Draw mean Dice of each arm on each test set, see :func:`..transfer.results.dice_figure`."""
    labels = sorted({cell.labels for _, cell in read if cell.variant in arms})
    panels: dict[str, dict[str, dict[int, tuple[float, tuple[float, float]]]]] = {}
    for name in dict.fromkeys(name for name, _ in read):
        for arm in arms:
            scores = {count: read.get((name, Cell(arm, count, steps))) for count in labels}
            found = {n: (float(s.by_case().mean()), ends(nested([s])[:, 0])) for n, s in scores.items() if s}
            panels.setdefault(f"{name} CTs" if name == SYNTHETIC else name, {})[arm] = found
    caption = "dots: means; bars: 95 % bootstrap intervals over pre-trainings, seeds and cases"
    return dice_figure(panels, labels, caption)


def reconstructions(folders: Mapping[tuple[str, int], Path]) -> Figure:
    """Put the pictures that inference drew of each pre-training below each other."""
    pictures = {
        key: next(iter(sorted((folder / "drawn").glob("*_reconstruction.png")))) for key, folder in folders.items()
    }
    images = {key: imread(file) for key, file in pictures.items()}
    height, width = next(iter(images.values())).shape[:2]
    drawing = Figure(figsize=(6, 6 * height / width * len(images) + 0.3 * len(images)), dpi=100, layout="constrained")
    FigureCanvasAgg(drawing)
    panels = drawing.subplots(len(images), 1, squeeze=False)[:, 0]
    for panel, ((variant, number), image) in zip(panels, images.items(), strict=True):
        panel.imshow(image)
        panel.set_title(f"{variant}, pre-training {number}", fontsize=7, color=TEXT_COLOUR)
        panel.axis("off")
    return drawing
