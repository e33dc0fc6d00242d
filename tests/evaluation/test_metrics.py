from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.handlers import IgniteMetricHandler
from monai.metrics import DiceMetric, compute_hausdorff_distance, compute_surface_dice
from monai.networks.utils import one_hot
from nibabel.affines import from_matvec, voxel_sizes
from scipy.ndimage import binary_erosion, distance_transform_edt, gaussian_filter

from shared_networks.errors import InputError
from shared_networks.evaluation import metrics
from shared_networks.evaluation.metrics import (
    MEASURES,
    OrganMetric,
    confusion_counts,
    macro_mean,
    organ_measures,
    surface_measures,
    tolerances_of,
)

SPACING = (0.7, 1.3, 4.0)
NAN = math.nan


def blob(seed: int, shape: tuple[int, int, int] = (30, 26, 14)) -> np.ndarray:
    """A ragged mask of some thousand voxels, which reaches the border of the volume in places."""
    noise = np.random.default_rng(seed).normal(size=shape)
    smooth = gaussian_filter(noise, [3 / mm for mm in SPACING])
    return smooth > np.quantile(smooth, 0.7)


def ball(radius: float, spacing: tuple[float, ...], size_mm: float = 64.0) -> np.ndarray:
    axes = [(np.arange(round(size_mm / mm)) - size_mm / mm / 2) * mm for mm in spacing]
    x, y, z = np.meshgrid(*axes, indexing="ij")
    return x**2 + y**2 + z**2 <= radius**2


def edges(mask: np.ndarray) -> np.ndarray:
    return mask & ~binary_erosion(mask)


def hd95_by_distance_transform(a: np.ndarray, b: np.ndarray, spacing: tuple[float, ...]) -> float:
    directed = []
    for one, other in ((a, b), (b, a)):
        to_other = distance_transform_edt(~edges(other), sampling=spacing)
        directed.append(np.percentile(to_other[edges(one)], 95))
    return max(directed)


@pytest.mark.parametrize("seed", range(4))
def test_hausdorff_distance_is_that_of_distance_transforms(seed: int) -> None:
    a, b = blob(seed), blob(seed + 100)
    hd95, _ = surface_measures(a, b, SPACING, 2.0)

    assert hd95 == pytest.approx(hd95_by_distance_transform(a, b, SPACING), abs=1e-4)
    assert hd95 > 4  # the blobs do differ


@pytest.mark.filterwarnings("ignore:.*always_return_as_numpy:FutureWarning")
@pytest.mark.parametrize("seed", range(2))
def test_surface_measures_are_those_of_monai(seed: int) -> None:
    a, b = blob(seed), blob(seed + 100)
    masks = {
        "y_pred": torch.from_numpy(a)[None, None],
        "y": torch.from_numpy(b)[None, None],
        "include_background": True,
    }
    hd95 = compute_hausdorff_distance(**masks, percentile=95, spacing=SPACING)
    nsd = compute_surface_dice(**masks, class_thresholds=[2.0], spacing=SPACING, use_subvoxels=True)

    assert surface_measures(a, b, SPACING, 2.0) == pytest.approx((hd95.item(), nsd.item()), abs=1e-5)


def plate(at: int, thick: int = 1) -> np.ndarray:
    mask = np.zeros((20, 16, 12), dtype=bool)
    mask[at : at + thick, 2:14, 2:10] = True
    return mask


@pytest.mark.parametrize(("tolerance", "nsd"), [(3.9, 0.0), (4.1, 0.5), (5.9, 0.5), (6.1, 1.0)])
def test_plates_at_a_known_distance(tolerance: float, nsd: float) -> None:
    """Three voxels of 2 mm apart; of each plate's two sides one is 4 and one 6 mm from the other plate."""
    assert surface_measures(plate(5), plate(8), (2.0, 1.0, 3.0), tolerance) == pytest.approx((6.0, nsd))


