from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor, decollate_batch, list_data_collate
from monai.inferers import SlidingWindowInferer
from monai.transforms import (
    Activationsd,
    Compose,
    CropForegroundd,
    EnsureChannelFirstd,
    Invertd,
    LoadImaged,
    Orientationd,
    ScaleIntensityRanged,
    SpatialPadd,
)
from monai.transforms import Spacingd as MonaiSpacingd
from scipy.ndimage import gaussian_filter
from torch import nn
from torch.nn import functional as F

from shared_networks.errors import InputError
from shared_networks.inference import sliding_window
from shared_networks.inference.label_planes import ScanGrid
from shared_networks.inference.sliding_window import CheckpointEnsemble, SlidingWindowLabels, organ_value, window_slices
from shared_networks.inference.uncertainty import UncertaintyInferer
from shared_networks.networks.checkpoints import read_weights
from shared_networks.transforms.spacing import Spacingd, resample_linear
from tests.conftest import ROOT

CLASSES = 5
ROI = (16, 20, 12)
NAMES = ["background", "liver", "left kidney", "right kidney", "aorta"]
PERMUTED = np.array([[0, 0, 1.0], [-1, 0, 0], [0, 1, 0]])


def rotation(about_z: float, about_x: float) -> np.ndarray:
    (c, s), (d, t) = ((np.cos(a), np.sin(a)) for a in (about_z, about_x))
    return np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]]) @ np.array([[1, 0, 0], [0, d, -t], [0, t, d]])


# axes, spacing in mm, shape; the prepared spacing is 2 mm
SCANS = {
    "LPS": (np.diag([-1.0, -1, 1]), (1.1, 1.3, 3.7), (44, 37, 21)),
    "permuted and flipped": (PERMUTED, (3.1, 1.2, 1.7), (17, 42, 33)),
    "oblique": (rotation(0.3, -0.2) @ np.diag([1.0, -1, -1]), (1.3, 1.1, 4.0), (37, 45, 19)),
    "oblique and permuted": (rotation(-0.2, 0.1) @ PERMUTED, (2.6, 2.0, 1.4), (22, 30, 50)),
    "smaller than a window": (np.eye(3), (1.9, 2.2, 2.1), (9, 30, 7)),
}


class Net(nn.Module):
    """Random smooth logits, the same for the same input.

    Args:
        knows_air: whether air is background to it.
    """

    def __init__(self, knows_air: bool = True) -> None:
        super().__init__()
        self.knows_air = knows_air
        torch.manual_seed(0)
        self.first, self.last = nn.Conv3d(1, 8, 5, padding=2), nn.Conv3d(8, CLASSES, 3, padding=1)
        self.windows = 0
        self.dtype: torch.dtype | None = None

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        self.windows += len(image)
        out = 8 * self.last(torch.tanh(3 * self.first(image)))
        if self.knows_air:
            out[:, :1] += 50 * (F.max_pool3d(image, 3, 1, 1) == 0)
        self.dtype = out.dtype
        return out


def write(file: Path, axes: np.ndarray, spacing: tuple[float, ...], shape: tuple[int, ...]) -> Path:
    """A smooth random CT in air."""
    scan = gaussian_filter(np.random.default_rng(0).normal(0, 3000, shape), 1.5)
    scan[:3], scan[:, -2:] = -1000, -1000
    affine = nib.affines.from_matvec(axes * spacing, [5.3, -7.1, 30.2])
    nib.save(nib.Nifti1Image(scan.astype(np.int16), affine), file)
    return file


def preparation(spacing: type[MonaiSpacingd] = Spacingd) -> Compose:
    return Compose(
        [
            LoadImaged("image"),
            EnsureChannelFirstd("image"),
            Orientationd("image", axcodes="RAS", labels=None),
            spacing("image", pixdim=(2.0, 2.0, 2.0), mode="bilinear"),
            ScaleIntensityRanged("image", -175, 250, 0.0, 1.0, clip=True),
            CropForegroundd("image", source_key="image", allow_smaller=True),
            SpatialPadd("image", spatial_size=ROI),
        ]
    )


