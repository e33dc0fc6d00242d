"""The segmentation network as a TensorRT engine, made by the bundle's command and run by its overlay."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from monai.bundle import ConfigParser

from shared_networks.networks.unetr import HiEndUNETR
from tests.bundle.test_exports import BUNDLE, IMAGE, export
from tests.conftest import ROOT


def test_an_engine_gives_the_logits_of_the_network(tmp_path: Path, device: torch.device) -> None:
    if device.type != "cuda":
        pytest.skip("TensorRT needs a GPU")
    pytest.importorskip("torch_tensorrt", reason="torch_tensorrt is not installed")
    configs = ROOT / BUNDLE / "configs"
    parser = ConfigParser()
    parser.read_config([str(configs / "train.json"), str(configs / "tiny.json")])
    torch.manual_seed(0)
    network: HiEndUNETR = parser.get_parsed_content("network_def").eval()
    weights, engine = tmp_path / "model.pt", tmp_path / "model_trt.ts"
    torch.save(network.state_dict(), weights)
    more = ["--checkpoint", str(weights), "--input_shape", "[1, 1, 48, 48, 48]", "--precision", "fp16"]
    export("trt_export", weights, engine, *more)

    overlay = ConfigParser()
    overlay.read_config([str(configs / name) for name in ("inference.json", "inference_trt.json", "tiny.json")])
    overlay["trt_checkpoint"], overlay["device"] = str(engine), str(device)
    with torch.no_grad():
        logits = network.to(device)(IMAGE.to(device))
        found = overlay.get_parsed_content("network")(IMAGE.to(device))
    error = float((found.float() - logits).abs().max() / logits.abs().max())
    print(f"relative error of the engine's logits: {error:.1e}")
    assert error <= 2e-2  # of float16
