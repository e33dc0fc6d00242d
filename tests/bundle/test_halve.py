"""Weights as they ship: half the size, with their record, in one act."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from shared_networks.bundle.halve import halve
from shared_networks.datasets.leaks import check_evaluation
from shared_networks.datasets.record import Record, file_digest, read_record, training_record, write_model
from shared_networks.errors import InputError
from shared_networks.networks.checkpoints import read_weights

RECORD: Record = {
    "labels": {"background": 0, "liver": 1},
    "split": {"seed": 0},
    "preparation": {"spacing": [3.0, 3.0, 3.0]},
    "dataset": "synthetic",
    "train": {"train_000": "12ab"},
    "validation": {},
    "test": {},
    "seen_before": {"train": {}, "validation": {}},
}


# What ships names no case.
RELEASED = {**RECORD, "train": {"12ab": "12ab"}}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    generator = torch.Generator().manual_seed(0)
    write_model({"a": torch.randn(400, 30, generator=generator)}, tmp_path / "models" / "model.pt", RECORD)
    return tmp_path / "models" / "model.pt"


def test_weights_and_record_are_written_together(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = model.parents[1] / "weights" / "small.pt"
    for _ in range(2):  # an older one is replaced
        halve(model, file)
        assert read_record(file) == {**RELEASED, "weights_sha256": file_digest(file)}
    assert sorted(path.name for path in file.parent.iterdir()) == ["small.json", "small.pt"]
    assert torch.load(file, weights_only=True)["a"].dtype == torch.float16
    torch.testing.assert_close(read_weights(file), read_weights(model), atol=1e-7, rtol=2**-11)
    assert 1.7 < model.stat().st_size / file.stat().st_size < 2
    assert f"{file}: 1 tensors, 0.0 MB in place of 0.0 MB" in capsys.readouterr().out


def test_safetensors_are_written_with_the_record(model: Path) -> None:
    file = model.parents[1] / "weights" / "small.safetensors"
    halve(model, file)
    assert read_record(file) == {**RELEASED, "weights_sha256": file_digest(file)}
    torch.testing.assert_close(read_weights(file), read_weights(model), atol=1e-7, rtol=2**-11)


def test_scans_that_trained_it_stay_known_without_their_names(tmp_path: Path) -> None:
    cases = []
    for name in ("Smith", "Jones"):
        (tmp_path / f"{name}.nii.gz").write_text(name)
        cases.append({"image": str(tmp_path / f"{name}.nii.gz"), "label": "x"})
    train, test = [{"train": [], "validation": [], "test": [], part: cases[:1]} for part in ("train", "test")]
    labels = ["background", "liver"]
    write_model({"a": torch.zeros(3)}, tmp_path / "model.pt", training_record("/data/X", train, {}, label_names=labels))
    halve(tmp_path / "model.pt", tmp_path / "small.pt")
    assert "Smith" not in (tmp_path / "small.json").read_text()
    now = training_record("/data/Y", test, {}, label_names=labels)
    check_evaluation([tmp_path / "small.pt"], now, cases[1:])
    with pytest.raises(InputError, match=r"Smith \(1 in all\) trained and would now test"):
        check_evaluation([tmp_path / "small.pt"], now, cases)


@pytest.mark.parametrize("output", ["models/model.pt", "models/../models/model.pt", "weights/small.pth", "weights"])
def test_the_model_itself_and_other_endings_are_refused(output: str, model: Path) -> None:
    before = model.read_bytes()
    with pytest.raises(InputError, match=r"give another file than --checkpoint, with a name that ends in \.pt"):
        halve(model, model.parents[1] / output)
    assert model.read_bytes() == before


@pytest.mark.parametrize("output", ["models/model.safetensors", "models/../models/model.safetensors", "own.pt"])
def test_a_record_that_is_of_other_weights_or_none_is_not_replaced(output: str, model: Path) -> None:
    (model.parents[1] / "own.json").write_text('{"spacing": 3}')
    before = {file: file.read_bytes() for file in model.parents[1].rglob("*.*")}
    file = model.parents[1] / output
    with pytest.raises(InputError) as caught:
        halve(model, file)
    of = "which is no record" if output == "own.pt" else f"the record of {file.with_suffix('.pt')}"
    assert str(caught.value).startswith(f"{file}: its record would replace {file.with_suffix('.json')}, {of}; give an")
    assert {file: file.read_bytes() for file in model.parents[1].rglob("*.*")} == before


def changed(model: Path, change: str) -> None:
    file, content = model.with_suffix(".json"), torch.load(model, weights_only=True)
    if change == "no record":
        file.unlink()
    elif change == "other record":
        file.write_text(json.dumps({**json.loads(file.read_text()), "weights_sha256": "0"}))
    elif change == "no model":
        shutil.rmtree(model.parent)
    else:
        write_model({"a": content["a"] * 1e6}, model, RECORD)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("no record", r"model\.json: no such file; weights ship with the record of their training"),
        ("other record", "not the weights that .* is the record of"),
        ("no model", "no such checkpoint"),
        ("too large", "a has values beyond float16"),
    ],
)
def test_what_cannot_ship_is_refused_and_nothing_written(change: str, message: str, model: Path) -> None:
    changed(model, change)
    with pytest.raises(InputError, match=message):
        halve(model, model.parents[1] / "weights" / "small.pt")
    assert not (model.parents[1] / "weights").exists()
