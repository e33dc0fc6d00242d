from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle import ConfigWorkflow
from monai.data import MetaTensor
from monai.transforms import Invertd
from nibabel.affines import from_matvec
from nibabel.orientations import apply_orientation, axcodes2ornt, inv_ornt_aff, ornt_transform
from torch import Tensor

from shared_networks.errors import InputError, input_error_in
from shared_networks.figures import reconstruction as figures
from shared_networks.inference.reconstruction import RestoreReconstructiond
from tests.conftest import ROOT

SIZE, PATCH = (4, 6, 8), (2, 3, 4)  # 8 patches
AFFINE = torch.tensor([[0.0, -1.5, 0, 20], [2.0, 0, 0, -7], [0, 0, 3.0, 11], [0, 0, 0, 1]], dtype=torch.float64)
BLOCKS = [
    (slice(None), slice(h, h + 2), slice(w, w + 3), slice(d, d + 4)) for h, w, d in product((0, 2), (0, 3), (0, 4))
]
MASKED = (1, 2, 5, 7)
AXES = ("RAS", "ASL", "LSA", "PSR", "SAL", "PIL")
SPACING = [6.0, 5.0, 8.0]


def image(channels: int = 2) -> MetaTensor:
    values = -200 + 500 * torch.rand(channels, *SIZE, generator=torch.Generator().manual_seed(1))
    return MetaTensor(values, affine=AFFINE.clone(), meta={"filename_or_obj": "case.nii.gz"})


def output(channels: int = 2) -> Tensor:
    """What the network gives: voxels of mean 0 and variance 1 in each patch, and the mask."""
    prediction = torch.rand(channels + 1, *SIZE, generator=torch.Generator().manual_seed(2))
    for index, block in enumerate(BLOCKS):
        values = prediction[:-1][block]
        prediction[:-1][block] = (values - values.mean()) / values.std(correction=0)
        prediction[-1:][block] = float(index in MASKED)
    return prediction


@pytest.fixture(params=["tensor", "tensor with another affine"])
def pred(request: Any) -> Tensor:
    return output() if request.param == "tensor" else MetaTensor(output(), affine=torch.eye(4))


def test_visible_patches_are_the_image_and_hidden_ones_have_its_statistics(pred):
    data = RestoreReconstructiond("pred", PATCH)({"image": image(), "pred": pred})
    for index, block in enumerate(BLOCKS):
        true, shown, mask = (data[key][block].as_tensor() for key in ("image", "reconstruction", "mask"))
        assert (mask == float(index in MASKED)).all()
        if index not in MASKED:
            assert torch.equal(shown, true)
            continue
        assert not torch.allclose(shown, true)
        assert shown.mean().item() == pytest.approx(true.mean().item(), abs=1e-3)
        assert shown.std().item() == pytest.approx(true.std().item(), rel=0.02)
        torch.testing.assert_close(shown, output()[:-1][block] * true.std() + true.mean(), rtol=1e-4, atol=1e-3)


def test_results_lie_on_the_grid_of_the_image(pred):
    data = RestoreReconstructiond("pred", PATCH)({"image": image(), "pred": pred})
    assert data["reconstruction"].shape == (2, *SIZE) and data["mask"].shape == (1, *SIZE)
    for key in ("reconstruction", "mask"):
        assert isinstance(data[key], MetaTensor)
        assert torch.equal(data[key].affine, AFFINE)
        assert data[key].meta["filename_or_obj"] == "case.nii.gz"


def test_inputs_are_left_alone():
    data = {"image": image(), "pred": output(), "case": "a"}
    result = RestoreReconstructiond("pred", PATCH)(data)
    assert data.keys() == {"image", "pred", "case"} and result["case"] == "a"
    assert torch.equal(data["image"], image()) and torch.equal(data["pred"], output())


