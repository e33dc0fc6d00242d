"""The network that nnU-Net gets, without nnU-Net: `tests/nnunet` has what needs it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import SimpleITK
import torch
from monai.transforms import SpatialPad
from torch import nn

from shared_networks.doors.nnunet.network import (
    PUBLISHED,
    SMALL,
    WINDOW,
    PlannedUNETR,
    axes_of_planes,
    cut_window,
    direction_to_affine,
    mirrored_axes,
    units_of_channels,
)
from shared_networks.errors import InputError
from shared_networks.networks.unetr import HiEndUNETR
from tests.conftest import ROOT

TINY: dict[str, Any] = {
    "patch_size": 4,
    "feature_size": 4,
    "hidden_size": 12,
    "num_layers": 3,
    "num_heads": 2,
    "out_indices": (0, 1, 2),
    "num_upsamples": 2,
}
SIZE = (7, 8, 13)  # right-left, front-back, head-feet: not all are multiples of the patch
CT = {"0": {"mean": 77.7, "std": 147.5, "percentile_00_5": -1005.0, "percentile_99_5": 307.0}}


def scan(channels: int = 1) -> torch.Tensor:
    """HU [1, C, X, Y, Z] in RAS."""
    return torch.randint(-1000, 300, (1, channels, *SIZE), generator=torch.Generator().manual_seed(0)).float()


def as_nnunet_has_it(image: torch.Tensor, backward: tuple[int, ...], mirrored: tuple[bool, ...]) -> torch.Tensor:
    """RAS as nnU-Net's reader and planner leave it, if the scan is stored mirrored."""
    stored = image.flip([axis for axis, turned in enumerate(mirrored, start=2) if turned])
    read = stored.permute(0, 1, 4, 3, 2)  # [Z, Y, X]
    forward = np.argsort(backward)
    return read.permute(0, 1, *(int(axis) + 2 for axis in forward))


def planned(backward: tuple[int, ...], mirrored: tuple[bool, ...], units=((1.0, 0.0),)) -> PlannedUNETR:
    torch.manual_seed(1)
    image = as_nnunet_has_it(scan(), backward, mirrored)
    network = PlannedUNETR(image.shape[2:], axes_of_planes(backward), units, 3, TINY).eval()
    x, y, z = mirrored
    network.mirrored = (x, y, z)
    return network


def in_bundle(image: torch.Tensor, window: tuple[float, float] = WINDOW) -> torch.Tensor:
    """The bundle's own preparation of [1, C, X, Y, Z] in RAS: the window, and padding by MONAI."""
    low, high = window
    padded = SpatialPad([8, 8, 16])(((image.clamp(low, high) - low) / (high - low))[0])
    return torch.as_tensor(padded)[None]


STORED = [
    pytest.param(backward, mirrored, id=f"{''.join(map(str, backward))}-{sum(mirrored)}")
    for backward in ((0, 1, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0))
    for mirrored in ((False, False, False), (True, True, False), (True, False, True))
]


@pytest.mark.parametrize(("backward", "mirrored"), STORED)
def test_encoder_gets_what_the_bundle_feeds(backward, mirrored) -> None:
    image, network = scan(), planned(backward, mirrored)
    assert torch.equal(network.prepare(as_nnunet_has_it(image, backward, mirrored)), in_bundle(image))
    assert network.segmenter.vit.grid == [2, 2, 4]


@pytest.mark.parametrize(("backward", "mirrored"), STORED)
def test_logits_lie_on_the_voxels_of_the_array(backward, mirrored) -> None:
    image, network = scan(), planned(backward, mirrored)
    with torch.no_grad():
        expected = network.segmenter(in_bundle(image))[:, :, 0:7, :, 1:14]  # 1 voxel behind, and 1 before, 2 behind
        found = network(as_nnunet_has_it(image, backward, mirrored))
    assert found.is_contiguous()
    assert expected.std() > 0.01
    torch.testing.assert_close(found, as_nnunet_has_it(expected, backward, mirrored), rtol=0, atol=1e-5)


def test_normalisation_of_each_channel_is_undone() -> None:
    intensities = {**CT, "1": {"mean": -20.0, "std": 30.0, "percentile_00_5": -100.0, "percentile_99_5": 90.0}}
    units = units_of_channels(["CTNormalization", "NoNormalization"], intensities)
    assert units == [(147.5, 77.7), (1.0, 0.0)]
    assert units_of_channels(["CTNormalization"], {"0": {"mean": 5.0, "std": 0.0}}) == [(1e-8, 5.0)]
    image = scan(2)
    given = image.clone()
    given[:, 0] = (image[:, 0].clamp(-1005, 307) - 77.7) / 147.5
    torch.manual_seed(1)
    network = PlannedUNETR(SIZE[::-1], axes_of_planes((0, 1, 2)), units, 3, TINY)
    prepared = network.prepare(as_nnunet_has_it(given, (0, 1, 2), (False,) * 3))
    torch.testing.assert_close(prepared, in_bundle(image), rtol=0, atol=1e-5)


