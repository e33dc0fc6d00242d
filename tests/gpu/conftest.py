"""What a GPU can disprove: `./runtests.sh --gpu`, or `--gpu --device cpu`, so that the tests themselves are tested."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cuda", help="where tests/gpu computes: cuda, cuda:1 or cpu")


def asked_for(config: pytest.Config) -> bool:
    """Return whether the command names these tests."""
    return any("tests/gpu" in str(argument) for argument in config.args)


def pytest_ignore_collect(config: pytest.Config) -> bool | None:
    """Leave these tests out unless they are asked for by name."""
    return None if asked_for(config) else True


def pytest_configure(config: pytest.Config) -> None:
    """Refuse a device that is missing: tests that were skipped would look like tests that passed."""
    if not asked_for(config) or (name := config.getoption("--device")) == "cpu":
        return
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not str(name).startswith("cuda") or (torch.device(name).index or 0) >= count:
        raise pytest.UsageError(f"--device {name}: PyTorch finds {count} CUDA device(s) here; give --device cpu")


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    """Where to compute; a GPU with its index, so that the device of a tensor equals it."""
    device = torch.device(request.config.getoption("--device"))
    if device.type == "cuda":
        device = torch.device("cuda", device.index or 0)
        torch.cuda.set_device(device)
    return device


@pytest.fixture(autouse=True)
def whole_float32() -> Iterator[None]:
    """No TF32: cuDNN convolves with its ten bits of mantissa unless it is told not to."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@pytest.fixture(autouse=True)
def empty_memory() -> Iterator[None]:
    """A test finds the memory of those before it free."""
    yield
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
