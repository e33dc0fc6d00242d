"""Tissue maps are accepted where training draws CTs of them, and nowhere else."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from shared_networks.datasets.tissue_maps import TISSUE_CHANNEL, tissue_problems
from shared_networks.datasets.validate import check_cases
from shared_networks.errors import InputError


def write(folder: Path, values: np.ndarray, channel: str | None = TISSUE_CHANNEL) -> dict[str, str]:
    """A case in an nnU-Net folder."""
    files = {"image": folder / "imagesTr" / "a_0000.nii.gz", "label": folder / "labelsTr" / "a.nii.gz"}
    for key, file in files.items():
        file.parent.mkdir(parents=True)
        nib.save(nib.Nifti1Image(values if key == "image" else (values > 1).astype(np.uint8), np.eye(4)), file)
    if channel:
        (folder / "dataset.json").write_text(json.dumps({"channel_names": {"0": channel}}))
    return {key: str(file) for key, file in files.items()}


@pytest.fixture
def blocks() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 4, (4, 4, 4)).astype(np.uint8).repeat(4, 0).repeat(4, 1).repeat(4, 2)


def test_tissue_maps_are_accepted_with_their_number_of_tissues(tmp_path: Path, blocks: np.ndarray) -> None:
    cases = [write(tmp_path, blocks)]
    assert check_cases(cases, 2, modality="CT", intensity_range=(-175, 250), num_tissues=4) == cases


@pytest.mark.parametrize("modality", ["MR", None])
def test_what_is_drawn_of_tissue_maps_is_a_ct(tmp_path: Path, blocks: np.ndarray, modality: str | None) -> None:
    with pytest.raises(InputError, match=f"^modality is {modality!r}, but .* are CTs; pass --modality CT, or leave"):
        check_cases([write(tmp_path, blocks)], 2, modality=modality, num_tissues=4)


@pytest.mark.parametrize("modality", ["CT", "MR", None])
def test_tissue_maps_are_refused_as_scans_in_one_line(tmp_path: Path, blocks: np.ndarray, modality: str | None) -> None:
    with pytest.raises(
        InputError, match=r"dataset.json: channel 0 is 'tissue map', no scan; .* configs/synthetic.json"
    ) as caught:
        check_cases([write(tmp_path, blocks)], 2, modality=modality)
    assert "\n" not in str(caught.value)


def test_without_that_name_a_map_still_is_no_ct(tmp_path: Path, blocks: np.ndarray) -> None:
    with pytest.raises(InputError, match="looks like a label map, as it holds 4 whole numbers"):
        check_cases([write(tmp_path, blocks, channel=None)], 2, modality="CT")


def test_tissues_outside_the_table_are_listed_with_their_file(tmp_path: Path, blocks: np.ndarray) -> None:
    with pytest.raises(InputError, match=r"a_0000.nii.gz: tissues 2, 3 are not in the table, which has 2, 0 to 1"):
        check_cases([write(tmp_path, blocks)], 2, modality="CT", num_tissues=2)


def test_maps_and_labels_are_bytes(tmp_path: Path, blocks: np.ndarray) -> None:
    with pytest.raises(InputError, match="300 tissues or classes: maps and labels are read as bytes; give at most 256"):
        check_cases([write(tmp_path, blocks)], 300, modality="CT", num_tissues=4)


def test_scans_are_no_tissue_maps() -> None:
    assert tissue_problems(np.array([0.0, 1.0, 2.0]), 3) == []
    [line] = tissue_problems(np.array([0.5, 1.0]), 3)
    assert line.startswith("no tissue map, as it holds 0.5; leave out configs/synthetic.json")
    [line] = tissue_problems(np.arange(-1000, 1000, dtype=np.int16), 3)
    assert "tissues -1000, -999, -998, -997, -996, ... are not in the table, which has 3" in line
