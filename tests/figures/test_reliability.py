from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.colors import to_rgb
from matplotlib.image import imread

from shared_networks.datasets.labels import label_colour
from shared_networks.figures.reliability import reliability_diagram

ORGANS = ["liver", "a$b$c"]
BINS = np.array(  # [organs, bins, 3]: voxels, sum of probabilities, true voxels
    [[[80, 8, 2], [0, 0, 0], [10, 6, 7], [10, 9, 10]], [[60, 3, 0], [30, 9, 3], [0, 0, 0], [10, 8, 4]]], float
)


def test_points_are_of_bins_that_have_voxels() -> None:
    panel, shares = reliability_diagram(ORGANS, BINS).axes
    lines = {line.get_label(): line for line in panel.lines}
    assert list(lines) == ["perfect", *ORGANS, "all"]
    expected = {
        "liver": [(0.1, 0.025), (0.6, 0.7), (0.9, 1.0)],
        "a$b$c": [(0.05, 0.0), (0.3, 0.1), (0.8, 0.4)],
        "all": [(11 / 140, 2 / 140), (0.3, 0.1), (0.6, 0.7), (17 / 20, 14 / 20)],
    }
    for name, points in expected.items():
        np.testing.assert_allclose(lines[name].get_xydata(), points)
    for value, name in enumerate(ORGANS, start=1):
        assert to_rgb(lines[name].get_color()) == to_rgb(label_colour(value))
    bars = [(bar.get_x(), bar.get_width(), bar.get_height()) for bar in shares.patches]
    np.testing.assert_allclose(bars, [(0, 0.25, 0.7), (0.25, 0.25, 0.15), (0.5, 0.25, 0.05), (0.75, 0.25, 0.1)])


def test_voxels_of_the_first_bin_alone_and_odd_names_can_be_drawn(tmp_path: Path) -> None:
    figure = reliability_diagram(["left kidney", "$\\wrong{"], BINS * [[[1], [0], [0], [0]]])
    figure.savefig(tmp_path / "reliability.png")
    assert (imread(tmp_path / "reliability.png")[..., :3] < 0.5).any()
    assert [text.get_text() for text in figure.legends[0].get_texts()][1:] == ["left kidney", "$\\wrong{", "all"]
