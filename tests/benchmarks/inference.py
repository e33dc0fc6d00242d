"""What segmenting a CT costs beside the network: time and memory, MONAI's chain against ours, and whether they agree.

    python -m tests.benchmarks.inference [--slices 100,300] [--only-ours 600,1000] [--json FILE]

Prints Markdown, then JSON. Scans are synthetic, 512 x 512 voxels of 0.8 x 0.8 x 2.5 mm, read from `.nii.gz` and
labelled into `.nii.gz`. A stand-in tells 14 classes by smoothed intensity, the same for both; the time within it is
taken off. On a busy machine compare `cpu s`, the processor time of all threads, too. Each run has a process of its own,
whose peak of resident memory includes Python, torch and MONAI.
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

import nibabel as nib
import numpy as np
import torch
import torch.nn.functional as F
from monai.bundle import ConfigParser
from monai.data import DataLoader, Dataset, decollate_batch
from torch import Tensor, nn

from .loader import machine
from .pretrain_step import resident

SPACING = (0.8, 0.8, 2.5)
CLASSES = 14
BUNDLE = Path(__file__).parents[2] / "hi_end_mae_btcv_seg"
RADII_MM = (80, 55, 45, 45, 40, 25, 20, 15, 15, 12, 12, 10, 10)  # of one organ a class, from liver to adrenal gland
ROI = (96, 96, 96)


def organ_hu(value: int) -> int:
    """The intensity that tells a class."""
    return -60 + 22 * value


def write_scan(file: Path, slices: int) -> None:
    """An ellipse of fat with thirteen ellipsoids every 750 mm, noise, and air around."""
    random = np.random.default_rng(0)
    x, y, _ = np.ogrid[:512, :512, :slices]
    body = ((x - 256) / 230) ** 2 + ((y - 256) / 170) ** 2 < 1
    scan = np.asfortranarray(np.broadcast_to(np.where(body, -100, -1000), (512, 512, slices)).astype(np.int16))
    for start in range(0, slices, 300):
        for value, radius in enumerate(RADII_MM, start=1):
            centre = np.array([*(256 + random.uniform(-110, 110, 2)), start + random.uniform(40, 260)])
            size = radius * random.uniform(0.8, 1.2, 3) / SPACING
            low = np.maximum(np.floor(centre - size).astype(int), 0)
            high = np.minimum(np.ceil(centre + size).astype(int) + 1, scan.shape)
            if (high <= low).any():
                continue
            box = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
            axes = np.ogrid[box]
            inside = sum(((a - c) / s) ** 2 for a, c, s in zip(axes, centre, size, strict=True)) < 1
            scan[box][inside] = organ_hu(value)
    noise = random.normal(0, 6, (512, 512)).astype(np.int16)  # the same in each slice, moved
    for index in range(slices):
        scan[:, :, index] += np.roll(noise, index * 37)
    affine = np.diag([-SPACING[0], -SPACING[1], SPACING[2], 1.0])  # LPS, as most CTs
    image = nib.Nifti1Image(scan, affine)
    image.to_filename(file)


class StandIn(nn.Module):
    """Logits by the distance of smoothed intensity to each class's, and the time that this takes."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds = self.cpu = 0.0
        self.centres = [(organ_hu(value) + 175) / 425 for value in range(1, CLASSES)]

    def forward(self, image: Tensor) -> Tensor:
        """[B, 1, H, W, D] to [B, 14, H, W, D]."""
        start, cpu = time.perf_counter(), time.process_time()
        smooth = F.avg_pool3d(image, 3, 1, 1)
        out = torch.empty((image.shape[0], CLASSES, *image.shape[2:]))
        out[:, 0] = -((smooth - (-100 + 175) / 425).clamp(min=0)[:, 0] ** 2) * 3000
        for value, centre in enumerate(self.centres, start=1):
            torch.sub(smooth[:, 0], centre, out=out[:, value]).square_().mul_(-3000)
        self.seconds += time.perf_counter() - start
        self.cpu += time.process_time() - cpu
        return out


def stock_chain(folder: Path) -> tuple[Any, Any]:
    """MONAI's transforms before and after the network, as the model zoo's bundles chain them."""
    from monai.transforms import (
        Activationsd,
        AsDiscreted,
        Compose,
        CropForegroundd,
        EnsureChannelFirstd,
        Invertd,
        LoadImaged,
        Orientationd,
        SaveImaged,
        ScaleIntensityRanged,
        Spacingd,
        SpatialPadd,
    )

    keys = "image"
    before = Compose(
        [
            LoadImaged(keys),
            EnsureChannelFirstd(keys),
            Orientationd(keys, axcodes="RAS", labels=None),
            Spacingd(keys, pixdim=(1.5, 1.5, 1.5), mode="bilinear"),
            ScaleIntensityRanged(keys, -175, 250, 0.0, 1.0, clip=True),
            CropForegroundd(keys, source_key=keys, allow_smaller=True),
            SpatialPadd(keys, spatial_size=ROI),
        ]
    )
    after = Compose(
        [
            Activationsd("pred", softmax=True),
            Invertd("pred", before, orig_keys=keys, nearest_interp=False, to_tensor=True, device="cpu"),
            AsDiscreted("pred", argmax=True),
            SaveImaged(
                "pred",
                output_dir=folder,
                output_postfix="seg",
                output_dtype=np.uint8,
                resample=False,
                separate_folder=False,
                print_log=False,
            ),
        ]
    )
    return before, after