def stock_probabilities(file: Path, network: nn.Module, overlap: float, mode: str, roi: Any = ROI) -> torch.Tensor:
    """[classes, X, Y, Z] by MONAI alone."""
    transform = preparation(MonaiSpacingd)
    batch = list_data_collate([transform({"image": str(file)})])
    with torch.no_grad():
        batch["pred"] = SlidingWindowInferer(roi, 2, overlap, mode)(batch["image"], network)
    after = [Activationsd("pred", softmax=True), Invertd("pred", transform, "image", nearest_interp=False)]
    return Compose(after)(decollate_batch(batch)[0])["pred"].as_tensor()


def prepared(file: Path) -> MetaTensor:
    return list_data_collate([preparation()({"image": str(file)})])["image"]


@pytest.fixture
def scan(tmp_path: Path) -> Path:
    return write(tmp_path / "scan.nii.gz", *SCANS["LPS"])


@pytest.mark.parametrize(("overlap", "mode"), [(0.5, "constant"), (0.7, "gaussian"), (0.0, "constant")])
@pytest.mark.parametrize("name", SCANS)
def test_labels_are_those_of_monais_slow_way(name: str, overlap: float, mode: str, tmp_path: Path) -> None:
    file = write(tmp_path / "scan.nii.gz", *SCANS[name])
    network = Net()
    expected = stock_probabilities(file, network, overlap, mode)
    infer = SlidingWindowLabels(ROI, 2, overlap, mode, organ="aorta", label_names=NAMES, label_probability=True)
    found = infer.begin(prepared(file), network).result()
    (labels,) = decollate_batch(found.labels)
    source = nib.load(file)
    assert labels.dtype == torch.uint8
    assert labels.shape == (1, *source.shape)
    np.testing.assert_array_equal(labels.affine, source.affine)
    assert labels.meta["filename_or_obj"] == str(file)
    # A hair beyond the crop MONAI's rounding leaves probabilities of 1e-16, whose largest means nothing.
    some = expected.sum(dim=0) > 1e-6
    assert (some & (expected.argmax(0) > 0)).float().mean() > 0.05
    assert (labels[0] == expected.argmax(0))[some].float().mean() > 0.9999
    assert not labels[0][~some].any()
    torch.testing.assert_close(found.organ_probability.float(), expected[4], atol=1e-3, rtol=0)
    organs = labels[0] > 0
    largest = expected.max(dim=0).values[organs]
    torch.testing.assert_close(found.label_probability[organs].float(), largest, atol=1e-3, rtol=0)


