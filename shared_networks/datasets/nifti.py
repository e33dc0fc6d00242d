"""Read NIfTI files, and say what is wrong with them."""

from __future__ import annotations

import math
import os
import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import nibabel as nib
import numpy as np
from monai.config import PathLike
from monai.data import ImageReader
from monai.data.utils import correct_nifti_header_if_necessary
from monai.utils import MetaKeys, SpaceKeys, ensure_tuple
from nibabel.arrayproxy import ArrayProxy
from nibabel.filebasedimages import ImageFileError
from nibabel.fileholders import FileHolder
from nibabel.openers import ImageOpener
from nibabel.spatialimages import HeaderDataError
from nibabel.wrapstruct import WrapStructError

from shared_networks.datasets.grid import affine_rows, same_affine, size_problem
from shared_networks.datasets.memory import free_memory
from shared_networks.errors import InputError, in_one_line

_UNREADABLE = (OSError, EOFError, ValueError, zlib.error, ImageFileError, HeaderDataError, WrapStructError)
_SAME_DIRECTION = 0.9  # cosine: halfway between two axes rounding decides what an axis is called
_MM = {1: 1000.0, 3: 0.001}  # metre and micron in xyzt_units; all else is taken for mm, as it is in every tool
SUFFIXES = (".nii.gz", ".nii")


class Nifti(NamedTuple):
    """What is in one NIfTI file, or why it is of no use.

    Attributes:
        problems: what is wrong, a sentence each.
        grid: shape and affine, `[4, 4]` in mm (RAS); `None` where the file has none that could be used.
        values: voxels of that shape as numbers; `None` where they were not asked for or could not be read.
    """

    problems: list[str]
    grid: tuple[tuple[int, ...], np.ndarray] | None
    values: np.ndarray | None = None


def read_nifti(file: str, voxels: bool = True, is_label: bool = False) -> Nifti:
    """Read a file to its last byte, once; what is wrong with it is returned and not raised.

    Args:
        file: `.nii.gz` or `.nii`, in small or capital letters.
        voxels: with `False` only the header is read.
        is_label: whether it holds labels, for advice.

    Returns:
        The affine in mm, whatever the unit in the header; axes of length 1 beyond the third are left out.
    """
    try:
        if problem := _disguise(file):
            return Nifti([problem], None)
        scan = open_nifti(file)
        with scan.file_map["image"].get_prepare_fileobj() as stream:
            # unchecked: nibabel turns a spacing of 0 into 1 and a negative one into its absolute value
            pixdim = type(scan.header).from_fileobj(stream, check=False)["pixdim"][1:4].astype(float)
            if voxels and (problem := _memory_problem(scan)):
                return Nifti([problem], None)
            values = _read_voxels(scan, stream) if voxels else None
        header, shape, affine = scan.header.copy(), scan.shape, scan.affine.copy()  # the next line writes into it
        used_affine = correct_nifti_header_if_necessary(scan).affine
    except FileNotFoundError:
        return Nifti(["no such file; correct the path or remove the case"], None)
    except _UNREADABLE as error:
        fix = "put its header right" if isinstance(error, HeaderDataError) else "copy or download it again"
        return Nifti([f"cannot be read ({in_one_line(error)}); {fix}"], None)
    problems = _shape_problems(shape, is_label) + _header_problems(pixdim, affine, used_affine, header)
    affine[:3] *= _MM.get(int(header["xyzt_units"]) % 8, 1.0)
    if not problems and (problem := size_problem(affine, shape)):
        problems.append(problem)
    flat = None if problems or values is None else values.reshape(shape[:3])
    return Nifti(problems, None if problems else (shape[:3], affine), values if problems else flat)