@pytest.mark.parametrize("axis", range(3))
def test_distances_follow_the_axis(axis: int) -> None:
    a, b = (np.ascontiguousarray(np.moveaxis(plate(at), 0, axis)) for at in (5, 8))
    hd95, _ = surface_measures(a, b, SPACING, 2.0)
    assert hd95 == pytest.approx(3 * SPACING[axis], abs=1e-5)


def test_surface_dice_counts_area_and_not_voxels() -> None:
    """A bar of 20 x 9 x 8 mm, finely spaced along its length, of which 15 mm are found."""
    spacing = (0.5, 3.0, 4.0)
    truth, prediction = np.zeros((60, 9, 9), dtype=bool), np.zeros((60, 9, 9), dtype=bool)
    truth[5:45, 3:6, 3:5] = True
    prediction[5:35, 3:6, 3:5] = True
    # Within 1 mm: of the truth one end and 16 mm of the sides, of the prediction one end, the sides and 1 mm of rim.
    end, sides, rim = 9 * 8, 2 * (9 + 8), 9 * 8 - 7 * 6
    by_hand = (end + 16 * sides + end + 15 * sides + rim) / (2 * end + 20 * sides + 2 * end + 15 * sides)

    _, nsd = surface_measures(prediction, truth, spacing, 1.0)
    assert nsd == pytest.approx(by_hand, abs=0.02)
    near = (truth & (np.arange(60) < 37)[:, None, None]).sum() + prediction.sum()
    assert near / (truth.sum() + prediction.sum()) > by_hand + 0.04  # every voxel of the bar is at its surface


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (0.8, 0.8, 3.0), (3.0, 0.8, 1.6)])
def test_balls_within_each_other(spacing: tuple[float, float, float]) -> None:
    small, large = ball(20, spacing), ball(24, spacing)
    labels = [mask.astype(np.uint8) for mask in (small, large)]
    values = dict(zip(MEASURES, organ_measures(*labels, spacing, 2, [6.0])[0], strict=True))

    assert values["dice"] == pytest.approx(2 * 20**3 / (20**3 + 24**3), abs=0.01)
    assert values["truth_ml"] == pytest.approx(4 / 3 * math.pi * 2.4**3, rel=0.01)
    assert values["predicted_ml"] == pytest.approx(4 / 3 * math.pi * 2.0**3, rel=0.01)
    assert values["volume_error_percent"] == pytest.approx(100 * (20**3 / 24**3 - 1), abs=1)
    assert values["hd95_mm"] == pytest.approx(4, abs=max(spacing) / 2 + 0.1)
    assert values["nsd"] > 0.99
    assert surface_measures(small, large, spacing, 1.0)[1] < 0.1


def wave(phase: float) -> np.ndarray:
    x, y, z = np.meshgrid(*(np.arange(n) * mm for n, mm in zip((34, 24, 12), SPACING, strict=True)), indexing="ij")
    return np.sin(x / 5 + phase) + np.cos(y / 7 - phase) + np.sin(z / 9 + 2 * phase) > 0.4


@pytest.mark.parametrize(
    ("phase", "tolerance", "nsd"),
    [
        (0.2, 1.0, 0.808312),
        (0.2, 2.0, 0.938081),
        (0.2, 4.0, 0.995099),
        (0.5, 1.0, 0.565259),
        (0.5, 2.0, 0.691568),
        (0.5, 4.0, 0.883249),
    ],
)
def test_surface_dice_is_that_of_its_authors(phase: float, tolerance: float, nsd: float) -> None:
    """Expected: compute_surface_dice_at_tolerance of google-deepmind/surface-distance 0.1 on the same masks."""
    assert surface_measures(wave(0), wave(phase), SPACING, tolerance)[1] == pytest.approx(nsd, abs=1e-5)


