"""MONAI's own experiment tracking, on a real run."""

from __future__ import annotations

from pathlib import Path

import pytest
from mlflow import MlflowClient

from tests.training.test_resume import train

pytestmark = pytest.mark.integration


def test_mlflow_gets_all_that_is_watched(datasets: dict[str, Path], tmp_path: Path) -> None:
    train(datasets["btcv"], tmp_path, "--tracking", "mlflow")
    client = MlflowClient(f"sqlite:///{tmp_path}/mlruns.db")
    (run,) = (run for e in client.search_experiments() for run in client.search_runs([e.experiment_id]))
    watched = {"learning_rate", "grad_norm", "crops_per_second", "data_wait"}
    assert run.data.metrics.keys() >= watched | {"train_loss", "val_masked_mse", "spread_block_3", "spread_block_9"}
    assert run.data.metrics["effective_rank"] > 1
    assert [m.step for m in client.get_metric_history(run.info.run_id, "train_loss")] == list(range(1, 9))
