"""Faster inference on CPUs: the same results, and nothing left behind."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from torch import nn

from shared_networks.networks.cpu import ChannelsLastInstanceNorm, fast_cpu, kept_memory
from shared_networks.networks.unetr import HiEndUNETR

CPU = torch.device("cpu")


def tiny() -> HiEndUNETR:
    torch.manual_seed(0)
    return HiEndUNETR(out_channels=3, img_size=24, patch_size=8, feature_size=4, hidden_size=24, num_layers=4,
                      num_heads=2, out_indices=(0, 1, 2)).eval()  # fmt: skip


def image(*size: int) -> torch.Tensor:
    return torch.rand(*size, generator=torch.Generator().manual_seed(1))


def test_norm_is_exact_over_many_voxels() -> None:
    x = 2 * torch.randn(1, 8, 64, 64, 64, generator=torch.Generator().manual_seed(0)) + 1
    with torch.no_grad():
        found = ChannelsLastInstanceNorm(1e-5)(x)
    expected = nn.functional.instance_norm(x.double())
    assert (found - expected).abs().max() < 1e-5
    assert found.is_contiguous(memory_format=torch.channels_last_3d)


@pytest.mark.parametrize("batch", [1, 2])
def test_logits_are_those_of_the_plain_network(batch: int) -> None:
    network, x = tiny(), image(batch, 1, 24, 16, 32)
    with torch.no_grad():
        expected = network(x)
        with fast_cpu(network, CPU):
            found = network(x)
            with torch.autocast("cpu", torch.bfloat16):
                assert (network(x) - expected).abs().max() < 0.2
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert found.is_contiguous()


@pytest.mark.parametrize("batch", [1, 2])
def test_gradients_are_those_of_the_plain_network(batch: int) -> None:
    network, x = tiny().train(), image(batch, 1, 24, 16, 32)

    def gradients(dtype: torch.dtype | None) -> list[torch.Tensor]:
        network.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype is not None):
            network(x).float().square().mean().backward()
        return [parameter.grad.clone() for parameter in network.parameters() if parameter.grad is not None]

    expected, usual = gradients(None), gradients(torch.bfloat16)
    with fast_cpu(network, CPU):
        exact, rounded = gradients(None), gradients(torch.bfloat16)
    for found, truth, near, rough in zip(exact, expected, rounded, usual, strict=True):
        torch.testing.assert_close(found, truth, rtol=1e-3, atol=1e-5)
        assert (near - truth).norm() <= 1.5 * (rough - truth).norm() + 1e-4  # as far off as bfloat16 is without


@pytest.mark.parametrize(("dtype", "last"), [(torch.float32, False), (torch.bfloat16, True)])
def test_training_keeps_the_usual_order_in_float32(dtype: torch.dtype, last: bool) -> None:
    block = nn.Sequential(nn.Conv3d(4, 4, 1), nn.InstanceNorm3d(4)).to(dtype)
    with fast_cpu(block, CPU):
        result = block(image(2, 4, 5, 6, 7).to(dtype))
    assert result.is_contiguous(memory_format=torch.channels_last_3d) == last


def test_weights_loaded_inside_the_block_count() -> None:
    """As an ensemble loads one member after another."""
    network, other, x = tiny(), tiny(), image(1, 1, 24, 24, 24)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.1)
        with fast_cpu(network, CPU):
            assert network.state_dict().keys() == other.state_dict().keys()
            network.load_state_dict(other.state_dict())
            found = network(x)
        torch.testing.assert_close(found, other(x), rtol=1e-4, atol=1e-4)


def test_the_network_is_as_before_when_the_block_ends_even_by_an_error() -> None:
    network = tiny()
    before = dict(network.named_modules())
    with torch.no_grad(), pytest.raises(ZeroDivisionError), fast_cpu(network, CPU):
        assert any(isinstance(module, ChannelsLastInstanceNorm) for module in network.modules())
        raise ZeroDivisionError
    assert dict(network.named_modules()) == before
    assert not any(module._forward_pre_hooks for module in network.modules())


def test_norms_with_parameters_or_statistics_stay() -> None:
    network = nn.Sequential(
        nn.InstanceNorm3d(2, affine=True), nn.InstanceNorm3d(2, track_running_stats=True), nn.InstanceNorm3d(2, eps=0.5)
    ).eval()
    x = image(1, 2, 3, 4, 5)
    with torch.no_grad(), fast_cpu(network, CPU):
        assert [type(module) is nn.InstanceNorm3d for module in network] == [True, True, False]
        torch.testing.assert_close(network[2](x), nn.InstanceNorm3d(2, eps=0.5)(x))


@pytest.mark.parametrize("case", ["another device", "compiled", "scripted", "a function"])
def test_nothing_changes_where_it_would_not_help(case: str) -> None:
    network = nn.Sequential(nn.Conv3d(1, 2, 3), nn.InstanceNorm3d(2))
    given = {"scripted": torch.jit.script(network), "a function": torch.relu}.get(case, network)
    if case == "compiled":
        network.compile(backend="eager")
    device = torch.device("cuda" if case == "another device" else "cpu")
    with fast_cpu(given, device):
        assert not network[0]._forward_pre_hooks and type(network[1]) is nn.InstanceNorm3d


def resident() -> int:
    """KB of this process."""
    return int(re.search(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text())[1])  # type: ignore[index]


def use_memory() -> None:
    torch.ones(30_000_000).sum()  # 120 MB


@pytest.fixture
def plain_glibc(monkeypatch: pytest.MonkeyPatch) -> None:
    """glibc, which no variable of the environment sets."""
    if platform.libc_ver()[0] != "glibc":
        pytest.skip("glibc's way with memory")
    for name in [name for name in os.environ if name.startswith(("MALLOC_", "GLIBC_TUNABLES"))]:
        monkeypatch.delenv(name)


def alone(function: Callable[[], list[int]]) -> list[int]:
    """Call in a process of its own: where one has freed memory before, glibc takes it before it asks for more."""
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        return process.submit(function).result()


def memory_around_a_block() -> list[int]:
    """KB of this process before, in and after a block that uses memory, and once memory was used after it."""
    found = [resident()]
    with kept_memory():
        use_memory()
        found.append(resident())
    found.append(resident())
    use_memory()
    return [*found, resident()]


@pytest.mark.integration
@pytest.mark.usefixtures("plain_glibc")
def test_freed_memory_is_kept_inside_the_block_alone() -> None:
    before, inside, after, later = alone(memory_around_a_block)
    assert inside - before > 100_000 and after - before < 20_000 and later - before < 20_000


@pytest.mark.integration
@pytest.mark.usefixtures("plain_glibc")
def test_settings_of_the_environment_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALLOC_MMAP_MAX_", "65536")
    before, inside, *_ = alone(memory_around_a_block)
    assert inside - before < 20_000
