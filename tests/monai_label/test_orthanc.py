"""A study of Debian's Orthanc is labelled over DICOMweb, and the DICOM SEG is there.

highdicom reads it voxel for voxel: each organ where `bundle run` puts it.
"""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import highdicom
import nibabel as nib
import numpy as np
import pydicom
import pytest
import requests
import SimpleITK
from PIL import Image

from shared_networks.synthetic.tissues import label_names

from . import ohif
from .conftest import FLARE, SCANS, Server, free_port, process, read, serving
from .test_server import write_dicom

ORTHANC = shutil.which("Orthanc")
PLUGIN = Path("/usr/share/orthanc/plugins/libOrthancDicomWeb.so")
NAMES = label_names("flare")

pytestmark = pytest.mark.skipif(
    ORTHANC is None or not PLUGIN.exists(),
    reason="no Orthanc with DICOMweb; apt-get install orthanc orthanc-dicomweb",
)


class Archive:
    """A DICOMweb server."""

    def __init__(self, address: str) -> None:
        self.address = address

    def store(self, files: Sequence[Path]) -> None:
        """Store files (STOW-RS)."""
        parts = [b"--part\r\nContent-Type: application/dicom\r\n\r\n" + file.read_bytes() + b"\r\n" for file in files]
        kind = {"Content-Type": 'multipart/related; type="application/dicom"; boundary=part'}
        body = b"".join(parts) + b"--part--"
        answer = requests.post(f"{self.address}/studies", data=body, headers=kind, timeout=60)
        answer.raise_for_status()
        assert not pydicom.Dataset.from_json(answer.json()).get("FailedSOPSequence"), answer.text

    def search(self, path: str, **tags: str) -> list[Any]:
        """Find studies, series or instances (QIDO-RS)."""
        answer = requests.get(f"{self.address}/{path}", tags, headers={"Accept": "application/dicom+json"}, timeout=60)
        answer.raise_for_status()
        return [pydicom.Dataset.from_json(found) for found in answer.json()]

    def series(self, study: str, modality: str) -> list[str]:
        """The series of a study that are of a modality, by UID."""
        return [str(found.SeriesInstanceUID) for found in self.search(f"studies/{study}/series", Modality=modality)]

    def segmentation(self, study: str, series: str) -> highdicom.seg.Segmentation:
        """Retrieve the one instance of a series (WADO-RS)."""
        kind = {"Accept": 'multipart/related; type="application/dicom"'}
        answer = requests.get(f"{self.address}/studies/{study}/series/{series}", headers=kind, timeout=60)
        answer.raise_for_status()
        edge = b"--" + answer.headers["Content-Type"].split("boundary=")[1].split(";")[0].strip('"').encode()
        _, part, rest = answer.content.split(edge)
        assert rest.strip() == b"--"
        return highdicom.seg.segread(io.BytesIO(part.partition(b"\r\n\r\n")[2]))


class Series(NamedTuple):
    """A CT series that the archive has, and what `bundle run` makes of it."""

    study: str
    uid: str
    instances: list[str]  # by position
    labels: np.ndarray
    affine: np.ndarray
    dicom_seg: Path


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Archive]:
    """Orthanc on an empty folder, for this machine alone."""
    folder, port = tmp_path_factory.mktemp("orthanc"), free_port()
    settings = {
        "StorageDirectory": str(folder),
        "IndexDirectory": str(folder),
        "HttpPort": port,
        "RemoteAccessAllowed": False,
        "DicomServerEnabled": False,
        "Plugins": [str(PLUGIN)],
        "DicomWeb": {"Enable": True, "Root": "/dicom-web/"},
    }
    (folder / "orthanc.json").write_text(json.dumps(settings))
    log = folder / "orthanc.log"
    with log.open("w") as stream:
        running = subprocess.Popen([str(ORTHANC), str(folder / "orthanc.json")], stdout=stream, stderr=stream)
        try:
            found = Archive(f"http://127.0.0.1:{port}/dicom-web")
            for _ in range(120):
                assert running.poll() is None, log.read_text()[-4000:]
                try:
                    assert found.search("studies") == []
                    break
                except requests.ConnectionError:
                    time.sleep(0.5)
            yield found
        finally:
            running.terminate()
            running.wait(30)


