"""A run is a folder: what a second training, another fold or other label names do in one, with the bundle's configs."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from monai.bundle import ConfigWorkflow

from shared_networks.datasets.record import read_record, write_model
from shared_networks.errors import input_error_in
from shared_networks.synthetic.phantom import write_dataset
from shared_networks.synthetic.tissues import label_names
from tests.conftest import COARSE, ROOT

pytestmark = pytest.mark.integration

BUNDLE, PRETRAIN = ROOT / "hi_end_mae_btcv_seg", ROOT / "hi_end_mae_pretrain"
FOLD = {"split#fold": 0, "split#num_folds": 3, "split#val_fraction": 0.3}


def flow(data: Path, *configs: str, **settings: Any) -> ConfigWorkflow:
    return ConfigWorkflow(
        config_file=[str(BUNDLE / "configs" / f"{name}.json") for name in (*configs, "tiny")],
        workflow_type="infer" if configs == ("inference",) else "train",
        logging_file=False,
        bundle_root=str(BUNDLE),
        dataset_dir=str(data),
        **{"network_def#feature_size": 4, "spacing": COARSE, **settings},
    )


def train(data: Path, run: Path, **settings: Any) -> ConfigWorkflow:
    usual = {"pretrained_encoder": "", "epochs": 1, "num_samples": 1, "output_dir": str(run), "ckpt_dir": str(run)}
    workflow = flow(data, "train", **{**usual, **settings})
    workflow.initialize()
    workflow.run()
    return workflow


def evaluate(data: Path, run: Path, **settings: Any) -> ConfigWorkflow:
    usual = {"ckpt_dir": str(run), "output_dir": str(run / "report"), **settings}
    workflow = flow(data, "train", "evaluate", **usual)
    workflow.initialize()
    workflow.run()
    return workflow


def refusal(start: Any, *args: Any, **settings: Any) -> str:
    with pytest.raises(Exception) as caught:
        start(*args, **settings)
    return str(input_error_in(caught.value))


def content(run: Path) -> dict[Path, bytes]:
    return {file: file.read_bytes() for file in run.rglob("*") if file.is_file() and "tfevents" not in file.name}


@pytest.fixture(scope="module")
def run(datasets: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training of fold 0."""
    folder = tmp_path_factory.mktemp("run")
    train(datasets["btcv"], folder, **FOLD)
    return folder


@pytest.mark.parametrize("settings", [{**FOLD, "split#fold": 1}, {"split#num_train_cases": 1}, {"epochs": 3}])
def test_a_second_training_in_the_folder_is_refused(
    run: Path, datasets: dict[str, Path], settings: dict[str, Any]
) -> None:
    before = content(run)
    line = refusal(train, datasets["btcv"], run, **settings)
    assert line == (
        f"{run}: holds a trained model; give --resume True to go on with it, --overwrite True to remove it and start "
        "anew, or another --ckpt_dir"
    )
    assert content(run) == before


def test_other_label_names_do_not_come_to_the_weights(run: Path, datasets: dict[str, Path]) -> None:
    before = content(run)
    assert "holds a trained model" in refusal(train, datasets["flare"], run, label_names="@dataset_labels")
    line = refusal(train, datasets["flare"], run, label_names="@dataset_labels", resume=True)
    assert "trained on other labels, background, spleen" in line
    assert content(run) == before


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            {**FOLD, "split#fold": 1},
            "fold was 0 and is 1. Give the settings of training: --seed 0 --split#val_fraction 0.3 --split#fold",
        ),
        ({**FOLD, "split#num_train_cases": 1}, "num_train_cases was None and is 1"),
        ({**FOLD, "spacing": [8.0, 8.0, 9.0]}, "spacing was [8.0, 8.0, 8.0] and is [8.0, 8.0, 9.0]"),
    ],
)
def test_another_folds_score_is_not_reported(
    run: Path, datasets: dict[str, Path], settings: dict[str, Any], said: str
) -> None:
    assert said in refusal(evaluate, datasets["btcv"], run, **settings)
    assert not (run / "report").exists()


def test_a_copied_data_set_hides_no_training_case(run: Path, datasets: dict[str, Path], tmp_path: Path) -> None:
    copy = shutil.copytree(datasets["btcv"], tmp_path / "renamed")
    for folder in ("imagesTr", "labelsTr"):
        for file in (copy / folder).iterdir():
            file.rename(file.with_name(file.name.replace("train_", "patient")))
    for fold in (1, 2):
        line = refusal(evaluate, copy, run, **{**FOLD, "split#fold": fold})
        assert "would now test" in line
    evaluate(copy, run, **FOLD)


