"""Weights and what is on record of them: written in one act, compared by digest."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import shared_networks.datasets.record
from shared_networks.datasets.record import (
    PARTS,
    Record,
    case_digests,
    file_digest,
    read_record,
    record_file,
    scores_alike,
    trained_labels,
    training_record,
    write_model,
)
from shared_networks.errors import InputError
from shared_networks.networks.checkpoints import check_weights
from tests.conftest import full_disk

SPACING = {"modality": "CT", "spacing": (1.0, 2.0, 5.0), "intensity_range": (-175, 250)}


def a_record(*labels: str, spacing: Any = None) -> Record:
    return training_record("", {part: [] for part in PARTS}, spacing or SPACING, label_names=labels)


def weights(value: float) -> dict[str, torch.Tensor]:
    return {"bias": torch.full((3,), value)}


def test_a_model_is_a_flat_state_dict_with_its_record_beside_it(tmp_path: Path) -> None:
    file = tmp_path / "models" / "model.pt"
    digest = write_model(weights(1), file, {**a_record("background", "liver"), "score": None})
    assert sorted(path.name for path in file.parent.iterdir()) == ["model.json", "model.pt"]
    assert torch.load(file, weights_only=True)["bias"].tolist() == [1, 1, 1]
    record = read_record(file)
    assert record == json.loads(record_file(file).read_text())
    assert record is not None and record["weights_sha256"] == digest == file_digest(file)
    assert trained_labels(record) == ["background", "liver"]
    assert record["preparation"] == {"modality": "CT", "spacing": [1.0, 2.0, 5.0], "intensity_range": [-175, 250]}


def digests(*files: Path) -> list[str]:
    return [case_digests([{"image": str(file), "label": "x"}]).popitem()[1] for file in files]


def test_scans_that_begin_and_end_in_air_are_told_apart(tmp_path: Path) -> None:
    """Of one size, as they lie uncompressed."""
    for name, value in {"a": 1, "b": 2, "c": 1}.items():
        content = np.zeros(200_000, np.int16)
        content[100_000] = value
        (tmp_path / f"{name}.nii").write_bytes(content.tobytes())
    a, b, c = digests(*sorted(tmp_path.iterdir()))
    assert a == c != b


def test_a_scan_is_known_compressed_or_not(tmp_path: Path) -> None:
    content = np.random.default_rng(0).integers(0, 9, 200_000).astype(np.uint8).tobytes()
    files = [tmp_path / name for name in ("a.nii", "b.nii.gz", "c.nii.gz", "d.nii.gz", "e.nii.gz")]
    parts = [content[:150_000], content[150_000:], b""]
    writings = [content, gzip.compress(content, 1), gzip.compress(content, 9, mtime=5)]
    writings += [b"".join(map(gzip.compress, parts[:2])), b"".join(map(gzip.compress, parts))]
    for file, writing in zip(files, writings, strict=True):
        file.write_bytes(writing)
    (known,) = set(digests(*files))
    files[1].write_bytes(gzip.compress(content[:-1] + b"x"))
    (tmp_path / "cut.nii.gz").write_bytes(writings[4][:20_000])
    assert digests(files[1]) != [known]
    assert digests(tmp_path / "cut.nii.gz", tmp_path / "none.nii.gz") == ["", ""]  # checks of the data name these


def test_labelled_scans_are_known_by_what_is_in_them(tmp_path: Path) -> None:
    for name, content in {"a_0000": b"1", "b_0000": b"2", "copy_0000": b"1", "a_0001": b"3"}.items():
        (tmp_path / f"{name}.nii.gz").write_bytes(content * 200_000)
    a, b, copy, second = (str(tmp_path / f"{name}.nii.gz") for name in ("a_0000", "b_0000", "copy_0000", "a_0001"))
    labelled = [{"image": image, "label": "x"} for image in (a, b, copy)]
    split = {"train": labelled, "validation": [{"image": [a, second], "label": "x"}], "test": [{"image": b}]}
    record = training_record(tmp_path, split, {})
    assert record["dataset"] == tmp_path.name
    train = record["train"]
    assert list(train) == ["a", "b", "copy"] and train["a"] == train["copy"] != train["b"]
    assert record["validation"]["a"] not in {"", train["a"]}  # another channel is another scan
    assert record["test"] == {"b": ""}  # nobody labelled it


def test_scores_compare_where_the_same_content_validates(tmp_path: Path) -> None:
    """Scans are labelled or not, and those of a store have the digest of their source."""

    def made(case: dict[str, Any], content: bytes, label: bytes = b"") -> Record:
        image.write_bytes(content)
        file.write_bytes(label)
        return training_record(tmp_path, {"train": [], "validation": [case], "test": []}, {})

    image, file = tmp_path / "a_0000.nii.gz", tmp_path / "a.nii.gz"
    scan: dict[str, Any] = {"image": str(image)}
    before = made(scan, gzip.compress(b"12"))
    assert before["validation"] == {"a": ""}  # known by its name alone, as all scans without label
    assert scores_alike(before, made(scan, b"12")) and not scores_alike(before, made(scan, b"13"))
    older = {key: value for key, value in before.items() if key != "validated_on"}
    assert scores_alike(older, made(scan, b"13")) and not scores_alike(older, made({**scan, "case": "b"}, b"13"))
    labelled = {**scan, "label": str(file)}
    before = made(labelled, b"12", b"0")
    assert scores_alike(before, made(labelled, b"12", b"0")) and not scores_alike(before, made(labelled, b"12", b"1"))
    assert not scores_alike(before, made({**scan, "label": ""}, b"12"))
    stored = made({**scan, "sha256": "1"}, b"12")
    assert scores_alike(stored, made({**scan, "sha256": "1"}, b"13"))
    assert not scores_alike(stored, made({**scan, "sha256": "2"}, b"12"))


@pytest.mark.parametrize("written", ["the new record", "the new weights"])
def test_a_writing_broken_off_leaves_a_model_with_its_own_record(
    tmp_path: Path, written: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after the new record, or after the new weights, were written."""
    file = tmp_path / "model.pt"
    write_model(weights(1), file, a_record("background", "liver"))
    calls = []

    def killed(path: Path, content: dict[str, Any], advice: str) -> None:
        calls.append(path)
        if len(calls) == 2:
            raise KeyboardInterrupt
        write(path, content, advice)
        if written == "the new record":
            raise KeyboardInterrupt

    write = shared_networks.datasets.record.write_json
    monkeypatch.setattr(shared_networks.datasets.record, "write_json", killed)
    with pytest.raises(KeyboardInterrupt):
        write_model(weights(2), file, a_record("background", "spleen"))
    value, organ = (1, "liver") if written == "the new record" else (2, "spleen")
    record = read_record(file)
    assert torch.load(file, weights_only=True)["bias"][0] == value
    assert record is not None and trained_labels(record) == ["background", organ]
    monkeypatch.undo()
    write_model(weights(3), file, a_record("background", "pancreas"))
    assert "liver" not in record_file(file).read_text()


