from __future__ import annotations

import logging
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from monai.bundle import ConfigParser
from monai.data import CacheDataset
from nibabel.affines import from_matvec

from shared_networks.datasets.cache import cache_rate, cached_bytes
from tests.conftest import ROOT

SPACING = (1.5, 1.5, 1.5)
TURN = np.array([[0, 0, 1.0], [-1, 0, 0], [0, 1, 0]])


def write(file: Path, shape: tuple[int, ...], spacing: tuple[float, ...] = SPACING) -> str:
    """A scan of nothing, its axes in no usual order."""
    nib.save(nib.Nifti1Image(np.zeros(shape, np.uint8), from_matvec(TURN @ np.diag(spacing), [5, 6, 7])), file)
    return str(file)


def case(folder: Path, name: str, shape: tuple[int, ...], spacing: tuple[float, ...] = SPACING) -> dict[str, str]:
    return {
        "image": write(folder / f"{name}_0000.nii.gz", shape, spacing),
        "label": write(folder / f"{name}.nii.gz", shape, spacing),
    }


def test_bytes_are_those_of_the_resampled_volumes(tmp_path: Path) -> None:
    one = case(tmp_path, "a", (10, 20, 30), (3.0, 0.75, 1.5))
    assert cached_bytes(one, SPACING) == 10 * 2 * 20 // 2 * 30 * 4 * 2
    assert cached_bytes(one, (3.0, 3.0, 3.0)) == 10 * 20 // 4 * 30 // 2 * 4 * 2
    assert cached_bytes({"image": [one["image"]] * 2, "label": one["label"]}, SPACING) == 10 * 20 * 30 * 4 * 3
    assert cached_bytes({"image": one["image"]}, SPACING) == 10 * 20 * 30 * 4
    assert cached_bytes({"image": str(tmp_path / "none.nii.gz")}, SPACING) == 0


def test_what_training_keeps_is_no_more_than_was_counted(datasets: dict[str, Path]) -> None:
    """Cropped to the body, which is less than the scan; measured on the cases that the config really caches."""
    configs = ROOT / "hi_end_mae_btcv_seg" / "configs"
    parser = ConfigParser(ConfigParser.load_config_files([str(configs / "train.json"), str(configs / "tiny.json")]))
    parser.update({"bundle_root": str(ROOT / "hi_end_mae_btcv_seg"), "dataset_dir": str(datasets["btcv"])})
    assert parser.get_parsed_content("cache_rate") == 1.0
    dataset = parser.get_parsed_content("train#dataset")
    assert isinstance(dataset, CacheDataset)
    assert dataset.cache_num == len(dataset.data) == 2
    for kept, entry in zip(dataset._cache, dataset.data, strict=True):
        taken = sum(kept[key].nbytes for key in ("image", "label"))
        assert 0.3 < taken / cached_bytes(entry, parser.get_parsed_content("spacing")) <= 1.0


@pytest.mark.parametrize(
    ("free", "processes", "expected"),
    [(16_000, 1, 1.0), (15_999, 1, 0.75), (11_200, 1, 0.5), (11_199, 1, 0.25), (16_000, 2, 0.25), (1_000, 1, 0.0)],
)
def test_so_many_fit_in_half_of_the_free_memory_whichever_they_are(
    free: int, processes: int, expected: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cases of 800, 3200, 2400 and 1600 bytes."""
    cases = [case(tmp_path, str(size), (10, 10, size)) for size in (1, 4, 3, 2)]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    assert cache_rate(cases, SPACING, free) == expected


def test_the_log_says_what_was_chosen_and_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cases = [case(tmp_path, str(size), (200, 200, size)) for size in (100, 900)]
    with caplog.at_level(logging.INFO):
        monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
        assert cache_rate(cases, SPACING, 700_000_000) == 1.0
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
        assert cache_rate(cases, SPACING, 1_250_000_000) == 0.5
        assert cache_rate([], SPACING, 1000) == 0.0
    assert caplog.messages == [
        "cache_rate 1.00: 2 of 2 cases, 0.3 of 0.3 GB, fit in half of the 0.7 GB that are free",
        "cache_rate 0.50: 1 of 2 cases, 0.3 of 0.3 GB, fit in half of the 1.2 GB that are free, shared by 2 processes",
        "cache_rate 0.00: 0 of 0 cases, 0.0 of 0.0 GB, fit in half of the 0.0 GB that are free, shared by 2 processes",
    ]


def test_the_command_line_overrides(datasets: dict[str, Path]) -> None:
    parser = ConfigParser(ConfigParser.load_config_file(str(ROOT / "hi_end_mae_flare_seg" / "configs" / "train.json")))
    parser.update({"bundle_root": str(ROOT / "hi_end_mae_flare_seg"), "dataset_dir": str(datasets["flare"])})
    parser.update({"cache_rate": 0.5, "spacing": [8.0, 8.0, 8.0]})
    assert parser.get_parsed_content("train#dataset").cache_num == 1
    assert parser.get_parsed_content("validate#dataset").cache_num == 0


def test_a_system_that_does_not_say_keeps_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("shared_networks.datasets.cache.free_memory", lambda: None)
    with caplog.at_level(logging.INFO):
        assert cache_rate([case(tmp_path, "a", (1, 1, 1))], SPACING) == 0.0
    assert "does not say how much memory is free; give --cache_rate" in caplog.text
