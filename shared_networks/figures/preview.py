"""Draw the organs of a label map as surfaces before a projection of the scan."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from nibabel.affines import voxel_sizes
from nibabel.orientations import apply_orientation, axcodes2ornt, io_orientation, ornt_transform
from scipy import ndimage

from shared_networks.datasets.labels import label_colour
from shared_networks.figures.overlay import add_legend
from shared_networks.figures.planes import Plane, add_title, draw_panels

PIXELS = 400
"""Finer pictures are thinned out to about so many pixels a side."""

SMOOTH_MM = 2.5
"""Width of the smoothing of a surface's depth, so that slices do not show as steps."""

_DIM = 0.55  # the brightness of the scan behind the organs


def preview_figure(
    image: np.ndarray, labels: np.ndarray, affine: np.ndarray, label_names: Sequence[str], title: str = ""
) -> Figure:
    """Draw the organs' surfaces, from the front and from the left, before the scan's maximum intensity projection.

    Args:
        image: [X, Y, Z] intensities.
        labels: [X, Y, Z] integers, 0 the background.
        affine: [4, 4], from voxel indices to RAS millimetres.
        label_names: names in order of label value, background first.
        title: heading of the figure, such as the name of the case.
    """
    orientation = io_orientation(affine)
    to_lpi = ornt_transform(orientation, axcodes2ornt("LPI"))
    sizes = [0.0, 0.0, 0.0]
    for (axis, _), mm in zip(orientation, voxel_sizes(affine), strict=True):
        sizes[int(axis)] = float(mm)
    scan, organs = apply_orientation(image, to_lpi), apply_orientation(labels, to_lpi)
    views = {"from the front": (1, ("R", "L")), "from the left": (0, ("A", "P"))}
    planes, surfaces = [], []
    for name, (axis, sides) in views.items():
        # Of the axes that are left the last runs down, and the other to the viewer's right.
        seen = organs if axis else organs[::-1]
        across, down = (size for number, size in enumerate(sizes) if number != axis)
        steps = [max(1, size // PIXELS) for number, size in enumerate(organs.shape) if number != axis]
        thin = (slice(None, None, steps[1]), slice(None, None, steps[0]))
        spacing = (down * steps[1], across * steps[0])
        pixels = scan.max(axis=axis).T[thin]
        planes.append(Plane(name, pixels, spacing, sides, (pixels.shape[0] // 2, pixels.shape[1] // 2)))
        first, depth = _first_labels(seen, axis)
        surfaces.append(_shaded(first.T[thin], depth.T[thin] * sizes[axis], spacing, len(label_names)))
    low, high = np.percentile(np.concatenate([plane.pixels.ravel() for plane in planes]), (2, 99.5))
    window = float(low), float(low) + max(float(high - low), 1e-6) / _DIM
    figure, panels = draw_panels([planes], [""], list(views), window, (0.3, 2.3, 0.5, 0.1), "bilinear")
    for panel, surface in zip(panels[0], surfaces, strict=True):
        panel.imshow(surface, aspect="auto", interpolation="bilinear")
    found = np.unique(labels)
    add_title(figure, title)
    add_legend(figure, panels[0][-1], "organ", {int(value): label_names[value] for value in found if value})
    return figure


def _first_labels(labels: np.ndarray, axis: int) -> tuple[np.ndarray, np.ndarray]:
    """The first label that is not the background along an axis, and how many voxels lie before it."""
    depth = (labels > 0).argmax(axis=axis)
    first = np.take_along_axis(labels, np.expand_dims(depth, axis), axis).squeeze(axis)
    return first, depth.astype(np.float64)


def _shaded(first: np.ndarray, depth: np.ndarray, spacing: tuple[float, float], count: int) -> np.ndarray:
    """Colour labels [rows, columns] as surfaces of a depth in mm that a light at the viewer's eye falls on.

    Returns:
        [rows, columns, 4] red, green, blue and opacity, 0 to 1.
    """
    light = np.zeros(first.shape)
    sigma = [SMOOTH_MM / mm for mm in spacing]
    for value in np.unique(first[first > 0]):
        organ = first == value  # smoothed by itself: what lies behind it is no part of its surface
        weight = ndimage.gaussian_filter(organ.astype(np.float64), sigma)
        smooth = ndimage.gaussian_filter(np.where(organ, depth, 0.0), sigma) / np.maximum(weight, 1e-6)
        slopes = [np.diff(smooth, axis=axis, prepend=np.take(smooth, [0], axis)) / spacing[axis] for axis in range(2)]
        light[organ] = (1 / np.sqrt(1 + slopes[0] ** 2 + slopes[1] ** 2))[organ]
    colours = np.array([(0.0, 0.0, 0.0), *(to_rgb(label_colour(value)) for value in range(1, count))])
    return np.dstack([colours[first] * (0.3 + 0.7 * light)[..., None], (first > 0).astype(np.float64)])
