"""The memory of a pre-training step: what `tests.benchmarks.memory` says, against what the step takes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from shared_networks.networks.hi_end_mae import HiEndMAE
from shared_networks.training.loss import MaskedPatchLoss
from tests.benchmarks.memory import LiveBytes, step_memory
from tests.benchmarks.pretrain_step import Bench
from tests.benchmarks.test_memory import SMALL

CROPS = {"cuda": 16, "cpu": 6}
WITHIN = 0.15


def step(network: HiEndMAE, optimizer: torch.optim.Optimizer, image: Tensor, dtype: torch.dtype) -> None:
    """One step whose gradients are already there, as in all but the first of the passes that are accumulated."""
    with torch.autocast(image.device.type, dtype, enabled=dtype != torch.float32):
        prediction = network(image)
    value = MaskedPatchLoss(network.vit.patch_size)(prediction.float(), image)
    del prediction
    value.backward()
    optimizer.step()


def measured_peak(settings: dict[str, Any], shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> int:
    """Most bytes at once: by PyTorch's own count on a GPU, by following each tensor of a real step on a CPU."""

    def peak(live: LiveBytes | None) -> int:
        before = torch.cuda.memory_allocated(device) if live is None else 0
        network = HiEndMAE(**settings).to(device).train()
        optimizer = Bench.adamw(network)
        image = torch.rand(*shape, device=device)
        step(network, optimizer, image[:1], dtype)  # makes gradients, moments and cuBLAS's workspace
        if live is None:
            torch.cuda.reset_peak_memory_stats(device)
        else:
            live.peak = live.now
        step(network, optimizer, image, dtype)
        return torch.cuda.max_memory_allocated(device) - before if live is None else live.peak

    if device.type == "cuda":
        return peak(None)
    with LiveBytes() as live:
        return peak(live)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
def test_a_step_takes_what_is_estimated(device: torch.device, dtype: torch.dtype, checkpointing: bool) -> None:
    """On a GPU of vit_large_p12, whose step must then fit."""
    size = {} if device.type == "cuda" else SMALL
    settings: dict[str, Any] = {**size, "use_checkpoint": checkpointing}
    shape = (CROPS[device.type], 1, *[settings.get("img_size", 96)] * 3)
    loss = MaskedPatchLoss(settings.get("patch_size", 12))
    estimate = step_memory(partial(HiEndMAE, **settings), loss, shape, dtype)
    peak = measured_peak(settings, shape, dtype, device)
    print(f"estimated {estimate.peak / 1e6:.1f} MB, measured {peak / 1e6:.1f} MB")
    assert estimate.peak == pytest.approx(peak, rel=WITHIN)
    assert peak > estimate.weights + estimate.gradients + estimate.moments  # all of these were counted
