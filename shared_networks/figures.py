"""Figures of scans in the patient's geometry: organ labels over CT, and reconstructions of masked scans."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap, to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke
from monai.data import MetaTensor
from monai.transforms import MapTransform
from monai.utils import convert_to_numpy
from nibabel.affines import voxel_sizes
from nibabel.orientations import apply_orientation, axcodes2ornt, io_orientation, ornt_transform

from shared_networks.data.datalist import case_name
from shared_networks.reports import source_file, written_whole

# Okabe and Ito's seven colours (https://jfly.uni-koeln.de/color/), then one by one, of colours that show on grey,
# the farthest in CIELAB from all before it in the worst of normal, protanopic and deuteranopic sight.
LABEL_COLOURS = (
    *("#e69f00", "#56b4e9", "#009e73", "#f0e442", "#0072b2", "#d55e00", "#cc79a7", "#005af0"),
    *("#00ff96", "#4bffff", "#d2003c", "#6996ff", "#f0965a", "#87e1b4", "#96ff78", "#d200b4"),
)
MASK_COLOUR = "#2b4568"  # no grey, so that a masked patch is never taken for tissue or air
FILL_OPACITY = 0.4
HEAT_OPACITY = 0.7  # of the largest weight
GAP = 0.06  # inches between panels
TEXT_COLOUR = "#333333"
GREYS = LinearSegmentedColormap.from_list("greys", ["black", "white"]).with_extremes(bad=MASK_COLOUR)


class Plane(NamedTuple):
    """A slice in radiological display convention: ``pixels[0, 0]`` is at the viewer's top left."""

    name: str
    pixels: np.ndarray  # [rows, columns]
    spacing: tuple[float, float]  # millimetres between rows and between columns
    sides: tuple[str, str]  # the patient's direction at the viewer's left and right
    centre: tuple[int, int]  # row and column of the voxel where the planes meet

    @property
    def extent(self) -> tuple[float, float]:
        """Height and width in millimetres."""
        return self.pixels.shape[0] * self.spacing[0], self.pixels.shape[1] * self.spacing[1]


