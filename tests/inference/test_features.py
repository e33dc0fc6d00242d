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
from monai.networks.utils import eval_mode
from monai.transforms import Compose
from nibabel.affines import apply_affine, from_matvec, voxel_sizes
from nibabel.orientations import apply_orientation, axcodes2ornt, inv_ornt_aff, ornt_transform

from shared_networks.errors import InputError, input_error_in
from shared_networks.inference.features import SaveFeaturesd, TokenFeatures, centres_inside, token_affine
from shared_networks.networks.hi_end_mae import HiEndMAE
from shared_networks.networks.unetr import HiEndUNETR
from tests.conftest import ROOT, full_disk

BUNDLE = ROOT / "hi_end_mae_pretrain"
NAMES = ("block_3", "block_6", "block_9", "latent")
TINY: dict[str, Any] = {
    "in_channels": 2,
    "img_size": (4, 6, 12),
    "patch_size": (2, 3, 4),  # grid (2, 2, 3)
    "hidden_size": 24,
    "num_layers": 4,
    "num_heads": 3,
    "out_indices": (0, 1, 3),
}


def workflow(overlay: str = "features", **settings: Any) -> ConfigWorkflow:
    files = [str(BUNDLE / "configs" / f"{name}.json") for name in ("inference", overlay, "tiny")]
    return ConfigWorkflow(files, workflow_type="infer", logging_file=False, bundle_root=str(BUNDLE), **settings)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights of the tiny network, every one of them."""
    torch.manual_seed(0)
    network = workflow(dataset_dir="").parser.get_parsed_content("network_def")
    file = tmp_path_factory.mktemp("models") / "model.pt"
    torch.save({name: tensor + 0.02 * torch.randn(tensor.shape) for name, tensor in network.state_dict().items()}, file)
    return file


@pytest.mark.parametrize("kind", [HiEndMAE, HiEndUNETR])
def test_tokens_are_the_encoders_at_their_place_without_cls(kind: type[HiEndMAE] | type[HiEndUNETR]) -> None:
    torch.manual_seed(0)
    sizes = {"decoder_hidden_size": 12, "decoder_num_heads": 2} if kind is HiEndMAE else {"feature_size": 2}
    network = kind(**TINY, **sizes)
    image = torch.rand(2, 2, 4, 6, 12)
    volumes = TokenFeatures(network)(image)
    assert list(volumes) == ["block_0", "block_1", "block_3", "latent"]
    latent, features = network.vit(image)
    assert latent.shape[1] == (13 if kind is HiEndMAE else 12)
    for volume, tokens in zip(volumes.values(), [*features, latent], strict=True):
        assert volume.shape == (2, 24, 2, 2, 3)
        for number, (h, w, d) in enumerate(product(range(2), range(2), range(3)), start=latent.shape[1] - 12):
            assert torch.equal(volume[:, :, h, w, d], tokens[:, number])


def test_features_are_float32_in_mixed_precision() -> None:
    network = HiEndMAE(**TINY, decoder_hidden_size=12, decoder_num_heads=2)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        features = TokenFeatures(network)(torch.rand(1, 2, 4, 6, 12))
    assert {volume.dtype for volume in features.values()} == {torch.float32}


def test_token_affine_points_at_the_middle_of_patches() -> None:
    affine = np.array([[0.0, -1.5, 0, 20], [2.0, 0, 0, -7], [0, 0, 3.0, 11], [0, 0, 0, 1]])
    tokens = token_affine(affine, (2, 3, 4))
    voxels = np.array([*product((4, 5), (3, 4, 5), (0, 1, 2, 3))])  # of token (2, 1, 0)
    np.testing.assert_allclose(apply_affine(tokens, [2, 1, 0]), apply_affine(affine, voxels).mean(axis=0))


def test_padding_is_told_from_the_scan() -> None:
    scan = from_matvec(np.diag([-1.0, 2.0, 3.0]), (9, 0, 0))  # x from 9 down to 0 mm, y from 0 to 10
    tokens = from_matvec(np.diag([4.0, 4.0, 3.0]), (-4, 1, 0))  # centres at x = -4, 0, 4, 8, 12 and y = 1, 5, 9, 13
    inside = centres_inside(tokens, (5, 4, 2), scan, (10, 6, 1))
    expected = np.zeros((5, 4, 2), dtype=bool)
    expected[1:4, :3, 0] = True
    np.testing.assert_array_equal(inside, expected)


@pytest.mark.parametrize(("axcodes", "zooms"), [("RAS", (4.0, 4.0, 4.0)), ("PIL", (3.0, 5.0, 2.0))])
def test_features_lie_where_the_scan_is(axcodes: str, zooms: tuple[float, ...], tmp_path: Path) -> None:
    """Through the real preprocessing, of a scan whose intensity is a linear function of the place in millimetres."""
    shape = (40, 33, 57)
    to_axes = ornt_transform(axcodes2ornt("RAS"), axcodes2ornt(axcodes))
    affine = from_matvec(np.diag(zooms), (-70, 20, 5))
    scan_affine = affine @ inv_ornt_aff(to_axes, shape)
    slope = np.array([1.0, -0.8, 0.6])
    values = apply_affine(affine, np.moveaxis(np.indices(shape), 0, -1)) @ slope
    offset = 37.5 - (values.max() + values.min()) / 2  # inside the intensity window
    assert np.ptp(values) < 425
    nib.save(nib.Nifti1Image(apply_orientation(values + offset, to_axes), scan_affine), tmp_path / "ct_7.nii.gz")

    flow = workflow(dataset_dir=str(tmp_path))
    preprocessing: Compose = flow.parser.get_parsed_content("preprocessing")
    image = preprocessing({"image": str(tmp_path / "ct_7.nii.gz")})["image"]
    means = image[0].unfold(0, 12, 12).unfold(1, 12, 12).unfold(2, 12, 12).mean(dim=(-3, -2, -1))[None]
    assert SaveFeaturesd("pred", 12, tmp_path, "float32")({"image": image, "pred": {"latent": means}})
    with np.load(tmp_path / "ct_7_features.npz") as file:
        content = dict(file)

    assert set(content) == {"latent", "affine", "inside", "patch_size", "spacing"}
    assert content["patch_size"].tolist() == [12, 12, 12]
    np.testing.assert_allclose(content["spacing"], 4.0)
    np.testing.assert_allclose(voxel_sizes(content["affine"]), 48.0)
    grid = content["latent"].shape[:3]
    assert content["latent"].shape == (*grid, 1) and content["inside"].shape == grid
    tokens = np.moveaxis(np.indices(grid), 0, -1)
    shape = image.meta["spatial_shape"]
    corners = [content["affine"] @ from_matvec(np.eye(3), corner) for corner in product((-0.5, 0.5), repeat=3)]
    in_scan = [centres_inside(corner, grid, scan_affine, shape) for corner in corners]
    whole = np.all(in_scan, axis=0)  # patches without padding
    assert whole.sum() >= 2 and (content["inside"] >= whole).all() and not content["inside"].all()
    expected = (apply_affine(content["affine"], tokens) @ slope + offset + 175) / 425
    np.testing.assert_allclose(content["latent"][..., 0][whole], expected[whole], atol=1e-3)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_whole_scans_are_encoded_window_by_window(
    dtype: str, model: Path, datasets: dict[str, Path], tmp_path: Path
) -> None:
    flow = workflow(
        dataset_dir=str(datasets["btcv"]), checkpoint=str(model), output_dir=str(tmp_path), feature_dtype=dtype
    )
    flow.initialize()
    flow.run()
    assert {file.name for file in tmp_path.iterdir()} == {"test_000_features.npz", "test_000_features.json"}
    with np.load(tmp_path / "test_000_features.npz") as file:
        content = dict(file)
    network: HiEndMAE = flow.parser.get_parsed_content("network_def")
    network.load_state_dict(torch.load(model))
    scans = flow.parser.get_parsed_content("dataset")
    image: MetaTensor = scans.prepare(scans.data[0])["image"]
    sizes = image.shape[1:]
    assert len(set(sizes)) > 1 and content["latent"].shape == (*(size // 12 for size in sizes), 192)
    for corner in product(*(range(0, size, 48) for size in sizes)):
        window = image.as_tensor()[(None, slice(None), *(slice(at, at + 48) for at in corner))]
        with eval_mode(network):
            latent, features = network.vit(window)
        part = tuple(slice(at // 12, at // 12 + 4) for at in corner)
        for name, tokens in zip(NAMES, [*features, latent], strict=True):
            assert content[name].dtype == dtype
            expected = tokens[0, 1:].reshape(4, 4, 4, 192).numpy()
            np.testing.assert_allclose(
                content[name][part], expected, atol=1e-4, rtol=1e-5 if dtype == "float32" else 1e-3
            )


def features_case(value: float) -> dict[str, Any]:
    meta = {"filename_or_obj": "ct_1.nii", "original_affine": np.eye(4), "spatial_shape": np.array([2, 2, 2])}
    return {
        "image": MetaTensor(torch.zeros(1, 2, 2, 2), meta=meta),
        "pred": {"block_3": torch.full((3, 1, 1, 1), value)},
    }


def test_overflow_and_wrong_types_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="ct_1: block_3 reaches 70000, beyond float16: give --feature_dtype float32"):
        SaveFeaturesd("pred", 2, tmp_path)(features_case(-70000.0))
    assert not list(tmp_path.iterdir())
    SaveFeaturesd("pred", 2, tmp_path, "float32")(features_case(-70000.0))
    with np.load(tmp_path / "ct_1_features.npz") as file:
        assert (file["block_3"] == -70000).all()
    with pytest.raises(InputError, match="feature_dtype is 'bfloat16': give float16 or float32"):
        SaveFeaturesd("pred", 2, tmp_path, "bfloat16")


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_features_that_are_not_finite_are_refused(value: float, dtype: str, tmp_path: Path) -> None:
    case = features_case(1.0)
    case["pred"]["block_3"][1] = value
    with pytest.raises(InputError, match="ct_1: block_3 is NaN or infinite: give --amp False"):
        SaveFeaturesd("pred", 2, tmp_path, dtype)(case)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("overlay", ["tiny", "features", "attention"])
def test_mixed_precision_is_that_of_training(
    overlay: str, model: Path, datasets: dict[str, Path], tmp_path: Path
) -> None:
    """Bfloat16, also on the CPU; MONAI's evaluator, which knows float16 on a GPU alone, is not asked."""
    seen: list[torch.dtype] = []
    settings = {
        "checkpoint": str(model),
        "output_dir": str(tmp_path),
        "amp": True,
        "dataset_dir": str(datasets["btcv"]),
    }
    more = {"voxel": [20, 20, 20]} if overlay == "attention" else {}
    flow = workflow(overlay=overlay, **settings, **more)
    flow.initialize()
    network: HiEndMAE = flow.parser.get_parsed_content("network_def")
    network.vit.blocks[0].mlp.linear1.register_forward_hook(lambda _m, _i, out: seen.append(out.dtype))
    flow.run()
    assert set(seen) == {torch.bfloat16}
    assert flow.parser.get_parsed_content("evaluator").amp is False


def test_a_full_disk_leaves_no_half_of_a_file(tmp_path: Path) -> None:
    case = features_case(1.0)
    case["pred"]["block_3"] = torch.ones(9000, 1, 1, 1)
    with full_disk(), pytest.raises(InputError, match=r"ct_1_features\.npz: cannot be written \("):
        SaveFeaturesd("pred", 2, tmp_path)(case)
    assert not list(tmp_path.iterdir())


def test_weights_and_data_are_checked_first(datasets: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(RuntimeError) as error:
        workflow(dataset_dir=str(datasets["btcv"]), checkpoint=str(tmp_path / "none.pt")).initialize()
    assert "none.pt: no trained weights there" in str(input_error_in(error.value))
    with pytest.raises(RuntimeError) as error:
        workflow(dataset_dir=str(tmp_path / "none")).run()
    assert "none: no such file or folder" in str(input_error_in(error.value))
