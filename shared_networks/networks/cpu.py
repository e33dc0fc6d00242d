"""Speed up networks on CPUs, for as long as a block runs.

Measured on a window of 96^3 of the full segmentation network, 2 Intel cores with AMX, the fastest of 4 in one run.
`python -m tests.benchmarks.window` measures the last row against the baseline.

| layers | float32, s | bfloat16, s |
|---|---|---|
| plain | 4.84 | 2.39 |
| channels-last order | 4.43 | 1.42 |
| channels-last order, memory kept | 4.26 | 1.18 |
"""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Parameters of mallopt (malloc.h), with what glibc arrives at by itself once large blocks were freed.
_TRIM_THRESHOLD, _MMAP_MAX, _MMAP_THRESHOLD = -1, -4, -3
_USUAL = {_MMAP_MAX: 65536, _MMAP_THRESHOLD: 32 << 20, _TRIM_THRESHOLD: 64 << 20}


class ChannelsLastInstanceNorm(nn.Module):
    """Normalise [B, C, H, W, D] as `nn.InstanceNorm3d` without parameters does, in channels-last order.

    Args:
        eps: added to the variance.
    """

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        if is_exact_training(x):
            return F.instance_norm(x, eps=self.eps)
        x = x.contiguous(memory_format=torch.channels_last_3d)
        if x.dtype != torch.float32:  # a batch of one has a batch norm, whose gradient is 20 times faster than others'
            return torch.cat([F.batch_norm(image, None, None, training=True, eps=self.eps) for image in x.split(1)])
        # In this order PyTorch's own norms are wrong by 5e-4 at 96^3: they add up a million voxels one by one.
        x = x - x.mean((2, 3, 4), keepdim=True)
        variance = x.square().mean((2, 3, 4), keepdim=True)
        return x.mul_(torch.rsqrt(variance + self.eps))


@contextmanager
def fast_cpu(network: Any, device: torch.device) -> Iterator[None]:
    """Run 3D convolutions and instance norms in channels-last order while the block runs.

    oneDNN convolves in this order without copies. glibc keeps freed memory for the next window meanwhile. Weights,
    their names and the results (to rounding) stay. When the block ends, network and memory are as before. The network
    does not change on other devices, if it is scripted or compiled, or without oneDNN, nor is it trained otherwise in
    float32, where the order costs more than it saves.

    Args:
        network: any module; something else is left alone.
        device: where it computes.
    """
    plain = isinstance(network, nn.Module) and not isinstance(network, torch.jit.ScriptModule)
    compiled = getattr(network, "_compiled_call_impl", None) is not None
    if device.type != "cpu":
        yield
        return
    if not plain or compiled or not torch.backends.mkldnn.is_available():
        with kept_memory():
            yield
        return
    modules = dict(network.named_modules())
    hooks = [m.register_forward_pre_hook(_channels_last) for m in modules.values() if isinstance(m, nn.Conv3d)]
    norms = {name: module for name, module in modules.items() if _is_bare_norm(module) and name}
    try:
        for name, norm in norms.items():
            _replace(network, name, ChannelsLastInstanceNorm(norm.eps))
        with kept_memory():
            yield
    finally:
        for hook in hooks:
            hook.remove()
        for name, norm in norms.items():
            _replace(network, name, norm)


@contextmanager
def kept_memory() -> Iterator[None]:
    """Let this process keep large blocks that it frees, for the next window, while the block runs.

    The tensors of a window are so large that glibc would ask the system for each of them anew, page by page. When the
    block ends, glibc's usual behaviour is back and free memory is returned. Other C libraries are left alone, and so
    is glibc where the environment sets it (`MALLOC_...` or `GLIBC_TUNABLES`).
    """
    if platform.libc_ver()[0] != "glibc" or any(n.startswith(("MALLOC_", "GLIBC_TUNABLES")) for n in os.environ):
        yield
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(_MMAP_MAX, 0)  # large blocks come from the heap, where they can be used again
    libc.mallopt(_TRIM_THRESHOLD, -1)  # and its end is not given back
    try:
        yield
    finally:
        for parameter, value in _USUAL.items():
            libc.mallopt(parameter, value)
        libc.malloc_trim(0)


def _channels_last(_module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Give a convolution its input [B, C, H, W, D] in channels-last order."""
    (x,) = inputs
    return (x if x.dim() != 5 or is_exact_training(x) else x.contiguous(memory_format=torch.channels_last_3d),)


def is_exact_training(x: Tensor) -> bool:
    """Return whether an input is float32 while gradients are recorded: that is faster in the usual order."""
    return x.dtype == torch.float32 and torch.is_grad_enabled()


def _is_bare_norm(module: nn.Module) -> bool:
    """Return whether a module is an instance norm without parameters and running statistics."""
    return type(module) is nn.InstanceNorm3d and not module.affine and not module.track_running_stats


def _replace(network: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module in the place of a submodule."""
    parent, _, child = name.rpartition(".")
    setattr(network.get_submodule(parent), child, module)
