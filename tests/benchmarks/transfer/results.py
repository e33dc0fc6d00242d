"""From the reports of all evaluations to raw numbers, and from these to intervals, tables and a figure."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations, compress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from shared_networks.datasets.labels import label_colour
from shared_networks.evaluation.tables import CONFIDENCE, RESAMPLES
from shared_networks.figures.planes import TEXT_COLOUR

Array = NDArray[np.float64]


class Cell(NamedTuple):
    """What is fine-tuned alike but for the seed."""

    data: str
    variant: str
    labels: int


class Comparison(NamedTuple):
    """Difference of Dice, of one cell less another, paired by seed and case."""

    cells: tuple[Cell, Cell]
    mean: float
    interval: tuple[float, float]


def read_report(file: Path) -> dict[tuple[str, str], float]:
    """Dice by case and organ of a `metrics.csv`, NaN where an organ is in neither truth nor prediction."""
    with file.open(newline="") as stream:
        return {(row["case"], row["organ"]): float(row["dice"] or "nan") for row in csv.DictReader(stream)}


def raw_rows(reports: Mapping[Cell, Mapping[int, Path]]) -> list[list[Any]]:
    """Every Dice there is, a row each, below a header.

    Args:
        reports: folder of an evaluation by cell and seed.
    """
    rows: list[list[Any]] = [["data", "variant", "labelled cases", "seed", "case", "organ", "dice"]]
    for cell, folders in reports.items():
        for seed, folder in folders.items():
            dice = read_report(folder / "metrics.csv")
            rows += [[*cell, seed, *place, "" if np.isnan(value) else value] for place, value in dice.items()]
    return rows


def read_dice(file: Path) -> dict[Cell, tuple[list[str], Array]]:
    """Organs, and Dice `[seeds, cases, organs]`, by cell, from a file of :func:`raw_rows`.

    Every seed of a cell has the same cases; Dice is NaN where an organ is in neither truth nor prediction.
    """
    found: dict[Cell, dict[tuple[str, str, str], float]] = {}
    with file.open(newline="") as stream:
        for row in csv.DictReader(stream):
            cell = Cell(row["data"], row["variant"], int(row["labelled cases"]))
            found.setdefault(cell, {})[row["seed"], row["case"], row["organ"]] = float(row["dice"] or "nan")
    read = {}
    for cell, dice in found.items():
        seeds, cases, organs = (list(dict.fromkeys(keys)) for keys in zip(*dice, strict=True))
        read[cell] = organs, np.array([[[dice[s, c, o] for o in organs] for c in cases] for s in seeds])
    return read


def interval(scores: Array) -> tuple[float, float]:
    """95 % bootstrap percentile interval of the mean of scores `[seeds, cases]`.

    Seeds and cases are drawn with replacement, each by themselves: all seeds are scored on the same cases, so what is
    hard for one is hard for all, and a score is no independent observation. From three seeds the interval is too
    narrow, and it holds nothing of the chance of a pre-training, which is made once.
    """
    rng = np.random.default_rng(0)
    seeds, cases = (rng.multinomial(n, np.full(n, 1 / n), size=RESAMPLES) / n for n in scores.shape)
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(np.einsum("rs,sc,rc->r", seeds, scores, cases), [tail, 1 - tail])
    return float(low), float(high)


def compare(first: Cell, second: Cell, scores: Mapping[Cell, Array]) -> Comparison:
    """First less second, by seed and case.

    Args:
        first: a cell.
        second: another.
        scores: `[seeds, cases]` by cell.
    """
    differences = scores[first] - scores[second]
    return Comparison((first, second), float(differences.mean()), interval(differences))


def masked_errors(folder: Path) -> tuple[float, float]:
    """Masked MSE at the end of a pre-training: over the last twentieth of its steps, and on the validation scans."""
    curves = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    training, validation = ([e.value for e in curves.Scalars(tag)] for tag in ("masked_mse", "val_masked_mse"))
    return float(np.mean(training[-max(1, len(training) // 20) :])), validation[-1]


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def shown(mean: float, ends: tuple[float, float], sign: str = "") -> str:
    """A mean with its interval, such as `0.512 (0.470 to 0.550)`."""
    return f"{mean:{sign}.3f} ({ends[0]:{sign}.3f} to {ends[1]:{sign}.3f})"


def comparison_table(comparisons: Sequence[Comparison]) -> str:
    """Differences with their intervals."""
    rows = [
        [first.labels, f"{first.variant} less {second.variant}", shown(mean, ends, "+")]
        for (first, second), mean, ends in comparisons
    ]
    return table(["labelled cases", "compared", "difference of mean Dice"], rows)


def data_section(
    data: str,
    read: Mapping[Cell, tuple[list[str], Array]],
    errors: Mapping[str, tuple[float, float]],
    arms: Sequence[str],
) -> str:
    """What is to be said of a data set.

    Args:
        data: its name.
        read: organs and Dice by cell of this data set, see :func:`read_dice`.
        errors: of the pre-trainings by variant, see :func:`masked_errors`.
        arms: the variants that were fine-tuned on every number of cases; the last is what others are held against.
    """
    scores = {cell: np.nanmean(dice, axis=2) for cell, (_, dice) in read.items()}
    labels = sorted({cell.labels for cell in read})
    cells = {count: [Cell(data, arm, count) for arm in arms] for count in labels}
    means = {cell: shown(float(s.mean()), interval(s)) for cell, s in scores.items()}
    organs = next(iter(read.values()))[0]
    columns = [cell for row in cells.values() for cell in row]
    dice = np.array([read[cell][1] for cell in columns])
    there = (~np.isnan(dice).all(axis=(1, 2))).all(axis=0)  # in some case's truth
    by_organ = np.nanmean(dice[..., there], axis=(1, 2)).T
    seeds, cases = next(iter(scores.values())).shape
    parts = [
        f"## {data}",
        f"Mean Dice over {seeds} seeds and the same {cases} test cases for each, from one pre-training an arm (95 % "
        "bootstrap interval: seeds and cases are drawn, each by themselves; the pre-training is not):",
        table(["labelled cases", *arms], [[count, *(means[cell] for cell in row)] for count, row in cells.items()]),
        "Differences, paired by seed and case (interval of the same kind):",
        comparison_table([compare(b, a, scores) for row in cells.values() for a, b in combinations(row, 2)]),
        "Mean Dice by organ:",
        table(
            ["organ", *(f"{c.variant}, {c.labels}" for c in columns)],
            [
                [organ, *(f"{value:.2f}" for value in row)]
                for organ, row in zip(compress(organs, there), by_organ, strict=True)
            ],
        ),
        "Masked error of the pre-trainings (1 is what predicting each patch's mean gives), at the end:",
        table(
            ["", "training crops", "middle of the validation scans"],
            [[variant, *(f"{error:.3f}" for error in pair)] for variant, pair in errors.items()],
        ),
    ]
    ablated = [cell for cell in read if cell.variant not in arms]
    if ablated:
        base = Cell(data, arms[-1], ablated[0].labels)
        parts += [
            f"Ablations of {base.variant}, {base.labels} labelled cases:",
            table(["", "mean Dice"], [[cell.variant, means[cell]] for cell in [base, *ablated]]),
            comparison_table([compare(cell, base, scores) for cell in ablated]),
        ]
    return "\n\n".join(parts)


def time_table(records: Sequence[Mapping[str, Any]]) -> str:
    """How long the parts took, from the records of their runs."""
    rows = []
    for part in dict.fromkeys(record["part"] for record in records):
        found = [record for record in records if record["part"] == part]
        minutes = [sum(record[key] for record in found) / 60 for key in ("processor_seconds", "seconds")]
        slowest = max(record["seconds"] for record in found)
        rows.append([part, len(found), *(f"{value:.1f}" for value in minutes), f"{slowest:.0f}"])
    return table(["part", "runs", "processor minutes", "minutes, added up", "slowest run, s"], rows)


def dice_figure(
    panels: Mapping[str, Mapping[str, Mapping[int, tuple[float, tuple[float, float]]]]],
    labels: Sequence[int],
    caption: str,
) -> Figure:
    """Draw mean Dice against the number of labelled cases: a panel for each data set, a line for each arm.

    Args:
        panels: mean and interval by title, arm and number of labelled cases; the same arms for each title.
        labels: all numbers of labelled cases.
        caption: what dots and bars are.
    """
    drawing = Figure(figsize=(0.6 + 3.6 * len(panels), 3.6), dpi=160, layout="constrained")
    FigureCanvasAgg(drawing)
    axes = drawing.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for panel, (title, arms) in zip(axes, panels.items(), strict=True):
        for number, (arm, found) in enumerate(arms.items()):
            if not found:
                continue
            means = np.array([mean for mean, _ in found.values()])
            errors = np.abs(np.array([ends for _, ends in found.values()]).T - means)
            places = np.array([labels.index(count) for count in found]) + 0.06 * (number - (len(arms) - 1) / 2)
            style = {"color": label_colour((5, 1, 3, 6)[number % 4]), "marker": "o", "markersize": 4, "capsize": 3}
            panel.errorbar(places, means, errors, label=arm, **style)
        panel.set_xticks(range(len(labels)), [str(count) for count in labels])
        panel.set_xlabel("labelled cases", fontsize=8)
        panel.set_title(title, fontsize=10, color=TEXT_COLOUR)
        panel.grid(axis="y", color="#dddddd", linewidth=0.6)
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylim(bottom=0)
    axes[0].set_ylabel("mean Dice", fontsize=8)
    axes[0].legend(frameon=False, fontsize=8, labelcolor=TEXT_COLOUR)
    drawing.supxlabel(caption, fontsize=7, color=TEXT_COLOUR)
    return drawing


def figure(read: Mapping[Cell, tuple[list[str], Array]], arms: Sequence[str]) -> Figure:
    """Draw mean Dice of each arm, see :func:`dice_figure`."""
    labels = sorted({cell.labels for cell in read})
    panels: dict[str, dict[str, dict[int, tuple[float, tuple[float, float]]]]] = {}
    for data in dict.fromkeys(cell.data for cell in read):
        for arm in arms:
            scores = {count: np.nanmean(read[Cell(data, arm, count)][1], axis=2) for count in labels}
            found = {count: (float(s.mean()), interval(s)) for count, s in scores.items()}
            panels.setdefault(data, {})[arm] = found
    caption = "one pre-training an arm; dots: mean over seeds and test cases; bars: 95 % bootstrap interval over both"
    return dice_figure(panels, labels, caption)
