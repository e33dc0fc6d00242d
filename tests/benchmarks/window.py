"""One window through the segmentation network, against the published way of computing it and against MONAI's networks.

    python -m tests.benchmarks.window [--repeats N] [--size tiny|full] [--dataset FOLDER --steps N]

Variants take turns in one process; ratios within a run are what counts, and of these the fastest, as load on the
machine only ever adds time. Prints Markdown, then JSON. Labels of random weights are noise, so that figures of
agreement mean little without `--dataset`, a folder in nnU-Net form: the convolutions are then first trained on one
crop of its first case (the encoder stays random), in the published way.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from monai.losses import DiceCELoss
from monai.networks.blocks import UnetOutBlock, UnetrBasicBlock, UnetResBlock, UnetrPrUpBlock, UnetrUpBlock
from monai.networks.nets import UNETR, SwinUNETR
from monai.transforms import Compose, EnsureChannelFirstd, LoadImaged, Orientationd, ScaleIntensityRanged, Spacingd
from torch import Tensor, nn

from shared_networks.datasets.cases import find_images
from shared_networks.datasets.pairs import find_labels, pair_cases
from shared_networks.networks import vit
from shared_networks.networks.cpu import fast_cpu
from shared_networks.networks.unetr import HiEndUNETR
from tests.benchmarks.pretrain_step import plain_attention, resident, summary

SIZES: dict[str, dict[str, Any]] = {
    "full": {},
    "tiny": {"img_size": 48, "feature_size": 8, "hidden_size": 192, "num_heads": 6},
}


class PublishedResizeUp(nn.Module):
    """The published last up-step."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv3d = nn.Conv3d(in_channels, out_channels, kernel_size=3, padding=1)
        self.conv_block = UnetResBlock(3, 2 * out_channels, out_channels, 3, 1, "instance")

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        x = F.interpolate(x, size=skip.shape[2:], mode="trilinear", align_corners=False)
        return self.conv_block(torch.cat([self.conv3d(x), skip], dim=1))


class PublishedUNETR(nn.Module):
    """The published network: MONAI's blocks as they are, and a ViT with plain attention.

    Args:
        ours: network whose sizes, and whose very parameters, it takes.
    """

    def __init__(self, ours: HiEndUNETR) -> None:
        super().__init__()
        self.vit = ours.vit
        hidden, f = ours.vit.hidden_size, ours.out.conv.conv.in_channels
        conv: dict[str, Any] = {"kernel_size": 3, "norm_name": "instance", "res_block": True}
        lift: dict[str, Any] = {**conv, "stride": 1, "upsample_kernel_size": 2, "conv_block": True}
        self.encoder1 = UnetrBasicBlock(3, ours.vit.in_channels, f, stride=1, **conv)
        self.encoder2 = UnetrPrUpBlock(3, hidden, 2 * f, num_layer=2, **lift)
        self.encoder3 = UnetrPrUpBlock(3, hidden, 4 * f, num_layer=1, **lift)
        self.encoder4 = UnetrPrUpBlock(3, hidden, 8 * f, num_layer=0, **lift)
        self.decoder5 = UnetrUpBlock(3, hidden, 8 * f, upsample_kernel_size=2, **conv)
        self.decoder4 = UnetrUpBlock(3, 8 * f, 4 * f, upsample_kernel_size=2, **conv)
        self.decoder3 = UnetrUpBlock(3, 4 * f, 2 * f, upsample_kernel_size=2, **conv)
        self.decoder2 = PublishedResizeUp(2 * f, f)
        self.out = UnetOutBlock(3, f, ours.out.conv.conv.out_channels)
        self.load_state_dict(ours.state_dict(keep_vars=True), strict=True, assign=True)

    def volume(self, tokens: Tensor, image: Tensor) -> Tensor:
        """[B, L, E] to [B, E, h, w, d], contiguous."""
        return tokens.transpose(1, 2).unflatten(2, self.vit.patch_grid(image)).contiguous()

    def forward(self, image: Tensor) -> Tensor:
        with mock.patch.object(vit, "attend", plain_attention):
            last, features = self.vit(image)
        skip1, skip2 = self.encoder1(image), self.encoder2(self.volume(features[0], image))
        skip3, skip4 = self.encoder3(self.volume(features[1], image)), self.encoder4(self.volume(features[2], image))
        x = self.decoder5(self.volume(last, image), skip4)
        x = self.decoder3(self.decoder4(x, skip3), skip2)
        return self.out(self.decoder2(x, skip1))


