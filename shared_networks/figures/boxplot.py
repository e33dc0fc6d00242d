"""Draw Dice by organ as a box plot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure

from shared_networks.datasets.labels import label_colour
from shared_networks.figures.planes import TEXT_COLOUR


def dice_boxplot(organs: Sequence[str], dice: np.ndarray, overall: Mapping[str, Any]) -> Figure:
    """Draw the cases' Dice by organ: a box in the organ's colour, a dot for every case, n in the label.

    Args:
        organs: names in order of label value, without the background.
        dice: `[cases, organs]`, NaN where there is no value.
        overall: of all organs, with `n`, `mean` and `interval_95`, as
            :func:`shared_networks.evaluation.tables.summarise` returns it.
    """
    figure = Figure(figsize=(2 + 0.75 * max(len(organs), 4), 5), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
    panel = figure.add_subplot()
    for place, scores in enumerate(dice.T, start=1):
        found = scores[~np.isnan(scores)]
        panel.boxplot(
            [found],
            positions=[place],
            widths=0.6,
            patch_artist=True,
            showfliers=False,  # every case is drawn as a dot
            medianprops={"color": "black", "linewidth": 1.5},
            boxprops={"facecolor": to_rgba(label_colour(place), 0.7), "edgecolor": TEXT_COLOUR},
            whiskerprops={"color": TEXT_COLOUR},
            capprops={"color": TEXT_COLOUR},
        )
        beside = place + 0.4 * (np.arange(len(found)) - (len(found) - 1) / 2) / max(len(found), 2)
        panel.scatter(beside, found, s=20, color=label_colour(place), edgecolors="black", linewidths=0.8, zorder=3)
    counts = (~np.isnan(dice)).sum(axis=0)
    names = [f"{name} (n={count})" for name, count in zip(organs, counts, strict=True)]
    panel.set_xticks(range(1, len(organs) + 1), names, rotation=40, ha="right", rotation_mode="anchor", fontsize=8)
    for label in panel.get_xticklabels():
        label.set_parse_math(False)
    panel.set(ylim=(-0.03, 1.03), xlim=(0.4, len(organs) + 0.6), ylabel="Dice")
    panel.grid(axis="y", color="#dddddd", linewidth=0.6)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)
    mean = "" if overall["mean"] is None else f", mean {overall['mean']:.3f}"
    if overall["interval_95"] is not None:
        mean += " (95 % interval {:.3f} to {:.3f})".format(*overall["interval_95"])
    panel.set_title(f"Dice by organ, {len(dice)} case{'s' * (len(dice) != 1)}{mean}", fontsize=10, color=TEXT_COLOUR)
    figure.supxlabel(
        "box: median and quartiles; whiskers: to the farthest case within 1.5 times the box; dots: cases",
        fontsize=7,
        color=TEXT_COLOUR,
    )
    return figure
