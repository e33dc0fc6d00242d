"""The synthetic scans: repeatable, in true patient geometry, with plausible organs, in nnU-Net layout."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from numpy.typing import NDArray

from shared_networks import files
from shared_networks.datasets.tissue_maps import TISSUE_CHANNEL
from shared_networks.errors import InputError
from shared_networks.synthetic import phantom
from shared_networks.synthetic.phantom import phantom_case, write_dataset
from shared_networks.synthetic.tissue_table import read_tissue_table
from shared_networks.synthetic.tissues import BTCV, FLARE22, TISSUE_ID, TISSUES

Case = tuple[NDArray[np.int16], NDArray[np.uint8], NDArray[np.float64]]


def make(seed: int, label_set: str = "flare", voxel_mm: float = 4.0) -> Case:
    return phantom_case(np.random.default_rng([0, 0, seed]), label_set, voxel_mm)


def test_label_orders_are_the_published_ones() -> None:
    assert len(BTCV) == len(FLARE22) == 14
    assert set(BTCV) ^ set(FLARE22) == {"portal vein and splenic vein", "duodenum"}
    assert [BTCV.index(n) for n in ("spleen", "liver", "pancreas", "left adrenal gland")] == [1, 6, 11, 13]
    assert [FLARE22.index(n) for n in ("liver", "spleen", "duodenum", "left kidney")] == [1, 3, 12, 13]


def test_same_seed_same_scan_other_seed_other_scan() -> None:
    one, again, other = make(3), make(3), make(4)
    for first, second in zip(one, again, strict=True):
        np.testing.assert_array_equal(first, second)
    assert one[0].shape != other[0].shape or (one[0] != other[0]).any()


def test_label_sets_show_the_same_patient() -> None:
    image, flare, affine = make(1)
    image_btcv, btcv, affine_btcv = make(1, "btcv")
    np.testing.assert_array_equal(image, image_btcv)
    np.testing.assert_array_equal(affine, affine_btcv)
    for value, organ in enumerate(BTCV[1:], 1):
        if organ in FLARE22:
            np.testing.assert_array_equal(btcv == value, flare == FLARE22.index(organ), err_msg=organ)
    assert not btcv[flare == FLARE22.index("duodenum")].any()
    assert not flare[btcv == BTCV.index("portal vein and splenic vein")].any()
    assert (btcv == BTCV.index("portal vein and splenic vein")).sum() > 50


def test_finer_voxels_are_finer() -> None:
    coarse, fine = make(2, voxel_mm=6), make(2, voxel_mm=3)
    np.testing.assert_allclose(
        nib.affines.voxel_sizes(fine[2]).min() / nib.affines.voxel_sizes(coarse[2]).min(), 0.5, rtol=1e-6
    )
    liver = [(c[1] == 1).sum() * abs(np.linalg.det(c[2][:3, :3])) for c in (coarse, fine)]
    assert fine[0].size > 3 * coarse[0].size and all(volume > 3e5 for volume in liver)


def command(out: Path, *options: str) -> subprocess.Popen[bytes]:
    words = [sys.executable, "-m", "shared_networks.synthetic.phantom", "--out", str(out), *options]
    root = str(Path(phantom.__file__).parents[2])
    env = os.environ | {"PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    return subprocess.Popen(words, env=env, cwd=out.parent, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


@pytest.mark.integration
def test_workers_end_with_a_killed_command(tmp_path: Path) -> None:
    process = command(tmp_path / "set", "--train", "100000", "--voxel_mm", "6", "--num_workers", "1")
    while not list((tmp_path / "set").rglob("*.nii.gz")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    process.kill()
    process.communicate(timeout=60)  # the worker holds its pipe


@pytest.mark.integration
def test_dataset_by_the_command_line(tmp_path: Path) -> None:
    """The documented command writes nnU-Net's layout; each case depends on its own number only."""
    out = tmp_path / "Dataset901_Phantom"
    options = ["--label_set", "btcv", "--train", "2", "--test", "1", "--seed", "5", "--voxel_mm", "6"]
    options += ["--num_workers", "2"]
    process = command(out, *options)
    shown, _ = process.communicate()
    assert process.returncode == 0, shown

    assert sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()) == [
        "dataset.json",
        "imagesTr/train_000_0000.nii.gz",
        "imagesTr/train_001_0000.nii.gz",
        "imagesTs/test_000_0000.nii.gz",
        "labelsTr/train_000.nii.gz",
        "labelsTr/train_001.nii.gz",
        "labelsTs/test_000.nii.gz",
    ]
    assert json.loads((out / "dataset.json").read_text()) == {
        "name": "Dataset901_Phantom",
        "channel_names": {"0": "CT"},
        "labels": {name: value for value, name in enumerate(BTCV)},
        "numTraining": 2,
        "file_ending": ".nii.gz",
    }
    for name, key in (("Tr/train_001", [5, 0, 1]), ("Ts/test_000", [5, 1, 0])):
        image, label = nib.load(out / f"images{name}_0000.nii.gz"), nib.load(out / f"labels{name}.nii.gz")
        expected_image, expected_label, affine = phantom_case(np.random.default_rng(key), "btcv", 6)
        assert image.get_data_dtype() == np.int16 and label.get_data_dtype() == np.uint8
        np.testing.assert_array_equal(np.asarray(image.dataobj), expected_image)
        np.testing.assert_array_equal(np.asarray(label.dataobj), expected_label)
        np.testing.assert_array_equal(image.affine, label.affine)
        np.testing.assert_allclose(image.affine, affine, atol=1e-4)


