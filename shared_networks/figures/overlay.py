"""Draw organ labels over a CT."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ignite.engine import Engine
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from monai.engines import IterationEvents
from monai.transforms import MapTransform
from monai.utils import convert_to_numpy
from torch.utils.tensorboard import SummaryWriter

from shared_networks.datasets.labels import label_colour
from shared_networks.datasets.pairs import named_case
from shared_networks.figures.planes import (
    TEXT_COLOUR,
    Plane,
    add_title,
    display_window,
    draw_panels,
    orthogonal_planes,
    require_same_grid,
    shown_channel,
)
from shared_networks.files import atomic_write

FILL_OPACITY = 0.4


def fullest_centre(labels: np.ndarray) -> tuple[int, ...]:
    """Find the voxel whose three planes together show the organs best.

    A plane scores, for every organ, the organ's area there over its greatest area in any parallel plane.

    Args:
        labels: `[X, Y, Z]` integers, 0 the background.

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
        image: `[X, Y, Z]`, in Hounsfield units.
        prediction: `[X, Y, Z]` integers, 0 the background.
        affine: `[4, 4]`, from voxel indices to RAS millimetres.
        label_names: names in order of label value, background first.
        truth: `[X, Y, Z]` integers.
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
    figure, panels = draw_panels([slices] * 2, list(rows), names, shown, (0.3, 2.3, 0.5, 0.1), "bilinear")
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
    add_title(figure, title)
    add_legend(figure, panels[0][-1], "organ" if truth is None else "Dice and organ", entries)
    return figure


def _draw_labels(panel: Axes, plane: Plane, num_labels: int) -> None:
    colours = [to_rgba("black", 0.0), *(to_rgba(label_colour(value), FILL_OPACITY) for value in range(1, num_labels))]
    panel.imshow(np.array(colours)[plane.pixels], aspect="auto", interpolation="nearest")
    rows, columns = (np.arange(-1, size + 1) for size in plane.pixels.shape)
    for value in np.unique(plane.pixels[plane.pixels > 0]):
        # The border of background closes outlines of organs that leave the scan.
        organ = np.pad(plane.pixels == value, 1)
        panel.contour(columns, rows, organ, levels=[0.5], colors=[label_colour(int(value))], linewidths=0.9)


def add_legend(figure: Figure, beside: Axes, heading: str, entries: Mapping[int, str]) -> None:
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


class SaveOverlayd(MapTransform):
    """Write `{case}_evaluation.png`, predicted organs over the CT, and return the data as they came.

    Its name is not that of inference's picture, `{case}_overlay.png`, which may be of another scan.

    Args:
        keys: key of the predicted label map `[1, X, Y, Z]`.
        image_key: key of the CT `[C, X, Y, Z]` in Hounsfield units on the same grid, whose file names the case and
            whose first channel is shown.
        label_key: key of the true label map `[1, X, Y, Z]` on the same grid, if there is one.
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
        case = named_case(data, self.image_key)
        require_same_grid(data, [self.image_key, *maps])
        prediction, *truth = (convert_to_numpy(data[key][0]).astype(np.int16) for key in maps)
        figure = overlay_figure(
            convert_to_numpy(image[0]),
            prediction,
            convert_to_numpy(image.affine),
            self.label_names,
            truth=truth[0] if truth else None,
            window=self.window,
            title=shown_channel(case, len(image)),
        )
        with atomic_write(self.output_dir / f"{case}_evaluation.png") as part:
            figure.savefig(part, bbox_inches="tight")
        return data


class OverlayPanel:
    """Write a picture of the first validation case for TensorBoard: truth and prediction over the CT.

    Args:
        log_dir: folder of TensorBoard's files.
        label_names: names in order of label value, background first.
    """

    def __init__(self, log_dir: str | Path, label_names: Sequence[str]) -> None:
        self.log_dir = log_dir
        self.label_names = label_names

    def attach(self, engine: Engine) -> None:
        """Attach to an evaluator whose `pred` and `label` are label maps after post-processing."""
        engine.add_event_handler(IterationEvents.MODEL_COMPLETED, self)

    def __call__(self, engine: Any) -> None:
        """Draw the first case of a validation."""
        if engine.state.rank != 0 or engine.state.iteration != 1:
            return
        case = engine.state.output[0]
        image = np.asarray(case["image"][0].cpu())
        labels, truth = (np.asarray(case[key][0].cpu(), dtype=np.int16) for key in ("pred", "label"))
        affine = np.asarray(getattr(case["image"], "affine", np.eye(4)), dtype=float)
        title = shown_channel(f"epoch {engine.state.epoch}", len(case["image"]))
        figure = overlay_figure(image, labels, affine, self.label_names, truth=truth, window=(0.0, 1.0), title=title)
        with SummaryWriter(str(self.log_dir)) as writer:
            writer.add_figure("overlay", figure, engine.state.epoch)