def test_an_organ_at_the_border_has_a_surface_there() -> None:
    whole = np.ones((6, 5, 4), dtype=np.uint8)
    values = organ_measures(whole, whole, SPACING, 2, [0.5])[0]
    assert values[:3] == pytest.approx([1, 0, 1])
    less = whole.copy()
    less[:, :, 0] = 0
    hd95, nsd = organ_measures(less, whole, SPACING, 2, [0.5])[0][1:3]
    assert hd95 == pytest.approx(4.0)
    assert nsd < 0.9


def test_absent_organs() -> None:
    truth, prediction = np.zeros((8, 8, 8), dtype=np.uint8), np.zeros((8, 8, 8), dtype=np.uint8)
    truth[1:3, 1:3, 1:3] = 1  # missed
    prediction[4:6, 4:6, 4:7] = 2  # made up
    truth[6:8, 1, 1:3] = prediction[6:8, 1, 1:3] = 4  # found; 3 is in neither
    ml = 0.7 * 1.3 * 4 / 1000
    expected = [
        [0, NAN, 0, 8 * ml, 0, -8 * ml, -100],
        [0, NAN, 0, 0, 12 * ml, 12 * ml, NAN],
        [NAN, NAN, NAN, 0, 0, 0, NAN],
        [1, 0, 1, 4 * ml, 4 * ml, 0, 0],
    ]
    np.testing.assert_allclose(organ_measures(prediction, truth, SPACING, 5, [2.0] * 4), expected, atol=1e-12)


@pytest.mark.parametrize("at", [2, 3, 5, 7, 11])
@pytest.mark.parametrize("degrees", [0, 3, 5, 13, 30])
def test_surfaces_at_the_tolerance_agree_however_the_file_rounds_its_spacing(at: int, degrees: int) -> None:
    """Five voxels of 0.4 mm lie within 2 mm, tilted or not, and wherever the organ is; six do not."""
    angle = np.deg2rad(degrees)
    turn = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
    spacing = voxel_sizes(from_matvec(turn @ np.diag([-0.4, 1.1, 3.0])).astype(np.float32).astype(float))
    assert surface_measures(plate(at, 4), plate(at, 9), spacing, 2.0)[1] == pytest.approx(1)
    assert surface_measures(plate(at, 3), plate(at, 9), spacing, 2.0)[1] < 0.8


def test_a_spacing_in_metres_and_one_rounded_in_print_reach_the_tolerance_too() -> None:
    for spacing in (1000 * float(np.float32(0.002)), 2.00005, 1.99995):
        assert surface_measures(plate(3, 5), plate(3, 6), (spacing, 1.0, 3.0), 2.0)[1] == pytest.approx(1)
    assert surface_measures(plate(3, 5), plate(3, 6), (2.001, 1.0, 3.0), 2.0)[1] < 0.9


def test_each_organ_has_its_own_tolerance() -> None:
    truth, prediction = (plate(at).astype(np.uint8) + 2 * plate(at + 8) for at in (2, 3))
    nsd = organ_measures(prediction, truth, (2.0, 1.0, 3.0), 3, [1.0, 3.0])[:, MEASURES.index("nsd")]
    assert nsd[0] < 0.9
    assert nsd[1] == 1