def test_writing_again_gives_the_same_bytes_and_never_mixes_sets(tmp_path: Path) -> None:
    write_dataset(tmp_path, train=1, test=0, voxel_mm=6)
    first = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    write_dataset(tmp_path, train=1, test=0, voxel_mm=6)
    assert first == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    (tmp_path / "labelsTr" / "somebody_else.nii.gz").touch()
    with pytest.raises(FileExistsError, match="somebody_else"):
        write_dataset(tmp_path, train=1, test=0, voxel_mm=6)


def test_tissue_maps_with_their_table(tmp_path: Path) -> None:
    """Nearly cubic voxels of tissues in the scan's place, labels as ever, and a table that names the tissues."""
    write_dataset(tmp_path, "flare", train=2, test=1, voxel_mm=5, tissues=True)
    assert json.loads((tmp_path / "dataset.json").read_text())["channel_names"] == {"0": TISSUE_CHANNEL}
    table = read_tissue_table(tmp_path / "tissues.json")
    assert table.names == tuple(TISSUES)
    for name in ("Tr/train_000", "Tr/train_001", "Ts/test_000"):
        tissue, label = nib.load(tmp_path / f"images{name}_0000.nii.gz"), nib.load(tmp_path / f"labels{name}.nii.gz")
        spacing = nib.affines.voxel_sizes(tissue.affine)
        assert tissue.get_data_dtype() == np.uint8 and 4.4 < spacing.min() < 5.6
        assert spacing.max() < 1.14 * spacing.min()
        np.testing.assert_array_equal(tissue.affine, label.affine)
        indices, organs = np.asarray(tissue.dataobj), np.asarray(label.dataobj)
        assert indices.max() < len(TISSUES) and indices.shape == organs.shape
        liver = np.bincount(indices[organs == FLARE22.index("liver")], minlength=len(TISSUES))
        assert liver.argmax() == TISSUE_ID["liver"] and liver[0] == 0


def killed(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_process_is_told() -> None:
    with pytest.raises(InputError, match="a process was killed, mostly for want of memory; give fewer --num_workers"):
        list(phantom.each(killed, [phantom.Planned(Path("a"), Path("b"), (0, 0, 0))], 1))


def test_interrupted_writing_leaves_no_half_scan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(files.os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_dataset(tmp_path, train=1, test=0, voxel_mm=6)
    assert not list(tmp_path.rglob("*.nii.gz")) and not (tmp_path / "dataset.json").exists()


@pytest.mark.parametrize("function", [lambda s: make(0, s), lambda s: write_dataset("never_made", s, train=0, test=0)])
def test_unknown_label_set(function, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"'amos'; choose one of btcv, flare"):
        function("amos")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("voxel_mm", [0.1, 7.0, float("nan")])
def test_impossible_voxel_size(voxel_mm: float) -> None:
    with pytest.raises(ValueError, match=rf"voxel_mm is {voxel_mm}; choose a size from 0.4 to 6 mm"):
        make(0, voxel_mm=voxel_mm)
