"""Segment a scan from Python, by a bundle's inference config."""

from __future__ import annotations

import os
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.spatialimages import SpatialImage
from numpy.typing import ArrayLike

from shared_networks.doors.inference import run_inference
from shared_networks.errors import FailedScansError, InputError
from shared_networks.settings.command_line import Given

_HERE = "segment()"
_STORED = ("int8", "uint8", "int16", "uint16", "int32", "uint32", "float32", "float64")
"""Number types that are written unchanged; other numbers become float32, as the bundle makes of them."""


def segment(
    image: str | os.PathLike[str] | SpatialImage | ArrayLike,
    affine: ArrayLike | None = None,
    *,
    bundle: str = "btcv",
    weights: str | os.PathLike[str] | None = None,
    device: Any = None,
    fast: bool = False,
    **settings: Any,
) -> nib.Nifti1Image:
    """Segment the organs of a CT.

    Example::

        from shared_networks import segment

        labels = segment("ct.nii.gz")
        labels = segment(volume, affine, bundle="flare", device="cuda")

    Args:
        image: path of a NIfTI file or of a folder with one scan, NIfTI or DICOM; a nibabel image; or an array
            [X, Y, Z] in Hounsfield units.
        affine: [4, 4] from voxels of an array to mm, RAS.
        bundle: `btcv` or `flare`, by whose labels it is segmented.
        weights: a model that the bundle trained; by default the small one that ships, else
            its `models/model.pt`.
        device: such as `"cuda:1"`; by default a GPU if one is found.
        fast: take fewer windows, in less time; see `docs/results/fast.json`.
        **settings: any setting of the bundle's inference config, such as `overlap=0.5`.

    Returns:
        Labels [X, Y, Z] on the scan's grid, with its affine.

    Raises:
        InputError: scan, weights or a setting are of no use, in one line.
    """
    if device is not None:
        settings["device"] = device
    if taken := sorted({"dataset_dir", "output_dir"} & settings.keys()):
        raise InputError(f"{taken[0]}: segment() takes one scan and returns its labels; leave it out")
    for name in ("organ_probability", "dicom_seg", "overlay"):
        if str(settings.get(name)) not in ("None", "False"):
            raise InputError(f"{name}: segment() returns labels alone; for files use hi-end-mae segment")
    with TemporaryDirectory() as folder:
        if isinstance(image, (str, os.PathLike)):
            if affine is not None:
                raise InputError(f"{os.fspath(image)}: has an affine of its own; give affine with an array alone")
            scan, named = os.fspath(image), os.fspath(image)
            if not os.path.exists(scan):
                raise InputError(f"{scan}: no such file or folder; give the path of a scan")
        else:
            scan, named = str(Path(folder) / "scan.nii"), "image" if isinstance(image, SpatialImage) else "array"
            nib.save(as_nifti(image, affine), scan)
        given = [Given(name, value, value, _HERE) for name, value in ({"overlay": False} | settings).items()]
        paths = {"output_dir": str(Path(folder) / "labels")}
        if weights is not None and not isinstance(weights, (str, os.PathLike)):
            raise InputError(f"weights: {weights!r} is no path; give one, or several models as checkpoints=[...]")
        if weights is not None:
            paths["checkpoint"] = os.fspath(weights)
        given += [Given(name, path, path) for name, path in paths.items()]
        try:
            with redirect_stdout(StringIO()):  # the bundle counts scans
                run_inference(bundle, [scan], fast, given, one_scan=True)
        except FailedScansError as error:
            (reason,) = error.failed.values()
            raise InputError(f"{named}: {reason}") from None
        (file,) = Path(folder, "labels").glob("*_seg.nii.gz")
        result: Any = nib.load(file)
        labels = np.asanyarray(result.dataobj)
    own = image.affine if isinstance(image, SpatialImage) else affine
    # On file an affine has float32.
    return nib.Nifti1Image(labels, result.affine if own is None else np.asarray(own, float), result.header)


def as_nifti(image: Any, affine: ArrayLike | None = None) -> nib.Nifti1Image:
    """Return a scan that is not on file as the one that is read alike.

    Args:
        image: a nibabel image, or an array [X, Y, Z].
        affine: [4, 4] of an array.

    Raises:
        InputError: it is no volume of numbers, or has no affine or two.
    """
    header = None
    if isinstance(image, SpatialImage):
        if affine is not None:
            raise InputError("image: has an affine of its own; give affine with an array alone")
        header = image.header if isinstance(image, nib.Nifti1Pair) else None
        stored: Any = image.dataobj
        scaled = nib.is_proxy(stored) and (stored.slope, stored.inter) != (1, 0)
        values = np.asanyarray(stored, dtype=np.float32 if scaled else None)  # the type in which files are read
        grid = image.affine
    else:
        values, grid = np.asarray(image), affine
    if grid is None:
        raise InputError("array: has no affine; give affine=, the [4, 4] matrix from voxels to mm")
    grid = np.asarray(grid)
    if grid.shape != (4, 4) or grid.dtype.kind not in "iuf" or not np.isfinite(grid).all():
        raise InputError(f"affine of shape {grid.shape}: give [4, 4] finite numbers, from voxels to mm")
    if values.dtype.kind not in "iuf":
        raise InputError(f"array of type {values.dtype}: give numbers, in Hounsfield units")
    if values.ndim < 3:
        raise InputError(f"array of shape {values.shape}: give a volume, [X, Y, Z]")
    values = values if values.dtype.name in _STORED else values.astype(np.float32)
    scan = nib.Nifti1Image(values, grid, header)
    scan.set_data_dtype(values.dtype)
    return scan
