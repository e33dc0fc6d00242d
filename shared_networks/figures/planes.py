"""Cut orthogonal planes of a volume and lay them out in millimetres."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from monai.data import MetaTensor
from nibabel.affines import voxel_sizes
from nibabel.orientations import apply_orientation, axcodes2ornt, io_orientation, ornt_transform

MASK_COLOUR = "#2b4568"  # no grey, so that a masked patch is never taken for tissue or air
GAP = 0.06  # inches between panels
TEXT_COLOUR = "#333333"
GREYS = LinearSegmentedColormap.from_list("greys", ["black", "white"]).with_extremes(bad=MASK_COLOUR)


class Plane(NamedTuple):
    """A slice in radiological display convention: `pixels[0, 0]` is at the viewer's top left."""

    name: str
    pixels: np.ndarray  # [rows, columns]
    spacing: tuple[float, float]  # millimetres between rows and between columns
    sides: tuple[str, str]  # the patient's direction at the viewer's left and right
    centre: tuple[int, int]  # row and column of the voxel where the planes meet

    @property
    def extent(self) -> tuple[float, float]:
        """Return height and width in millimetres."""
        return self.pixels.shape[0] * self.spacing[0], self.pixels.shape[1] * self.spacing[1]


def orthogonal_planes(
    volume: np.ndarray, affine: np.ndarray, centre: Sequence[int] | None = None
) -> tuple[Plane, Plane, Plane]:
    """Cut the axial, coronal and sagittal slice through a voxel, as a radiologist looks at them.

    The patient's right is at the viewer's left and anterior (axial) or superior (coronal, sagittal) at the top; in the
    sagittal slice the patient faces the viewer's left. An oblique scan is cut along its own axes, each taken for the
    closest of the patient's.

    Args:
        volume: `[X, Y, Z]`.
        affine: `[4, 4]`, from voxel indices to RAS millimetres, of any orientation.
        centre: indices into `volume` of the voxel where the planes meet, by default the middle.

    Returns:
        The axial, coronal and sagittal plane.
    """
    indices = [size // 2 for size in volume.shape] if centre is None else centre
    # In LPI order columns run to the patient's left (or back), rows to the back (or down): what the display wants.
    orientation = ornt_transform(io_orientation(affine), axcodes2ornt("LPI"))
    at, spacing = [0, 0, 0], [0.0, 0.0, 0.0]
    for (axis, direction), index, size, mm in zip(orientation, indices, volume.shape, voxel_sizes(affine), strict=True):
        at[int(axis)] = index if direction > 0 else size - 1 - index
        spacing[int(axis)] = float(mm)
    lpi = apply_orientation(volume, orientation)
    left, posterior, inferior = spacing
    return (
        Plane("axial", lpi[:, :, at[2]].T, (posterior, left), ("R", "L"), (at[1], at[0])),
        Plane("coronal", lpi[:, at[1], :].T, (inferior, left), ("R", "L"), (at[2], at[0])),
        Plane("sagittal", lpi[at[0], :, :].T, (inferior, posterior), ("A", "P"), (at[2], at[1])),
    )


def display_window(image: np.ndarray, window: Sequence[float] | None) -> tuple[float, float]:
    """Return the intensities to show as black and as white: those given, or else percentiles of the image."""
    low, high = np.percentile(image, (0.5, 99.5)) if window is None else window
    return float(low), max(float(high), float(low) + 1e-6)


def draw_panels(
    grid: Sequence[Sequence[Plane]],
    row_names: Sequence[str],
    column_names: Sequence[str],
    window: tuple[float, float],
    margins: tuple[float, float, float, float],
    interpolation: str,
) -> tuple[Figure, list[list[Axes]]]:
    """Show planes in a grid, all on one scale in millimetres.

    Args:
        grid: rows of planes.
        row_names: what to write at the left of each row.
        column_names: what to write above each column.
        window: values shown as black and as white.
        margins: inches at the left, right, top and bottom.
        interpolation: how matplotlib resamples the pixels.
    """
    heights = [max(plane.extent[0] for plane in row) for row in grid]
    widths = [max(plane.extent[1] for plane in column) for column in zip(*grid, strict=True)]
    inches_per_mm = min(9.0 / sum(widths), 9.0 / sum(heights))
    left, right, top, bottom = margins
    inner_width = sum(widths) * inches_per_mm + GAP * (len(widths) - 1)
    inner_height = sum(heights) * inches_per_mm + GAP * (len(heights) - 1)
    width, height = left + inner_width + right, top + inner_height + bottom
    figure = Figure(figsize=(width, height), dpi=160)
    FigureCanvasAgg(figure)
    cells = figure.add_gridspec(
        len(heights),
        len(widths),
        left=left / width,
        right=1 - right / width,
        top=1 - top / height,
        bottom=bottom / height,
        width_ratios=widths,
        height_ratios=heights,
        wspace=GAP / (np.mean(widths) * inches_per_mm),
        hspace=GAP / (np.mean(heights) * inches_per_mm),
    )
    panels = []
    for i, row in enumerate(grid):
        panels.append([figure.add_subplot(cells[i, j]) for j in range(len(row))])
        for panel, plane, cell_width in zip(panels[-1], row, widths, strict=True):
            panel.imshow(
                plane.pixels, GREYS, vmin=window[0], vmax=window[1], aspect="auto", interpolation=interpolation
            )
            # Cells have the proportions of the limits in millimetres, so pixels get their aspect and all one scale.
            half_height, half_width = heights[i] / plane.spacing[0] / 2, cell_width / plane.spacing[1] / 2
            middle = [(size - 1) / 2 for size in plane.pixels.shape]
            panel.set_ylim(middle[0] + half_height, middle[0] - half_height)
            panel.set_xlim(middle[1] - half_width, middle[1] + half_width)
            panel.set(facecolor="black", xticks=[], yticks=[])
            panel.spines[:].set_visible(False)
            for x, side in zip((0.02, 0.98), plane.sides, strict=True):
                mark = panel.text(
                    x, 0.5, side, color="white", fontsize=7, ha="center", va="center", transform=panel.transAxes
                )
                mark.set_path_effects([withStroke(linewidth=1.5, foreground="black")])
    for row_panels, name in zip(panels, row_names, strict=True):
        row_panels[0].set_ylabel(name, fontsize=8, color=TEXT_COLOUR)
    for panel, name in zip(panels[0], column_names, strict=True):
        panel.set_title(name, fontsize=8, color=TEXT_COLOUR, pad=4)
    return figure, panels


def add_title(figure: Figure, title: str) -> None:
    """Write a heading at the top left."""
    y = 1 - 0.15 / figure.get_figheight()
    x = 0.3 / figure.get_figwidth()
    heading = figure.text(x, y, title, fontsize=9, color=TEXT_COLOUR, va="center", weight="bold")
    heading.set_parse_math(False)  # a name may hold $


def add_caption(figure: Figure, caption: str) -> None:
    """Write one or two lines below the panels."""
    y = 0.2 * (1 + caption.count("\n") / 3) / figure.get_figheight()
    figure.text(0.5, y, caption, fontsize=7, color=TEXT_COLOUR, ha="center", va="center")


def shown_channel(title: str, channels: int) -> str:
    """Add to the title of a picture that it shows the first of several channels."""
    return title if channels == 1 else f"{title}   first of {channels} channels"


def require_same_grid(data: Mapping[Hashable, Any], keys: Sequence[Hashable]) -> None:
    """Raise a ValueError unless volumes have one shape and one affine; others than the first may have one channel."""
    first, *others = keys
    for key in others:
        expected, found = (tuple(data[k].shape) for k in (first, key))
        if found[1:] != expected[1:] or found[0] not in (1, expected[0]):
            raise ValueError(
                f"'{key}' has shape {found} but '{first}' has {expected}: invert predictions to the grid of '{first}'."
            )
        if isinstance(data[key], MetaTensor) and not np.allclose(data[key].affine, data[first].affine, atol=1e-3):
            raise ValueError(
                f"'{key}' has affine {data[key].affine.tolist()} but '{first}' has {data[first].affine.tolist()}: "
                f"invert predictions to the grid of '{first}'."
            )