@dataclass(frozen=True)
class Variant:
    """A way of running the window.

    Args:
        name: for the table.
        network: which one.
        dtype: of autocast; float32 for none.
    """

    name: str
    network: str = "ours"
    dtype: torch.dtype = torch.float32


VARIANTS = [
    Variant("published, float32", "published"),
    Variant("ours, float32"),
    Variant("published, bfloat16", "published", torch.bfloat16),
    Variant("ours, bfloat16", dtype=torch.bfloat16),
    Variant("MONAI SwinUNETR (48), float32", "SwinUNETR"),
    Variant("MONAI UNETR-B/16, float32", "UNETR"),
]
STAGES = ("vit", "encoder1", "encoder2", "encoder3", "encoder4", "decoder5", "decoder4", "decoder3", "decoder2", "out")


def make_networks(size: str) -> dict[str, nn.Module]:
    """The networks by name; the published one shares our weights."""
    torch.manual_seed(0)
    ours = HiEndUNETR(**SIZES[size])
    image_size = [g * p for g, p in zip(ours.vit.grid, ours.vit.patch_size, strict=True)]
    networks = {
        "ours": ours,
        "published": PublishedUNETR(ours),
        "SwinUNETR": SwinUNETR(in_channels=1, out_channels=14, feature_size=48 if size == "full" else 12),
        "UNETR": UNETR(in_channels=1, out_channels=14, img_size=[96] * 3 if size == "full" else image_size),
    }
    return {name: network.eval() for name, network in networks.items()}


