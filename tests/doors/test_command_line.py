from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from shared_networks.doors.command_line import run_command
from shared_networks.doors.inference import FAST_OVERLAP
from shared_networks.version import __version__
from tests.conftest import BUNDLES, ROOT


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "hi-end-mae segment SCANS [options]"),
        (["--help"], "hi-end-mae segment ct.nii.gz --out labels"),
        (["-h"], "2  the command or a setting is wrong"),
        (["segment", "--help"], "labels to find: btcv or flare"),
        (["segment", "ct.nii.gz", "-h"], "1  some scan failed"),
        (["info", "--help"], "With --json as JSON"),
        (["--version"], f"hi-end-mae {__version__}\n"),
    ],
)
def test_help_is_plain_text(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(words) == 0
    shown = capsys.readouterr()
    assert said in shown.out and shown.err == "" and "\x1b" not in shown.out
    assert max(map(len, shown.out.splitlines())) <= 120


def test_help_comes_at_once() -> None:
    code = "import sys; from shared_networks.doors.command_line import run_command as run; run(['segment', '--help']); "
    code += "assert not {'torch', 'monai', 'numpy'} & {*sys.modules}"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("ct.nii.gz", "ct.nii.gz: is no command; give segment or info, as in: hi-end-mae segment ct.nii.gz"),
        ("segment", "SCANS: are missing; give files or folders"),
        ("segment --out labels", "SCANS: are missing"),
        ("segment docs/cover.nii README.md --out x", "docs/cover.nii: no such file or folder"),
        ("segment pyproject.toml ''", "'': is no path; give files or folders"),
        ("segment no.nii.gz", "no.nii.gz: no such file or folder; give a scan, or"),
        ("segment no.nii.gz -- --trace", "--: is neither an option nor a path"),
        ("segment no.nii.gz --out", "--out: has no value; give a path"),
        ("segment no.nii.gz --out a --output_dir b", "--out, --output_dir: are the same; give one"),
        ("segment no.nii.gz --out pyproject.toml/labels", "pyproject.toml/labels: cannot be written"),
        ("segment no.nii.gz --bundle amos", "--bundle amos: no bundle of segmentation"),
        ("segment no.nii.gz --weights no.pt", "no.pt: no such checkpoint"),
        ("segment no.nii.gz --weights ''", "--weights: has no value; give a path"),
        ("segment no.nii.gz --weights hi_end_mae_flare_seg/weights/small.pt", "give --bundle flare"),
        ("segment no.nii.gz --device cuda:99", "--device cuda:99: give a device of this machine: cpu"),
        ("segment no.nii.gz --overlap 2", "--overlap 2: give a number of at least 0 and below 1"),
        ("segment no.nii.gz --overlp 0.5", "--overlp: there is no setting 'overlp'; did you mean --overlap"),
        ("segment no.nii.gz --spacing", "--spacing: has no value; give three numbers"),
        ("segment no.nii.gz --fast --overlap 0.5", "--fast sets --overlap; give one"),
        ("segment no.nii.gz --fast=maybe", "--fast maybe: give True or False"),
        ("segment no.nii.gz --bundle_root .", "--bundle_root: follows from --bundle"),
        ("info --devices", "--devices: is no option of info"),
        ("info json", "json: is no option of info"),
    ],
)
def test_a_wrong_command_is_one_line_and_exit_code_2(
    words: str, said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    assert run_command([word.replace("''", "") for word in words.split()]) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith("error: ") and said in shown.err
    assert shown.err.count("\n") == 1 and shown.out == ""
    assert not (ROOT / "labels").exists()


@pytest.mark.integration
def test_a_scan_is_segmented_and_left_the_next_time(
    ct: Path, labels: tuple[np.ndarray, np.ndarray], tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    shutil.copy(ct, "ct.nii.gz")
    assert run_command(["segment", "ct.nii.gz"]) == 0
    assert capsys.readouterr().out.splitlines()[-2:] == [
        "1 segmented, 0 there already, 0 failed, 0 passed over",
        "results are in labels",
    ]
    names = ["ct_overlay.png", "ct_preview.png", "ct_seg.json", "ct_seg.nii.gz", "report.json", "statistics.csv"]
    assert sorted(file.name for file in Path("labels").iterdir()) == names
    found = nib.load("labels/ct_seg.nii.gz")
    np.testing.assert_array_equal(np.asanyarray(found.dataobj), labels[0])  # type: ignore[attr-defined]
    assert run_command(["segment", "--out", "labels", "ct.nii.gz"]) == 0
    assert "0 segmented, 1 there already" in capsys.readouterr().out


@pytest.mark.integration
def test_options_reach_the_bundle(ct: Path, tmp_path: Path) -> None:
    weights = ROOT / BUNDLES[2] / "weights" / "small.pt"
    words = ["segment", "--fast", str(ct), "--bundle", BUNDLES[2], "--weights", str(weights), "--out", str(tmp_path)]
    assert run_command([*words, "--overlay", "False", "--device=cpu", "--blending", "gaussian"]) == 0
    note = json.loads((tmp_path / "case_seg.json").read_text())
    assert note["labels"][0]["name"] == "liver" and note["made_with"]["blending"] == "gaussian"
    assert note["made_with"]["overlap"] == FAST_OVERLAP and not list(tmp_path.glob("*.png"))
    (used,) = note["made_with"]["weights"]
    assert used.startswith(f"{weights}: ")


@pytest.mark.integration
def test_a_scan_that_fails_is_exit_code_1_and_costs_itself_alone(
    ct: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scans = tmp_path / "scans"
    scans.mkdir()
    shutil.copy(ct, scans)
    (scans / "broken.nii.gz").write_bytes(ct.read_bytes()[:1000])
    assert run_command(["segment", str(scans), "--out", str(tmp_path / "labels"), "--overlay", "False"]) == 1
    shown = capsys.readouterr()
    assert shown.err.splitlines()[-2] == "error: 1 of 2 scan(s) not segmented:"
    assert shown.err.splitlines()[-1].startswith(f"{scans}/broken.nii.gz: ")
    assert (tmp_path / "labels" / "case_seg.nii.gz").is_file()


def test_an_interrupted_run_says_how_to_go_on(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("shared_networks.doors.inference.run_inference", interrupt)
    assert run_command(["segment", "ct.nii.gz"]) == 130
    assert capsys.readouterr().err.startswith("error: interrupted; ")
