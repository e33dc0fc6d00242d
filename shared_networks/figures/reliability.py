"""Draw how often probabilities are right as a reliability diagram."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from shared_networks.datasets.labels import label_colour
from shared_networks.figures.planes import TEXT_COLOUR


def reliability_diagram(organs: Sequence[str], bins: np.ndarray) -> Figure:
    """Draw the share of true voxels over the mean probability of each bin, and below the bins' shares of voxels.

    A line in the organ's colour for each organ, and a black one of all together.

    Args:
        organs: names in order of label value, without the background.
        bins: `[organs, bins, 3]`, of each bin of probability from 0 to 1 the number of voxels, the sum of their
            probabilities, and how many are true.
    """
    figure = Figure(figsize=(6.5, 6), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
    panel, shares = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    panel.plot([0, 1], [0, 1], "--", color="#999999", linewidth=1, label="perfect")
    pooled = bins.sum(axis=0)
    lines = [(name, sums, label_colour(value)) for value, (name, sums) in enumerate(zip(organs, bins, strict=True), 1)]
    for name, sums, colour in (*lines, ("all", pooled, "black")):
        voxels, chances, true = sums[sums[:, 0] > 0].T
        width = 2.2 if sums is pooled else 1
        panel.plot(
            chances / voxels, true / voxels, "o-", color=colour, linewidth=width, markersize=2 + width, label=name
        )
    panel.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), ylabel="share of true voxels")
    edges = np.linspace(0, 1, len(pooled) + 1)
    shares.bar(
        edges[:-1], pooled[:, 0] / pooled[:, 0].sum(), 1 / len(pooled), align="edge", color="#666666", edgecolor="white"
    )
    shares.set(yscale="log", xlabel="probability of the organ", ylabel="share of voxels")
    for axes in (panel, shares):
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    legend = figure.legend(*panel.get_legend_handles_labels(), loc="outside right upper", fontsize=7, frameon=False)
    for text in legend.get_texts():
        text.set_parse_math(False)
    panel.set_title("Reliability of probabilities, voxels of all cases", fontsize=10, color=TEXT_COLOUR)
    return figure