def test_all_of_another_data_set_is_reported_on(run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_dataset(tmp_path / "others", train=3, test=0, seed=8, voxel_mm=6.0)
    with caplog.at_level(logging.INFO):
        evaluate(tmp_path / "others", run, output_dir=str(tmp_path / "report"), **{"split#val_cases": []})
    assert f"{tmp_path}/others: the model has seen none of its cases: reporting on all 3" in caplog.text
    assert "figures are too good" not in caplog.text
    rows = (tmp_path / "report" / "dice.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in rows[1:4]] == ["train_000", "train_001", "train_002"]


def test_weights_of_another_training_are_not_taken_for_those_on_record(
    run: Path, datasets: dict[str, Path], tmp_path: Path
) -> None:
    weights = torch.load(run / "model.pt", weights_only=True)
    torch.save({name: tensor + 0.01 for name, tensor in weights.items()}, tmp_path / "model.pt")
    (tmp_path / "model.json").write_bytes((run / "model.json").read_bytes())
    said = f"{tmp_path}/model.pt: not the weights that {tmp_path}/model.json is the record of"
    assert refusal(evaluate, datasets["btcv"], tmp_path, **FOLD).startswith(said)
    inference = flow(datasets["btcv"], "inference", checkpoint=str(tmp_path / "model.pt"), output_dir=str(tmp_path))
    assert refusal(inference.initialize).startswith(said)


def test_scans_are_segmented_at_the_voxel_size_of_training(run: Path, datasets: dict[str, Path]) -> None:
    settings = {"checkpoint": str(run / "model.pt"), "output_dir": str(run / "labels")}
    inference = flow(datasets["btcv"], "inference", **settings, spacing=[3.0, 8.0, 8.0])
    assert "spacing was [8.0, 8.0, 8.0] and is [3.0, 8.0, 8.0]. Pass --spacing [8.0,8.0,8.0]" in refusal(
        inference.initialize
    )
    assert not (run / "labels").exists()


def test_all_members_of_an_ensemble_are_of_these_labels(run: Path, datasets: dict[str, Path], tmp_path: Path) -> None:
    train(datasets["flare"], tmp_path, label_names=list(label_names("flare")))
    inference = flow(datasets["btcv"], "inference", checkpoints=[str(f / "model.pt") for f in (run, tmp_path)])
    assert refusal(inference.initialize).startswith(f"{tmp_path}/model.json: the model was trained on other labels")


def test_weights_that_saw_this_folds_test_cases_are_no_start(
    run: Path, datasets: dict[str, Path], tmp_path: Path
) -> None:
    for setting in ("init_weights", "pretrained_encoder"):
        line = refusal(
            train, datasets["btcv"], tmp_path, **{**FOLD, "split#fold": 1}, **{setting: str(run / "model.pt")}
        )
        assert "the weights to start from: " in line and "would now" in line
    train(datasets["btcv"], tmp_path, **FOLD, init_weights=str(run / "model.pt"))
    record = read_record(tmp_path / "model.pt")
    assert record is not None and record["seen_before"]["train"] == record["train"]


def test_scans_that_pretrained_are_not_evaluated(datasets: dict[str, Path], tmp_path: Path) -> None:
    """Another seed draws another validation case: the loss on it would not be that of a scan never seen."""

    def evaluation(**settings: Any) -> ConfigWorkflow:
        return ConfigWorkflow(
            config_file=[str(PRETRAIN / "configs" / f"{name}.json") for name in ("train", "evaluate", "tiny")],
            workflow_type="train",
            logging_file=False,
            bundle_root=str(PRETRAIN),
            dataset_dir=str(datasets["btcv"]),
            **{"ckpt_dir": str(tmp_path), "output_dir": str(tmp_path), "cache_rate": 0.0, **settings},
        )

    parser = evaluation().parser
    network, record = (parser.get_parsed_content(name) for name in ("network_def", "record"))
    write_model(network.state_dict(), tmp_path / "model.pt", record)
    evaluation().initialize()
    with pytest.raises(Exception) as caught:
        evaluation(seed=1).initialize()
    line = str(input_error_in(caught.value))
    assert "(1 in all) trained and would now test. Give the settings of training: --seed 0 --val_fraction 0.1" in line


def test_folds_have_folders_of_their_own(datasets: dict[str, Path]) -> None:
    folders = {
        str(flow(datasets["btcv"], "train", **settings).parser.get_parsed_content(name))
        for settings in ({}, {"split#fold": 0}, {"split#fold": 2})
        for name in ("ckpt_dir", "output_dir")
    }
    names = {"models", "models/fold_0", "models/fold_2", "outputs", "outputs/fold_0", "outputs/fold_2"}
    assert folders == {f"{BUNDLE}/{name}" for name in names}


def test_overwriting_starts_a_training_of_other_labels(datasets: dict[str, Path], tmp_path: Path) -> None:
    train(datasets["btcv"], tmp_path)
    train(datasets["flare"], tmp_path, label_names="@dataset_labels", overwrite=True)
    record = json.loads((tmp_path / "model.json").read_text())
    assert sorted(record["labels"], key=record["labels"].get) == list(label_names("flare"))
    assert len(list((tmp_path / "state").iterdir())) == 1


def test_the_only_case_is_trained_resumed_and_reported_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_dataset(tmp_path / "data", train=1, test=0, seed=2, voxel_mm=6.0)
    with caplog.at_level(logging.WARNING):
        train(tmp_path / "data", tmp_path / "run")
    assert "is the only case: it trains and validates, so validation measures memorisation" in caplog.text
    train(tmp_path / "data", tmp_path / "run", resume=True)
    evaluate(tmp_path / "data", tmp_path / "run")
    assert (tmp_path / "run" / "report" / "dice.csv").is_file()
