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

from shared_networks.synthetic.tissues import label_names

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


def labels_of(content: highdicom.seg.Segmentation, affine: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """Label values of a DICOM SEG by their segments' names, on a grid in RAS on which its voxels must lie."""
    volume = content.get_volume(combine_segments=True)
    inside = np.argwhere(volume.array)
    to_grid = np.linalg.inv(np.diag([-1.0, -1, 1, 1]) @ affine) @ volume.affine
    places = nib.affines.apply_affine(to_grid, inside)
    np.testing.assert_allclose(places, places.round(), atol=1e-2)
    numbers = volume.array[tuple(inside.T)]
    values = {n: NAMES.index(content.get_segment_description(n).SegmentLabel) for n in content.segment_numbers}
    labels = np.zeros(shape, np.uint8)
    labels[tuple(places.round().astype(int).T)] = [values[int(number)] for number in numbers]
    return labels


def check(content: highdicom.seg.Segmentation, scan: Series, labels: np.ndarray) -> None:
    """The object holds the labels on the scan's grid, and each frame refers to the slice at its place."""
    np.testing.assert_array_equal(labels_of(content, scan.affine, labels.shape), labels)
    assert (content.StudyInstanceUID, content.PatientID) == (scan.study, "phantom")
    (referred,) = content.ReferencedSeriesSequence
    assert referred.SeriesInstanceUID == scan.uid
    frames = content.get_pixels_by_source_instance(
        scan.instances, combine_segments=True, ignore_spatial_locations=True, assert_missing_frames_are_empty=True
    )
    values = [0, *(NAMES.index(content.get_segment_description(n).SegmentLabel) for n in content.segment_numbers)]
    np.testing.assert_array_equal(np.take(values, frames), labels.transpose(2, 1, 0))


@pytest.mark.parametrize("name", SCANS)
def test_label_saved_by_a_viewer_is_a_dicom_seg_of_the_study(
    name: str, server: Server, archive: Archive, series: dict[str, Series], tmp_path: Path
) -> None:
    scan = series[name]
    labelled = server.get("/info/")["datastore"]
    assert labelled["total"] == len(SCANS)
    assert archive.series(scan.study, "SEG") == []
    response = server.infer(FLARE, scan.uid)
    assert response.status_code == 200, f"{response.text}\n{server.log.read_text()[-3000:]}"
    served = tmp_path / "label.nii.gz"
    served.write_bytes(response.content)
    labels, affine = read(served)
    np.testing.assert_allclose(affine, scan.affine, atol=1e-4)
    # MONAI Label segments a NIfTI of the series, whose oblique axes are rounded: voxels on an edge may differ.
    assert (labels != scan.labels).sum() <= (0 if name == "lps" else 20)
    server.save_label(scan.uid, served, [NAMES[value] for value in np.unique(labels) if value])
    (found,) = archive.series(scan.study, "SEG")
    check(archive.segmentation(scan.study, found), scan, labels)
    assert server.get("/info/")["datastore"]["completed"] == labelled["completed"] + 1


@pytest.mark.parametrize("name", SCANS)
def test_dicom_seg_of_bundle_run_is_stored(name: str, archive: Archive, series: dict[str, Series]) -> None:
    scan = series[name]
    written = pydicom.dcmread(scan.dicom_seg)
    archive.store([scan.dicom_seg])
    assert written.SeriesInstanceUID in archive.series(scan.study, "SEG")
    stored = archive.segmentation(scan.study, written.SeriesInstanceUID)
    check(stored, scan, scan.labels)
    assert stored.PixelData == written.PixelData
    assert [part.SegmentDescription for part in stored.SegmentSequence] == [
        part.SegmentDescription for part in written.SegmentSequence
    ]
