"""Training all cases: nothing validates, so the last weights are the model, and all else goes on."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from ignite.engine import Events
from monai.bundle import ConfigWorkflow

from tests.conftest import BUNDLES, ROOT
from tests.training.test_resume import SMALL

pytestmark = pytest.mark.integration

OPTIONS = {
    "hi_end_mae_pretrain": {"val_fraction": 0.0},
    "segmenter": {"pretrained_encoder": "", "training_run#ema#decay": 0.5, "split#val_fraction": 0.0},
}

NONE_VALIDATES = {BUNDLES[0]: "--val_fraction 0.0", BUNDLES[1]: "--split#val_fraction 0.0"}


def workflow(bundle: str, datasets: dict[str, Path], out: Path, **override: Any) -> ConfigWorkflow:
    root = ROOT / bundle
    flow = ConfigWorkflow(
        config_file=[str(root / "configs" / name) for name in ("train.json", "tiny.json")],
        logging_file=False,
        bundle_root=str(root),
        dataset_dir=str(datasets["flare" if "flare" in bundle else "btcv"]),
        **{"ckpt_dir": str(out), "output_dir": str(out), "num_samples": 1, "batch_size": 1},
        **{"epochs": 2, "warmup_epochs": 2, "val_interval": 1},
        **OPTIONS.get(bundle, OPTIONS["segmenter"]),
        **override,
    )
    flow.initialize()
    return flow


@pytest.mark.parametrize("bundle", BUNDLES)
def test_all_cases_train_and_the_last_weights_are_the_model(
    bundle: str, datasets: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    flow = workflow(bundle, datasets, tmp_path)
    trainer, network = (flow.parser.get_parsed_content(name) for name in ("train#trainer", "network_def"))
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    rates: list[float] = []
    moved: list[bool] = []

    def note_rate(engine: Any) -> None:
        rates.append(max(group["lr"] for group in engine.optimizer.param_groups))

    def note_weights(engine: Any) -> None:
        moved.append(any(not torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items()))

    trainer.add_event_handler(Events.ITERATION_STARTED, note_rate)
    trainer.add_event_handler(Events.ITERATION_COMPLETED(once=1), note_weights)
    flow.run()
    assert "val_fraction is 0: no case validates, so the last weights become the model" in caplog.text
    assert "no validation cases" in caplog.text
    assert trainer.state.iteration == 2 * 3  # all three cases
    highest = flow.parser["learning_rate"]
    assert rates == pytest.approx([highest * (1 / 6 + 5 / 6 * step / 6) for step in range(6)])  # warm-up alone
    assert moved == [True]  # the first step too

    saved = torch.load(tmp_path / "model.pt", weights_only=True)
    average = getattr(flow.parser.get_parsed_content("training_run").ema, "average", None)
    assert (average is None) == (bundle == "hi_end_mae_pretrain")
    for name, tensor in (average or network.state_dict()).items():
        assert torch.equal(saved[name], tensor), name

    again = workflow(bundle, datasets, tmp_path, resume=True)  # finished already
    again.run()
    again_saved = torch.load(tmp_path / "model.pt", weights_only=True)
    assert all(torch.equal(again_saved[name], tensor) for name, tensor in saved.items())


@pytest.mark.parametrize("bundle", BUNDLES[:2])
def test_two_processes_need_no_validation_case_either(bundle: str, datasets: dict[str, Path], tmp_path: Path) -> None:
    files = [f"configs/{name}.json" for name in ("train", "multi_gpu_train", "tiny")]
    options = {"dataset_dir": datasets["btcv"], "ckpt_dir": tmp_path, "output_dir": tmp_path}
    words = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"),
        *("-m", "monai.bundle", "run", "--config_file", str(files)),
        *(word for key, value in options.items() for word in (f"--{key}", str(value))),
        *SMALL.replace("--val_fraction 0.3", NONE_VALIDATES[bundle]).replace("--epochs 4", "--epochs 1").split(),
        *(() if bundle == BUNDLES[0] else ("--pretrained_encoder", "")),
    ]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, cwd=ROOT / bundle, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "model.pt").is_file()
    assert "Traceback" not in done.stderr and "no validation cases" in done.stdout + done.stderr
