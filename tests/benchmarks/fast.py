"""What `hi-end-mae segment --fast` saves and costs, with the weights that ship, on synthetic CTs that they never saw.

    python -m tests.benchmarks.fast [--cases N] [--voxel_mm MM] [--out docs/results/fast.json]

CPU seconds are of the whole segmentation, after one that is not counted.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from shared_networks import segment
from shared_networks.evaluation.metrics import confusion_counts
from shared_networks.synthetic.phantom import write_dataset
from shared_networks.synthetic.tissues import label_names

from . import loader

WAYS = {"default": False, "fast": True}
SEED = 99
"""Of CTs that never trained the weights; see `tests/workflows/test_shipped_weights.py`."""


def mean_dice(counts: np.ndarray) -> float:
    """Mean Dice over the organs that are there, of confusion counts [classes, classes]."""
    found, true = counts.sum(axis=1), counts.sum(axis=0)
    organs = [value for value in range(1, len(counts)) if true[value] + found[value]]
    return float(np.mean([2 * counts[value, value] / (true[value] + found[value]) for value in organs]))


def measure(cases: int, voxel_mm: float) -> dict[str, Any]:
    """CPU seconds a case and mean Dice over all voxels of the cases, by way."""
    classes = len(label_names("btcv"))
    with tempfile.TemporaryDirectory() as folder:
        write_dataset(folder, train=0, test=cases, seed=SEED, voxel_mm=voxel_mm)
        scans = sorted(Path(folder, "imagesTs").iterdir())
        truths: list[Any] = [nib.load(file) for file in sorted(Path(folder, "labelsTs").iterdir())]
        shapes = [list(truth.shape) for truth in truths]
        segment(scans[0], fast=True)
        ways = {}
        for way, fast in WAYS.items():
            start = time.process_time()
            results = [segment(scan, fast=fast) for scan in scans]
            seconds = (time.process_time() - start) / cases
            counts: Any = sum(
                confusion_counts(np.asanyarray(result.dataobj), np.asanyarray(truth.dataobj), classes)
                for result, truth in zip(results, truths, strict=True)
            )
            ways[way] = {"CPU seconds a case": round(seconds, 2), "mean Dice": round(mean_dice(counts), 4)}
    return {"machine": loader.machine(), "voxel_mm": voxel_mm, "shapes": shapes, "ways": ways}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=2)
    parser.add_argument("--voxel_mm", type=float, default=1.5)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    text = json.dumps(measure(options.cases, options.voxel_mm), indent=1)
    print(text)
    if options.out:
        options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
