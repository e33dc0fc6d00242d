"""Which results are there, and of what they were made."""

from __future__ import annotations

from pathlib import Path

import pytest

from shared_networks.inference.done import NoteDone, read_note


def noted(folder: Path, **settings: object) -> NoteDone:
    weights = folder / "model.pt"
    weights.write_bytes(b"weights")
    return NoteDone("features", ["_features.npz"], folder, [weights], settings)


def test_results_are_done_of_one_scan_weights_and_settings(tmp_path: Path) -> None:
    note = noted(tmp_path, amp=False)
    assert not note.is_done("a", "scan 1")
    case = {"name": "a", "stamp": "scan 1"}
    assert note(case) is case
    assert not note.is_done("a", "scan 1")  # the file itself is not there
    (tmp_path / "a_features.npz").touch()
    assert note.is_done("a", "scan 1")
    assert not note.is_done("a", "scan 2")
    assert not noted(tmp_path, amp=True).is_done("a", "scan 1")
    (tmp_path / "model.pt").write_bytes(b"other weights")
    assert not note.is_done("a", "scan 1")


@pytest.mark.parametrize("content", ["", "{", "[1]", "3"])
def test_a_note_that_says_nothing_leaves_the_scan_to_do(content: str, tmp_path: Path) -> None:
    (tmp_path / "a_features.json").write_text(content)
    assert read_note(tmp_path / "a_features.json") == {}
    assert not noted(tmp_path).is_done("a", "scan 1")
