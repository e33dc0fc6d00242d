from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.image import imread
from monai.data import MetaTensor
from nibabel.affines import from_matvec
from nibabel.orientations import apply_orientation, axcodes2ornt, inv_ornt_aff, ornt_transform

from shared_networks.datasets.labels import LABEL_COLOURS, label_colour
from shared_networks.figures import overlay
from shared_networks.figures.overlay import FILL_OPACITY, SaveOverlayd, fullest_centre, overlay_figure
from shared_networks.figures.planes import MASK_COLOUR, orthogonal_planes
from shared_networks.figures.reconstruction import DrawReconstructiond, reconstruction_figure

SHAPE, SPACING = (10, 12, 7), (1.5, 2.0, 4.0)  # in RAS
NAMES = ["background", "liver", "spleen"]
ORIENTATIONS = ["RAS", "LPS", "SAR", "PIL"]


def scan(axcodes: str) -> tuple[np.ndarray, np.ndarray]:
    """One patient stored with these axes: a block of 1 left, anterior, superior; of 2 right, posterior, inferior."""
    volume = np.zeros(SHAPE, dtype=np.int16)
    volume[1:4, 8:11, 4:6] = 1
    volume[7:9, 1:3, 1:3] = 2
    return stored(volume, from_matvec(np.diag(SPACING), (-30, 20, 5)), axcodes)


def stored(volume: np.ndarray, affine: np.ndarray, axcodes: str) -> tuple[np.ndarray, np.ndarray]:
    to_axes = ornt_transform(axcodes2ornt("RAS"), axcodes2ornt(axcodes))
    return apply_orientation(volume, to_axes), affine @ inv_ornt_aff(to_axes, volume.shape)


def centre_of(value: int, volume: np.ndarray) -> list[int]:
    return [int(positions.mean()) for positions in (volume == value).nonzero()]


def block(shape: tuple[int, int], rows: slice, columns: slice, value: int) -> np.ndarray:
    plane = np.zeros(shape, dtype=np.int16)
    plane[rows, columns] = value
    return plane


@pytest.mark.parametrize("tilt", [0.0, 12.0])
@pytest.mark.parametrize("axcodes", ORIENTATIONS)
def test_planes_are_in_radiological_convention(axcodes: str, tilt: float) -> None:
    volume, affine = scan(axcodes)
    angle = np.deg2rad(tilt)
    about_z = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
    about_x = about_z[[2, 0, 1]][:, [2, 0, 1]]
    affine = from_matvec(about_x @ about_z) @ affine

    axial, coronal, sagittal = orthogonal_planes(volume, affine, centre_of(1, volume))
    # Left is at the viewer's right, anterior or superior at the top, anterior at the sagittal's left.
    np.testing.assert_array_equal(axial.pixels, block((12, 10), slice(1, 4), slice(6, 9), 1))
    np.testing.assert_array_equal(coronal.pixels, block((7, 10), slice(1, 3), slice(6, 9), 1))
    np.testing.assert_array_equal(sagittal.pixels, block((7, 12), slice(1, 3), slice(1, 4), 1))

    axial, coronal, sagittal = orthogonal_planes(volume, affine, centre_of(2, volume))
    np.testing.assert_array_equal(axial.pixels, block((12, 10), slice(9, 11), slice(1, 3), 2))
    np.testing.assert_array_equal(coronal.pixels, block((7, 10), slice(4, 6), slice(1, 3), 2))
    np.testing.assert_array_equal(sagittal.pixels, block((7, 12), slice(4, 6), slice(9, 11), 2))

    assert [plane.name for plane in (axial, coronal, sagittal)] == ["axial", "coronal", "sagittal"]
    assert [plane.sides for plane in (axial, coronal, sagittal)] == [("R", "L"), ("R", "L"), ("A", "P")]
    for plane, spacing in ((axial, (2, 1.5)), (coronal, (4, 1.5)), (sagittal, (4, 2))):
        assert plane.spacing == pytest.approx(spacing)
    assert axial.extent == pytest.approx((24, 15))
    assert coronal.extent == pytest.approx((28, 15))
    assert sagittal.extent == pytest.approx((28, 24))


def test_planes_go_through_the_middle_by_default() -> None:
    volume = np.arange(np.prod(SHAPE)).reshape(SHAPE)
    axial, coronal, sagittal = orthogonal_planes(volume, np.eye(4))

    np.testing.assert_array_equal(axial.pixels, volume[::-1, ::-1, 3].T)
    np.testing.assert_array_equal(coronal.pixels, volume[::-1, 6, ::-1].T)
    np.testing.assert_array_equal(sagittal.pixels, volume[5, ::-1, ::-1].T)