def orthogonal_planes(
    volume: np.ndarray, affine: np.ndarray, centre: Sequence[int] | None = None
) -> tuple[Plane, Plane, Plane]:
    """Cut the axial, coronal and sagittal slice through a voxel, as a radiologist looks at them.

    The patient's right is at the viewer's left and anterior (axial) or superior (coronal, sagittal) at the top; in the
    sagittal slice the patient faces the viewer's left. An oblique scan is cut along its own axes, each taken for the
    closest of the patient's.

    Args:
        volume: ``[X, Y, Z]``.
        affine: ``[4, 4]``, from voxel indices to RAS millimetres, of any orientation.
        centre: indices into ``volume`` of the voxel where the planes meet, by default the middle.

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


def fullest_centre(labels: np.ndarray) -> tuple[int, ...]:
    """Find the voxel whose three planes together show the organs best.

    A plane scores, for every organ, the organ's area there over its greatest area in any parallel plane.

    Args:
        labels: ``[X, Y, Z]`` integers, 0 the background.

    Returns:
        The index of the best plane along each axis, the middle where all is background.
    """
    if not labels.any():
        return tuple(size // 2 for size in labels.shape)
    voxels = labels.nonzero()
    values = labels[voxels].astype(np.int64)
    centre = []
    for size, positions in zip(labels.shape, voxels, strict=True):
        bins = values.max() + 1
        areas = np.bincount(positions * bins + values, minlength=size * bins).reshape(size, bins)
        centre.append(int((areas / areas.max(axis=0).clip(min=1)).sum(axis=1).argmax()))
    return tuple(centre)


def label_colour(value: int) -> str:
    """Return the colour of a label value from 1 up, the same in all figures."""
    return LABEL_COLOURS[(value - 1) % len(LABEL_COLOURS)]


def display_window(image: np.ndarray, window: Sequence[float] | None) -> tuple[float, float]:
    """Return the intensities to show as black and as white: those given, or else percentiles of the image."""
    low, high = np.percentile(image, (0.5, 99.5)) if window is None else window
    return float(low), max(float(high), float(low) + 1e-6)


def overlay_figure(
    image: np.ndarray,
    prediction: np.ndarray,
    affine: np.ndarray,
    label_names: Sequence[str],
    truth: np.ndarray | None = None,
    window: Sequence[float] | None = (-175.0, 250.0),
    title: str = "",
) -> Figure:
    """Draw predicted organs over a CT in three planes, below the truth or, without one, below the bare image.

    The planes go where the truth's organs (the prediction's, where there are none) are best seen. With a truth, the
    legend gives every organ's Dice over the whole volume.

    Args:
        image: ``[X, Y, Z]``, in Hounsfield units.
        prediction: ``[X, Y, Z]`` integers, 0 the background.
        affine: ``[4, 4]``, from voxel indices to RAS millimetres.
        label_names: names in order of label value, background first.
        truth: ``[X, Y, Z]`` integers.
        window: intensities shown as black and as white; `None` takes percentiles, for MR.
        title: heading of the figure, such as the name of the case.

    Raises:
        ValueError: if a label value has no name.
    """
    maps = [prediction] if truth is None else [truth, prediction]
    highest = max(int(labels.max()) for labels in maps)
    if highest >= len(label_names):
        raise ValueError(
            f"label value {highest} has no name among the {len(label_names)} of label_names {list(label_names)}: give "
            "one name per value, background first."
        )
    centre = fullest_centre(maps[0] if maps[0].any() else prediction)
    rows = {"image" if truth is None else "truth": truth, "prediction": prediction}

    slices = orthogonal_planes(image, affine, centre)
    names = [plane.name for plane in slices]
    shown = display_window(image, window)
    figure, panels = _panels([slices] * 2, list(rows), names, shown, (0.3, 2.3, 0.5, 0.1), "bilinear")
    for row, labels in zip(panels, rows.values(), strict=True):
        if labels is not None:
            for panel, plane in zip(row, orthogonal_planes(labels, affine, centre), strict=True):
                _draw_labels(panel, plane, len(label_names))

    present = [value for value in range(1, len(label_names)) if any((labels == value).any() for labels in maps)]
    entries = {value: label_names[value] for value in present}
    if truth is not None:
        dice = {value: _dice(prediction == value, truth == value) for value in present}
        entries = {value: f"{dice[value]:.2f}  {name}" for value, name in entries.items()}
        title += f"   mean Dice {np.mean(list(dice.values())):.2f}" if dice else ""
    _add_title(figure, title)
    _add_legend(figure, panels[0][-1], "organ" if truth is None else "Dice and organ", entries)
    return figure


def reconstruction_figure(
    original: np.ndarray, masked: np.ndarray, reconstruction: np.ndarray, affine: np.ndarray, title: str = ""
) -> Figure:
    """Draw three planes of a scan beside its masked input and its reconstruction.

    Args:
        original: ``[X, Y, Z]``, in [0, 1].
        masked: ``[X, Y, Z]``, in [0, 1], NaN where masked.
        reconstruction: ``[X, Y, Z]``, in [0, 1], its masked patches put back with the true patches' mean and deviation.
        affine: ``[4, 4]``, from voxel indices to RAS millimetres.
        title: heading of the figure, such as the name of the case.
    """
    columns = {"original": original, "masked input": masked, "reconstruction": reconstruction}
    grid = list(zip(*(orthogonal_planes(volume, affine) for volume in columns.values()), strict=True))
    names = [row[0].name for row in grid]
    figure, _ = _panels(grid, names, list(columns), (0.0, 1.0), (0.3, 0.1, 0.5, 0.4), "nearest")
    _add_title(figure, title)
    _add_caption(
        figure,
        "Means and standard deviations of masked patches come from the truth; only the pattern within is predicted.",
    )
    return figure


def attention_figure(
    image: Plane,
    maps: Mapping[str, Mapping[str, Plane]],
    window: Sequence[float] | None = (-175.0, 250.0),
    title: str = "",
) -> Figure:
    """Draw attention maps over a slice through the query, which is marked: a row for each kind, a column for each tap.

    Each panel has its own colours, from violet at the smallest to yellow at the largest weight in the slice; both are
    written in its corner. Source of the layout: Tang et al., "Hi-End-MAE", arXiv 2502.08347.

    Args:
        image: the slice, in Hounsfield units.
        maps: attention in that slice by kind and by tap, the same taps for every kind; 0 outside the window that the
            network saw.
        window: intensities shown as black and as white; `None` takes percentiles, for MR.
        title: heading of the figure, such as the name of the case.
    """
    taps = list(next(iter(maps.values())))
    shown = display_window(image.pixels, window)
    figure, panels = _panels(
        [[image] * len(taps)] * len(maps), list(maps), taps, shown, (0.3, 0.1, 0.5, 0.55), "bilinear"
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
    _add_title(figure, title)
    _add_caption(
        figure,
        "Share of the attention of the patch at +, mean over heads; violet is the smallest in the slice, yellow the "
        "largest.\nThe network sees one window, outside which there is none. Cross-attention: the patch at + and all "
        "without colour are hidden.",
    )
    return figure


def _panels(
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


def _draw_labels(panel: Axes, plane: Plane, num_labels: int) -> None:
    colours = [to_rgba("black", 0.0), *(to_rgba(label_colour(value), FILL_OPACITY) for value in range(1, num_labels))]
    panel.imshow(np.array(colours)[plane.pixels], aspect="auto", interpolation="nearest")
    rows, columns = (np.arange(-1, size + 1) for size in plane.pixels.shape)
    for value in np.unique(plane.pixels[plane.pixels > 0]):
        # The border of background closes outlines of organs that leave the scan.
        organ = np.pad(plane.pixels == value, 1)
        panel.contour(columns, rows, organ, levels=[0.5], colors=[label_colour(int(value))], linewidths=0.9)


def _add_title(figure: Figure, title: str) -> None:
    y = 1 - 0.15 / figure.get_figheight()
    x = 0.3 / figure.get_figwidth()
    heading = figure.text(x, y, title, fontsize=9, color=TEXT_COLOUR, va="center", weight="bold")
    heading.set_parse_math(False)  # a name may hold $


def _add_caption(figure: Figure, caption: str) -> None:
    y = 0.2 * (1 + caption.count("\n") / 3) / figure.get_figheight()
    figure.text(0.5, y, caption, fontsize=7, color=TEXT_COLOUR, ha="center", va="center")


def _add_legend(figure: Figure, beside: Axes, heading: str, entries: Mapping[int, str]) -> None:
    """Write a line for every label value at the right of a panel."""
    corner = beside.get_position()
    legend = figure.legend(
        handles=[Patch(color=label_colour(value), label=entry) for value, entry in entries.items()],
        title=heading,
        loc="upper left",
        bbox_to_anchor=(corner.x1, corner.y1),
        borderaxespad=0,
        handlelength=1,
        handleheight=1,
        labelspacing=0.6,
        alignment="left",
        frameon=False,
        fontsize=8,
        title_fontsize=8,
        labelcolor=TEXT_COLOUR,
    )
    for text in legend.get_texts():
        text.set_parse_math(False)
    legend.get_title().set_color(TEXT_COLOUR)


def _dice(prediction: np.ndarray, truth: np.ndarray) -> float:
    """Return the Dice of two masks, not both empty, as the reports do."""
    return 2 * np.count_nonzero(prediction & truth) / (np.count_nonzero(prediction) + np.count_nonzero(truth))


def _require_same_grid(data: Mapping[Hashable, Any], keys: Sequence[Hashable]) -> None:
    first, *others = keys
    for key in others:
        expected, found = (tuple(data[k].shape) for k in (first, key))
        if found != expected:
            raise ValueError(
                f"'{key}' has shape {found} but '{first}' has {expected}: invert predictions to the grid of '{first}'."
            )
        if isinstance(data[key], MetaTensor) and not np.allclose(data[key].affine, data[first].affine, atol=1e-3):
            raise ValueError(
                f"'{key}' has affine {data[key].affine.tolist()} but '{first}' has {data[first].affine.tolist()}: "
                f"invert predictions to the grid of '{first}'."
            )


class SaveOverlayd(MapTransform):
    """Write ``{case}_overlay.png``, predicted organs over the CT, and return the data as they came.

    Args:
        keys: key of the predicted label map ``[1, X, Y, Z]``.
        image_key: key of the CT ``[1, X, Y, Z]`` in Hounsfield units on the same grid, whose file names the case.
        label_key: key of the true label map ``[1, X, Y, Z]`` on the same grid, if there is one.
        label_names: names in order of label value, background first.
        output_dir: folder of the figures, created if need be.
        window: intensities shown as black and as white; `None` takes percentiles, for MR.

    Raises:
        InputError: on call, if the figure cannot be written.
        ValueError: on call, if the grids differ, a label value has no name or the image does not know its file.
    """

    def __init__(
        self,
        keys: str = "pred",
        image_key: str = "image",
        label_key: str | None = None,
        *,
        label_names: Sequence[str],
        output_dir: str | Path,
        window: Sequence[float] | None = (-175.0, 250.0),
    ) -> None:
        super().__init__(keys)
        self.image_key = image_key
        self.label_key = label_key
        self.label_names = label_names
        self.output_dir = Path(output_dir)
        self.window = window

    def __call__(self, data: Mapping[Hashable, Any]) -> Mapping[Hashable, Any]:
        """Write the figure of one decollated case."""
        maps = [self.keys[0], *([] if self.label_key is None else [self.label_key])]
        image = data[self.image_key]
        case = str(data.get("case") or case_name(source_file(image)))
        _require_same_grid(data, [self.image_key, *maps])
        prediction, *truth = (convert_to_numpy(data[key][0]).astype(np.int16) for key in maps)
        figure = overlay_figure(
            convert_to_numpy(image[0]),
            prediction,
            convert_to_numpy(image.affine),
            self.label_names,
            truth=truth[0] if truth else None,
            window=self.window,
            title=case,
        )
        with written_whole(self.output_dir / f"{case}_overlay.png") as part:
            figure.savefig(part, bbox_inches="tight")
        return data


class SaveReconstructiond(MapTransform):
    """Write ``{case}_reconstruction.png``, a scan beside its reconstruction, and return the data as they came.

    Args:
        keys: key of the reconstruction ``[1, X, Y, Z]`` in [0, 1].
        image_key: key of the scan ``[1, X, Y, Z]`` in [0, 1], whose file names the case.
        mask_key: key of the mask ``[1, X, Y, Z]``, true where the network did not see the scan.
        output_dir: folder of the figures, created if need be.

    Raises:
        InputError: on call, if the figure cannot be written.
        ValueError: on call, if the grids differ or the image does not know its file.
    """

    def __init__(
        self, keys: str = "reconstruction", image_key: str = "image", mask_key: str = "mask", *, output_dir: str | Path
    ) -> None:
        super().__init__(keys)
        self.image_key = image_key
        self.mask_key = mask_key
        self.output_dir = Path(output_dir)

    def __call__(self, data: Mapping[Hashable, Any]) -> Mapping[Hashable, Any]:
        """Write the figure of one decollated case."""
        keys = (self.image_key, self.mask_key, self.keys[0])
        image = data[self.image_key]
        case = str(data.get("case") or case_name(source_file(image)))
        _require_same_grid(data, keys)
        original, mask, reconstruction = (convert_to_numpy(data[key][0]) for key in keys)
        masked = np.where(mask, np.nan, original)
        figure = reconstruction_figure(original, masked, reconstruction, convert_to_numpy(image.affine), case)
        with written_whole(self.output_dir / f"{case}_reconstruction.png") as part:
            figure.savefig(part, bbox_inches="tight")
        return data


def dice_boxplot(organs: Sequence[str], dice: np.ndarray, overall: Mapping[str, Any]) -> Figure:
    """Draw the cases' Dice by organ: a box in the organ's colour, a dot for every case, n in the label.

    Args:
        organs: names in order of label value, without the background.
        dice: ``[cases, organs]``, NaN where there is no value.
        overall: of all organs, with ``n``, ``mean`` and ``interval_95``, as
            :func:`shared_networks.reports.summarise` returns it.
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
