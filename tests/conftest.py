"""Data and places that several tests share."""

from __future__ import annotations

import resource
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from shared_networks.synthetic.phantom import write_dataset

ROOT = Path(__file__).parent.parent
BUNDLES = ("hi_end_mae_pretrain", "hi_end_mae_btcv_seg", "hi_end_mae_flare_seg")
COARSE = [8.0, 8.0, 8.0]
"""Spacing in mm at which a CT has few windows, for tests of what is around the network."""


@pytest.fixture(scope="session")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundles and the package as a user has them after cloning, so that runs write beside the copy."""
    root = tmp_path_factory.mktemp("clone")
    for name in (*BUNDLES, "shared_networks"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("models", "outputs", "__pycache__"))
    return root


@pytest.fixture(scope="session")
def datasets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Small synthetic data sets in nnU-Net layout, by label set: three cases to train on, one to report on."""
    root = tmp_path_factory.mktemp("data")
    for label_set in ("btcv", "flare"):
        write_dataset(root / label_set, label_set=label_set, train=3, test=1, seed=1, voxel_mm=6.0)
    return {label_set: root / label_set for label_set in ("btcv", "flare")}


@pytest.fixture(scope="session")
def tissue_maps(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tissue maps of the same size in the same layout, by label set."""
    root = tmp_path_factory.mktemp("tissues")
    for label_set in ("btcv", "flare"):
        write_dataset(root / label_set, label_set=label_set, train=3, test=1, seed=1, voxel_mm=6.0, tissues=True)
    return {label_set: root / label_set for label_set in ("btcv", "flare")}


@contextmanager
def full_disk(size: int = 4000) -> Iterator[None]:
    """No file of this process may grow beyond some bytes: writing fails as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
