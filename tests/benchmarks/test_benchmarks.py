"""The benchmarks run, at their smallest, and what they compare computes the same."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.benchmarks import pretrain_step, quoted, scaling
from tests.conftest import ROOT


def test_scaling_multiplies_out() -> None:
    plan = scaling.plan(cases=100, epochs=10, gpus=2, gpu_tflops=100.0, share=0.5, crops_a_case=8)
    rate = 2 * 100e12 * 0.5 / 340.84e9
    assert plan["crops/s"] == pytest.approx(rate, rel=1e-3)
    assert plan["hours"] == pytest.approx(100 * 10 * 8 / rate / 3600, rel=1e-3)
    assert plan["loader cores"] == pytest.approx(rate / quoted.crops(quoted.STORE)["crops/s a core"], rel=1e-3)
    assert plan["read, GB/s"] == pytest.approx(rate * 1.57e-3, rel=1e-3)


def test_scaling_counts_the_network_that_it_plans_for() -> None:
    flop = pretrain_step.count_flop("vit_large_p12")
    assert flop / 1e9 == pytest.approx(scaling.GFLOP_A_CROP, rel=1e-3)


def test_scaling_prints_a_line_a_number_of_gpus(capsys: pytest.CaptureFixture[str]) -> None:
    scaling.main(["--gpus", "1,4", "--cases", "10"])
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert [row.split(" | ")[0] for row in rows] == ["| GPUs", "| 1", "| 4"]


@pytest.mark.slow
def test_speed_compares_equal_results(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "tests.benchmarks.speed", "--tiny", "--repeats", "1", "--out", str(tmp_path)]
    subprocess.run(words, cwd=ROOT, check=True, capture_output=True)
    step, window, crops, chain = (
        part["figures"] for part in json.loads((tmp_path / "speed.json").read_text())["parts"].values()
    )
    assert "MONAI's masked autoencoder, float32" in step["variants"]
    assert all(row["step"]["fastest"] > 0 for row in step["variants"].values())
    assert window["variants"]["ours, float32"]["error"] < 1e-4
    assert crops["many"]["cases"] == 10_000
    stock = next(row for row in chain["rows"] if row["chain"] == "stock")
    assert stock["equal voxels"] >= 0.999
    assert stock["organ share"] > 0
    report = (tmp_path / "speed.md").read_text()
    assert report.count("\n## ") == 4
