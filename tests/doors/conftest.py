"""A CT that is segmented in a second."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from shared_networks import segment
from shared_networks.synthetic.phantom import write_dataset


@pytest.fixture(scope="session")
def ct(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with the middle of a synthetic CT, anisotropic, oblique, in LSA order, int16 with a slope: one window."""
    folder = tmp_path_factory.mktemp("ct")
    write_dataset(folder / "data", train=0, test=1, seed=99, voxel_mm=5.0)
    whole: Any = nib.load(folder / "data" / "imagesTs" / "test_000_0000.nii.gz")
    middle = [n // 2 for n in whole.shape]
    half = [round(84 / mm) for mm in whole.header.get_zooms()]  # 168 mm of the window's 180
    box = tuple(slice(max(m - h, 0), m + h) for m, h in zip(middle, half, strict=True))
    part = whole.slicer[box]
    turned = part.as_reoriented(
        nib.orientations.ornt_transform(nib.io_orientation(part.affine), nib.orientations.axcodes2ornt("LSA"))
    )
    stored = np.round((np.asanyarray(turned.dataobj) + 1024) / 0.5).astype(np.int16)
    image = nib.Nifti1Image(stored, turned.affine, turned.header)
    image.set_data_dtype(np.int16)
    image.header.set_slope_inter(0.5, -1024)
    file = folder / "case.nii.gz"
    nib.save(image, file)
    return file


@pytest.fixture(scope="session")
def labels(ct: Path) -> Any:
    """Its labels, as the doors find them: [X, Y, Z] and the affine."""
    found = segment(ct)
    return np.asanyarray(found.dataobj), found.affine