@pytest.fixture(scope="module")
def server(archive: Archive, releases: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The server on the archive, as the guide says, with a cache of its own."""
    folder = tmp_path_factory.mktemp("dicomweb")
    cache = {"MONAI_LABEL_DICOMWEB_CACHE_PATH": str(folder / "cache"), "MONAI_LABEL_DICOMWEB_CACHE_EXPIRY": "0"}
    with serving([zipped for zipped in releases if FLARE in zipped.name], archive.address, folder, **cache) as running:
        yield running


@pytest.fixture(scope="module")
def series(
    archive: Archive, server: Server, studies: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Series]:
    """The scans to segment as CT series in the archive, by name."""
    folder = tmp_path_factory.mktemp("series")
    scans, output = folder / "scans", folder / "output"
    scans.mkdir()
    for name in SCANS:
        write_dicom(*read(studies / f"{name}.nii.gz"), scans / name)
        archive.store(sorted((scans / name).iterdir()))
    options = ["--dataset_dir", scans, "--output_dir", output, "--overlay", "False", "--dicom_seg", "True"]
    command = [sys.executable, "-m", "monai.bundle", "run", "--config_file", "configs/inference.json", *options]
    process(command, server.bundle(FLARE))
    made = {}
    for name in SCANS:
        slices = [pydicom.dcmread(file) for file in sorted((scans / name).iterdir())]
        uids = str(slices[0].StudyInstanceUID), str(slices[0].SeriesInstanceUID)
        labels = read(output / f"{name}_seg.nii.gz")
        instances = [str(part.SOPInstanceUID) for part in slices]
        made[name] = Series(*uids, instances, *labels, output / f"{name}_seg.dcm")
    return made


def values_of(content: highdicom.seg.Segmentation) -> np.ndarray:
    """The label value of each segment number, by the segment's name; 0 of 0."""
    return np.array([0, *(NAMES.index(part.SegmentLabel) for part in content.SegmentSequence)], np.uint8)


def on_grid(labels: np.ndarray, affine: np.ndarray, scan: Series) -> np.ndarray:
    """Labels with an affine to LPS on the grid of a scan, on whose voxels theirs must lie."""
    inside = np.argwhere(labels)
    to_grid = np.linalg.inv(np.diag([-1.0, -1, 1, 1]) @ scan.affine) @ affine
    places = nib.affines.apply_affine(to_grid, inside)
    np.testing.assert_allclose(places, places.round(), atol=1e-2)
    placed = np.zeros(scan.labels.shape, np.uint8)
    placed[tuple(places.round().astype(int).T)] = labels[tuple(inside.T)]
    return placed


def check(content: highdicom.seg.Segmentation, scan: Series, labels: np.ndarray) -> None:
    """The object holds the labels on the scan's grid, and each frame refers to the slice at its place."""
    assert (content.StudyInstanceUID, content.PatientID) == (scan.study, "phantom")
    (referred,) = content.ReferencedSeriesSequence
    assert referred.SeriesInstanceUID == scan.uid
    values, volume = values_of(content), content.get_volume(combine_segments=True)
    np.testing.assert_array_equal(on_grid(values[volume.array], volume.affine, scan), labels)
    frames = content.get_pixels_by_source_instance(
        scan.instances, combine_segments=True, ignore_spatial_locations=True, assert_missing_frames_are_empty=True
    )
    np.testing.assert_array_equal(values[frames], labels.transpose(2, 1, 0))


@pytest.mark.parametrize("name", SCANS)
def test_dicom_seg_of_bundle_run_is_stored_and_labels_the_study(
    name: str, server: Server, archive: Archive, series: dict[str, Series]
) -> None:
    """MONAI Label fetches it as a label when it is about to train."""
    scan = series[name]
    assert server.get("/info/")["datastore"]["total"] == len(SCANS)
    assert archive.series(scan.study, "SEG") == []
    written = pydicom.dcmread(scan.dicom_seg)
    archive.store([scan.dicom_seg])
    assert archive.series(scan.study, "SEG") == [written.SeriesInstanceUID]
    stored = archive.segmentation(scan.study, written.SeriesInstanceUID)
    check(stored, scan, scan.labels)
    assert stored.PixelData == written.PixelData
    descriptions = [part.SegmentDescription for part in stored.SegmentSequence]
    assert descriptions == [part.SegmentDescription for part in written.SegmentSequence]
    labels = {Path(pair["image"]).name: pair["label"] for pair in server.get("/datastore/?output=train")}
    fetched = SimpleITK.ReadImage(labels[f"{scan.uid}.nii.gz"])
    matrix = np.reshape(fetched.GetDirection(), (3, 3)) * fetched.GetSpacing()
    affine = nib.affines.from_matvec(matrix, fetched.GetOrigin())
    numbers = SimpleITK.GetArrayFromImage(fetched).T
    np.testing.assert_array_equal(on_grid(values_of(stored)[numbers], affine, scan), scan.labels)


@pytest.mark.parametrize("name", SCANS)
def test_label_saved_by_a_viewer_is_a_dicom_seg_of_the_study(
    name: str, server: Server, archive: Archive, series: dict[str, Series], tmp_path: Path
) -> None:
    scan = series[name]
    before, labelled = archive.series(scan.study, "SEG"), server.get("/info/")["datastore"]["completed"]
    response = server.infer(FLARE, scan.uid)
    assert response.status_code == 200, f"{response.text}\n{server.log.read_text()[-3000:]}"
    served = tmp_path / "label.nii.gz"
    served.write_bytes(response.content)
    labels, affine = read(served)
    np.testing.assert_allclose(affine, scan.affine, atol=1e-4)
    # MONAI Label segments a NIfTI of the series, whose oblique axes are rounded: voxels on an edge may differ.
    assert (labels != scan.labels).sum() <= (0 if name == "lps" else 20)
    server.save_label(scan.uid, served, FLARE, [NAMES[value] for value in np.unique(labels) if value])
    (found,) = set(archive.series(scan.study, "SEG")) - set(before)
    check(archive.segmentation(scan.study, found), scan, labels)
    assert server.get("/info/")["datastore"]["completed"] == labelled + 1


@pytest.mark.skipif(ohif.MISSING, reason="no Chromium or Playwright; apt-get install chromium; pip install playwright")
def test_ohif_shows_both_dicom_segs(
    server: Server, archive: Archive, series: dict[str, Series], tmp_path: Path
) -> None:
    """Of `bundle run` and of the viewer: all organs are listed, and in colour over the grey scan."""
    scan = series["lps"]
    organs = [NAMES[value] for value in np.unique(scan.labels) if value]
    for description in {str(found.SeriesDescription) for found in archive.search("series", Modality="SEG")}:
        picture = tmp_path / "ohif.png"
        assert ohif.open_segmentation(server.address, scan.study, description, picture) == organs
        red, _, blue = np.moveaxis(np.asarray(Image.open(picture).convert("RGB"), int)[:, 285:995], -1, 0)
        assert (red - blue > 30).sum() > 500