def test_other_keys_one_patch_size_for_all_axes_and_plain_tensors():
    values = torch.rand(1, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    prediction = torch.zeros(2, 4, 4, 4)
    prediction[1, :2, :2, :2] = 1
    data = RestoreReconstructiond("guess", 2, image_key="ct")({"ct": values, "guess": prediction})
    expected = values.clone()
    expected[0, :2, :2, :2] = values[0, :2, :2, :2].mean()
    torch.testing.assert_close(data["reconstruction"], expected)
    assert torch.equal(data["mask"], prediction[1:])
    assert type(data["reconstruction"]) is type(data["mask"]) is Tensor


def test_sizes_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match=r"image size \(4, 6, 8\) is not divisible by patch size \(2, 4, 4\)"):
        RestoreReconstructiond("pred", (2, 4, 4))({"image": image(), "pred": output()})


def reconstruct(data: Path, out: Path, **settings: Any) -> tuple[list[str], dict[str, str]]:
    """Cases that the bundle's config has reconstructed with a tiny random network, and why not the others."""
    bundle = ROOT / "hi_end_mae_pretrain"
    flow = ConfigWorkflow(
        [str(bundle / "configs" / f"{name}.json") for name in ("inference", "tiny")],
        workflow_type="infer",
        logging_file=False,
        bundle_root=str(bundle),
        dataset_dir=str(data),
        output_dir=str(out),
        checkpoint=str(out.parent / "model.pt"),
        **settings,
    )
    flow.parser.parse(reset=True)
    torch.manual_seed(0)
    torch.save(flow.parser.get_parsed_content("network_def").state_dict(), out.parent / "model.pt")
    flow.initialize()
    scans = flow.parser.get_parsed_content("dataset")
    try:
        flow.run()
    except RuntimeError as error:
        assert isinstance(input_error_in(error), InputError)
    return [case.rpartition("/")[2] for case in scans.done], {Path(f).name: why for f, why in scans.failed.items()}


def write_scan(file: Path, seed: int = 0) -> None:
    file.parent.mkdir(exist_ok=True)
    values = np.random.default_rng(seed).integers(-1000, 400, (20, 20, 20)).astype(np.int16)
    nib.save(nib.Nifti1Image(values, np.diag([4.0, 4.0, 4.0, 1.0])), file)


@pytest.mark.integration
def test_scans_whose_names_hold_dots_keep_their_results_apart(tmp_path: Path) -> None:
    names = ["1.2.840.113.17", "1.2.840.113.18", "plain"]
    for seed, name in enumerate(names):
        write_scan(tmp_path / "dots" / f"{name}.nii.gz", seed)
    assert reconstruct(tmp_path / "dots", tmp_path / "out") == (names, {})
    kinds = ("reconstruction.json", "reconstruction.nii.gz", "reconstruction.png", "mask.nii.gz")
    found = {file.name for file in (tmp_path / "out").iterdir()}
    assert found == {f"{name}_{kind}" for name in names for kind in kinds}
    assert reconstruct(tmp_path / "dots", tmp_path / "out") == ([], {})


def stored(volume: np.ndarray, axcodes: str, file: Path) -> nib.Nifti1Image:
    """Write a volume [R, A, S] of 6 x 5 x 8 mm with other axes, and codes and a unit of its own."""
    to_axes = ornt_transform(axcodes2ornt("RAS"), axcodes2ornt(axcodes))
    affine = from_matvec(np.diag(SPACING), (-60, 30, 700)) @ inv_ornt_aff(to_axes, volume.shape)
    file.parent.mkdir(exist_ok=True)
    image = nib.Nifti1Image(apply_orientation(volume, to_axes), affine)
    image.set_sform(affine, 3)
    image.set_qform(affine, 1)
    image.header.set_xyzt_units("mm", "sec")
    nib.save(image, file)
    return image


CODES = ("xyzt_units", "sform_code", "qform_code", "srow_x", "srow_y", "srow_z")


