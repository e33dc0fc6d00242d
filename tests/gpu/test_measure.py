"""The measurements run, at their smallest."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.gpu import measure
from tests.workflows.test_words import LONGEST_SENTENCE, prose


def test_tiny_measurements_fill_table_and_file(tmp_path: Path, device: torch.device) -> None:
    words = ["--out", str(tmp_path), "--device", str(device), "--size", "tiny", "--repeats", "1", "--workers", "0"]
    measure.main([*words, "--no-compile"])
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert all(row["step"]["fastest"] > 0 and row["share"] > 0 for row in report["step"]["variants"].values())
    assert {"bfloat16", "bfloat16, attention not fused"} <= report["step"]["variants"].keys()
    assert report["store"]["crops/s"] > 0 and 0 <= report["store"]["data wait"] <= 1
    assert report["scan"]["seconds"] > 0 and report["scan"]["peak GB"] > 0
    assert {f"{name}, {where}" for name in ("window", "small step") for where in ("cpu", device.type)} <= report.keys()
    text = (tmp_path / "gpu.md").read_text()
    assert text.count("| bfloat16") == 2 and "a step of 4 crops, float32" in text
    assert max(len(sentence.split()) for sentence in prose(text)) <= LONGEST_SENTENCE


def test_without_a_gpu_one_line_says_so(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("it has one")
    with pytest.raises(SystemExit):
        measure.main(["--out", str(tmp_path)])
    assert "PyTorch finds no CUDA device here; give --device cpu" in capsys.readouterr().err.splitlines()[-1]