def test_counts_do_not_depend_on_slabs(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(0)
    prediction, truth = random.integers(5, size=(2, 13, 7, 6)).astype(np.uint8)
    monkeypatch.setattr(metrics, "_SLAB_VOXELS", 100)
    counts = confusion_counts(prediction, truth, 5)

    expected = [[np.sum((prediction == p) & (truth == t)) for t in range(5)] for p in range(5)]
    np.testing.assert_array_equal(counts, expected)


def scan(labels: np.ndarray, spacing: tuple[float, ...] = SPACING) -> MetaTensor:
    """A label map as MONAI hands it over, float32 with its file's affine: LPS, oblique, spaced unevenly."""
    angle = np.deg2rad(20)
    turn = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
    affine = from_matvec(turn @ np.diag([-1, -1, 1]) @ np.diag(spacing), (90, -40, 12))
    return MetaTensor(torch.from_numpy(labels.astype(np.float32))[None], affine=torch.from_numpy(affine))


def test_metric_measures_in_the_scans_own_millimetres() -> None:
    truth, prediction = plate(8).astype(np.uint8), plate(5).astype(np.uint8)
    metric = OrganMetric(["background", "liver"], nsd_tolerance=1.0)
    metric([torch.from_numpy(prediction)[None]], [scan(truth)])  # a bare tensor of other type as prediction
    of_ones = scan(truth, (1.0, 2.0, 3.0))
    of_ones.spatial_ndim = 1  # as MONAI leaves it after a batch of one
    metric([scan(truth)], [of_ones])

    values = metric.get_buffer()
    assert values.shape == (2, 1, len(MEASURES))
    ml = 0.7 * 1.3 * 4 * 96 / 1000
    torch.testing.assert_close(values[0, 0], torch.tensor([0, 2.1, 0, ml, ml, 0, 0]).double(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(values[1, 0, :4], torch.tensor([1, 0, 1, 0.576]).double())
    assert metric.aggregate().item() == 0.5
    assert IgniteMetricHandler(metric_fn=metric).metric_fn is metric


def test_mean_dice_is_that_of_monai_where_all_organs_are_there() -> None:
    random = np.random.default_rng(1)
    maps = random.integers(4, size=(2, 2, 1, 9, 8, 7))
    metric, monais = OrganMetric(["background", "a", "b", "c"]), DiceMetric(include_background=False)
    for prediction, truth in zip(*maps, strict=True):
        metric([torch.from_numpy(prediction)], [scan(truth[0])])
        monais(
            [one_hot(torch.from_numpy(m), 4, dim=0) for m in [prediction]], [one_hot(torch.from_numpy(truth), 4, dim=0)]
        )
    assert metric.aggregate().item() == pytest.approx(monais.aggregate().item(), abs=1e-6)


def test_macro_mean_is_over_organs_first() -> None:
    assert macro_mean(torch.tensor([[1.0, 0.0], [1.0, NAN]])) == 0.75
    assert macro_mean(torch.tensor([[NAN]])).isnan()


def test_metric_refuses_what_it_cannot_measure() -> None:
    metric = OrganMetric(["background", "liver"])
    labels = plate(5).astype(np.uint8)
    with pytest.raises(ValueError, match="the truth is a Tensor without spacing: load it with LoadImaged"):
        metric([torch.from_numpy(labels)[None]], [torch.from_numpy(labels)[None]])
    with pytest.raises(ValueError, match=r"prediction has shape \[1, 1, 20, 16, 11\] but the truth has"):
        metric([torch.from_numpy(labels[..., 1:])[None]], [scan(labels)])
    with pytest.raises(InputError, match="label values 0 to 2 are not among 0 to 1, the values that label_names names"):
        metric([torch.from_numpy(labels)[None]], [scan(2 * labels)])


def test_tolerances_by_organ() -> None:
    assert tolerances_of(["liver", "aorta"], 2) == {"liver": 2.0, "aorta": 2.0}
    assert tolerances_of(["liver", "aorta"], {"aorta": 1, "liver": 3.5}) == {"liver": 3.5, "aorta": 1.0}


@pytest.mark.parametrize(
    ("tolerance", "message"),
    [
        ({"liver": 1.0}, "nsd_tolerance has no aorta; give mm for every organ"),
        ({"liver": 1.0, "aorta": 1.0, "heart": 1.0}, "nsd_tolerance names heart; the organs are liver, aorta"),
        (0, "nsd_tolerance is 0 for liver; give millimetres above 0"),
        (NAN, "nsd_tolerance is nan for liver"),
        ("2 mm", "nsd_tolerance is '2 mm' for liver"),
    ],
)
def test_wrong_tolerances_are_refused(tolerance: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        OrganMetric(["background", "liver", "aorta"], nsd_tolerance=tolerance)  # type: ignore[arg-type]
