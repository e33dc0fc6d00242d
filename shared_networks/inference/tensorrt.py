"""Load a network that TensorRT has compiled."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import torch

from shared_networks.errors import InputError


def load_engine(file: str | Path, device: torch.device | str, **sizes: Any) -> torch.nn.Module:
    """Load a network that `trt_export` has compiled with TensorRT.

    Args:
        file: which `trt_export` wrote.
        device: to run it on.
        sizes: of the network, which overlays such as `tiny.json` set; the engine has its own.

    Raises:
        InputError: there is no such file, it does not load on this machine, or torch_tensorrt is not installed.
    """
    remedy = (
        f"Make it with: python -m monai.bundle trt_export network_def --filepath {file} --ckpt_file models/model.pt "
        "--meta_file configs/metadata.json --config_file configs/inference.json --precision fp16"
    )
    if not Path(file).is_file():
        raise InputError(f"{file}: no TensorRT engine there. {remedy}")
    try:
        importlib.import_module("torch_tensorrt")  # torch then knows what an engine is
        return torch.jit.load(file, map_location=device)
    except ImportError as error:
        raise InputError(f"{file}: runs with torch_tensorrt ({error}); pip install torch-tensorrt") from error
    except RuntimeError as error:
        raise InputError(f"{file}: does not load on this machine ({str(error).splitlines()[0]}). {remedy}") from error