@pytest.mark.parametrize("name", ["LPS", "oblique"])
def test_of_a_network_that_has_not_learnt_air_labels_differ_in_windows_of_air_alone(name: str, tmp_path: Path) -> None:
    """Where no window of air alone reaches, so in all tissue, labels are MONAI's; what only these cover is air."""
    axes, spacing, shape = SCANS[name]
    file = write(tmp_path / "scan.nii.gz", axes, spacing, tuple(2 * size for size in shape))
    values = np.asanyarray(nib.load(file).dataobj).copy()
    values[shape[0] // 2 :, shape[1] // 2 :] = -1000
    values[-1, -1] = 100  # so that no crop takes the air away
    nib.save(nib.Nifti1Image(values, nib.load(file).affine), file)
    network, image = Net(knows_air=False), prepared(file)
    expected = stock_probabilities(file, network, 0.5, "constant")

    in_air, in_others = torch.zeros_like(image[0]), torch.zeros_like(image[0])
    for window in window_slices(image.shape[2:], ROI, 0.5):
        (in_others if (image[0, 0][window] > 0).any() else in_air)[(0, *window)] = 1
    assert in_air.mean() > 0.1
    assert not (in_air.bool() & (image[0] > 0)).any()
    transform = preparation(MonaiSpacingd)
    own = transform({"image": str(file)})
    on_scan = Invertd(["air", "others"], transform, "image", nearest_interp=False)
    masks = on_scan({**own, "air": own["image"] * 0 + in_air, "others": own["image"] * 0 + in_others})
    air, others = masks["air"][0].as_tensor(), masks["others"][0].as_tensor()

    labels = SlidingWindowLabels(ROI, 2)(image, network)[0, 0]
    same = (air == 0) & (expected.sum(dim=0) > 1e-6)
    assert (labels == expected.argmax(0))[same].float().mean() > 0.9999
    assert same.float().mean() > 0.2
    assert (expected.argmax(0) > 0)[others == 0].any() and not labels[others == 0].any()


@pytest.mark.integration
def test_the_real_ct(tmp_path: Path) -> None:
    file = ROOT.parent / "shared/real_ct/Dataset001_BTCV/imagesTr/ct_001_0000.nii.gz"
    if not file.is_file():
        pytest.skip("the real CT is not at hand")
    network = Net()
    expected = stock_probabilities(file, network, 0.25, "constant", (80, 80, 80)).argmax(0)
    labels = SlidingWindowLabels((80, 80, 80), 1, 0.25)(prepared(file), network)[0, 0]
    assert (labels == expected).float().mean() > 0.999


def test_windows_are_monais() -> None:
    seen: list[tuple[int, ...]] = []

    def network(window: torch.Tensor, slices: list[list[slice]]) -> torch.Tensor:
        seen.extend(tuple(s.start for s in place[2:]) for place in slices)
        return window

    for size, roi, overlap in [((20, 33, 41), (16, 12, 20), 0.3), ((16, 16, 17), (16, 16, 16), 0.99)]:
        seen.clear()
        SlidingWindowInferer(roi, 1, overlap, with_coord=True)(torch.zeros(1, 1, *size), network)
        assert seen == [tuple(s.start for s in place) for place in window_slices(size, roi, overlap)]


def test_air_is_background_and_no_work(tmp_path: Path) -> None:
    image = prepared(write(tmp_path / "scan.nii.gz", *SCANS["LPS"]))
    image[..., image.shape[-1] // 4 :] = 0
    network = Net()
    everywhere = len(window_slices(image.shape[2:], ROI, 0.5))
    labels = SlidingWindowLabels(ROI)(image, network)
    assert 0 < network.windows < everywhere / 2
    assert labels.any()
    assert not labels[..., -10:].any()
    network.windows = 0
    infer = SlidingWindowLabels(ROI, organ=2, label_names=NAMES)
    empty = infer(image * 0, network)
    assert network.windows == 0
    assert empty.shape == labels.shape
    assert not empty.any()
    assert not infer.organ_probability.any()


def test_no_volume_of_all_classes_is_ever_made(scan: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image, largest = prepared(scan), 0
    zeros = torch.zeros

    def noted(*size: object, **settings: object) -> torch.Tensor:
        nonlocal largest
        out = zeros(*size, **settings)
        largest = max(largest, out.numel() if out.is_floating_point() else 0)
        return out

    monkeypatch.setattr(torch, "zeros", noted)
    SlidingWindowLabels(ROI)(image, Net())
    longest = int(np.argmax(image.shape[2:]))
    slab = CLASSES * image[0, 0].numel() // image.shape[2 + longest] * ROI[longest]
    assert largest == slab < CLASSES * image.numel() / 1.5


def test_flips_are_averaged_and_mirrored_back(scan: Path) -> None:
    image, plain, network = prepared(scan), Net(), Net()
    both = SlidingWindowLabels(ROI, flip_axes=[0, 1], organ=1, label_names=NAMES, label_probability=True)
    assert both.flips == [(), (0,), (1,), (0, 1)]
    found = both.begin(image, network).result()
    liver = found.labels[0, 0] == 1
    assert liver.any()
    torch.testing.assert_close(found.label_probability[liver], found.organ_probability[liver], atol=1e-3, rtol=0)
    mean = torch.zeros(())
    for dims in ([], [2], [3], [2, 3]):  # a network that mirrors by itself must give its share
        one = SlidingWindowLabels(ROI, organ=1, label_names=NAMES, flip_axes=[])
        averaging = type("", (SlidingWindowLabels,), {"averages_probabilities": True})
        one.__class__ = averaging
        one(image, lambda x, d=dims: plain(x.flip(d)).flip(d))
        mean = mean + one.organ_probability.float() / 4
    torch.testing.assert_close(found.organ_probability.float(), mean, atol=2e-3, rtol=0)


@pytest.mark.parametrize("batch", [1, 3])
def test_folds_are_averaged_with_one_network(batch: int, scan: Path, tmp_path: Path) -> None:
    image, files, means = prepared(scan), [], torch.zeros(())
    for fold in range(3):
        network = Net()
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(fold)) * 0.1)
        files.append(tmp_path / f"fold_{fold}.pt")
        torch.save(network.state_dict(), files[-1])
        alone = SlidingWindowLabels(ROI, batch, checkpoints=[files[-1]] * 2, organ=3, label_names=NAMES)
        alone(image, Net())
        means = means + alone.organ_probability.float() / 3
    folds = SlidingWindowLabels(ROI, batch, checkpoints=files, organ="right kidney", label_names=NAMES)
    folds(image, Net())
    folds(image, Net())  # which has none of the weights that the first was left with
    torch.testing.assert_close(folds.organ_probability.float(), means, atol=2e-3, rtol=0)


def test_weights_are_read_only_where_others_are_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files, read = [tmp_path / "a.pt", tmp_path / "b.pt"], []
    for value, file in enumerate(files):
        torch.save({"weight": torch.full((1, 1), value), "bias": torch.zeros(1)}, file)
    monkeypatch.setattr(sliding_window, "read_weights", lambda file: [read.append(file.name), read_weights(file)][1])
    network, members = nn.Linear(1, 1), CheckpointEnsemble(files)
    assert [network.weight.item() for _ in range(3) for _ in members.in_turn(network)] == [0, 1, 1, 0, 0, 1]
    assert read == ["a.pt", "b.pt"]
    assert len(members) == 2
    assert [network.weight.item() for _ in CheckpointEnsemble([]).in_turn(network)] == [1]  # as it is


def test_weights_are_read_once_a_scan(scan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many windows there are, and once more for the next scan, as the files may have changed."""
    files, read = [tmp_path / "a.pt", tmp_path / "b.pt"], []
    for file in files:
        torch.save(Net().state_dict(), file)
    load = torch.load
    monkeypatch.setattr(torch, "load", lambda file, **kwargs: [read.append(Path(file)), load(file, **kwargs)][1])
    image, ensemble = prepared(scan), SlidingWindowLabels(ROI, checkpoints=files)
    unsure = UncertaintyInferer(ROI, "ensemble", checkpoints=files, overlap=0.5)
    for infer in (ensemble, ensemble, unsure):
        read.clear()
        infer(image, Net().eval())
        assert read == files


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_output_that_is_not_finite_is_refused(value: float, scan: Path) -> None:
    network = Net()
    with torch.no_grad():
        network.last.bias[2] = value
    for infer in (SlidingWindowLabels(ROI), UncertaintyInferer(ROI, "tta", samples=2)):
        with pytest.raises(InputError, match="the network's output is NaN or infinite: give --amp False"):
            infer(prepared(scan), network.eval())


def test_mixed_precision_on_the_cpu(scan: Path) -> None:
    image, network = prepared(scan), Net()
    exact = SlidingWindowLabels(ROI)(image, network)
    assert network.dtype == torch.float32
    mixed = SlidingWindowLabels(ROI, dtype=torch.bfloat16)(image, network)
    assert network.dtype == torch.bfloat16
    assert 0.95 < (exact == mixed).float().mean() < 1


def test_a_scan_that_was_batched_by_hand(scan: Path) -> None:
    """As MONAI Label does it: metadata are not collated."""
    image = preparation()({"image": str(scan)})["image"]
    labels = SlidingWindowLabels(ROI)(image[None], Net())
    assert torch.equal(labels.as_tensor(), SlidingWindowLabels(ROI)(prepared(scan), Net()).as_tensor())
    np.testing.assert_array_equal(labels[0].affine, nib.load(scan).affine)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"overlap": 1.0}, "overlap is 1.0; give --overlap a share"),
        ({"blending": "linear"}, "blending is 'linear'; give --blending constant or"),
        ({"flip_axes": [3]}, r"tta_flip_axes is \[3\]; give axes among"),
        ({"sw_batch_size": 0}, "sw_batch_size is 0; give"),
        ({"organ": "heart", "label_names": NAMES}, "organ_probability is 'heart'; give one of background, liver"),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        SlidingWindowLabels(ROI, **settings)


def test_what_is_no_scan(scan: Path) -> None:
    with pytest.raises(ValueError, match="one scan at a time"):
        SlidingWindowLabels(ROI)(torch.zeros(1, 1, *ROI), Net())
    image = prepared(scan)
    with pytest.raises(ValueError, match=r"shape \(2, 1"):
        SlidingWindowLabels(ROI)(torch.cat([image, image]), Net())


def test_an_organ_by_name_or_value() -> None:
    assert organ_value("liver", NAMES) == organ_value(1, NAMES) == organ_value("1", NAMES) == 1
    with pytest.raises(InputError, match="is 9"):
        organ_value(9, NAMES)


def test_shear_is_refused_and_rounding_is_not() -> None:
    affine = np.diag([0.8, 0.8, 2.5, 1.0])
    rounded, tilted = affine.copy(), affine.copy()
    rounded[1, 2], tilted[1, 2] = 1e-4, 0.4
    grid = ScanGrid.of(np.diag([2.0, 2, 2, 1]), rounded, (30, 40, 50))
    assert grid.shape == (30, 40, 50)
    assert grid.axes == (0, 1, 2)
    with pytest.raises(InputError, match="not at right angles, as of a CT with gantry tilt"):
        ScanGrid.of(np.diag([2.0, 2, 2, 1]), tilted, (30, 40, 50))


@pytest.mark.parametrize("name", SCANS)
def test_spacing_is_monais_there_and_back(name: str, tmp_path: Path) -> None:
    file = write(tmp_path / "scan.nii.gz", *SCANS[name])
    start = Compose(preparation().transforms[:3])({"image": str(file)})
    integers = {"image": MetaTensor(start["image"].short(), meta=start["image"].meta), "image_path": str(file)}
    ours, theirs = (kind("image", pixdim=(2.0, 1.5, 3.0), mode="bilinear") for kind in (Spacingd, MonaiSpacingd))
    image, expected = ours(integers)["image"], theirs(start)["image"]
    torch.testing.assert_close(image.as_tensor(), expected.as_tensor(), atol=2e-3, rtol=1e-5)
    np.testing.assert_array_equal(image.affine, expected.affine)
    back, expected_back = ours.inverse({"image": image})["image"], theirs.inverse({"image": expected})["image"]
    torch.testing.assert_close(back.as_tensor(), expected_back.as_tensor(), atol=5e-3, rtol=1e-5)
    np.testing.assert_allclose(back.affine, start["image"].affine, atol=1e-9)


def test_nearest_spacing_is_left_to_monai(scan: Path) -> None:
    start = Compose(preparation().transforms[:3])({"image": str(scan)})
    ours, theirs = (kind("image", pixdim=(2.0, 1.5, 3.0), mode="nearest")(start) for kind in (Spacingd, MonaiSpacingd))
    assert torch.equal(ours["image"], theirs["image"])


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 3, 1, 2), (0, 2, 3, 1)])
def test_resampling_of_a_linear_ramp_in_any_memory_order(order: tuple[int, ...]) -> None:
    x, y, z = torch.meshgrid(torch.arange(5.0), torch.arange(4.0), torch.arange(1.0), indexing="ij")
    ramp = torch.stack([x + 10 * y, -x + z])
    volume = ramp.permute(order).contiguous().permute(*np.argsort(order).tolist())
    positions = [torch.tensor([-1.0, 0.25, 3.5, 9.0]), torch.tensor([2.5]), torch.tensor([-0.5, 0.0, 2.0])]
    out = resample_linear(volume, positions)
    assert out.shape == (2, 4, 1, 3)
    torch.testing.assert_close(out[0, :, 0, 0], torch.tensor([0.0, 0.25, 3.5, 4.0]) + 25)
    torch.testing.assert_close(out[1, :, 0, 2], -torch.tensor([0.0, 0.25, 3.5, 4.0]))


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 3, 1, 2), (0, 3, 2, 1), (3, 0, 2, 1)])
def test_resampling_is_the_same_to_the_last_bit_in_any_memory_order(order: tuple[int, ...]) -> None:
    """`bundle run` reads planes as on file and MONAI Label does not; both give the same labels."""
    values = torch.randint(-1000, 1000, (2, 9, 8, 7), generator=torch.Generator().manual_seed(0))
    positions = [torch.linspace(0, n - 1, 13, dtype=torch.float64) for n in (9, 8, 7)]
    volume = values.float().permute(order).contiguous().permute(*np.argsort(order).tolist())
    file = values.to(torch.int16).permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    assert torch.equal(resample_linear(volume, positions), resample_linear(file, positions))