def open_nifti(file: str) -> nib.Nifti1Image:
    """Open a file by its content; nibabel goes by the name, in which it knows small letters or capitals alone."""
    with ImageOpener(file) as stream:
        size = stream.read(4)
    kinds = {348: nib.Nifti1Image, 540: nib.Nifti2Image}
    kind = kinds.get(int.from_bytes(size, "little")) or kinds.get(int.from_bytes(size, "big"))
    scan = kind.from_file_map({"image": FileHolder(file)}) if kind else None
    if scan is None:
        raise ImageFileError("empty file" if not size else "its content is not NIfTI")
    if not scan.header["magic"].item().startswith(b"n+"):
        raise ImageFileError("half of a pair of .hdr and .img, which are not read; convert it to .nii.gz")
    if (offset := int(scan.dataobj.offset)) < scan.header.single_vox_offset:
        # nibabel takes 0 as it is and SimpleITK takes 348: each reads other voxels, and some of them from the header.
        begin = scan.header.single_vox_offset
        raise HeaderDataError(f"vox_offset is {offset}, and voxels begin behind the header, at {begin} or later")
    return scan


def _disguise(file: str) -> str:
    """Why a file is not what its name says, if so."""
    if file.casefold().endswith((".hdr", ".img")):
        return f"is half of a pair of .hdr and .img; convert it to {os.path.basename(file)[:-4]}.nii.gz"
    with open(file, "rb") as stream:
        start = stream.read(352)
    if start.startswith(b"version https://git-lfs"):
        return "is a pointer of Git LFS and no scan; get the file itself with git lfs pull"
    zipped, named = start[:2] == b"\x1f\x8b", file.casefold().endswith(".gz")
    if zipped and file.casefold().endswith(".nii"):
        return f"is gzipped, though its name says that it is not; rename it to {os.path.basename(file)}.gz"
    if start and named and not zipped and start[344:347] in (b"n+1", b"ni1"):
        return f"is not gzipped, though its name says so; rename it to {os.path.basename(file)[:-3]}"
    return ""


def _memory_problem(scan: nib.Nifti1Image) -> str:
    needed, free = math.prod(scan.shape) * scan.get_data_dtype().itemsize, free_memory()
    if free is None or needed <= free:
        return ""
    size = " x ".join(map(str, scan.shape))
    return f"{size} voxels take {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free; crop the scan or remove the case"


def _read_voxels(scan: nib.Nifti1Image, stream: ImageOpener) -> np.ndarray:
    """Read voxels in the type they are stored in; nibabel makes float64, four times int16, of scaled ones."""
    stored: Any = scan.dataobj
    layout = (stored.shape, stored.dtype, stored.offset, stored.slope, stored.inter)
    is_scaled = (stored.slope, stored.inter) != (1, 0)
    values = np.asanyarray(ArrayProxy(stream, layout, mmap=False), dtype=np.float32 if is_scaled else None)
    while stream.read(1 << 20):  # gzip's checksum comes last: nibabel alone reads damaged voxels without a word
        pass
    return values


def _shape_problems(shape: tuple[int, ...], is_label: bool) -> list[str]:
    if len(shape) >= 3 and set(shape[3:]) <= {1}:
        return []
    if is_label and len(shape) == 4:
        return [
            f"shape {shape} is not 3D; if its last axis has a volume for each class (one-hot), take the argmax over it "
            "and save that, one integer a voxel"
        ]
    return [f"shape {shape} is not 3D; save each volume as a file of its own (channels as NAME_0000, NAME_0001, ...)"]


def _header_problems(pixdim: np.ndarray, affine: np.ndarray, used_affine: np.ndarray, header: Any) -> list[str]:
    problems = []
    sform, qform = (int(header[code]) > 0 for code in ("sform_code", "qform_code"))
    if not sform and not qform:
        problems.append(
            "the header has no orientation (sform and qform codes are 0), so that left, right, head and feet are "
            "unknown; write the true affine into it, or export the scan again"
        )
    elif sform and qform and all(map(_regular, affines := (header.get_sform(), header.get_qform()))):
        ours, theirs = ("".join(nib.aff2axcodes(each)) for each in affines)
        cosines = np.prod([form[:3, :3] / nib.affines.voxel_sizes(form) for form in affines], axis=0).sum(axis=0)
        if ours != theirs and cosines.min() < _SAME_DIRECTION:
            problems.append(
                f"the header holds two orientations, {ours} in the sform and {theirs} in the qform, of which programs "
                "use one or the other; write the true one into both"
            )
    if not (pixdim > 0).all() or not np.isfinite(pixdim).all():
        spacing = tuple(round(value, 4) for value in pixdim.tolist())
        problems.append(f"spacing {spacing} mm in pixdim is not positive; write the true one into the header")
    if not _regular(affine):
        problems.append(f"affine {affine_rows(affine)} is singular or not finite; write the true one into the header")
    if not problems and not same_affine(affine, used_affine):
        # MONAI's reader then takes the qform, even where its code says that there is none.
        problems.append(
            f"the header holds two affines, {affine_rows(affine)} and by its spacing and qform, which MONAI uses, "
            f"{affine_rows(used_affine)}; write the true one into both sform and qform"
        )
    return problems


