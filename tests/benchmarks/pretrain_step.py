"""One pre-training step against the published way of running it, variants interleaved in one process.

    python -m tests.benchmarks.pretrain_step --preset vit_large_p12 --batch 4 --repeats 3

Ratios within a run are what counts. On a busy machine `--threads 1` and more repeats make them steadier.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import statistics
import time
from collections.abc import Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from monai.networks.nets import MaskedAutoEncoderViT
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from shared_networks.networks import vit
from shared_networks.networks.hi_end_mae import HiEndMAE, standardise_patches
from shared_networks.training.loss import MaskedPatchLoss
from shared_networks.training.optim import parameter_groups

PRESETS: dict[str, dict[str, Any]] = {
    "vit_large_p12": {},
    "vit_base_p16": {
        "patch_size": 16,
        "hidden_size": 768,
        "num_heads": 12,
        "decoder_hidden_size": 384,
        "decoder_num_heads": 12,
    },
    "tiny": {
        "img_size": 24,
        "hidden_size": 48,
        "num_heads": 4,
        "decoder_hidden_size": 24,
        "decoder_num_heads": 4,
    },
}
PHASES = ("forward", "backward", "optimiser")


@dataclass(frozen=True)
class Variant:
    """A way of running the step.

    Args:
        name: for the table.
        published: plain attention, loss on tokens, AdamW that is not fused.
        dtype: of autocast; float32 for none.
        compiled: with torch.compile.
        plain_attention: attention written out, as published.
        monai: MONAI's masked autoencoder of equal sizes instead, whose decoder is a plain transformer.
    """

    name: str
    published: bool = False
    dtype: torch.dtype = torch.float32
    compiled: bool = False
    plain_attention: bool = False
    monai: bool = False


VARIANTS = [
    Variant("published way, float32", published=True),
    Variant("float32"),
    Variant("bfloat16", dtype=torch.bfloat16),
    Variant("bfloat16, attention not fused", dtype=torch.bfloat16, plain_attention=True),
]
COMPILED = [Variant("bfloat16, compiled", dtype=torch.bfloat16, compiled=True)]
MONAI = [Variant("MONAI's masked autoencoder, float32", published=True, monai=True)]  # it fails under autocast


def plain_attention(query: Tensor, key: Tensor, value: Tensor, num_heads: int) -> Tensor:
    """Attention as published: softmax(Q K^T / sqrt(size)) V, written out."""
    q, k, v = (vit.split_heads(x, num_heads) for x in (query, key, value))
    scores = (q @ k.transpose(-2, -1)) * (q.shape[-1] ** -0.5)
    return (scores.softmax(dim=-1) @ v).transpose(1, 2).flatten(2)


def published_loss(network: HiEndMAE, image: Tensor) -> Tensor:
    """The published forward pass: the loss is taken on tokens, no volume is put together."""
    grid = network.vit.patch_grid(image)
    permutation = network.shuffle(image.shape[0], math.prod(grid)).to(image.device)
    latent, taps = network.encode(image, permutation)
    hidden = permutation[:, network.num_visible(math.prod(grid)) :]
    predicted = network.decode(latent, taps, permutation, grid)[:, -hidden.shape[1] :]
    target = standardise_patches(vit.gather_tokens(vit.patchify(image, network.vit.patch_size), hidden))
    return (predicted - target).square().mean()


def monai_network(ours: HiEndMAE) -> MaskedAutoEncoderViT:
    """MONAI's masked autoencoder with the sizes of ours, all of its decoder's blocks plain."""
    encoder, decoder = ours.vit, ours.decoder
    return MaskedAutoEncoderViT(
        in_channels=encoder.in_channels,
        img_size=[g * p for g, p in zip(encoder.grid, encoder.patch_size, strict=True)],
        patch_size=encoder.patch_size,
        hidden_size=encoder.hidden_size,
        mlp_dim=4 * encoder.hidden_size,
        num_layers=len(encoder.blocks),
        num_heads=encoder.blocks[0].attn.num_heads,
        masking_ratio=ours.mask_ratio,
        decoder_hidden_size=decoder.norm.normalized_shape[0],
        decoder_mlp_dim=4 * decoder.norm.normalized_shape[0],
        decoder_num_layers=len(decoder.blocks) + len(decoder.cross_blocks),
        decoder_num_heads=decoder.blocks[0].attn.num_heads,
        qkv_bias=True,
    )


def monai_loss(network: nn.Module, image: Tensor, patch_size: Sequence[int], autocast: torch.autocast) -> Tensor:
    """Mean squared error on the patches that MONAI's network masked."""
    with autocast:
        predicted, mask = network(image)
    error = (predicted.float() - standardise_patches(vit.patchify(image, patch_size))).square().mean(-1)
    return (error * mask).sum() / mask.sum()


