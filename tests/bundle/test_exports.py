"""The segmentation network as TorchScript and ONNX, and the overlay that runs a compiled one."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from monai.bundle import ConfigParser
from torch import Tensor

from shared_networks.errors import input_error_in
from shared_networks.networks.checkpoints import half_precision
from shared_networks.networks.hi_end_mae import HiEndMAE
from shared_networks.networks.unetr import HiEndUNETR
from shared_networks.networks.vit import patchify
from tests.conftest import BUNDLES, ROOT

pytestmark = pytest.mark.integration

BUNDLE = "hi_end_mae_btcv_seg"
IMAGE = torch.rand(1, 1, 48, 48, 48, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tensor]:
    """Weights of the network of tiny.json, stored as float16 like those that ship, and its logits of IMAGE."""
    configs = ROOT / BUNDLE / "configs"
    parser = ConfigParser()
    parser.read_config([str(configs / "train.json"), str(configs / "tiny.json")])
    torch.manual_seed(0)
    network: HiEndUNETR = parser.get_parsed_content("network_def").eval()
    file = tmp_path_factory.mktemp("weights") / "model.pt"
    halved = half_precision(network.state_dict(), file)
    torch.save(halved, file)
    network.load_state_dict(halved)
    with torch.no_grad():
        return file, network(IMAGE)


def export(command: str, weights: Path, output: Path, *more: str, bundle: str = BUNDLE) -> None:
    """Run an export command of monai as a user does, in the bundle's folder."""
    words = [sys.executable, "-m", "monai.bundle", command, "network_def", "--filepath", str(output)]
    words += ["--ckpt_file", str(weights), "--meta_file", "configs/metadata.json"]
    words += ["--config_file", "['configs/inference.json', 'configs/tiny.json']", *more]
    environment = {**os.environ, "PYTHONPATH": ""}
    done = subprocess.run(words, cwd=ROOT / bundle, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]


def test_torchscript_of_the_command_gives_the_same_logits(tiny: tuple[Path, Tensor], tmp_path: Path) -> None:
    weights, logits = tiny
    export("ckpt_export", weights, tmp_path / "model.ts", "--checkpoint", str(weights))
    with torch.no_grad():
        scripted = torch.jit.load(tmp_path / "model.ts")(IMAGE)
    torch.testing.assert_close(scripted, logits, atol=1e-4, rtol=0)


def test_onnx_of_the_command_gives_the_same_logits(tiny: tuple[Path, Tensor], tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    weights, logits = tiny
    more = ["--checkpoint", str(weights), "--input_shape", "[1, 1, 48, 48, 48]"]
    export("onnx_export", weights, tmp_path / "model.onnx", *more)
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: IMAGE.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), logits, atol=1e-4, rtol=0)


def test_onnx_of_the_pretraining_network_reconstructs_what_it_hides(tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    configs = ROOT / BUNDLES[0] / "configs"
    parser = ConfigParser()
    parser.read_config([str(configs / "inference.json"), str(configs / "tiny.json")])
    network: HiEndMAE = parser.get_parsed_content("network_def").eval()
    torch.save(network.state_dict(), tmp_path / "model.pt")
    more = ["--checkpoint", str(tmp_path / "model.pt"), "--input_shape", "[1, 1, 48, 48, 48]"]
    export("onnx_export", tmp_path / "model.pt", tmp_path / "model.onnx", *more, bundle=BUNDLES[0])
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    found = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: IMAGE.numpy()})[0])
    hidden = patchify(found[:, 1:], network.vit.patch_size)[..., 0]
    assert hidden.unique().tolist() == [0, 1]
    with torch.no_grad():
        expected = network(IMAGE, hidden.argsort(dim=1))  # the order among the visible, or the hidden, does not matter
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def references(config: Any) -> set[str]:
    """Top-level names that a config refers to."""
    return set(re.findall(r"@([a-z_]+)", json.dumps(config)))


@pytest.mark.parametrize("bundle", BUNDLES[1:])
def test_tensorrt_overlay_fits_inference(bundle: str) -> None:
    """It names nothing that inference.json lacks, but for its own file, and is the same in both bundles."""
    configs = ROOT / bundle / "configs"
    overlay, inference = (json.loads((configs / f).read_text()) for f in ("inference_trt.json", "inference.json"))
    own = {"trt_checkpoint"}
    changed = {key.split("#")[0] for key in overlay if not key.startswith("_desc_")}
    assert changed - own <= inference.keys()
    assert references(overlay) <= inference.keys() | own
    assert overlay == json.loads((ROOT / BUNDLE / "configs" / "inference_trt.json").read_text())
    checks = ["$@network_def" if "checkpoint" in json.dumps(item) else item for item in inference["initialize"]]
    assert overlay["initialize"] == checks  # the engine is loaded where the weights are checked
    parser = ConfigParser()
    parser.read_config([str(configs / file) for file in ("inference.json", "inference_trt.json")])
    assert parser.get_parsed_content("saver").settings["network"] == {}  # heads and blocks are in the engine's digest


def trt_network(file: Path, *overlays: str) -> Any:
    configs = ROOT / BUNDLE / "configs"
    parser = ConfigParser()
    parser.read_config([str(configs / name) for name in ("inference.json", "inference_trt.json", *overlays)])
    parser["trt_checkpoint"], parser["device"] = str(file), "cpu"
    return parser.get_parsed_content("network")


@pytest.mark.parametrize("overlays", [(), ("tiny.json",)])
def test_tensorrt_overlay_runs_the_network_of_the_file(
    overlays: Sequence[str], tiny: tuple[Path, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With TorchScript in the engine's place, as TensorRT needs a GPU."""
    weights, logits = tiny
    network = HiEndUNETR(img_size=48, feature_size=8, hidden_size=192, num_heads=6).eval()
    network.load_state_dict(torch.load(weights, weights_only=True))
    torch.jit.script(network).save(str(tmp_path / "model_trt.ts"))
    (tmp_path / "torch_tensorrt.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    with torch.no_grad():
        found = trt_network(tmp_path / "model_trt.ts", *overlays)(IMAGE)
    torch.testing.assert_close(found, logits, atol=1e-4, rtol=0)


def test_an_engine_that_does_not_load_names_the_command_that_makes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "model_trt.ts"
    command = f"Make it with: python -m monai.bundle trt_export network_def --filepath {file} --ckpt_file"

    def error() -> str:
        with pytest.raises(RuntimeError) as caught:
            trt_network(file)
        return str(input_error_in(caught.value))

    assert error().startswith(f"{file}: no TensorRT engine there. {command}")
    file.write_bytes(b"no archive")
    monkeypatch.setitem(sys.modules, "torch_tensorrt", None)  # as where it is not installed
    assert error().endswith("pip install torch-tensorrt")
    monkeypatch.delitem(sys.modules, "torch_tensorrt")
    (tmp_path / "torch_tensorrt.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    assert error().startswith(f"{file}: does not load on this machine (")
    assert f"). {command}" in error()
    assert "\n" not in error()
