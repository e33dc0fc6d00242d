"""A training on the device that is interrupted and resumed repeats one that is not."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from monai.bundle import ConfigWorkflow

from tests.conftest import ROOT
from tests.training.test_resume import loss_curve, stop_after

ITERATIONS = 8


def pretraining(data: Path, out: Path, device: torch.device, *files: str, **override: Any) -> ConfigWorkflow:
    """The bundle's training of its tiny network, ready to run: epochs of two iterations."""
    bundle = ROOT / "hi_end_mae_pretrain"
    settings = {"epochs": 4, "warmup_epochs": 1, "val_interval": 2, "val_fraction": 0.3, "num_samples": 2}
    flow = ConfigWorkflow(
        config_file=[str(bundle / "configs" / name) for name in ("train.json", "tiny.json", *files)],
        logging_file=False,
        bundle_root=str(bundle),
        dataset_dir=str(data),
        ckpt_dir=str(out),
        output_dir=str(out),
        device=str(device),
        **{**settings, "batch_size": 1, "amp": False, **override},
    )
    flow.initialize()
    return flow


@pytest.fixture(autouse=True)
def repeatable(device: torch.device) -> Iterator[None]:
    """A GPU adds in an order of its own, unless it is asked not to; some of its operators cannot help it."""
    before = signal.getsignal(signal.SIGTERM)
    torch.use_deterministic_algorithms(device.type == "cuda", warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
    signal.signal(signal.SIGTERM, before)


def test_a_resumed_training_repeats_an_uninterrupted_one(
    datasets: dict[str, Path], tmp_path: Path, device: torch.device
) -> None:
    pretraining(datasets["btcv"], tmp_path / "whole", device).run()
    stopped = pretraining(datasets["btcv"], tmp_path / "parts", device)
    stop_after(stopped.parser.get_parsed_content("training_run"), 3)
    stopped.run()
    assert stopped.parser.get_parsed_content("train#trainer").state.iteration == 3
    resumed = pretraining(datasets["btcv"], tmp_path / "parts", device, resume=True)
    resumed.run()
    network = resumed.parser.get_parsed_content("network_def")
    assert {parameter.device for parameter in network.parameters()} == {device}

    curve, again = (loss_curve(tmp_path / name) for name in ("whole", "parts"))
    assert list(curve) == list(again) == list(range(1, ITERATIONS + 1)) and len(set(curve.values())) == ITERATIONS
    whole, parts = (torch.load(tmp_path / name / "model.pt", weights_only=True) for name in ("whole", "parts"))
    if device.type == "cpu":
        assert curve == again
        assert all(torch.equal(whole[name], parts[name]) for name in whole)
        return
    assert list(again.values()) == pytest.approx(list(curve.values()), rel=1e-3)
    for name, tensor in whole.items():
        assert float((tensor - parts[name]).norm()) <= 1e-2 * float(tensor.norm()), name
