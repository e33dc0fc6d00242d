"""How fast everything is, beside MONAI's own and the published way, in one run.

    python -m tests.benchmarks.speed [--tiny] [--repeats N] [--out FOLDER]

Pre-training step, loader, segmentation window and inference chain, each by the module of its name, one after the
other; a GPU is used where there is one. Prints Markdown; `--out` gets `speed.md` and `speed.json`. Keep the machine
quiet: ratios within a part are what counts, seconds are this machine's.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from . import inference, loader, pretrain_step, window

PARTS: dict[str, tuple[Any, list[str], list[str]]] = {  # by title: module, its options at full size, at the tiny one
    "Pre-training step": (pretrain_step, ["--monai"], ["--monai", "--preset", "tiny", "--batch", "2"]),
    "Segmentation window": (window, [], ["--size", "tiny"]),
    "Crops for pre-training": (loader, [], []),
    "Inference chain without the network": (
        inference,
        ["--slices", "100,300", "--only-ours", "600,1000"],
        ["--slices", "20", "--only-ours", ""],
    ),
}


def measure(tiny: bool, repeats: int | None) -> dict[str, Any]:
    """Every part's figures by its title, with the seconds that it took; a process each, so that none holds memory."""
    report: dict[str, Any] = {"machine": loader.machine(), "parts": {}}
    for title, (module, full, small) in PARTS.items():
        start = time.perf_counter()
        options = small if tiny else full
        if repeats and module in (pretrain_step, window):
            options = [*options, "--repeats", str(repeats)]
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "figures.json"
            words = [sys.executable, "-W", "ignore", "-m", module.__name__, *options, "--json", str(file)]
            subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
            figures = json.loads(file.read_text())
        seconds = round(time.perf_counter() - start)
        report["parts"][title] = {"seconds": seconds, "markdown": module.markdown(figures), "figures": figures}
    return report


def markdown(report: dict[str, Any]) -> str:
    """The report as Markdown, a section a part."""
    machine = ", ".join(f"{name} {value}" for name, value in report["machine"].items() if value is not None)
    sections = [
        f"## {title}\n\n{part['markdown']}\n\n*Measured in {part['seconds']} s.*"
        for title, part in report["parts"].items()
    ]
    return "\n\n".join([f"Machine: {machine}.", *sections])


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="small networks and scans: whether it runs, in minutes")
    parser.add_argument("--repeats", type=int, help="of steps and windows")
    parser.add_argument("--out", type=Path, help="folder for speed.md and speed.json")
    args = parser.parse_args()
    report = measure(args.tiny, args.repeats)
    print(markdown(report))
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "speed.md").write_text(markdown(report) + "\n")
        (args.out / "speed.json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