def test_fullest_centre_shows_most_organs() -> None:
    labels = np.zeros(SHAPE, dtype=np.int16)
    labels[0:6, 2, 1:3] = 1  # the larger organ reaches across
    labels[4, 2:9, 2] = 2
    assert fullest_centre(labels) == (4, 2, 2)


def test_fullest_centre_of_background_is_the_middle() -> None:
    assert fullest_centre(np.zeros(SHAPE, dtype=np.int16)) == (5, 6, 3)


def test_label_colours_differ_and_repeat_only_after_all() -> None:
    assert len(set(LABEL_COLOURS)) == len(LABEL_COLOURS) >= 13
    assert [label_colour(value) for value in (1, 2, 17)] == [LABEL_COLOURS[0], LABEL_COLOURS[1], LABEL_COLOURS[0]]


def legend(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def pixels(figure: Figure) -> np.ndarray:
    figure.canvas.draw()
    return np.asarray(figure.canvas.buffer_rgba())[..., :3]


def panel_pixels(figure: Figure) -> list[np.ndarray]:
    """What is drawn in each panel, a pixel from its edge, in order of rows."""
    drawn = pixels(figure)
    boxes = [panel.get_window_extent() for panel in figure.axes]
    height = len(drawn)
    return [
        drawn[height - int(box.y1) + 1 : height - int(box.y0) - 1, int(box.x0) + 1 : int(box.x1) - 1] for box in boxes
    ]


def filled(panel: np.ndarray, colour: str, grey: float, tolerance: int = 3) -> np.ndarray:
    """Where the panel shows the label colour laid over this grey."""
    blend = 255 * (FILL_OPACITY * np.array(to_rgb(colour)) + (1 - FILL_OPACITY) * grey)
    return (np.abs(panel.astype(float) - blend) <= tolerance).all(axis=-1)


@pytest.mark.parametrize("axcodes", ORIENTATIONS)
def test_overlay_fills_organs_in_place_and_on_scale(axcodes: str) -> None:
    labels, affine = scan(axcodes)
    labels[labels == 2] = 0
    figure = overlay_figure(np.full(labels.shape, 37.5), labels, affine, NAMES, truth=labels)

    axial, coronal, sagittal, *prediction = panel_pixels(figure)
    # Fractions of the block's middle in each field of view, padded with black to the tallest plane, 28 mm.
    for panel, row, column, size in (
        (axial, (2 + 2.5 * 2) / 28, 7.5 / 10, (6 / 28, 3 / 10)),
        (coronal, 2 / 7, 7.5 / 10, (2 / 7, 3 / 10)),
        (sagittal, 2 / 7, 2.5 / 12, (2 / 7, 3 / 12)),
    ):
        rows, columns = filled(panel, label_colour(1), 0.5).nonzero()
        assert rows.mean() / panel.shape[0] == pytest.approx(row, abs=0.01)
        assert columns.mean() / panel.shape[1] == pytest.approx(column, abs=0.01)
        assert np.ptp(rows) / panel.shape[0] == pytest.approx(size[0], abs=0.02)
        assert np.ptp(columns) / panel.shape[1] == pytest.approx(size[1], abs=0.02)
        assert not filled(panel, label_colour(2), 0.5).any()
    assert len(prediction) == 3
    for above, below in zip((axial, coronal, sagittal), prediction, strict=True):
        assert (above[: len(below)] == below[: len(above)]).mean() > 0.99


def test_overlay_shows_truth_above_prediction_with_dice() -> None:
    truth, affine = scan("SAR")
    prediction = truth.copy()
    block = np.argwhere(truth == 1)
    prediction[tuple(block[: len(block) // 3].T)] = 0  # two thirds of the organ are found: Dice 2 * 2 / (2 + 3)
    prediction[truth == 2] = 3
    names = [*NAMES, "aorta", "pancreas"]
    figure = overlay_figure(np.zeros(truth.shape), prediction, affine, names, truth=truth, title="ct_001")

    assert legend(figure) == ["0.80  liver", "0.00  spleen", "0.00  aorta"]
    assert [text.get_text() for text in figure.texts] == ["ct_001   mean Dice 0.27"]
    assert [panel.get_ylabel() for panel in figure.axes[::3]] == ["truth", "prediction"]
    shown = panel_pixels(figure)
    grey = 175 / 425
    assert sum(filled(panel, label_colour(1), grey).sum() for panel in shown[:3]) > 1.2 * sum(
        filled(panel, label_colour(1), grey).sum() for panel in shown[3:]
    )


def test_overlay_without_truth_shows_the_bare_image_above() -> None:
    prediction, affine = scan("LPS")
    figure = overlay_figure(np.full(prediction.shape, 37.5), prediction, affine, NAMES)

    assert legend(figure) == ["liver", "spleen"]
    assert [panel.get_ylabel() for panel in figure.axes[::3]] == ["image", "prediction"]
    shown = panel_pixels(figure)
    assert all(np.ptp(panel, axis=-1).max() == 0 for panel in shown[:3])  # grey throughout
    for value in (1, 2):
        assert any(filled(panel, label_colour(value), 0.5).any() for panel in shown[3:])


def test_overlay_follows_the_window() -> None:
    prediction, affine = scan("RAS")
    figure = overlay_figure(np.full(prediction.shape, 50.0), prediction, affine, NAMES, window=(0, 200))

    assert (panel_pixels(figure)[1] == round(255 * 0.25)).mean() > 0.5


def test_overlay_of_nothing_is_drawn() -> None:
    empty = np.zeros((2, 3, 1), dtype=np.int16)
    figure = overlay_figure(np.zeros(empty.shape), empty, np.eye(4), NAMES, truth=empty, title="tiny")

    assert legend(figure) == []
    assert [text.get_text() for text in figure.texts] == ["tiny"]
    assert len(panel_pixels(figure)) == 6


def test_overlay_centres_on_the_prediction_where_the_truth_is_empty() -> None:
    prediction, affine = scan("PIL")
    figure = overlay_figure(np.full(SHAPE, 37.5), prediction, affine, NAMES, truth=np.zeros_like(prediction))

    assert any(filled(panel, label_colour(1), 0.5).any() for panel in panel_pixels(figure)[3:])


def test_overlay_rejects_a_value_without_name() -> None:
    labels, affine = scan("RAS")
    with pytest.raises(
        ValueError, match=r"label value 2 has no name among the 2 of label_names \['background', 'liver'\]"
    ):
        overlay_figure(np.zeros(SHAPE), labels, affine, NAMES[:2])


def test_reconstruction_figure_tells_the_mask_from_air_and_where_statistics_come_from() -> None:
    original = np.zeros(SHAPE)  # all air
    masked = original.copy()
    masked[:, :6] = np.nan  # the posterior half
    affine = np.diag([*SPACING, 1.0])
    figure = reconstruction_figure(original, masked, original + 1, affine, title="ct_001")

    assert [panel.get_title() for panel in figure.axes[:3]] == ["original", "masked input", "reconstruction"]
    assert [panel.get_ylabel() for panel in figure.axes[::3]] == ["axial", "coronal", "sagittal"]
    title, caption = (text.get_text() for text in figure.texts)
    assert title == "ct_001"
    assert "come from the truth" in caption
    air, half, ones = panel_pixels(figure)[:3]
    assert (air == 0).all(axis=-1).mean() > 0.95
    is_mask = (np.abs(half - 255 * np.array(to_rgb(MASK_COLOUR))) < 2).all(axis=-1)
    rows = is_mask.any(axis=1).nonzero()[0]
    assert rows.min() / len(half) == pytest.approx(0.5, abs=0.02)
    assert rows.max() / len(half) > 0.95
    # The axial slice is 15 mm wide, in a column as wide as the sagittal one, 24 mm.
    assert (ones == 255).all(axis=-1).mean() == pytest.approx(15 / 24, abs=0.01)


def meta_tensor(volume: np.ndarray, affine: np.ndarray, file: str = "in/ct_001_0000.nii.gz") -> MetaTensor:
    return MetaTensor(torch.as_tensor(volume.copy())[None], affine=affine, meta={"filename_or_obj": file})


@pytest.fixture
def case() -> dict[str, MetaTensor]:
    labels, affine = scan("LPS")
    image = np.where(labels > 0, 100.0, -100.0)
    tensors = {"image": image, "pred": labels.astype(np.float32), "label": labels}
    return {key: meta_tensor(volume, affine) for key, volume in tensors.items()}


@pytest.mark.parametrize("label_key", [None, "label"])
def test_save_overlay_writes_the_case(tmp_path: Path, case: dict[str, MetaTensor], label_key: str | None) -> None:
    save = SaveOverlayd(label_key=label_key, label_names=NAMES, output_dir=tmp_path / "figures", window=(-100, 300))
    data = save(case)

    assert data is case
    png = np.round(255 * imread(tmp_path / "figures" / "ct_001_evaluation.png")[..., :3])
    for value in (1, 2):
        assert filled(png, label_colour(value), 0.5).sum() > 100
    names = [*(path.name for path in tmp_path.rglob("*.png"))]
    assert names == ["ct_001_evaluation.png"]


def test_save_overlay_rejects_another_grid(tmp_path: Path, case: dict[str, MetaTensor]) -> None:
    save = SaveOverlayd(label_key="label", label_names=NAMES, output_dir=tmp_path)
    with pytest.raises(ValueError, match=r"'pred' has shape \(1, 9, 12, 7\) but 'image' has \(1, 10, 12, 7\)"):
        save({**case, "pred": case["pred"][:, 1:]})
    with pytest.raises(ValueError, match=r"'label' has shape \(2, 10, 12, 7\) but 'image' has \(1, 10, 12, 7\)"):
        save({**case, "label": torch.cat([case["label"]] * 2)})
    mirrored = meta_tensor(case["pred"][0].numpy(), np.diag([*SPACING, 1.0]))
    with pytest.raises(ValueError, match=r"'pred' has affine \[\[1\.5, .* but 'image' has \[\[-1\.5"):
        save({**case, "pred": mirrored})
    with pytest.raises(ValueError, match="no 'filename_or_obj'"):
        save({**case, "image": case["image"].as_tensor()})
    assert not list(tmp_path.iterdir())


def test_reconstruction_is_drawn_on_the_grid_of_the_image() -> None:
    labels, affine = scan("SAR")
    mask = labels == 1
    keys = {"image": labels / 2, "mask": mask, "reconstruction": np.where(mask, 0.6, labels / 2)}
    case = {key: meta_tensor(volume, affine, "ct_7.nii") for key, volume in keys.items()}
    # Nothing of the mask lies in the middle planes of this scan; of this one, all.
    plain = DrawReconstructiond()(case)
    covered = DrawReconstructiond()({**case, "mask": meta_tensor(np.ones_like(mask), affine)})["figure"]
    assert plain.keys() == {*case, "figure"} and "figure" not in case
    shares = [masked_share(figure) for figure in (plain["figure"], covered)]
    assert shares[0] == 0 and shares[1] > 0.1
    assert plain["figure"].texts[0].get_text() == "ct_7"
    with pytest.raises(ValueError, match=r"'mask' has shape \(1, 7, 12, 9\) but 'image' has \(1, 7, 12, 10\)"):
        DrawReconstructiond()({**case, "mask": case["mask"][..., 1:]})


def masked_share(figure: Figure) -> float:
    return float((np.abs(pixels(figure) - 255 * np.array(to_rgb(MASK_COLOUR))) < 2).all(axis=-1).mean())


def test_pictures_of_several_channels_show_the_first_and_say_so(tmp_path: Path) -> None:
    labels, affine = scan("ASL")
    volume = np.stack([np.full(labels.shape, 0.25), np.ones(labels.shape)])
    image = MetaTensor(torch.as_tensor(volume), affine=affine, meta={"filename_or_obj": "ct_7_0000.nii"})
    mask = meta_tensor(np.zeros(labels.shape), affine)
    figure = DrawReconstructiond()({"image": image, "mask": mask, "reconstruction": image})["figure"]
    assert figure.texts[0].get_text() == "ct_7   first of 2 channels"
    assert all((panel == round(0.25 * 255)).any() and not (panel == 255).any() for panel in central(figure))
    with pytest.raises(ValueError, match=r"'reconstruction' has shape \(3, .*\) but 'image' has \(2, "):
        DrawReconstructiond()({"image": image, "mask": mask, "reconstruction": torch.cat([image, image[:1]])})

    titles: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        draw = overlay.overlay_figure
        patch.setattr(
            overlay, "overlay_figure", lambda *args, **named: titles.append(named["title"]) or draw(*args, **named)
        )
        case = {"scan": image, "pred": meta_tensor(labels, affine), "truth": meta_tensor(labels, affine)}
        SaveOverlayd(image_key="scan", label_key="truth", label_names=NAMES, output_dir=tmp_path)(case)
    assert titles == ["ct_7   first of 2 channels"]
    assert (tmp_path / "ct_7_evaluation.png").is_file()


def central(figure: Figure) -> list[np.ndarray]:
    """The middle of each panel, where no mark of the sides is."""
    panels = panel_pixels(figure)
    return [
        panel[panel.shape[0] // 4 : panel.shape[0] // 3, panel.shape[1] // 3 : -panel.shape[1] // 3] for panel in panels
    ]
