"""Synthetic abdominal CT with organ labels: data to start from for those who have none.

A randomly scaled, posed and warped patient is painted from tables of shapes; the table of tissues gives Hounsfield
units for a contrast phase; texture, blur and noise make a scan of it. No patient is in it. With `--tissues True` the
tissues are written in place of the scan, so that training draws other scans of them each time.

Example:
    python -m shared_networks.synthetic.phantom --out phantoms --label_set btcv --train 16 --test 4 --seed 0
"""

from __future__ import annotations

import gzip
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import nibabel as nib
import numpy as np
from nibabel.orientations import apply_orientation, axcodes2ornt, inv_ornt_aff, ornt_transform
from numpy.typing import NDArray
from tqdm import tqdm

from shared_networks.datasets.tissue_maps import TISSUE_CHANNEL
from shared_networks.errors import InputError, report_in_one_line
from shared_networks.files import atomic_write, write_json
from shared_networks.processes import process_pool
from shared_networks.settings.command_line import call_with_options
from shared_networks.settings.kinds import FLAG, NOT_NEGATIVE, PATH, SEED, choice, number
from shared_networks.synthetic.appearance import scan
from shared_networks.synthetic.body import anatomy
from shared_networks.synthetic.patient import place, varied
from shared_networks.synthetic.shapes import Array
from shared_networks.synthetic.tissue_table import TABLE_FILE, phantom_tissues, table_content
from shared_networks.synthetic.tissues import LABEL_SETS, ORGANS, label_names

ORIENTATIONS = ("RAS", "LPS", "LAS", "RPS", "LPI", "PIR", "ASL")
OPTIONS = {
    "out": PATH,
    "label_set": choice(*LABEL_SETS),
    "train": NOT_NEGATIVE,
    "test": NOT_NEGATIVE,
    "seed": SEED,
    "voxel_mm": number("a size from 0.4 to 6 mm", lambda size: 0.4 <= size <= 6),
    "tissues": FLAG,
    "num_workers": NOT_NEGATIVE,
}
"""What the options of the command line take."""


def phantom_case(
    rng: np.random.Generator, label_set: str = "btcv", voxel_mm: float = 3.0, tissues: bool = False
) -> tuple[NDArray[np.integer[Any]], NDArray[np.uint8], Array]:
    """Make one scan. The same generator state gives the same patient and scan in either label set.

    Args:
        rng: Source of all variation.
        label_set: Order of the label values, "btcv" or "flare".
        voxel_mm: In-plane voxel size in mm, up to 12 % more or less; slices are as thick or up to 5 mm.
        tissues: Return the map of tissues in place of the scan, with slices about as thick as voxels are wide.

    Returns:
        Image `[H, W, D]` in HU within [-1024, 3071], or uint8 indices of tissues; label `[H, W, D]`; and their affine
        `[4, 4]` to RAS world mm. The axes of the arrays run in one of `ORIENTATIONS`.

    Raises:
        ValueError: If `label_set` is unknown or `voxel_mm` is not from 0.4 to 6.
    """
    names = label_names(label_set)
    if not 0.4 <= voxel_mm <= 6:
        raise ValueError(f"voxel_mm is {voxel_mm}; choose a size from 0.4 to 6 mm")
    canvas, spacing, affine = place(rng, voxel_mm, thickest=0 if tissues else 5)
    for structure in varied(anatomy(rng, canvas.habitus), rng):
        canvas.paint(structure)
    values = np.array([names.index(organ) if organ in names else 0 for organ in ORGANS], np.uint8)
    volumes = canvas.tissue if tissues else scan(rng, canvas.tissue, spacing), values[canvas.organ]
    turn = ornt_transform(axcodes2ornt("RAS"), axcodes2ornt(rng.choice(ORIENTATIONS)))
    image, label = (np.ascontiguousarray(apply_orientation(volume, turn)) for volume in volumes)
    return image, label, affine @ inv_ornt_aff(turn, canvas.tissue.shape)


