"""What a scan costs in a row of scans, where the network takes N seconds and all else M: at best max(N, M).

    python -m tests.benchmarks.pipeline [--scans 20] [--slices 100] [--json FILE]

Scans are those of `tests.benchmarks.inference`. The network is a stand-in that waits, as a processor waits for a GPU,
and then gives the same logits in every window. M is measured first: one scan after the other, with a network that does
not wait. Then N is a quarter of M, M, and four times M. MONAI's own chain, with a worker that prepares the next scan,
is run over two scans, as it takes many times as long. Wall time a scan; prints Markdown, then JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from monai.bundle import ConfigParser
from monai.data import DataLoader, Dataset, decollate_batch
from monai.inferers import SlidingWindowInferer
from torch import Tensor, nn

from .inference import BUNDLE, CLASSES, ROI, StandIn, stock_chain, write_scan
from .loader import machine

SHARES = (0.25, 1.0, 4.0)


class Waiting(nn.Module):
    """The stand-in's logits of its first window, in every window after some seconds."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds, self.calls = 0.0, 0
        self.logits: Tensor | None = None

    def forward(self, image: Tensor) -> Tensor:
        """[B, 1, H, W, D] to [B, 14, H, W, D]."""
        if self.logits is None:
            self.logits = StandIn()(image[:1])
        self.calls += 1
        time.sleep(self.seconds)
        return self.logits.expand(len(image), *self.logits.shape[1:])


class Ours:
    """The items of the bundle's inference.json, over a folder."""

    def __init__(self, scans: Path, output: Path) -> None:
        parser = ConfigParser(ConfigParser.load_config_file(BUNDLE / "configs" / "inference.json"))
        weights = output / "model.pt"
        output.mkdir()
        torch.save({"w": torch.zeros(1)}, weights)
        self.network = Waiting().eval()
        settings = {
            "bundle_root": str(BUNDLE),
            "dataset_dir": str(scans),
            "output_dir": str(output),
            "checkpoint": str(weights),
            "num_classes": CLASSES,
            "skip_existing": False,
            "device": torch.device("cpu"),
            "handlers": [],
        }
        parser.update(settings)
        parser["evaluator"]["network"] = self.network
        self.scans = parser.get_parsed_content("dataset")
        self.evaluator = parser.get_parsed_content("evaluator")

    def run(self, seconds: float, ahead: bool) -> float:
        """Return the wall time a scan, with a wait of some seconds in each window."""
        self.network.seconds, self.network.calls = seconds, 0
        start = time.perf_counter()
        if ahead:
            self.scans.run(self.evaluator)
        else:
            self.scans.start()
            self.evaluator.run()
        assert not self.scans.failed and self.scans.taken == len(self.scans.data), self.scans.failed
        return (time.perf_counter() - start) / len(self.scans.data)


def monais(files: list[Path], output: Path, seconds: float) -> float:
    """Return the wall time a scan of MONAI's chain with a worker."""
    output.mkdir()
    before, after = stock_chain(output)
    network = Waiting().eval()
    network.seconds = seconds
    start = time.perf_counter()
    loader = DataLoader(Dataset([{"image": str(file)} for file in files], before), batch_size=1, num_workers=1)
    for batch in loader:
        with torch.no_grad():
            batch["pred"] = SlidingWindowInferer(ROI, 1, 0.5)(batch["image"], network)
        for item in decollate_batch(batch):
            after(item)
    return (time.perf_counter() - start) / len(files)


def measure(scans: int, slices: int) -> dict[str, Any]:
    """Measure all in this process, in turns."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "scans"
        folder.mkdir()
        files = [folder / f"ct_{index:03d}.nii.gz" for index in range(scans)]
        write_scan(files[0], slices)
        for file in files[1:]:
            os.link(files[0], file)
        chain = Ours(folder, Path(name) / "out")
        chain.run(0.0, ahead=False)  # what is loaded at first use
        rest = chain.run(0.0, ahead=False)
        windows = chain.network.calls // scans
        rows = []
        for share in SHARES:
            wait = share * rest
            row = {
                "N / M": share,
                "N, s": wait,
                "M, s": rest,
                "one after the other, s": chain.run(wait / windows, ahead=False),
                "pipeline, s": chain.run(wait / windows, ahead=True),
                "MONAI with a worker, s": monais(files[:2], Path(name) / f"monai_{share}", wait / windows),
            }
            row["pipeline / max(N, M)"] = row["pipeline, s"] / max(wait, rest)
            rows.append({key: round(value, 3) for key, value in row.items()})
            print(rows[-1], file=sys.stderr, flush=True)
    return {"machine": machine(), "scans": scans, "slices": slices, "windows": windows, "rows": rows}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scans", type=int, default=20)
    parser.add_argument("--slices", type=int, default=100)
    parser.add_argument("--json", help="file to write the figures to as well")
    arguments = parser.parse_args()
    report = measure(arguments.scans, arguments.slices)
    columns = list(report["rows"][0])
    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    lines += [f"| {' | '.join(str(row[column]) for column in columns)} |" for row in report["rows"]]
    content = json.dumps(report, indent=1)
    print(f"Machine: {report['machine']}.", "\n".join(lines), content, sep="\n\n")
    if arguments.json:
        Path(arguments.json).write_text(content)


if __name__ == "__main__":
    main()
