"""What the bundle operator of MONAI Deploy App SDK 4.0 does with a folder, done here to a release without the SDK.

`MonaiBundleInferenceOperator` reads `configs/metadata.json` and `configs/inference.json` by monai's `ConfigParser`. It
takes `device`, `inferer`, `preprocessing`, `postprocessing` and `network` from it by name, leaves out transforms whose
class is named `LoadImage...` or `SaveImage...`, and loads `models/model.pt` strictly. `./runtests.sh --deploy` runs the
operator itself.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser
from monai.data import MetaTensor
from monai.transforms import Compose, MapTransform

from shared_networks.bundle.release import release
from shared_networks.inference.save import keep_largest_components
from tests.conftest import ROOT

pytestmark = pytest.mark.integration

BTCV = "hi_end_mae_btcv_seg"
AFFINE = np.array([[0, 0, -3.0, 30], [0, 4.0, 0, -20], [-5.0, 0, 0, 50], [0, 0, 0, 1]])  # IAL


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An unpacked release of the tiny network, with weights of random numbers."""
    folder = tmp_path_factory.mktemp("release")
    (archive,) = release(folder, BTCV, overlay="tiny")
    ZipFile(archive).extractall(folder)
    root = folder / BTCV
    config = ConfigParser()
    config.read_config(root / "configs" / "inference.json")
    config["bundle_root"] = str(root)
    torch.manual_seed(0)
    (root / "models").mkdir()
    torch.save(config.get_parsed_content("network_def").state_dict(), root / "models" / "model.pt")
    return root


@pytest.fixture
def image() -> np.ndarray:
    """A patient of noise, [X, Y, Z] in HU."""
    values = np.full((26, 30, 40), -1000, np.int16)
    noise = np.random.default_rng(0).normal(40, 60, (20, 22, 30)).astype(np.int16)
    values[3:23, 4:26, 5:35] = noise
    return values


@pytest.fixture
def parser(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> ConfigParser:
    """The configs as the operator reads them, in the bundle's folder, where the application goes."""
    monkeypatch.chdir(bundle)
    monkeypatch.setattr(sys, "path", [str(bundle), *sys.path])
    parser = ConfigParser()
    parser.read_meta(f=json.loads((bundle / "configs" / "metadata.json").read_text()))
    parser.read_config([bundle / "configs" / "inference.json"])
    return parser


def without(compose: Compose, *names: str) -> list[Any]:
    """The transforms that the operator leaves."""
    return [t for t in compose.transforms if not any(name in type(t).__name__ for name in names)]


def strict(parser: ConfigParser, file: Path) -> torch.nn.Module:
    """The network with its weights; the operator tries TorchScript first."""
    with pytest.raises(RuntimeError):
        torch.jit.load(file)
    network: torch.nn.Module = parser.get_parsed_content("network")
    content = torch.load(file, map_location=parser.get_parsed_content("device"))
    assert not {"state_dict", "model"} & content.keys()  # which would be taken for the weights
    network.load_state_dict(content, strict=True)
    return network.eval()


def labels(parser: ConfigParser, image: np.ndarray, file: Path) -> np.ndarray:
    """Labels [X, Y, Z] of a scan, as the operator's `compute` makes them."""
    parser.parse()
    device, inferer = (parser.get_parsed_content(name) for name in ("device", "inferer"))
    before, after = (
        without(parser.get_parsed_content(name), "LoadImage", "SaveImage")
        for name in ("preprocessing", "postprocessing")
    )
    (source,), (result,) = (parser["_meta_"]["network_data_format"][kind] for kind in ("inputs", "outputs"))
    assert isinstance(before[0], MapTransform)
    meta = {"original_affine": AFFINE, "affine": AFFINE.copy(), "spatial_shape": np.array(image.shape)}
    meta["original_channel_dim"] = "no_channel"
    with torch.no_grad():
        data = Compose(before)({source: MetaTensor.ensure_torch_and_prune_meta(image, meta)})
        output = inferer(inputs=data[source][None].to(device), network=strict(parser, file))[0]
        if after:
            output = Compose(after)({result: output, **data})[result]
    return output.cpu().numpy().squeeze(0).astype(np.uint8)


def test_labels_are_those_of_bundle_run(bundle: Path, parser: ConfigParser, image: np.ndarray, tmp_path: Path) -> None:
    """On the scan's own grid; nothing is saved by the bundle, as the application saves."""
    nib.save(nib.Nifti1Image(image, AFFINE), tmp_path / "ct.nii.gz")
    words = [sys.executable, "-m", "monai.bundle", "run", "--config_file", "configs/inference.json"]
    words += ["--dataset_dir", str(tmp_path), "--output_dir", str(tmp_path / "out"), "--overlay", "False"]
    environment = {**os.environ, "PYTHONPATH": ""}
    done = subprocess.run(words, cwd=bundle, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    expected: Any = nib.load(tmp_path / "out" / "ct_seg.nii.gz")
    found = labels(parser, image, bundle / "models" / "model.pt")
    np.testing.assert_array_equal(found, np.asanyarray(expected.dataobj))
    np.testing.assert_allclose(expected.affine, AFFINE)
    assert len(np.unique(found)) > 2
    assert not (bundle / "outputs").exists()


def test_largest_pieces_are_kept_where_the_release_says_so(
    bundle: Path, parser: ConfigParser, image: np.ndarray
) -> None:
    plain = labels(parser, image, bundle / "models" / "model.pt")
    parser["largest_component"] = True
    kept = labels(parser, image, bundle / "models" / "model.pt")
    np.testing.assert_array_equal(kept, keep_largest_components(plain))
    assert (kept != plain).any()


@pytest.mark.parametrize("name", [BTCV, "hi_end_mae_flare_seg"])
def test_segmenters_name_what_the_operator_asks_for(name: str) -> None:
    parser = ConfigParser()
    parser.read_config(ROOT / name / "configs" / "inference.json")
    parser.read_meta(ROOT / name / "configs" / "metadata.json")
    asked = ("device", "inferer", "preprocessing", "postprocessing", "network")
    assert [section for section in asked if parser.get(section) is None] == []
    channels = parser["_meta_"]["network_data_format"]
    assert [
        (list(part), part[key]["type"]) for key, part in zip(("image", "pred"), channels.values(), strict=True)
    ] == [
        (["image"], "image"),
        (["pred"], "image"),
    ]


def test_weights_that_lack_a_tensor_are_refused(bundle: Path, parser: ConfigParser, tmp_path: Path) -> None:
    content = torch.load(bundle / "models" / "model.pt", weights_only=True)
    content.pop("out.conv.conv.bias")
    torch.save(content, tmp_path / "model.pt")
    with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict.*out\.conv\.conv\.bias"):
        strict(parser, tmp_path / "model.pt")