def test_a_full_disk_leaves_model_and_record_as_they_were(tmp_path: Path) -> None:
    file = tmp_path / "model.pt"
    write_model(weights(1), file, a_record("background", "liver"))
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with full_disk(), pytest.raises(InputError, match=r"model\.pt: cannot be written"):
        write_model({"bias": torch.ones(100_000)}, file, a_record("background", "spleen"))
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize(("there", "new"), [("a.b.pt", "a.b.safetensors"), ("a.b.safetensors", "a.b.pt")])
def test_weights_of_the_same_stem_do_not_take_over_a_record(tmp_path: Path, there: str, new: str) -> None:
    pytest.importorskip("safetensors")
    write_model(weights(1), tmp_path / there, a_record("background", "liver"))
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(InputError) as caught:
        write_model(weights(2), tmp_path / new, a_record("background", "spleen"))
    assert str(caught.value) == (
        f"{tmp_path / new}: its record would replace {tmp_path}/a.b.json, the record of {tmp_path / there}; give "
        f"another name or folder, or move {there} and a.b.json away"
    )
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    (tmp_path / "a.pt").touch()  # its record is another file
    write_model(weights(2), tmp_path / there, a_record("background", "spleen"))
    (tmp_path / there).unlink()
    write_model(weights(3), tmp_path / new, a_record("background", "spleen"))
    assert trained_labels(read_record(tmp_path / new) or {}) == ["background", "spleen"]


def test_other_weights_than_those_on_record_are_refused(tmp_path: Path) -> None:
    file, other = tmp_path / "model.pt", tmp_path / "other" / "model.pt"
    write_model(weights(1), file, a_record())
    write_model(weights(2), other, a_record())
    other.replace(file)
    with pytest.raises(InputError) as caught:
        read_record(file)
    assert str(caught.value) == (
        f"{file}: not the weights that {tmp_path}/model.json is the record of, so that labels and cases are unknown. "
        "Copy both files of one training, or remove the record to use the weights without"
    )
    record_file(file).unlink()
    assert read_record(file) is None and read_record(tmp_path / "none.pt") is None


@pytest.mark.parametrize(
    "content", ["{", "[]", "{}", '{"weights_sha256": 1}', "a list for labels", "a record without cases"]
)
def test_a_damaged_record_is_named(tmp_path: Path, content: str) -> None:
    file = tmp_path / "model.pt"
    write_model(weights(1), file, a_record())
    record = json.loads(record_file(file).read_text())
    changed = {"a list for labels": {**record, "labels": []}, "a record without cases": {**record, "train": None}}
    record_file(file).write_text(json.dumps(changed[content]) if content in changed else content)
    said = (
        "not the weights" if content in ("{}", '{"weights_sha256": 1}') else r"no record of a model \(.*\); remove it"
    )
    with pytest.raises(InputError, match=rf"model\.json.*{said}|{said}.*model\.json"):
        read_record(file)


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ({"spacing": [1.0, 2.0, 4.0]}, r"spacing was \[1.0, 2.0, 5.0\] and is .*4.0\]. Pass --spacing \[1.0,2.0,5.0\]"),
        ({"modality": "MR"}, "modality was CT and is MR. Pass --modality CT"),
        ({"intensity_range": [-200, 250]}, r"intensity_range was \[-175, 250\].*Pass --intensity_range \[-175,250\]"),
    ],
)
def test_a_model_is_used_on_scans_prepared_as_in_its_training(tmp_path: Path, setting: dict, said: str) -> None:
    network = torch.nn.Linear(1, 1)
    files = [tmp_path / name / "model.pt" for name in "ab"]
    write_model(network.state_dict(), files[0], a_record())
    write_model(network.state_dict(), files[1], a_record(spacing={**SPACING, **setting}))
    check_weights(files[0], network, SPACING)
    with pytest.raises(InputError, match=said):
        check_weights(files[0], network, {**SPACING, **setting})
    with pytest.raises(InputError, match=r"b/model\.pt: trained with other settings"):
        check_weights(files, network, SPACING)


def test_weights_without_a_record_are_used_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    network = torch.nn.Linear(1, 1)
    torch.save(network.state_dict(), tmp_path / "model.pt")
    check_weights(tmp_path / "model.pt", network)
    assert not caplog.text
    check_weights(tmp_path / "model.pt", network, SPACING)
    assert "has no model.json: label names, preparation of scans and cases of training cannot be" in caplog.text