@pytest.mark.integration
def test_scans_of_every_kind_of_axes_are_reconstructed_on_their_own_grid(tmp_path: Path) -> None:
    """Stored as ASL, LSA, PSR or SAL, the upper left of the affine is singular, as a plane's never is."""
    volume = np.random.default_rng(0).integers(-300, 400, (22, 26, 14)).astype(np.int16)
    scans = {axcodes: stored(volume, axcodes, tmp_path / "in" / f"{axcodes}.nii.gz") for axcodes in AXES}
    out = tmp_path / "out"
    assert reconstruct(tmp_path / "in", out, spacing=SPACING) == (sorted(AXES), {})
    for axcodes, scan in scans.items():
        result, mask = (nib.load(out / f"{axcodes}_{kind}.nii.gz") for kind in ("reconstruction", "mask"))
        for image, dtype in ((result, np.int16), (mask, np.uint8)):
            assert image.shape == scan.shape and image.get_data_dtype() == dtype
            np.testing.assert_allclose(image.affine, scan.affine, atol=1e-4)
            assert all((image.header[name] == scan.header[name]).all() for name in CODES)
        values, hidden = np.asanyarray(result.dataobj), np.asanyarray(mask.dataobj)
        assert set(np.unique(hidden)) == {0, 1}
        seen = hidden == 0
        np.testing.assert_array_equal(values[seen], np.clip(scan.dataobj, -175, 250)[seen])
        assert (values != np.clip(scan.dataobj, -175, 250))[~seen].mean() > 0.5


@pytest.mark.integration
def test_all_channels_are_in_the_file_and_the_first_is_in_the_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    volumes = np.random.default_rng(1).integers(-300, 400, (2, 22, 26, 14)).astype(np.int16)
    for channel, volume in enumerate(volumes):
        scan = stored(volume, "PSR", tmp_path / "images" / f"ct_{channel:04d}.nii.gz")
        volumes[channel] = np.clip(volume, -175, 250)
    titles: list[str] = []
    draw = figures.reconstruction_figure
    monkeypatch.setattr(figures, "reconstruction_figure", lambda *drawn: titles.append(drawn[-1]) or draw(*drawn))
    done = reconstruct(tmp_path / "images", tmp_path / "out", spacing=SPACING, **{"network_def#in_channels": 2})
    assert done == (["ct"], {})
    assert titles == ["ct   first of 2 channels"]
    result, mask = (nib.load(tmp_path / "out" / f"ct_{kind}.nii.gz") for kind in ("reconstruction", "mask"))
    assert result.shape == (*scan.shape, 2) and mask.shape == scan.shape
    np.testing.assert_allclose(result.affine, scan.affine, atol=1e-4)
    to_axes = ornt_transform(axcodes2ornt("RAS"), axcodes2ornt("PSR"))
    seen = np.asanyarray(mask.dataobj) == 0
    for channel, volume in enumerate(volumes):
        found = np.asanyarray(result.dataobj)[..., channel]
        np.testing.assert_array_equal(found[seen], apply_orientation(volume, to_axes)[seen])


@pytest.mark.integration
def test_a_scan_that_fails_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_scan(tmp_path / "in" / "ct.nii.gz")

    def fail(*_: Any) -> Any:
        raise ValueError("cannot be inverted")

    monkeypatch.setattr(Invertd, "__call__", fail)
    done, failed = reconstruct(tmp_path / "in", tmp_path / "out")
    assert done == [] and failed["ct.nii.gz"].startswith("failed (ValueError: cannot be inverted); report this")
    assert not (tmp_path / "out").exists()


@pytest.mark.integration
def test_files_named_as_results_are_kept(tmp_path: Path) -> None:
    """A mask of the user's own, and results of another scan of the same name."""
    for seed, file in enumerate(("a/ct.nii.gz", "b/ct.nii.gz", "b/other.nii.gz")):
        write_scan(tmp_path / file, seed)
    out = tmp_path / "out"
    out.mkdir()
    (out / "other_mask.nii.gz").write_text("somebody else's")
    assert reconstruct(tmp_path / "a", out) == (["ct"], {})
    before = {file: file.read_bytes() for file in out.iterdir()}
    done, failed = reconstruct(tmp_path / "b", out)
    assert done == [] and failed["ct.nii.gz"].startswith(
        f"{out}/ct_reconstruction.nii.gz: is a result of another scan, {tmp_path}/a/ct.nii.gz, and would be lost"
    )
    assert failed["other.nii.gz"].startswith(f"{out}/other_mask.nii.gz: is no result of this scan, as far as records")
    assert {file: file.read_bytes() for file in out.iterdir()} == before
    assert reconstruct(tmp_path / "a", out, seed=1) == (["ct"], {})
