"""Odd NIfTI files of the kinds that people meet in public data sets, made of arrays and small data sets."""

from __future__ import annotations

import gzip
import shutil
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np

AFFINE = np.array([[0, -1.5, 0, 20], [-0.8, 0, 0, 30], [0, 0, 3, -40], [0, 0, 0, 1.0]])  # PLS
SHAPE = (9, 7, 5)


def voxels(seed: int = 0) -> np.ndarray:
    """Noise in the range of HU, of which no axis is like another."""
    return np.random.default_rng(seed).integers(-1000, 300, SHAPE).astype(np.int16)


def save(
    file: str | Path, values: np.ndarray, affine: np.ndarray = AFFINE, qform: np.ndarray | None = None, unit: str = "mm"
) -> str:
    """Writes a file whose forms both hold, whatever letters its suffix is of."""
    scan = nib.Nifti1Image(values, affine)
    scan.set_sform(affine, 1)
    scan.set_qform(affine if qform is None else qform, 1)
    scan.header.set_xyzt_units(unit)
    content = scan.to_bytes()
    Path(file).write_bytes(gzip.compress(content, 1) if str(file).lower().endswith(".gz") else content)
    return str(file)


def patch(file: str | Path, **fields: object) -> None:
    """Overwrites fields of a header as they are, which nibabel would refuse or mend."""
    zipped = str(file).lower().endswith(".gz")
    content = bytearray(gzip.decompress(Path(file).read_bytes()) if zipped else Path(file).read_bytes())
    header = np.frombuffer(bytes(content[:348]), nib.nifti1.header_dtype).copy()
    for name, value in fields.items():
        header[name] = value
    content[:348] = header.tobytes()
    Path(file).write_bytes(gzip.compress(bytes(content), 1) if zipped else bytes(content))


def scaled(affine: np.ndarray, factor: float) -> np.ndarray:
    """An affine in another unit."""
    return np.diag([factor, factor, factor, 1]) @ affine


def mirrored(affine: np.ndarray) -> np.ndarray:
    """An affine whose left is the other's right."""
    return np.diag([-1.0, 1, 1, 1]) @ affine


def rewrite(
    file: Path,
    change: Callable[[np.ndarray], np.ndarray] = lambda v: v,
    form: Callable[[np.ndarray], np.ndarray] = lambda a: a,
    qform: Callable[[np.ndarray], np.ndarray] | None = None,
    unit: str = "mm",
) -> None:
    """Saves a file again with other voxels, another affine, or a qform of its own."""
    scan = nib.load(file)
    affine = form(scan.affine)
    save(file, change(np.asanyarray(scan.dataobj)), affine, qform(affine) if qform else None, unit)


def in_a_circle(values: np.ndarray, outside: float) -> np.ndarray:
    """Pads what lies outside of the circle of reconstruction, as scanners do."""
    x, y = (np.linspace(-1, 1, size) for size in values.shape[:2])
    return np.where((x[:, None, None] ** 2 + y[:, None] ** 2) > 1, outside, values)


def with_metal(values: np.ndarray) -> np.ndarray:
    values = values.copy()
    values[tuple(slice(size // 2, size // 2 + 2) for size in values.shape)] = 30000
    return values


def noisy(values: np.ndarray) -> np.ndarray:
    return values + np.random.default_rng(0).normal(0, 40, values.shape)


Change = Callable[[np.ndarray], np.ndarray]

# of a CT in HU: these still are
HOUNSFIELD: dict[str, Change] = {
    "as it is": lambda v: v,
    "padded with -2000": lambda v: in_a_circle(v, -2000),
    "padded with -3024": lambda v: in_a_circle(v, -3024),
    "padded with -32768": lambda v: in_a_circle(v, -32768),
    "metal": with_metal,
    "clipped to -160 and 240": lambda v: v.clip(-160, 240),
    "noise": noisy,
    "float": lambda v: v.astype(np.float64),
}

# these are not, though most of them have values below -50
NOT_HOUNSFIELD: dict[str, Change] = {
    "air at 0": lambda v: (v + 1024).clip(0),
    "air at 0, padded with -1024": lambda v: in_a_circle(v + 1024, -1024),
    "air at 0, noise, padded with -2000": lambda v: in_a_circle(noisy(v) + 1024, -2000),
    "intercept twice": lambda v: v - 1024,
    "tenths": lambda v: v * 10,
    "tens": lambda v: v / 10,
    "thousands": lambda v: v / 1000,
    "inverted": lambda v: -v,
    "0 to 1": lambda v: (v + 1024) / 3000,
    "z-scores": lambda v: (v - v.mean()) / v.std(),
    "attenuation": lambda v: 0.2 * (1 + v / 1000),
    "8 bits": lambda v: np.rint((v.clip(-1000, 1000) + 1000) / 2000 * 255 - 128),
}


def _pairs(data: Path) -> list[tuple[Path, Path]]:
    return list(zip(sorted(data.glob("imagesTr/*")), sorted(data.glob("labelsTr/*")), strict=True))


def flat_folder(data: Path, folder: Path, change: Change | None = None, with_labels: bool = False) -> Path:
    """A folder of CTs alone, or with their label maps among them."""
    folder.mkdir()
    for number, (image, label) in enumerate(_pairs(data)):
        shutil.copy(image, folder / f"img{number:04d}.nii.gz")
        if change:
            rewrite(folder / f"img{number:04d}.nii.gz", lambda v: change(v).astype(np.uint16))
        if with_labels:
            shutil.copy(label, folder / f"label{number:04d}.nii.gz")
    return folder


def case_folders(data: Path, folder: Path, name: str = "case_{:05d}") -> Path:
    """A folder for each case, in which all files have the same names."""
    for number, (image, label) in enumerate(_pairs(data)):
        case = folder / name.format(number)
        case.mkdir(parents=True)
        shutil.copy(image, case / "imaging.nii.gz")
        shutil.copy(label, case / "segmentation.nii.gz")
    return folder
