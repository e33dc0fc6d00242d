"""Lay out the tables of an evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from shared_networks.evaluation.metrics import MEASURES

DECIMALS = {
    "dice": 4,
    "hd95_mm": 2,
    "nsd": 4,
    "truth_ml": 2,
    "predicted_ml": 2,
    "volume_error_ml": 2,
    "volume_error_percent": 1,
    "ece": 6,
}
COLUMNS = (*MEASURES, "ece")
"""What a report has of every case and organ: what label maps tell, and the expected calibration error."""

CONFIDENCE = 0.95
RESAMPLES = 10_000


def dice_table(dice: torch.Tensor) -> torch.Tensor:
    """Border a Dice matrix with its means, leaving out what is NaN.

    The last column is each case's mean over its organs, the last row the mean of every column over the cases that have
    a value there; so the corner is the mean over organs first, then over cases, as MONAI's mean Dice is.

    Args:
        dice: `[cases, organs]`, NaN where neither truth nor prediction has the organ.

    Returns:
        `[cases + 1, organs + 1]`, NaN where there is nothing to average.
    """
    with_mean_column = torch.cat([dice, dice.nanmean(dim=1, keepdim=True)], dim=1)
    return torch.cat([with_mean_column, with_mean_column.nanmean(dim=0, keepdim=True)], dim=0)


def dice_rows(cases: Sequence[str], organs: Sequence[str], dice: torch.Tensor) -> list[list[Any]]:
    """Lay out the rows of `dice.csv`: a line a case, a column an organ, and means (see :func:`dice_table`)."""
    table = dice_table(dice).tolist()
    body = [[name, *(_cell(value, 4) for value in row)] for name, row in zip((*cases, "mean"), table, strict=True)]
    return [["case", *organs, "mean"], *body]


def presence(truth_ml: float, predicted_ml: float) -> str:
    """Say where an organ is: `found`, `missed`, `false positive` or `absent`."""
    if truth_ml > 0:
        return "found" if predicted_ml > 0 else "missed"
    return "false positive" if predicted_ml > 0 else "absent"


def measure_rows(cases: Sequence[str], organs: Sequence[str], measures: torch.Tensor) -> list[list[Any]]:
    """Lay out the rows of `metrics.csv`: a line for each case and organ, empty where there is no value.

    Args:
        cases: names.
        organs: names.
        measures: `[cases, organs, len(COLUMNS)]`.
    """
    rows: list[list[Any]] = [["case", "organ", *COLUMNS, "presence"]]
    for case, table in zip(cases, measures.tolist(), strict=True):
        for organ, values in zip(organs, table, strict=True):
            named = dict(zip(COLUMNS, values, strict=True))
            cells = [_cell(value, DECIMALS[name]) for name, value in named.items()]
            rows.append([case, organ, *cells, presence(named["truth_ml"], named["predicted_ml"])])
    return rows


def summarise(values: torch.Tensor, seed: int = 0, decimals: int = 4) -> dict[str, Any]:
    """Describe one number a case.

    The interval is the bootstrap's percentile interval of the mean: cases are drawn with replacement, as cases, not
    voxels or organs, are what another hospital would bring anew. Source: Efron and Tibshirani, "An introduction to the
    bootstrap", 1993, chapter 13. From few cases it is too narrow.

    Args:
        values: `[cases]`, NaN left out.
        seed: of the draws.
        decimals: kept of every number.

    Returns:
        `n`, `mean`, `median`, `std` (with n - 1) and `interval_95`, None where `n` is too small.
    """
    found = values[~values.isnan()].double().numpy()
    n = len(found)
    out: dict[str, Any] = {"n": n, "mean": None, "median": None, "std": None, "interval_95": None}
    if n:
        out |= {"mean": round(float(found.mean()), decimals), "median": round(float(np.median(found)), decimals)}
    if n > 1:
        draws = np.random.default_rng(seed).integers(n, size=(RESAMPLES, n))
        tail = (1 - CONFIDENCE) / 2
        interval = np.quantile(found[draws].mean(axis=1), [tail, 1 - tail])
        out["std"] = round(float(found.std(ddof=1)), decimals)
        out["interval_95"] = [round(float(end), decimals) for end in interval]
    return out


def presence_counts(organs: Sequence[str], measures: torch.Tensor) -> dict[str, dict[str, int]]:
    """Count by organ in how many cases it is in the truth, is missed, and is predicted without being there."""
    true, predicted = (measures[..., COLUMNS.index(name)] > 0 for name in ("truth_ml", "predicted_ml"))
    counts = torch.stack([true, true & ~predicted, predicted & ~true]).sum(dim=1).T.tolist()
    return {
        organ: dict(zip(("cases", "missed", "false_positives"), row, strict=True))
        for organ, row in zip(organs, counts, strict=True)
    }


def summary(
    cases: Sequence[str],
    organs: Sequence[str],
    measures: torch.Tensor,
    settings: Mapping[str, Any],
    seed: int = 0,
) -> dict[str, Any]:
    """Collect the content of `metrics.json`.

    Args:
        cases: names.
        organs: names.
        measures: `[cases, organs, len(COLUMNS)]`.
        settings: of the evaluation, kept as they are.
        seed: of the bootstrap.

    Returns:
        `settings`, `cases`, `organs` (by name, counts and each measure's :func:`summarise` over cases) and
        `overall`: for Dice, distance, surface Dice and calibration :func:`summarise` of each case's mean over its
        organs, and `mean_of_organs`, the mean over cases first and then over organs, which differs where organs are
        absent.
    """
    counts = presence_counts(organs, measures)
    by_organ = {
        organ: counts[organ]
        | {
            name: summarise(measures[:, i, j], seed, DECIMALS[name])
            for j, name in enumerate(COLUMNS)
            if name not in ("truth_ml", "predicted_ml")
        }
        for i, organ in enumerate(organs)
    }
    overall = {}
    for name in ("dice", "hd95_mm", "nsd", "ece"):
        values = measures[..., COLUMNS.index(name)]
        of_organs = summarise(values.nanmean(dim=0), seed, DECIMALS[name])["mean"]
        overall[name] = summarise(values.nanmean(dim=1), seed, DECIMALS[name]) | {"mean_of_organs": of_organs}
    return {
        "settings": {
            **settings,
            "bootstrap": {"of": "cases", "resamples": RESAMPLES, "confidence": CONFIDENCE, "seed": seed},
            "order_of_means": "organs first, then cases; mean_of_organs: cases first, then organs",
            "organ_not_in_truth_or_prediction": "Dice and NSD 0, HD95 left out and counted as missed or false positive",
            "organ_in_neither": "left out, but for ece",
        },
        "cases": list(cases),
        "organs": by_organ,
        "overall": overall,
    }


def format_organ_table(organs: Sequence[str], measures: torch.Tensor) -> str:
    """Lay out one line per organ with its means over cases, then the means over all.

    Args:
        organs: one name for every row of a case.
        measures: `[cases, organs, len(COLUMNS)]`.
    """
    scores = {name: measures[..., COLUMNS.index(name)] for name in ("dice", "hd95_mm", "nsd")}
    means = [dice_table(values)[-1].tolist() for values in scores.values()]
    counts = presence_counts(organs, measures)
    width = max(map(len, ("organ", "mean", *organs)))
    head = f"{'organ':<{width}}  {'Dice':>6}  {'HD95 mm':>7}  {'NSD':>6}  {'cases':>5}  {'missed':>6}  {'false':>5}"
    lines = []
    for i, name in enumerate((*organs, "mean")):
        dice, hd95, nsd = (column[i] for column in means)
        row = counts[name].values() if name in counts else (len(measures), *_totals(counts))
        present, missed, false = row
        lines.append(
            f"{name:<{width}}  {_shown(dice, 4):>6}  {_shown(hd95, 2):>7}  {_shown(nsd, 4):>6}  "
            f"{present:>5}  {missed:>6}  {false:>5}"
        )
    rule = "-" * len(head)
    return "\n".join([head, rule, *lines[:-1], rule, lines[-1]])


def format_overall(content: Mapping[str, Any]) -> str:
    """Say in a few lines what the mean Dice of :func:`summary` is worth, and how well probabilities are calibrated."""
    dice = content["overall"]["dice"]
    lines = ["means are over each case's organs first, then over cases"]
    if dice["interval_95"] is not None:
        low, high = dice["interval_95"]
        lines[0] += f"; 95 % bootstrap interval of the mean Dice over {dice['n']} cases: {low:.4f} to {high:.4f}"
    if dice["mean"] != dice["mean_of_organs"]:
        lines.append(f"over cases first, then over organs, the mean Dice is {dice['mean_of_organs']:.4f}")
    if (ece := content["overall"]["ece"]["mean"]) is not None:
        lines.append(f"expected calibration error, lower is better: {ece:.6f}")
    return "\n".join(lines)


def extremes(cases: Sequence[str], dice: torch.Tensor) -> dict[str, str]:
    """Name the `best`, `median` (the lower of two) and `worst` case by mean Dice.

    Args:
        cases: names.
        dice: `[cases, organs]`; cases without any value are left out.

    Returns:
        Case by rank, empty where no case has a value.
    """
    means = dict(zip(cases, dice.nanmean(dim=1).tolist(), strict=True))
    ranked = sorted((case for case, mean in means.items() if mean == mean), key=lambda case: (means[case], case))
    return {"best": ranked[-1], "median": ranked[(len(ranked) - 1) // 2], "worst": ranked[0]} if ranked else {}


def _totals(counts: Mapping[str, Mapping[str, int]]) -> tuple[int, int]:
    return sum(c["missed"] for c in counts.values()), sum(c["false_positives"] for c in counts.values())


def _cell(value: float, decimals: int) -> str:
    return "" if value != value else f"{value:.{decimals}f}"


def _shown(value: float, decimals: int) -> str:
    return "-" if value != value else f"{value:.{decimals}f}"
