"""Draw attention maps over a scan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

from shared_networks.figures.planes import Plane, add_caption, add_title, display_window, draw_panels

HEAT_OPACITY = 0.7  # of the largest weight


def attention_figure(
    image: Plane,
    maps: Mapping[str, Mapping[str, Plane]],
    window: Sequence[float] | None = (-175.0, 250.0),
    title: str = "",
) -> Figure:
    """Draw attention maps over a slice through the query, which is marked: a row a kind, a column an encoder block.

    Each panel has its own colours, from violet at the smallest to yellow at the largest weight in the slice; both are
    written in its corner. Source of the layout: Tang et al., "Hi-End-MAE", arXiv 2502.08347.

    Args:
        image: the slice, in Hounsfield units.
        maps: attention in that slice by kind and by block, the same blocks for every kind; 0 outside the window that
            the network saw.
        window: intensities shown as black and as white; `None` takes percentiles, for MR.
        title: heading of the figure, such as the name of the case.
    """
    blocks = list(next(iter(maps.values())))
    shown = display_window(image.pixels, window)
    figure, panels = draw_panels(
        [[image] * len(blocks)] * len(maps), list(maps), blocks, shown, (0.3, 0.1, 0.5, 0.55), "bilinear"
    )
    for row, kind in zip(panels, maps.values(), strict=True):
        for panel, plane in zip(row, kind.values(), strict=True):
            known = plane.pixels > 0
            weights = plane.pixels[known] if known.any() else np.zeros(1)
            low, high = float(weights.min()), float(weights.max())
            share = np.where(known, plane.pixels - low, 0) / (high - low or 1.0)
            colours = colormaps["plasma"](share)
            colours[..., 3] = np.where(known, HEAT_OPACITY * (1 + share) / 2, 0)
            panel.imshow(colours, aspect="auto", interpolation="nearest")
            y, x = image.centre
            panel.plot(x, y, "+", color="cyan", markersize=9, markeredgewidth=1.5, scalex=False, scaley=False)
            text = f"{100 * low:.2f} to {100 * high:.2f} %"
            mark = panel.text(0.98, 0.03, text, color="white", fontsize=7, ha="right", transform=panel.transAxes)
            mark.set_path_effects([withStroke(linewidth=1.5, foreground="black")])
    add_title(figure, title)
    add_caption(
        figure,
        "Share of the attention of the patch at +, mean over heads; violet is the smallest in the slice, yellow the "
        "largest.\nThe network sees one window, outside which there is none. Cross-attention: the patch at + and all "
        "without colour are masked.",
    )
    return figure