def resident(key: str) -> int:
    """Bytes of a line such as VmRSS or VmHWM of this process (Linux)."""
    text = Path("/proc/self/status").read_text()
    return 1024 * int(text.split(f"{key}:")[1].split()[0])


@contextmanager
def running(variant: Variant, device: torch.device) -> Any:
    """The settings of a variant, put back afterwards."""
    plain = variant.published or variant.plain_attention
    attention = mock.patch.object(vit, "attend", plain_attention) if plain else nullcontext()
    with attention:
        yield torch.autocast(device.type, variant.dtype, enabled=variant.dtype != torch.float32)


def set_fused(optimizer: torch.optim.Optimizer, fused: bool, device: torch.device) -> None:
    """Switch an AdamW between its fused and its default kernels, so that the variants share one set of moments."""
    for group in optimizer.param_groups:
        group["fused"] = fused
    for state in optimizer.state.values():
        state["step"] = state["step"].to(device if fused else "cpu")


class Bench:
    """A network with its optimiser, loss and images, and what one step of a variant takes."""

    def __init__(self, preset: str, device: torch.device) -> None:
        torch.manual_seed(0)
        self.device = device
        self.network = HiEndMAE(**PRESETS[preset]).to(device)
        self.monai: nn.Module | None = None
        self.compiled: nn.Module | None = None
        self.loss = MaskedPatchLoss(self.network.vit.patch_size)
        self.optimizer = self.adamw(self.network)

    @staticmethod
    def adamw(network: nn.Module) -> torch.optim.AdamW:
        return torch.optim.AdamW(parameter_groups(network, 0.05), lr=1e-4, betas=(0.9, 0.95), fused=True)

    def add_monai(self) -> None:
        """Hold MONAI's network, too, with an optimiser of its own."""
        self.monai = monai_network(self.network).to(self.device)
        self.monai_optimizer = self.adamw(self.monai)

    def images(self, batch: int) -> Tensor:
        size = [g * p for g, p in zip(self.network.vit.grid, self.network.vit.patch_size, strict=True)]
        return torch.rand(batch, self.network.vit.in_channels, *size, device=self.device)

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def forward(self, variant: Variant, image: Tensor, autocast: torch.autocast) -> Tensor:
        if variant.monai:
            assert self.monai is not None
            return monai_loss(self.monai, image, self.network.vit.patch_size, autocast)
        if variant.published:
            return published_loss(self.network, image)
        if variant.compiled and self.compiled is None:
            self.compiled = torch.compile(self.network)
        network = self.compiled if variant.compiled else self.network
        with autocast:
            prediction = network(image)
        return self.loss(prediction.float(), image)

    def step(self, variant: Variant, image: Tensor) -> dict[str, float]:
        """Seconds of each phase of one step."""
        optimizer = self.monai_optimizer if variant.monai else self.optimizer
        set_fused(optimizer, not variant.published, self.device)
        with running(variant, self.device) as autocast:
            times = [self.now()]
            loss = self.forward(variant, image, autocast)
            times.append(self.now())
            loss.backward()
            times.append(self.now())
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            times.append(self.now())
        assert math.isfinite(loss.item())
        seconds = {name: end - start for name, start, end in zip(PHASES, times, times[1:], strict=False)}
        return {**seconds, "step": times[-1] - times[0]}

    def peak(self, variant: Variant, image: Tensor) -> int:
        """Peak bytes of a step: all that torch allocated on CUDA, growth of the resident size on CPU (Linux)."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self.step(variant, image)
            return torch.cuda.max_memory_allocated()
        ctypes.CDLL(None).malloc_trim(0)  # else a step reuses what the one before left behind, and nothing grows
        Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM back to VmRSS
        before = resident("VmRSS")
        self.step(variant, image)
        return resident("VmHWM") - before

    def matmul_rate(self, variant: Variant) -> float:
        """FLOP/s of a large product under the variant's precision: what could be achieved."""
        n, rounds = (8192, 20) if self.device.type == "cuda" else (2048, 3)
        a = torch.rand(n, n, device=self.device, dtype=variant.dtype)
        best = math.inf
        with running(variant, self.device), torch.no_grad():
            for _ in range(rounds):
                start = self.now()
                a @ a
                best = min(best, self.now() - start)
        return 2 * n**3 / best


