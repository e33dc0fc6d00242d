"""Data sets for the real nnU-Net, planned and preprocessed by it.

Run by `./runtests.sh --nnunet` alone, in an environment that has nnU-Net.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from shared_networks.synthetic.phantom import phantom_case, write_dataset

from ..conftest import ROOT

FIRST, SECOND = "Dataset801_Mixed", "Dataset802_Turned"
PLANS = "HiEndMAE"


def pytest_ignore_collect(config: pytest.Config) -> bool | None:
    """Leave these tests out unless they are asked for by name."""
    return None if any("tests/nnunet" in str(argument) for argument in config.args) else True


def command(words: str | Sequence[str], failing: bool = False, **environment: str) -> str:
    """Run a command of nnU-Net, and return what it said."""
    program, *options = shlex.split(words) if isinstance(words, str) else words
    done = subprocess.run(
        [Path(sys.executable).with_name(program), *options],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert (done.returncode != 0) == failing, f"{words}\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    return done.stderr if failing else done.stdout


def edit(file: Path, **entries: object) -> None:
    """Give a JSON file further entries."""
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """nnU-Net's folders `raw`, `preprocessed` and `results`, named in the environment, with two data sets in `raw`.

    The first has scans of all orientations, each with its own voxel size, and a reader that turns them. The second has
    nnU-Net's default reader and scans of one voxel size, largest from left to right, stored as LPS.
    """
    root = tmp_path_factory.mktemp("nnunet")
    trainers = (ROOT / "shared_networks" / "doors" / "nnunet", ROOT / "tests" / "nnunet" / "short_trainers")
    os.environ |= {f"nnUNet_{name}": str(root / name) for name in ("raw", "preprocessed", "results")}
    os.environ |= {"nnUNet_extTrainer": os.pathsep.join(map(str, trainers))}
    os.environ |= {"nnUNet_n_proc_DA": "1", "nnUNet_def_n_proc": "1"}  # processes
    write_dataset(root / "raw" / FIRST, train=5, test=1, seed=3, voxel_mm=6.0)
    edit(root / "raw" / FIRST / "dataset.json", overwrite_image_reader_writer="NibabelIOWithReorient")
    second = root / "raw" / SECOND
    write_dataset(second, train=0, test=0)
    for number in range(2):
        image, label, affine = phantom_case(np.random.default_rng([10, number]), "btcv", 6.0)
        ornt = nib.orientations.ornt_transform(
            nib.orientations.io_orientation(affine), nib.orientations.axcodes2ornt("LPS")
        )
        for folder, ending, volume in (("imagesTr", "_0000", image), ("labelsTr", "", label)):
            values = nib.orientations.apply_orientation(volume, ornt)
            stored = nib.Nifti1Image(values, np.diag([-9.0, -6, 5, 1]))
            nib.save(stored, second / folder / f"case_{number}{ending}.nii.gz")
    edit(second / "dataset.json", numTraining=2)
    return root


@pytest.fixture(scope="session")
def turned(folders: Path) -> Path:
    """The second data set, planned as nnU-Net plans by default, and preprocessed."""
    command("nnUNetv2_plan_and_preprocess -d 802 -c 3d_fullres -np 1 -npfp 1")
    return folders / "preprocessed" / SECOND