@pytest.mark.parametrize("scheme", ["ZScoreNormalization", "RescaleTo01Normalization"])
def test_normalisation_without_unit_is_refused(scheme) -> None:
    with pytest.raises(InputError, match=rf'^channel 1 of the plans has {scheme}, .*"channel_names": {{"1": "CT"}}'):
        units_of_channels(["CTNormalization", scheme], CT)


@pytest.mark.parametrize(
    ("scheme", "window", "text"),
    [
        ("CTNormalization", WINDOW, None),
        ("NoNormalization", (-2000, 2000), None),
        ("CTNormalization", (-1100, 250), "clip channel 0 to -1005 .. 307 HU, and the encoder knows -1100 .. 250. "),
        ("CTNormalization", (-175, 400), '-175 .. 400. To keep them all, write "channel_names": {"0": "noNorm"}'),
    ],
)
def test_a_window_that_plans_cut_is_told(scheme, window, text) -> None:
    found = cut_window([scheme], CT, window)
    assert found is None if text is None else text in str(found)


@pytest.mark.parametrize(
    ("code", "mirrored"), [("RAS", (False, False, False)), ("LPS", (True, True, False)), ("RAI", (False, False, True))]
)
def test_mirrored_axes_are_those_against_ras(code, mirrored) -> None:
    affine = nib.orientations.inv_ornt_aff(nib.orientations.axcodes2ornt(code), (3, 4, 5)) @ np.diag([3.0, 4, 5, 1])
    oblique = nib.affines.from_matvec([[0.96, -0.28, 0], [0.28, 0.96, 0], [0, 0, 1]]) @ affine
    assert mirrored_axes([("a", affine), ("b", oblique)]) == mirrored


def test_a_reader_that_turns_scans_mirrors_none() -> None:
    assert mirrored_axes([]) == (False, False, False)


def test_scans_that_lie_differently_are_refused() -> None:
    message = r"^scans are stored in different orientations \(one is RAS, two is LAS\).*NibabelIOWithReorient"
    with pytest.raises(InputError, match=message):
        mirrored_axes([("one", np.eye(4)), ("two", np.diag([-1.0, 1, 1, 1]))])


def test_axes_in_another_order_are_refused() -> None:
    with pytest.raises(InputError, match=r"^one is stored as ASR, whose axes are in another order.*dataset\.json"):
        mirrored_axes([("one", np.eye(4)[[2, 0, 1, 3]])])


@pytest.mark.parametrize("code", ["RAS", "LPS", "PIR", "ASL"])
def test_directions_of_simple_itk_are_affines(tmp_path: Path, code: str) -> None:
    affine = nib.orientations.inv_ornt_aff(nib.orientations.axcodes2ornt(code), (3, 4, 5)) @ np.diag([1.0, 2, 3, 1])
    nib.save(nib.Nifti1Image(np.zeros((3, 4, 5)), affine), tmp_path / "scan.nii.gz")
    direction = SimpleITK.ReadImage(str(tmp_path / "scan.nii.gz")).GetDirection()
    found = direction_to_affine(direction)
    np.testing.assert_allclose(found[:3, :3], affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0), atol=1e-6)
    assert nib.aff2axcodes(found) == nib.aff2axcodes(affine)


def test_state_holds_how_scans_lie_and_the_window_and_else_the_segmenter() -> None:
    network = planned((0, 1, 2), (True, False, True))
    network.window = (-100.0, 200.0)
    state = network.state_dict()
    assert {name for name in state if not name.startswith("segmenter.")} == {"_extra_state"}
    assert all(tensor.shape is not None for tensor in state.values())  # nnU-Net compares them
    other = planned((0, 1, 2), (False, False, False))
    other.load_state_dict(state)
    assert other.mirrored == (True, False, True)
    image = as_nnunet_has_it(scan(), (0, 1, 2), (True, False, True))
    assert torch.equal(other.prepare(image), in_bundle(scan(), (-100.0, 200.0)))


def test_a_plan_of_slices_is_refused() -> None:
    with pytest.raises(InputError, match=r"^the plans' patch \[56, 64\] is 2D: choose 3d_fullres"):
        PlannedUNETR((56, 64), (), [(1.0, 0.0)], 3, TINY)


def test_sizes_are_the_bundles() -> None:
    def shapes(**network: Any) -> dict[str, torch.Size]:
        with torch.device("meta"):
            built: nn.Module = HiEndUNETR(img_size=2 * network["patch_size"], **network)
        return {name: tensor.shape for name, tensor in built.state_dict().items()}

    train, small = (
        json.loads((ROOT / "hi_end_mae_btcv_seg" / "configs" / f"{name}.json").read_text())
        for name in ("train", "small")
    )
    written = {key: value for key, value in train["network_def"].items() if not key.startswith("_")}
    written |= {"patch_size": train["patch_size"], "out_channels": 14}
    del written["img_size"]
    assert shapes(**PUBLISHED) == shapes(**written)
    overlay = {key.removeprefix("network_def#"): value for key, value in small.items() if key.startswith("network_def")}
    assert shapes(**SMALL) == shapes(**{**written, "patch_size": small["patch_size"], **overlay})
    assert list(WINDOW) == train["intensity_range"]