def stock(file: Path, folder: Path, network: nn.Module, marks: dict[str, float]) -> None:
    """MONAI's chain with MONAI's inferer."""
    from monai.inferers import SlidingWindowInferer

    before, after = stock_chain(folder)
    batch: Any = next(iter(DataLoader(Dataset([{"image": str(file)}], before), batch_size=1)))
    marks["prepared"] = time.perf_counter()
    with torch.no_grad():
        batch["pred"] = SlidingWindowInferer(ROI, 1, 0.5)(batch["image"], network)
    marks["windows"] = time.perf_counter()
    for item in decollate_batch(batch):
        after(item)


def ours(file: Path, folder: Path, network: nn.Module, marks: dict[str, float], overlay: bool = False) -> None:
    """The items of the bundle's inference.json."""
    parser = ConfigParser(ConfigParser.load_config_file(BUNDLE / "configs" / "inference.json"))
    weights = folder / "model.pt"
    torch.save({"w": torch.zeros(1)}, weights)
    settings = {
        "bundle_root": str(BUNDLE),
        "dataset_dir": str(file),
        "output_dir": str(folder),
        "checkpoint": str(weights),
        "num_classes": CLASSES,
        "overlay": overlay,
        "device": "cpu",
    }
    parser.update(settings)
    item: Any = next(iter(parser.get_parsed_content("dataloader")))
    marks["prepared"] = time.perf_counter()
    item["pred"] = parser.get_parsed_content("inferer")(item["image"], network)
    marks["windows"] = time.perf_counter()
    for case in decollate_batch(item):
        parser.get_parsed_content("postprocessing")(case)


def run_one(which: str, file: Path, folder: Path) -> None:
    """Run one chain in this process and print its figures."""
    network = StandIn().eval()
    base = resident("VmHWM")
    marks, cpu = {"start": time.perf_counter()}, time.process_time()
    if which == "stock":
        stock(file, folder, network, marks)
    else:
        ours(file, folder, network, marks, overlay=which == "ours with overlay")
    marks["end"] = time.perf_counter()
    figures = {
        "seconds": marks["end"] - marks["start"] - network.seconds,
        "cpu s": time.process_time() - cpu - network.cpu,
        "prepare": marks["prepared"] - marks["start"],
        "windows": marks["windows"] - marks["prepared"] - network.seconds,
        "after": marks["end"] - marks["windows"],
        "stand-in": network.seconds,
        "peak GB": resident("VmHWM") / 1e9,
        "GB at start": base / 1e9,
    }
    print(json.dumps({name: round(value, 2) for name, value in figures.items()}))


def in_a_process(which: str, file: Path, folder: Path) -> dict[str, Any]:
    """Run one chain in a process of its own."""
    folder.mkdir()
    words = [sys.executable, "-W", "ignore", "-m", "tests.benchmarks.inference", "--one", which, str(file), str(folder)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"failed": (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]}
    return json.loads(done.stdout.strip().splitlines()[-1])


def labels_in(folder: Path) -> np.ndarray:
    """The labels that a run has saved."""
    return np.asanyarray(nib.load(next(folder.glob("*_seg.nii.gz"))).dataobj)


def measure(both: list[int], alone: list[int], folder: str | None = None) -> dict[str, Any]:
    """Run both chains at some numbers of slices and ours alone at others; `folder` takes scans and labels meanwhile."""
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir=folder) as name:
        for slices in [*both, *alone]:
            file = Path(name) / f"ct_{slices}.nii.gz"
            write_scan(file, slices)
            results = {}
            for which in (["ours", "stock"] if slices in both else ["ours"]) + ["ours with overlay"] * (slices == 300):
                results[which] = Path(name) / f"{which} {slices}".replace(" ", "_")
                rows.append({"slices": slices, "chain": which, **in_a_process(which, file, results[which])})
                print(rows[-1], file=sys.stderr, flush=True)
            if "stock" in results and not any("failed" in row for row in rows):
                labels, expected = labels_in(results["ours"]), labels_in(results["stock"])
                row = next(row for row in reversed(rows) if row["chain"] == "stock")
                row["equal voxels"] = round(float((labels == expected).mean()), 6)
                row["organ share"] = round(float((expected > 0).mean()), 4)
            file.unlink()
    return {"machine": machine(), "rows": rows}


def markdown(report: dict[str, Any]) -> str:
    """The report as a table."""
    rows = report["rows"]
    columns = list(dict.fromkeys(column for row in rows for column in row))
    lines = [f"512 x 512 voxels of {SPACING} mm, windows of {ROI}, overlap 0.5.", "", f"| {' | '.join(columns)} |"]
    lines += [f"|{'---|' * len(columns)}"]
    return "\n".join(lines + [f"| {' | '.join(str(row.get(column, '')) for column in columns)} |" for row in rows])


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--slices", default="100,300", help="sizes to run both chains at")
    parser.add_argument("--only-ours", default="600,1000", help="sizes beyond stock's memory")
    parser.add_argument("--out", help="folder for scans and labels; a temporary one by default")
    parser.add_argument("--json", help="file to write the figures to as well")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        which, file, folder = arguments.one
        run_one(which, Path(file), Path(folder))
        return
    both, alone = ([int(n) for n in text.split(",") if n] for text in (arguments.slices, arguments.only_ours))
    report = measure(both, alone, arguments.out)
    content = json.dumps(report, indent=1)
    print(f"Machine: {report['machine']}. {markdown(report)}", content, sep="\n\n")
    if arguments.json:
        Path(arguments.json).write_text(content)


if __name__ == "__main__":
    main()
