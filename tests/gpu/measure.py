"""What training and inference cost on a GPU, beside the CPU of the same machine.

    python -m tests.gpu.measure --out docs/results

Writes `gpu.json` and `gpu.md`. A pre-training step at full size in all its variants, a training that reads a prepared
store, a whole scan, and one window and one step on the CPU. `--device cpu --size tiny` only shows that it runs.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from monai.bundle import ConfigWorkflow
from monai.engines import SupervisedTrainer
from monai.inferers import SimpleInferer
from monai.transforms import Compose

from shared_networks.networks.precision import AutocastInferer
from shared_networks.networks.unetr import HiEndUNETR
from shared_networks.store.crops import RandReadCropsd
from shared_networks.training.handlers import PrepareBatchSelfSupervised, TrainingHandlers
from shared_networks.training.sampler import SeededCacheDataset, SeededDataLoader
from tests.benchmarks import inference, loader, pretrain_step, window

SIZES: dict[str, dict[str, Any]] = {
    "full": {"preset": "vit_large_p12", "batch": 32, "cases": 4, "crop": 96, "store": loader.SHAPE, "slices": 300},
    "tiny": {"preset": "tiny", "batch": 4, "cases": 1, "crop": 24, "store": (1, 40, 36, 32), "slices": 8},
}
SCAN: dict[str, dict[str, Any]] = {  # settings of inference.json
    "full": {},
    "tiny": {
        "spacing": [4.0, 4.0, 4.0],
        "img_size": [48, 48, 48],
        "network_def#feature_size": 8,
        "network_def#hidden_size": 192,
        "network_def#num_heads": 6,
    },
}
CPU = torch.device("cpu")
CPU_BATCH = 4
STEPS = 24  # of an epoch that reads the store


def training_from_store(size: str, device: torch.device, workers: int, folder: Path) -> dict[str, float]:
    """Crops a second, and the share of time that training waits for them, in the second epoch from a prepared store."""
    sizes = SIZES[size]
    with mock.patch.object(loader, "SHAPE", sizes["store"]):
        few = loader.make_store(folder)
    crops = sizes["batch"] // sizes["cases"]
    steps = STEPS if size == "full" else 2
    cases = (few * (steps * sizes["cases"]))[: steps * sizes["cases"]]
    read = RandReadCropsd("image", (sizes["crop"],) * 3, crops, flip_prob=0.5, rotate_prob=0.3)
    data = SeededDataLoader(SeededCacheDataset(cases, Compose([read]), 0.0), sizes["cases"], workers)
    bench = pretrain_step.Bench(sizes["preset"], device)
    schedule = torch.optim.lr_scheduler.LambdaLR(bench.optimizer, lambda _: 1.0)
    trainer = SupervisedTrainer(
        device=device,
        max_epochs=2,
        train_data_loader=data,
        network=bench.network,
        optimizer=bench.optimizer,
        loss_function=bench.loss,
        prepare_batch=PrepareBatchSelfSupervised(),
        inferer=AutocastInferer(SimpleInferer(), torch.bfloat16),
        train_handlers=[TrainingHandlers(bench.network, bench.optimizer, schedule, seed=0)],
        optim_set_to_none=True,
        decollate=False,
        non_blocking=True,
    )
    trainer.run()
    metrics = trainer.state.metrics
    return {"workers": workers, "crops/s": metrics["crops_per_second"], "data wait": metrics["data_wait"]}


def whole_scan(size: str, device: torch.device, folder: Path) -> dict[str, float]:
    """Seconds and peak memory from a file to its labels, by the bundle's own pipeline, with weights of a random start.

    Labels are then noise, so that interpolating them takes longer than a trained network's.
    """
    slices, settings = SIZES[size]["slices"], SCAN[size]
    inference.write_scan(folder / "ct.nii.gz", slices)
    sizes = {name.removeprefix("network_def#"): value for name, value in settings.items() if "#" in name}
    torch.manual_seed(0)
    network = HiEndUNETR(img_size=settings.get("img_size", 96), **sizes)
    torch.save(network.state_dict(), folder / "model.pt")
    del network
    flow = ConfigWorkflow(
        config_file=str(inference.BUNDLE / "configs" / "inference.json"),
        logging_file=False,
        bundle_root=str(inference.BUNDLE),
        dataset_dir=str(folder / "ct.nii.gz"),
        checkpoint=str(folder / "model.pt"),
        output_dir=str(folder / "labels"),
        device=str(device),
        amp=True,
        overlay=False,
        **settings,
    )
    flow.initialize()
    begin_peak(device)
    start = window.now(device)
    flow.run()
    seconds = window.now(device) - start
    return {"slices": slices, "seconds": seconds, "peak GB": end_peak(device) / 1e9}


def begin_peak(device: torch.device) -> None:
    """Forget earlier peaks."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def end_peak(device: torch.device) -> int:
    """Bytes: all that torch allocated at most on CUDA, the resident size on a CPU (Linux)."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else pretrain_step.resident("VmHWM")


def one_window(size: str, device: torch.device, repeats: int) -> dict[str, float]:
    """Seconds of a window of the segmentation network, the fastest, by precision."""
    torch.manual_seed(0)
    network = HiEndUNETR(**window.SIZES[size]).eval().to(device)
    image = torch.rand(1, 1, *[window.SIZES[size].get("img_size", 96)] * 3, device=device)
    variants = [v for v in window.VARIANTS if v.network == "ours"]
    return {v.name: min(window.run(v, network, image)[0]["all"] for _ in range(repeats)) for v in variants}


def one_step(size: str, device: torch.device, repeats: int) -> dict[str, float]:
    """Seconds of a pre-training step of a few crops, the fastest, by precision."""
    bench = pretrain_step.Bench(SIZES[size]["preset"], device)
    image = bench.images(CPU_BATCH)
    variants = [v for v in pretrain_step.VARIANTS if v.name in ("float32", "bfloat16")]
    return {v.name: min(bench.step(v, image)["step"] for _ in range(repeats + 1)) for v in variants}


def measure(size: str, device: torch.device, repeats: int, workers: int, compiled: bool) -> dict[str, Any]:
    """Measure all, one after the other, in this process."""
    report: dict[str, Any] = {"machine": loader.machine(), "size": size, "seconds": {}}

    def part(name: str, function: Any, *arguments: Any) -> None:
        start = time.perf_counter()
        report[name] = function(*arguments)
        report["seconds"][name] = round(time.perf_counter() - start)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    sizes = SIZES[size]
    part("step", pretrain_step.measure, sizes["preset"], sizes["batch"], repeats, device, compiled)
    with tempfile.TemporaryDirectory() as folder:
        part("store", training_from_store, size, device, workers, Path(folder))
    with tempfile.TemporaryDirectory() as folder:
        part("scan", whole_scan, size, device, Path(folder))
    for name, function in (("window", one_window), ("small step", one_step)):
        for where in (device, CPU):
            part(f"{name}, {where.type}", function, size, where, repeats if where is device else 1)
    return report


def markdown(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    step, scan, store = report["step"], report["scan"], report["store"]
    words = ", ".join(f"{name} {value}" for name, value in report["machine"].items() if value is not None)
    lines = [
        "# On a GPU",
        "",
        f"{step['device']}. Machine: {words}. Network size: {report['size']}.",
        "",
        f"Pre-training steps of {step['batch']} crops. The fastest of {step['repeats']} counts:",
        "",
        "| step | seconds | crops a second | share of a large product's FLOP/s | peak memory, GB |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, row in step["variants"].items():
        fastest = row["step"]["fastest"]
        lines.append(
            f"| {name.replace('published way', 'baseline')} | {fastest:.3g} | {step['batch'] / fastest:.3g} "
            f"| {row['share']:.0%} | {row['peak_gb']:.3g} |"
        )
    lines += [
        "",
        f"Training in bfloat16 from a prepared store, with {store['workers']} loading processes:",
        "",
        "| crops a second | share of time without data |",
        "| --- | --- |",
        f"| {store['crops/s']:.3g} | {store['data wait']:.1%} |",
        "",
        "A whole scan, from file to labels, in mixed precision. Weights are random, so labels are noise:",
        "",
        "| voxels | seconds | peak memory, GB |",
        "| --- | --- | --- |",
        f"| 512 x 512 x {scan['slices']} | {scan['seconds']:.3g} | {scan['peak GB']:.3g} |",
    ]
    devices = [name.removeprefix("window, ") for name in report if name.startswith("window, ")]
    lines += ["", "The same on the device and on the CPU, in seconds:", ""]
    lines += [f"| work | {' | '.join(devices)} |", f"| --- |{' --- |' * len(devices)}"]
    for kind, label in (("window", "a window"), ("small step", f"a step of {CPU_BATCH} crops")):
        for name in report[f"{kind}, {devices[0]}"]:
            cells = " | ".join(f"{report[f'{kind}, {where}'][name]:.3g}" for where in devices)
            lines.append(f"| {label}, {name.removeprefix('ours, ')} | {cells} |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for gpu.json and gpu.md")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--workers", type=int, default=8, help="processes that read the store")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    args = parser.parse_args(arguments)
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device {args.device}: PyTorch finds no CUDA device here; give --device cpu --size tiny")
    report = measure(args.size, device, args.repeats, args.workers, not args.no_compile)
    text = markdown(report)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "gpu.json").write_text(json.dumps(report, indent=1) + "\n")
    (args.out / "gpu.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