class Planned(NamedTuple):
    """A case to write: its files, and the numbers that decide on its patient and scan."""

    image: Path
    label: Path
    key: tuple[int, int, int]


def write_case(planned: Planned, label_set: str, voxel_mm: float, tissues: bool) -> None:
    """Write one scan of `phantom_case` and its label."""
    image, label, affine = phantom_case(np.random.default_rng(planned.key), label_set, voxel_mm, tissues)
    for path, volume in ((planned.image, image), (planned.label, label)):
        with atomic_write(path, "give another --out") as unfinished:
            unfinished.write_bytes(gzip.compress(nib.Nifti1Image(volume, affine).to_bytes(), 1, mtime=0))


def each(write: Callable[[Planned], None], cases: Iterable[Planned], num_workers: int) -> Iterator[None]:
    """Write cases, several at a time, and yield after each.

    Raises:
        InputError: a process was killed.
    """
    if num_workers == 0:
        yield from map(write, cases)
        return
    with process_pool(num_workers) as pool:
        try:
            yield from pool.map(write, cases)
        except BrokenProcessPool:
            raise InputError("a process was killed, mostly for want of memory; give fewer --num_workers") from None


def write_dataset(
    out: str | Path,
    label_set: str = "btcv",
    train: int = 16,
    test: int = 4,
    seed: int = 0,
    voxel_mm: float = 3.0,
    tissues: bool = False,
    num_workers: int = 0,
) -> None:
    """Write phantoms as an nnU-Net folder: imagesTr, labelsTr, imagesTs, labelsTs and, last, dataset.json.

    Each case depends on the seed, its split and its number only, not on how many are made.

    Args:
        out: Folder to write to; made if missing, files of the same names are replaced.
        label_set: Order of the label values, "btcv" or "flare".
        train: Number of training cases, `train_000` and on.
        test: Number of test cases, `test_000` and on.
        seed: Seed of the whole set.
        voxel_mm: In-plane voxel size: 3 makes a case in about half a second, 0.8 is clinical resolution.
        tissues: Write tissue maps in place of scans, and the table of their indices, `tissues.json`.
        num_workers: Processes, each of which makes another case; 0 makes them in this one. The files are the same.

    Raises:
        ValueError: As `phantom_case`.
        FileExistsError: If the folder already holds other scans.
        InputError: If a process was killed.
    """
    folder, names = Path(out), label_names(label_set)
    planned = [
        Planned(
            folder / f"images{end}/{name}_{i:03d}_0000.nii.gz",
            folder / f"labels{end}/{name}_{i:03d}.nii.gz",
            (seed, split, i),
        )
        for split, (name, end, count) in enumerate((("train", "Tr", train), ("test", "Ts", test)))
        for i in range(count)
    ]
    others = set(folder.glob("*T[rs]/*.nii.gz")) - {path for case in planned for path in (case.image, case.label)}
    if others:
        raise FileExistsError(f"{folder} already holds other scans, such as {min(others)}; choose an empty folder")
    for kind in ("imagesTr", "labelsTr", "imagesTs", "labelsTs"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
    write = partial(write_case, label_set=label_set, voxel_mm=voxel_mm, tissues=tissues)
    for _ in tqdm(each(write, planned, num_workers), desc="phantoms", unit="case", total=len(planned)):
        pass
    if tissues:
        write_json(folder / TABLE_FILE, table_content(phantom_tissues()), "give another --out")
    summary = {
        "name": folder.resolve().name,
        "channel_names": {"0": TISSUE_CHANNEL if tissues else "CT"},
        "labels": {name: value for value, name in enumerate(names)},
        "numTraining": train,
        "file_ending": ".nii.gz",
    }
    write_json(folder / "dataset.json", summary, "give another --out")


if __name__ == "__main__":
    report_in_one_line()
    call_with_options(write_dataset, OPTIONS, sys.argv[1:])
