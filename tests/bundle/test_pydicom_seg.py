"""The stand-in for pydicom-seg, which pydicom 3 does not import, reads what is written where it is written."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from shared_networks.bundle.monai_label import serve
from tests.inference.test_dicom_seg import ROTATED, SHAPE, put, saved, series, sitk, value_of

pydicom = pytest.importorskip("pydicom")

FOLDER = Path(serve.__file__).with_name("pydicom_seg_by_highdicom")


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """No test leaves an import to the next."""
    yield
    sys.modules.pop("pydicom_seg", None)


def test_labels_and_geometry_of_an_oblique_series(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    series(tmp_path / "in" / "ct", ROTATED)
    saved(tmp_path / "in", tmp_path / "out")
    monkeypatch.syspath_prepend(FOLDER)
    content = pydicom.dcmread(tmp_path / "out" / "ct_seg.dcm")
    image = importlib.import_module("pydicom_seg").MultiClassReader().read(content).image
    numbers = sitk.GetArrayFromImage(image).T
    inside = np.argwhere(numbers)
    matrix = np.reshape(image.GetDirection(), (3, 3)) * image.GetSpacing()
    values = np.array([0, *(value_of(segment) for segment in content.SegmentSequence)])
    written = nib.load(tmp_path / "out" / "ct_seg.nii.gz")
    found = np.zeros(SHAPE, np.uint8)
    put(found, written.affine, inside @ matrix.T + image.GetOrigin(), values[numbers[tuple(inside.T)]])
    np.testing.assert_array_equal(found, np.asanyarray(written.dataobj))


@pytest.mark.parametrize(
    ("content", "needed"),
    [("from pydicom._storage_sopclass_uids import SegmentationStorage", True), ("", False), ("import nothing", False)],
)
def test_it_is_needed_where_pydicom_seg_misses_what_pydicom_2_had(
    content: str, needed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another failure is left for MONAI Label to tell."""
    (tmp_path / "pydicom_seg.py").write_text(content)
    monkeypatch.syspath_prepend(tmp_path)
    assert serve.without_pydicom_seg() == needed
