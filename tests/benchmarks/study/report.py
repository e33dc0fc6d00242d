"""From numbers to text and pictures."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from shared_networks.datasets.labels import label_colour
from shared_networks.figures.planes import TEXT_COLOUR
from shared_networks.files import write_csv

from .results import (
    PRETRAININGS,
    RAW,
    Known,
    Scores,
    ends,
    matched,
    nested,
    pretraining_rows,
    raw_rows,
    read_scores,
)
from .runs import SYNTHETIC, Cell, Trial, slug
from .settings import ARMS, CURVE_ARMS, CURVES, MAIN_LABELS, OURS, SCRATCH, Settings

Estimate = tuple[float, tuple[float, float]]
"""A mean, and the ends of its 95 % interval."""
COLOURS = {arm: label_colour(number) for arm, number in zip(ARMS, (5, 1, 3, 6), strict=True)}


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Return a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def mean_of(scores: Scores) -> Estimate:
    """Return the mean with its interval."""
    return float(scores.by_case().mean()), ends(nested([scores])[:, 0])


def difference(first: Scores, second: Scores) -> Estimate:
    """Return first less second with its interval, paired."""
    first, second = matched(first, second)
    draws = nested([first, second])
    return float(first.by_case().mean() - second.by_case().mean()), ends(draws[:, 0] - draws[:, 1])


def shown(estimate: Estimate, sign: str = "") -> str:
    """Return a mean with its interval as text, such as `0.512 (0.470 to 0.550)`."""
    mean, low, high = (f"{round(value, 3) + 0.0:{sign}.3f}" for value in (estimate[0], *estimate[1]))  # no -0.000
    return f"{mean} ({low} to {high})"


def pretraining_table(rows: Iterable[Sequence[Any]], pictures: Path) -> str:
    """Return a row for each pre-training, of :func:`.results.pretraining_rows`, with its picture in a folder."""
    header = ["", "pre-training", "masked error, training", "masked error, validation", "probe, Dice", "effective rank"]
    lines = []
    for variant, number, *ended, rank in rows:
        picture = pictures / f"{slug(variant)}_{number}.jpg"
        shown = f"![what {variant} {number} makes of a test scan]({pictures.name}/{picture.name})"
        values = (f"{value:.3f}" for value in ended)
        lines.append([variant, number, *values, f"{rank:.1f}", shown if picture.is_file() else "not here"])
    return table([*header, "reconstruction"], lines)


def arms_tables(read: Mapping[tuple[str, Cell], Scores], test_set: str, arms: Sequence[str], steps: int) -> list[str]:
    """Return means by number of labelled cases, and the differences of all pairs of arms."""
    labels = sorted({cell.labels for name, cell in read if name == test_set and cell.variant in arms})
    cells = {(arm, count): read.get((test_set, Cell(arm, count, steps))) for arm in arms for count in labels}
    means, differences = [], []
    for count in labels:
        row = [cells[arm, count] for arm in arms]
        means.append([count, *(f"{shown(mean_of(s))}, {len(s.trials)}" if s else "not run" for s in row)])
        for later in range(len(arms)):
            for earlier in range(later):
                first, second = row[later], row[earlier]
                if first and second:
                    differences.append(
                        [count, f"{arms[later]} less {arms[earlier]}", shown(difference(first, second), "+")]
                    )
    return [
        "Mean Dice, its 95 % interval, and the number of fine-tunings:",
        table(["labelled cases", *arms], means),
        "Differences:",
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
            rows.append([name, shown(mean_of(found)), shown(difference(found, other), "+")])
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


def curve_cells(cells: Iterable[Cell], labels: int) -> dict[str, dict[int, Cell]]:
    """Return those of a curve, by arm and by the numbers of steps of which all arms are there."""
    there = set(cells)
    steps = sorted({cell.steps for cell in there if cell.labels == labels})
    whole = [count for count in steps if all(Cell(arm, labels, count) in there for arm in CURVE_ARMS)]
    return {arm: {count: Cell(arm, labels, count) for count in whole} for arm in CURVE_ARMS}


def curve_rows(read: Mapping[tuple[str, Cell], Scores], test_set: str, labels: int) -> list[list[Any]]:
    """Return mean Dice of the two arms of a curve, and the second less the first, by the number of steps."""
    first, second = curve_cells((cell for name, cell in read if name == test_set), labels).values()
    rows = []
    for count in first:
        pair = read[test_set, first[count]], read[test_set, second[count]]
        rows.append([count, *(shown(mean_of(scores)) for scores in pair), shown(difference(*reversed(pair)), "+")])
    return rows


def time_table(records: Sequence[Mapping[str, Any]]) -> str:
    """Return how long the parts took, from the records of their runs."""
    rows = []
    for part in dict.fromkeys(record["part"] for record in records):
        found = [record for record in records if record["part"] == part]
        minutes = [sum(record[key] for record in found) / 60 for key in ("processor_seconds", "seconds")]
        slowest = max(record["seconds"] for record in found)
        rows.append([part, len(found), *(f"{value:.1f}" for value in minutes), f"{slowest:.0f}"])
    return table(["part", "runs", "processor minutes", "minutes, added up", "slowest run, s"], rows)


def draw(panel: Axes, arms: Mapping[str, Mapping[int, Estimate]], counts: Sequence[int]) -> None:
    """Draw means with their intervals against numbers of labelled cases or of steps, a line an arm.

    Args:
        panel: to draw in.
        arms: mean and interval by number, by arm.
        counts: all numbers, which are drawn at equal distances.
    """
    for number, (arm, found) in enumerate(arms.items()):
        if not found:
            continue
        means = np.array([mean for mean, _ in found.values()])
        errors = np.abs(np.array([ends for _, ends in found.values()]).T - means)
        places = np.array([counts.index(count) for count in found]) + 0.06 * (number - (len(arms) - 1) / 2)
        style = {"color": COLOURS[arm], "marker": "o", "markersize": 4, "capsize": 3}
        panel.errorbar(places, means, errors, label=arm, **style)
    panel.set_xlim(-0.4, len(counts) - 0.6)
    panel.set_xticks(range(len(counts)), [f"{count:,}" for count in counts])
    panel.grid(axis="y", color="#dddddd", linewidth=0.6)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)


def figure(read: Mapping[tuple[str, Cell], Scores], arms: Mapping[str, Mapping[int, Cell]], axis: str) -> Figure:
    """Draw mean Dice of each arm, and below it the difference from the first arm: a column a test set.

    Args:
        read: see :func:`.results.read_scores`.
        arms: cells by number of labelled cases or of steps, by arm.
        axis: what these are numbers of.
    """
    names = list(dict.fromkeys(name for name, _ in read))
    drawing = Figure(figsize=(0.6 + 3.8 * len(names), 5.4), dpi=160, layout="constrained")
    FigureCanvasAgg(drawing)
    panels = drawing.subplots(2, len(names), sharex=True, sharey="row", squeeze=False, height_ratios=(3, 2))
    there = {cell for _, cell in read}
    counts = sorted({count for cells in arms.values() for count, cell in cells.items() if cell in there})
    base = next(iter(arms))
    for name, (upper, lower) in zip(names, panels.T, strict=True):
        scores = {
            arm: {n: read[name, cell] for n, cell in cells.items() if (name, cell) in read}
            for arm, cells in arms.items()
        }
        means = {arm: {n: mean_of(s) for n, s in found.items()} for arm, found in scores.items()}
        gains = {
            arm: {n: difference(s, scores[base][n]) for n, s in found.items() if n in scores[base]}
            for arm, found in scores.items()
            if arm != base
        }
        draw(upper, means, counts)
        draw(lower, gains, counts)
        lower.axhline(0, color=TEXT_COLOUR, linewidth=0.8)
        upper.set_title(f"{name} CTs" if name == SYNTHETIC else name, fontsize=10, color=TEXT_COLOUR)
        lower.set_xlabel(axis, fontsize=8)
    panels[0, 0].set_ylim(bottom=0)
    panels[0, 0].set_ylabel("mean Dice", fontsize=8)
    panels[1, 0].set_ylabel(f"less {base}", fontsize=8)
    panels[0, 0].legend(frameon=False, fontsize=8, labelcolor=TEXT_COLOUR)
    caption = "dots: means; bars: 95 % bootstrap intervals over pre-trainings, seeds and cases; differences are paired"
    drawing.supxlabel(caption, fontsize=7, color=TEXT_COLOUR)
    return drawing


def save_reconstructions(pretrainings: Mapping[tuple[str, int], Path], known: Path | None, folder: Path) -> None:
    """Copy pictures of earlier sittings, and save what inference drew of other pre-trainings, as small JPEG files."""
    folder.mkdir(exist_ok=True)
    for file in (known / folder.name).glob("*.jpg") if known else ():
        shutil.copyfile(file, folder / file.name)
    for (variant, number), drawn in pretrainings.items():
        if not (file := folder / f"{slug(variant)}_{number}.jpg").exists():
            with Image.open(min((drawn / "drawn").glob("*_reconstruction.png"))) as picture:
                picture.thumbnail((600, 600))
                picture.convert("RGB").save(file, quality=80)


def dice_sections(read: Mapping[tuple[str, Cell], Scores], size: Settings) -> list[str]:
    """Return what is to be said of each test set."""
    arms, steps = size["arms"], size["fine-tuning"]["steps"]
    base, scratch = Cell(OURS, MAIN_LABELS, steps), Cell(SCRATCH, MAIN_LABELS, steps)
    sections = []
    for test_set in dict.fromkeys(name for name, _ in read):
        others = dict.fromkeys(cell.variant for name, cell in read if name == test_set and cell.variant not in arms)
        count = len(next(s.cases for (name, _), s in read.items() if name == test_set))
        sections += [
            f"## {test_set}, {count} case{'s' if count > 1 else ''}",
            *arms_tables(read, test_set, arms, steps),
            "By organ:",
            organ_table(read, test_set, [Cell(arm, n, steps) for n in size["labels"] for arm in arms]),
        ]
        for labels in CURVES:
            curve = curve_rows(read, test_set, labels)
            if len(curve) > 1:
                header = ["steps", *CURVE_ARMS, f"{CURVE_ARMS[1]} less {CURVE_ARMS[0]}"]
                sections += [f"By steps, with {labels} labelled cases:", table(header, curve)]
        if others:
            sections += ["Ablations:", ablation_table(read, test_set, others, base, scratch)]
    return sections


def report(
    out: Path,
    size: Settings,
    pretrainings: Mapping[tuple[str, int], Path],
    reports: Mapping[Trial, Path],
    known: Known,
) -> list[str]:
    """Write raw numbers and figures, and return the sections of the text.

    Args:
        out: folder to write to.
        size: of the study.
        pretrainings: folders of those that are there.
        reports: folders of all evaluations, also of those that are not there.
        known: of earlier sittings.
    """
    if not reports:
        return ["The scans are not all made yet."]
    write_csv(out / RAW, raw_rows(reports, known))
    write_csv(out / PRETRAININGS, ended := pretraining_rows(pretrainings, known))
    read = read_scores(out / RAW, size["seeds"])
    here = {trial for trial, folder in reports.items() if (folder / "metrics.csv").is_file()}
    earlier = (known.rows.keys() & reports.keys()) - here
    told = f"{len(here | earlier)} of {len(reports)} fine-tunings are done, and {len(ended) - 1} pre-trainings."
    if earlier:
        told += f" {len(earlier)} fine-tunings are of earlier sittings, whose times are not in the table."
    sections = [told]
    if ended[1:]:
        save_reconstructions(pretrainings, known.folder, out / "reconstructions")
        sections += ["## Pre-trainings", pretraining_table(ended[1:], out / "reconstructions")]
    if read:
        steps = size["fine-tuning"]["steps"]
        arms = {arm: {count: Cell(arm, count, steps) for count in size["labels"]} for arm in size["arms"]}
        figure(read, arms, "labelled cases").savefig(out / "transfer.png")
        sections += ["![Mean Dice by labelled cases](transfer.png)"]
        for labels in CURVES:
            curve = curve_cells((cell for _, cell in read), labels)
            if len(curve[SCRATCH]) > 1:
                figure(read, curve, "steps").savefig(out / f"curve_{labels}.png")
                sections += [f"![Mean Dice by steps, with {labels} labelled cases](curve_{labels}.png)"]
    return sections + dice_sections(read, size)
