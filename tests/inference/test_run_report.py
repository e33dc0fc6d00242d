"""What a run says at its end."""

from __future__ import annotations

import json
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest

from shared_networks.datasets.record import file_digest
from shared_networks.inference.predict import Totals
from shared_networks.inference.run_report import SHOWN, run_report, say_looks
from shared_networks.version import __version__


def test_a_report_says_what_was_done_with_what(tmp_path: Path) -> None:
    weights = tmp_path / "model.pt"
    weights.write_bytes(b"weights")
    started = datetime.now(timezone.utc) - timedelta(seconds=5)
    totals = Totals(started, 2, 1, {"b.nii": "no scan"}, {"c.txt": "no image"})
    report = run_report(totals, [str(weights)], {"overlap": 0.5}, ["background", "liver"], {"a": ["liver: not found"]})
    assert json.loads(json.dumps(report)) == report
    assert datetime.fromisoformat(report["started"]) == started.replace(microsecond=0)
    assert report["seconds"] >= 5
    assert report["versions"]["hi_end_mae"] == __version__ and report["versions"].keys() >= {"monai", "torch"}
    assert report["models"] == [{"file": str(weights), "weights_sha256": file_digest(weights)}]
    assert (report["segmented"], report["there_already"]) == (2, 1)
    assert report["failed"] == {"b.nii": "no scan"} and report["passed_over"] == {"c.txt": "no image"}
    assert report["look_at"] == {"a": ["liver: not found"]} and report["settings"] == {"overlap": 0.5}


def test_scans_to_look_at_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    say_looks({}, 3, Path("report.json"))
    assert capsys.readouterr().out == ""
    say_looks({"a": ["liver: not found", "spleen: not found"]}, 3, Path("report.json"))
    assert capsys.readouterr().out == "1 of 3 scan(s) to look at:\n  a: liver: not found; spleen: not found\n"
    say_looks({f"c{number:03d}": ["liver: not found"] for number in range(SHOWN + 2)}, 99, Path("out/report.json"))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == SHOWN + 2 and lines[-1] == "  and 2 more, in out/report.json"