def _regular(affine: np.ndarray) -> bool:
    return bool(np.isfinite(affine).all() and np.linalg.matrix_rank(affine[:3, :3]) == 3)


def grid_problems(image: str, image_scan: Nifti, other: str, other_scan: Nifti) -> list[str]:
    """Return how the grid of another file (a channel, a label) differs from the image's."""
    if image_scan.grid is None or other_scan.grid is None:
        return []
    (shape, affine), (other_shape, other_affine) = image_scan.grid, other_scan.grid
    problems = []
    if shape[:3] != other_shape[:3]:
        problems.append(f"{other}: shape {other_shape} is not {shape} as in {image}; resample it to the image's grid")
    if not same_affine(affine, other_affine):
        mirrored = np.linalg.det(affine[:3, :3]) * np.linalg.det(other_affine[:3, :3]) < 0
        problems.append(
            f"{other}: affine {affine_rows(other_affine)} is not {affine_rows(affine)} as in {image}"
            f"{' and mirrored to it, so that left and right may be swapped' if mirrored else ''}; "
            "resample it to the image's grid, or copy the affine if only the header is wrong"
        )
    return problems


class NiftiReader(ImageReader):
    """Read NIfTI for MONAI's `LoadImaged`: what is checked is what is trained on.

    MONAI's own reader takes affines in metres for millimetres, axes of length 1 for channels, and a file without
    orientation as it lies; see :func:`shared_networks.datasets.nifti.read_nifti`. Files of other formats are left to
    MONAI's readers.
    """

    def verify_suffix(self, filename: Sequence[PathLike] | PathLike) -> bool:
        """Return whether all files are NIfTI by their names."""
        return all(is_nifti(str(file)) for file in ensure_tuple(filename))

    def read(self, data: Sequence[PathLike] | PathLike, **_: Any) -> list[tuple[str, Nifti]]:
        """Read a file, or a file a channel.

        Raises:
            ValueError: a file is no NIfTI by its name, so that MONAI tries another reader.
        """
        if not self.verify_suffix(data):
            raise ValueError(f"{data} is no NIfTI")
        return [(str(file), read_nifti(str(file))) for file in ensure_tuple(data)]

    def get_data(self, img: Sequence[tuple[str, Nifti]]) -> tuple[np.ndarray, dict[str, Any]]:
        """Return voxels and metadata.

        Args:
            img: of :meth:`read`.

        Returns:
            `[X, Y, Z]`, or of several files `[C, X, Y, Z]`, in the type they are stored in; and affine to mm (RAS),
            shape and channel as MONAI's transforms need them.

        Raises:
            InputError: a file cannot be used.
        """
        if problems := [f"{file}: {problem}" for file, scan in img for problem in scan.problems]:
            raise InputError("\n".join(problems))
        channels = [scan.values for _, scan in img if scan.values is not None]
        grid = img[0][1].grid
        if grid is None or len({channel.shape for channel in channels}) > 1:
            raise InputError(f"{img[0][0]}: its channels have different shapes; resample them to one grid")
        values = channels[0] if len(channels) == 1 else np.stack(channels)
        affine = np.asarray(grid[1], dtype=float)
        return values.astype(values.dtype.newbyteorder("="), copy=False), {
            MetaKeys.AFFINE: affine,
            MetaKeys.ORIGINAL_AFFINE: affine.copy(),
            MetaKeys.SPATIAL_SHAPE: np.array(grid[0]),
            MetaKeys.SPACE: SpaceKeys.RAS,
            MetaKeys.ORIGINAL_CHANNEL_DIM: float("nan") if len(channels) == 1 else 0,
        }


def is_nifti(file: str) -> bool:
    """Return whether a file is NIfTI by its name, in small or capital letters."""
    return file.casefold().endswith(SUFFIXES)