def count_flop(preset: str) -> float:
    """FLOP of the products in one crop's forward and backward pass, counted on tensors without data."""
    with FakeTensorMode(), FlopCounterMode(display=False) as counter, mock.patch.object(vit, "attend", plain_attention):
        network = HiEndMAE(**PRESETS[preset])
        size = [g * p for g, p in zip(network.vit.grid, network.vit.patch_size, strict=True)]
        network(torch.zeros(1, network.vit.in_channels, *size)).square().mean().backward()
    return float(counter.get_total_flops())


def best_batch(bench: Bench, variant: Variant) -> dict[int, float]:
    """Crops/s by batch, doubled until memory runs out."""
    rates: dict[int, float] = {}
    batch = 1
    while True:
        try:
            image = bench.images(batch)
            bench.step(variant, image)
            rates[batch] = batch / min(bench.step(variant, image)["step"] for _ in range(3))
        except torch.cuda.OutOfMemoryError:
            bench.optimizer.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()
            return rates
        batch *= 2


def measure(
    preset: str, batch: int, repeats: int, device: torch.device, compiled: bool = False, monai: bool = False
) -> dict[str, Any]:
    """Run every variant `repeats` times in turn, each time after a step of warming up."""
    bench = Bench(preset, device)
    image = bench.images(batch)
    variants = VARIANTS + COMPILED * compiled + MONAI * monai
    if monai:
        bench.add_monai()
    steps: dict[str, list[dict[str, float]]] = {v.name: [] for v in variants}
    rates = {v.name: 0.0 for v in variants}
    for _ in range(repeats):
        for variant in variants:
            bench.step(variant, image)
            steps[variant.name].append(bench.step(variant, image))
            rates[variant.name] = max(rates[variant.name], bench.matmul_rate(variant))
    peaks = {v.name: bench.peak(v, image) for v in variants}
    flop = count_flop(preset)
    base = min(s["step"] for s in steps[variants[0].name])
    rows = {}
    for name, runs in steps.items():
        row: dict[str, Any] = {phase: summary([s[phase] for s in runs]) for phase in (*PHASES, "step")}
        row["ratio"] = base / row["step"]["fastest"]
        row["peak_gb"] = peaks[name] / 1e9
        row["gflops"] = batch * flop / (row["forward"]["fastest"] + row["backward"]["fastest"]) / 1e9
        row["matmul_gflops"] = rates[name] / 1e9
        row["share"] = row["gflops"] / row["matmul_gflops"]
        rows[name] = row
    report = {
        "preset": preset,
        "batch": batch,
        "repeats": repeats,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "gflop_a_crop": flop / 1e9,
        "variants": rows,
    }
    if device.type == "cuda":
        report["crops_a_second_by_batch"] = best_batch(bench, COMPILED[0] if compiled else VARIANTS[3])
    return report


def summary(values: list[float]) -> dict[str, float]:
    """Fastest, median, and spread (slowest less fastest)."""
    return {"fastest": min(values), "median": statistics.median(values), "spread": max(values) - min(values)}


def markdown(report: dict[str, Any]) -> str:
    """The report as a table."""

    def cell(s: dict[str, float]) -> str:
        return f"{s['fastest']:.3g} ({s['median']:.3g} ± {s['spread'] / 2:.2g})"

    lines = [
        f"{report['preset']}, batch {report['batch']}, {report['device']}, torch {report['torch']}; "
        f"{report['gflop_a_crop']:.0f} GFLOP a crop. Seconds: fastest (median ± half the spread) "
        f"of {report['repeats']}; ratio and share of the fastest, as load on the machine only ever adds time.",
        "",
        "| variant | forward | backward | optimiser | step | times published | peak GB | GFLOP/s | of a large matmul |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, row in report["variants"].items():
        times = " | ".join(cell(row[phase]) for phase in (*PHASES, "step"))
        lines.append(
            f"| {name} | {times} | {row['ratio']:.2f} | {row['peak_gb']:.1f} | {row['gflops']:.0f} "
            f"| {row['share']:.0%} of {row['matmul_gflops']:.0f} |"
        )
    rates = report.get("crops_a_second_by_batch", {})
    if rates:
        lines += ["", "| batch | crops/s |", "|---|---|", *(f"| {b} | {rate:.1f} |" for b, rate in rates.items())]
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="vit_large_p12")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="of the CPU; default: all")
    parser.add_argument("--compile", action="store_true", help="one more variant, with torch.compile")
    parser.add_argument("--monai", action="store_true", help="MONAI's masked autoencoder beside it")
    parser.add_argument("--json", type=Path, help="file to write the figures to as well")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    report = measure(args.preset, args.batch, args.repeats, torch.device(args.device), args.compile, args.monai)
    print(markdown(report), json.dumps(report, indent=1), sep="\n\n")
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
