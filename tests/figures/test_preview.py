"""The front and the left of the patient are seen, whatever the order of the voxels."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from nibabel.orientations import apply_orientation, axcodes2ornt, inv_ornt_aff, ornt_transform

from shared_networks.datasets.labels import label_colour
from shared_networks.figures.preview import preview_figure

NAMES = ["background", "front", "back", "left"]
SHAPE = (30, 24, 18)
AFFINE = np.array([[3.0, 0, 0, -50], [0, 4.0, 0, 20], [0, 0, 5.0, -300], [0, 0, 0, 1]])  # RAS


def body() -> np.ndarray:
    """In RAS order: `front` hides most of `back`, and `left` lies at the patient's left, above."""
    labels = np.zeros(SHAPE, np.uint8)
    labels[12:18, 16:20, 6:12] = 1
    labels[12:22, 4:8, 6:12] = 2
    labels[3:6, 9:15, 12:16] = 3
    return labels


def surfaces(codes: str, thin: int = 1) -> list[np.ndarray]:
    """The two pictures of the organs [rows, columns, RGBA]."""
    change = ornt_transform(axcodes2ornt("RAS"), axcodes2ornt(codes))
    labels = apply_orientation(body(), change)
    image = np.where(labels > 0, 100, -1000).astype(np.int16)
    figure = preview_figure(image, labels, AFFINE @ inv_ornt_aff(change, SHAPE), NAMES, "case $1")
    return [np.asarray(panel.images[1].get_array()) for panel in figure.axes]


def hue(value: int) -> np.ndarray:
    colour = np.array(to_rgb(label_colour(value)))
    return colour / np.linalg.norm(colour)


def shown(pixel: np.ndarray) -> int:
    """The label of a pixel, by its colour."""
    if pixel[3] == 0:
        return 0
    return 1 + int(np.argmax([pixel[:3] @ hue(value) / np.linalg.norm(pixel[:3]) for value in (1, 2, 3)]))


@pytest.mark.parametrize("codes", ["RAS", "LPS", "LPI", "SAR", "ILP"])
def test_organs_are_seen_from_the_front_and_from_the_left(codes: str) -> None:
    front, left = surfaces(codes)
    # Rows run down. Columns of the front run to the patient's left, of the left side to the back.
    assert front.shape == (18, 30, 4) and left.shape == (18, 24, 4)
    at = {"middle": (18 - 9, 30 - 15), "right": (18 - 9, 30 - 20), "above": (18 - 14, 30 - 5)}
    assert {name: shown(front[place]) for name, place in at.items()} == {"middle": 1, "right": 2, "above": 3}
    at = {"anterior": (18 - 9, 24 - 18), "posterior": (18 - 9, 24 - 6), "above": (18 - 14, 24 - 12)}
    assert {name: shown(left[place]) for name, place in at.items()} == {"anterior": 1, "posterior": 2, "above": 3}
    assert front[0, 0, 3] == 0 and left[-1, -1, 3] == 0


def test_a_surface_that_faces_the_viewer_is_brightest() -> None:
    labels = np.zeros((60, 60, 20), np.uint8)
    x, y = np.meshgrid(np.arange(60) - 30, np.arange(60) - 30, indexing="ij")
    labels[np.hypot(x, y) < 20] = 1  # a cylinder along the patient's length
    figure = preview_figure(labels * 100, labels, np.diag([2.0, 2, 2, 1]), NAMES)
    light = np.asarray(figure.axes[0].images[1].get_array())[10, :, :3].sum(axis=1)
    assert light[30] > 1.2 * light[48] > 0


def test_a_scan_without_organs_is_drawn() -> None:
    blank = np.zeros(SHAPE, np.uint8)
    figure = preview_figure(blank.astype(np.float32), blank, AFFINE, NAMES, "none")
    assert not np.asarray(figure.axes[0].images[1].get_array())[..., 3].any()


def test_a_fine_scan_is_thinned_and_keeps_its_proportions() -> None:
    labels = np.zeros((1000, 20, 30), np.uint8)
    labels[400:600, 5:15, 10:20] = 1
    figure = preview_figure(labels * 10, labels, np.diag([0.5, 2, 2, 1]), NAMES)
    panel = figure.axes[0]
    rows, columns = panel.images[1].get_array().shape[:2]
    assert (rows, columns) == (30, 500)
    assert panel.images[0].get_array().shape == (rows, columns)
    width = np.diff(panel.get_xlim())[0] * 0.5 * 2
    height = -np.diff(panel.get_ylim())[0] * 2
    box = panel.get_position()
    inches = figure.get_size_inches()
    assert width / height == pytest.approx(box.width * inches[0] / (box.height * inches[1]), rel=1e-3)
