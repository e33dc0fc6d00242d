"""Fine-tuning's options together, through the bundle's own config."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from monai.bundle import ConfigWorkflow

from shared_networks.networks.vit import interpolate_positions
from tests.conftest import COARSE, ROOT

pytestmark = pytest.mark.integration

BUNDLE = ROOT / "hi_end_mae_btcv_seg"

FROZEN = {"optimizer#params#freeze_encoder": True}


def train(data: Path, out: Path, **override: Any) -> ConfigWorkflow:
    flow = ConfigWorkflow(
        config_file=[str(BUNDLE / "configs" / name) for name in ("train.json", "tiny.json")],
        logging_file=False,
        bundle_root=str(BUNDLE),
        dataset_dir=str(data),
        **{
            "pretrained_encoder": "",
            "ckpt_dir": str(out),
            "output_dir": str(out),
            "num_samples": 1,
            "spacing": COARSE,
            **override,
        },
    )
    flow.initialize()
    flow.run()
    return flow


def test_precision_accumulation_clipping_and_checkpointing_together(datasets: dict[str, Path], tmp_path: Path) -> None:
    options = {
        "amp": True,
        "train#trainer#accumulation_steps": 2,
        "max_grad_norm": 0.1,
        "network_def#use_checkpoint": True,
    }
    options |= {"optimizer#params#layer_decay": 0.75, "training_run#ema#decay": 0.9}
    flow = train(datasets["btcv"], tmp_path, epochs=1, **options)
    metrics = flow.parser.get_parsed_content("train#trainer").state.metrics
    assert metrics["grad_norm"] > 0.1  # as it was before it was clipped
    assert flow.parser.get_parsed_content("precision") is torch.bfloat16
    weights = torch.load(tmp_path / "model.pt", weights_only=True)
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    assert all(tensor.isfinite().all() for tensor in weights.values())


def test_a_frozen_encoder_stays_as_it_was(datasets: dict[str, Path], tmp_path: Path) -> None:
    first = train(datasets["btcv"], tmp_path / "first", epochs=1, **FROZEN)
    network = first.parser.get_parsed_content("network_def")
    again = train(
        datasets["btcv"],
        tmp_path / "again",
        epochs=2,
        **FROZEN,
        pretrained_encoder=str(tmp_path / "first/model.pt"),
    )
    trained = again.parser.get_parsed_content("network_def").state_dict()
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, trained[name]) == name.startswith("vit."), name


def test_training_goes_on_at_another_crop_size_with_the_positions_that_were_learned(
    datasets: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = train(datasets["btcv"], tmp_path / "first", epochs=1, warmup_epochs=0)
    name = "vit.patch_embedding.position_embeddings"
    learned = first.parser.get_parsed_content("network_def").state_dict()[name]
    for option in ("init_weights", "pretrained_encoder"):
        settings = {"img_size": [24, 48, 36], "epochs": 1, "warmup_epochs": 0, "learning_rate": 0.0}
        model = {option: str(tmp_path / "first" / "model.pt")}
        again = train(datasets["btcv"], tmp_path / option, **settings, **model)
        assert f"interpolated from 4 x 4 x 4 to 2 x 4 x 3 tokens: {name}" in capsys.readouterr().out
        found = again.parser.get_parsed_content("network_def").state_dict()[name]
        torch.testing.assert_close(found, interpolate_positions(learned, [4, 4, 4], [2, 4, 3]))


@pytest.mark.slow
def test_compiled_training_is_the_same(datasets: dict[str, Path], tmp_path: Path) -> None:
    """The network is compiled in place, so that its weights keep their names."""
    flow = train(datasets["btcv"], tmp_path, epochs=1, compile=True)
    weights = torch.load(tmp_path / "model.pt", weights_only=True)
    assert weights.keys() == flow.parser.get_parsed_content("network_def").state_dict().keys()
    assert not any("_orig_mod" in name for name in weights)
