"""Report a run of inference: what was done with what, and which results deserve a look."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

from shared_networks.datasets.record import model_facts
from shared_networks.inference.predict import Totals
from shared_networks.version import __version__

SHOWN = 20
"""Scans to look at that a run prints; its report has all."""


def run_report(
    totals: Totals,
    checkpoints: Sequence[str],
    settings: Mapping[str, Any],
    label_names: Sequence[str],
    looks: Mapping[str, Sequence[str]],
) -> dict[str, Any]:
    """Return the content of `report.json`.

    Args:
        totals: what was done to the scans.
        checkpoints: files of the weights.
        settings: all else that results depend on, by name.
        label_names: names in order of label value, background first.
        looks: what deserves a look, by case.
    """
    ended = datetime.now(timezone.utc)
    packages = {name: version(name) for name in ("monai", "torch", "nibabel", "numpy")}
    return {
        "started": totals.started.isoformat(timespec="seconds"),
        "seconds": round((ended - totals.started).total_seconds(), 1),
        "versions": {"hi_end_mae": __version__, "python": platform.python_version(), **packages},
        "models": [model_facts(file) for file in checkpoints],
        "settings": dict(settings),
        "label_names": list(label_names),
        "segmented": totals.done,
        "there_already": totals.skipped,
        "failed": totals.failed,
        "passed_over": totals.passed_over,
        "look_at": {case: list(said) for case, said in looks.items()},
    }


def say_looks(looks: Mapping[str, Sequence[str]], cases: int, report: Path) -> None:
    """Print which scans deserve a look, and why.

    Args:
        looks: what deserves a look, by case.
        cases: how many scans have results.
        report: the file that has them all.
    """
    if not looks:
        return
    print(f"{len(looks)} of {cases} scan(s) to look at:")
    for case, said in list(looks.items())[:SHOWN]:
        print(f"  {case}: {'; '.join(said)}")
    if len(looks) > SHOWN:
        print(f"  and {len(looks) - SHOWN} more, in {report}")