def crop(dataset: Path, size: int) -> tuple[Tensor, Tensor]:
    """Image and label [1, 1, S, S, S] about the labels' centre, of a data set's first case, prepared as to train."""
    load = Compose(
        [
            LoadImaged(["image", "label"]),
            EnsureChannelFirstd(["image", "label"]),
            Orientationd(["image", "label"], axcodes="RAS", labels=None),
            Spacingd(["image", "label"], pixdim=(1.5,) * 3, mode=["bilinear", "nearest"]),
            ScaleIntensityRanged("image", -175, 250, 0.0, 1.0, clip=True),
        ]
    )
    case = load(pair_cases(find_images(str(dataset)), find_labels(str(dataset)))[0])
    centre = case["label"][0].nonzero().float().mean(0).round().int().tolist()
    start = [min(max(c - size // 2, 0), n - size) for c, n in zip(centre, case["image"].shape[1:], strict=True)]
    box = (slice(None), *(slice(s, s + size) for s in start))
    return case["image"].as_tensor()[box][None], case["label"].as_tensor()[box][None]


def train(network: nn.Module, image: Tensor, label: Tensor, steps: int) -> None:
    """Overfit the convolutions to one crop."""
    network.get_submodule("vit").requires_grad_(False)
    parameters = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, fused=True)
    loss = DiceCELoss(to_onehot_y=True, softmax=True, squared_pred=True)
    for _ in range(steps):
        optimizer.zero_grad(set_to_none=True)
        loss(network(image), label).backward()
        optimizer.step()
    network.requires_grad_(True)


def now(device: torch.device) -> float:
    """Seconds, when all that was asked of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@contextmanager
def stage_seconds(network: nn.Module, device: torch.device) -> Iterator[dict[str, float]]:
    """Seconds of each stage of the forward passes made inside the block, by name."""
    seconds: dict[str, float] = {}

    def start(name: str) -> Callable[..., None]:
        return lambda *_: seconds.__setitem__(name, -now(device))

    def stop(name: str) -> Callable[..., None]:
        return lambda *_: seconds.__setitem__(name, seconds[name] + now(device))

    stages = [(name, module) for name, module in network.named_children() if name in STAGES]
    handles = [module.register_forward_pre_hook(start(name)) for name, module in stages]
    handles += [module.register_forward_hook(stop(name)) for name, module in stages]
    try:
        yield seconds
    finally:
        for handle in handles:
            handle.remove()


def run(variant: Variant, network: nn.Module, image: Tensor) -> tuple[dict[str, float], Tensor]:
    """Seconds of a window (`all`) and of its stages, and its logits.

    It is the second window under one autocast and one :func:`fast_cpu`, as all but the first of a scan are:
    weights are rounded once, and memory is there.
    """
    mixed = variant.dtype != torch.float32
    autocast = torch.autocast(image.device.type, variant.dtype) if mixed else nullcontext()
    fast = fast_cpu(network, image.device) if variant.network == "ours" else nullcontext()
    with torch.no_grad(), autocast, fast:
        network(image)
        with stage_seconds(network, image.device) as stages:
            begin = now(image.device)
            logits = network(image)
            seconds = {"all": now(image.device) - begin}
    own = stages if variant.network in ("ours", "published") else {}
    return {**seconds, **own}, logits


def peak(variant: Variant, network: nn.Module, image: Tensor) -> int:
    """Bytes: all that torch allocated at most on CUDA, growth of the resident size on CPU (Linux)."""
    if image.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        run(variant, network, image)
        return torch.cuda.max_memory_allocated()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM back to VmRSS
    before = resident("VmRSS")
    run(variant, network, image)
    return resident("VmHWM") - before


def mean_dice(first: Tensor, second: Tensor) -> float:
    """Mean Dice of two label maps over the labels above 0 that either has."""
    labels = [i for i in torch.cat([first.unique(), second.unique()]).unique().tolist() if i]
    a, b = ([(x == i) for i in labels] for x in (first, second))
    return sum(float(2 * (p & q).sum() / (p.sum() + q.sum())) for p, q in zip(a, b, strict=True)) / max(len(labels), 1)


def measure(size: str, repeats: int, dataset: Path | None, steps: int, device: torch.device) -> dict[str, Any]:
    """Run every variant `repeats` times in turn."""
    networks = make_networks(size)
    side = SIZES[size].get("img_size", 96)
    image = F.avg_pool3d(torch.rand(1, 1, side, side, side), 5, 1, 2)
    if dataset is not None:
        image, label = crop(dataset, side)
        train(networks["published"], image, label, steps)
    networks = {name: network.to(device) for name, network in networks.items()}
    images = {name: image.to(device) for name in networks}
    if size == "tiny":  # SwinUNETR needs a multiple of 32
        images["SwinUNETR"] = torch.rand(1, 1, 64, 64, 64, device=device)
    runs: dict[str, list[dict[str, float]]] = {v.name: [] for v in VARIANTS}
    logits: dict[str, Tensor] = {}
    for _ in range(repeats):
        for variant in VARIANTS:
            network, window = networks[variant.network], images[variant.network]
            seconds, logits[variant.name] = run(variant, network, window)
            runs[variant.name].append(seconds)
    truth = logits[VARIANTS[0].name]
    rows: dict[str, Any] = {}
    for variant in VARIANTS:
        turns, result = runs[variant.name], logits[variant.name]
        row: dict[str, Any] = {name: summary([t[name] for t in turns]) for name in turns[0]}
        row["ratio"] = min(t["all"] for t in runs[VARIANTS[0].name]) / row["all"]["fastest"]
        row["peak_gb"] = peak(variant, networks[variant.network], images[variant.network]) / 1e9
        if variant.network in ("ours", "published"):
            row["error"] = float((result.float() - truth).abs().max())
            row["dice"] = mean_dice(result.argmax(1), truth.argmax(1))
        rows[variant.name] = row
    return {
        "size": size,
        "repeats": repeats,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "trained_steps": steps if dataset is not None else 0,
        "largest_logit": float(truth.abs().max()),
        "labels": truth.argmax(1).unique().numel(),
        "variants": rows,
    }


def markdown(report: dict[str, Any]) -> str:
    """The report as two tables."""
    lines = [
        f"{report['size']}, {report['device']}, torch {report['torch']}, {report['trained_steps']} steps of "
        f"training; logits up to {report['largest_logit']:.1f}, {report['labels']} labels. Seconds: fastest (median) "
        f"of {report['repeats']}; ratio of the fastest; error and Dice against the first row.",
        "",
        "| variant | window | times published | peak GB | error of logits | Dice of labels |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in report["variants"].items():
        error, dice = (f"{row[key]:.2g}" if key in row else "" for key in ("error", "dice"))
        dice = f"{row['dice']:.4f}" if "dice" in row else ""
        lines.append(
            f"| {name} | {row['all']['fastest']:.2f} ({row['all']['median']:.2f}) | {row['ratio']:.2f} "
            f"| {row['peak_gb']:.2f} | {error} | {dice} |"
        )
    lines += ["", f"| variant | {' | '.join(STAGES)} |", "|---|" + "---|" * len(STAGES)]
    for name, row in report["variants"].items():
        if "vit" in row:
            lines.append(f"| {name} | " + " | ".join(f"{row[stage]['fastest']:.2f}" for stage in STAGES) + " |")
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument("--dataset", type=Path, help="nnU-Net folder to train the convolutions on")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="of the CPU; default: all")
    parser.add_argument("--json", type=Path, help="file to write the figures to as well")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    report = measure(args.size, args.repeats, args.dataset, args.steps, torch.device(args.device))
    print(markdown(report), json.dumps(report, indent=1), sep="\n\n")
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
