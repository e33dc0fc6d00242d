"""Segmentation and scoring in MONAI Label, beside a bundle that has no weights."""

from __future__ import annotations

import email
import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pydicom
import pytest
import torch
from monai.bundle import ConfigParser
from monai.data import MetaTensor
from monai.inferers import SlidingWindowInferer
from monai.transforms import Invertd
from pydicom.dataset import FileDataset, FileMetaDataset

from .conftest import (
    BTCV,
    FLARE,
    LABELLED,
    NAMES,
    SCANS,
    Server,
    as_slicer_asks,
    assert_segmentation_is_that_of_bundle_run,
    bundle_run,
    read,
    segmented,
)


def write_dicom(values: np.ndarray, affine: np.ndarray, folder: Path) -> None:
    """Write [columns, rows, slices] of HU as a CT series; the affine is to RAS."""
    matrix = np.diag([-1.0, -1, 1, 1]) @ affine
    spacing = np.linalg.norm(matrix[:3, :3], axis=0)
    axes = (matrix[:3, :3] / spacing).round(8)
    study, series, frame = (pydicom.uid.generate_uid() for _ in range(3))
    folder.mkdir()
    for index in range(values.shape[2]):
        meta = FileMetaDataset()
        meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
        meta.MediaStorageSOPClassUID = pydicom.uid.CTImageStorage
        meta.MediaStorageSOPInstanceUID = pydicom.uid.generate_uid()
        piece: Any = FileDataset(None, {}, file_meta=meta, preamble=b"\0" * 128)
        piece.SOPClassUID, piece.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
        piece.StudyInstanceUID, piece.SeriesInstanceUID, piece.FrameOfReferenceUID = study, series, frame
        piece.PatientName = piece.PatientID = "phantom"
        piece.Modality, piece.InstanceNumber = "CT", index + 1
        piece.Columns, piece.Rows = values.shape[:2]
        piece.PixelSpacing = [float(spacing[1]), float(spacing[0])]
        piece.SliceThickness = float(spacing[2])
        piece.ImageOrientationPatient = [*axes[:, 0], *axes[:, 1]]
        piece.ImagePositionPatient = [*(matrix[:3, 3] + index * matrix[:3, 2]).round(6)]
        piece.SamplesPerPixel, piece.PhotometricInterpretation = 1, "MONOCHROME2"
        piece.BitsAllocated, piece.BitsStored, piece.HighBit, piece.PixelRepresentation = 16, 16, 15, 1
        piece.RescaleSlope, piece.RescaleIntercept = 1, 0
        piece.PixelData = values[:, :, index].T.astype("<i2").tobytes()
        piece.save_as(folder / f"{index:03d}.dcm", enforce_file_format=True)


def test_info_lists_what_can_be_done(server: Server) -> None:
    """A bundle without weights can be trained and no more."""
    info = server.get("/info/")
    assert list(info["trainers"]) == [BTCV, FLARE]
    assert list(info["models"]) == list(info["scoring"]) == [FLARE]
    assert info["datastore"]["total"] == 6
    assert info["datastore"]["completed"] == 2
    assert server.infer(BTCV, "lps").status_code == 500


def test_the_weights_that_ship_label_at_once(server: Server, studies: Path, tmp_path: Path) -> None:
    found, _ = segmented(server, FLARE, LABELLED[0], tmp_path / "first.nii.gz")
    truth, _ = read(studies / "labels" / "final" / f"{LABELLED[0]}.nii.gz")
    both, either = np.zeros(2), np.zeros(2)
    for n, organ in enumerate(("liver", "spleen")):
        ours, theirs = found == NAMES[FLARE].index(organ), truth == NAMES[BTCV].index(organ)
        both[n], either[n] = 2 * (ours & theirs).sum(), ours.sum() + theirs.sum()
    assert (both / either > 0.8).all(), both / either


def test_segmentation_is_that_of_bundle_run(server: Server, scans: Path, tmp_path: Path) -> None:
    assert_segmentation_is_that_of_bundle_run(server, FLARE, scans, tmp_path)


def test_segmentation_of_an_uploaded_scan(server: Server, scans: Path, tmp_path: Path) -> None:
    """As a viewer on another machine asks for it, for whom no path of the server's means anything."""
    with (scans / "oblique.nii.gz").open("rb") as stream:
        sent = segmented(server, FLARE, "", tmp_path / "sent.nii.gz", files={"file": ("a.nii.gz", stream)})
    kept = segmented(server, FLARE, "oblique", tmp_path / "kept.nii.gz")
    np.testing.assert_array_equal(sent[0], kept[0])


def test_segmentation_as_json_and_with_its_file(server: Server, tmp_path: Path) -> None:
    """As 3D Slicer asks for it: NRRD, of bytes."""
    found = server.infer(FLARE, "lps", output="json").json()
    organs = {organ: value for value, organ in enumerate(NAMES[FLARE]) if value}
    assert found["label_names"] == organs
    assert found["latencies"]["infer"] > 0
    asked = {**as_slicer_asks(server, "models", FLARE), "result_extension": ".nrrd", "result_dtype": "uint8"}
    form = {"params": json.dumps(asked)}
    response = server.infer(FLARE, "lps", output="all", data=form)
    head = f"Content-Type: {response.headers['content-type']}\r\n\r\n".encode()
    params, image = email.message_from_bytes(head + response.content).get_payload()
    assert '"label_names"' in params.get_payload()
    nrrd = image.get_payload(decode=True)
    header, content = nrrd.split(b"\n\n", 1)
    assert b"type: unsigned char" in header
    labels = segmented(server, FLARE, "lps", tmp_path / "lps.nii.gz")[0]
    assert content == labels.tobytes(order="F")


def test_dicom_folder_of_the_datastore(server: Server, studies: Path, tmp_path: Path) -> None:
    """By its name in the datastore, and by its path."""
    values, affine = read(studies / "lps.nii.gz")
    series = tmp_path / "series.dicom"
    write_dicom(values, affine, series)
    series.rename(studies / "series.dicom")
    server.reload()
    form = {"params": '{"result_extension": ".nii.gz"}'}
    wanted, wanted_affine = read(bundle_run(server, FLARE, studies / "series.dicom", tmp_path / "run")["series.dicom"])
    for image in ("series", str(studies / "series.dicom")):
        labels, affine = segmented(server, FLARE, image, tmp_path / "served.nii.gz", data=form)
        np.testing.assert_array_equal(labels, wanted)
        np.testing.assert_allclose(affine, wanted_affine, atol=1e-4)


def test_batch_infer_labels_all_that_have_none(server: Server, studies: Path, tmp_path: Path) -> None:
    done = server.run("batch/infer", FLARE, images=list(SCANS), multi_gpu=False, max_workers=2)
    assert done["status"] == "DONE", done["log"]
    assert server.get("/info/")["datastore"]["label_tags"]["original"] == len(SCANS)
    for name in SCANS:
        labels, _ = segmented(server, FLARE, name, tmp_path / "one.nii.gz")
        np.testing.assert_array_equal(read(studies / "labels" / "original" / f"{name}.nii.gz")[0], labels)


def epistemic(bundle: Path, scan: Path, samples: int) -> float:
    """The score by MONAI's parts: the mean over the scan of -p log p, p the mean chance of an organ with dropout."""
    config = ConfigParser()
    config.read_config(bundle / "configs" / "inference.json")
    config["bundle_root"], config["network_def"]["dropout"] = str(bundle), 0.2
    network = config.get_parsed_content("network_def").train()
    network.load_state_dict(torch.load(bundle / "models" / "model.pt", weights_only=True))
    prepare: Any = config.get_parsed_content("preprocessing")
    image = prepare({"image": str(scan)})["image"]
    size, batch, overlap, blending = (
        config.get_parsed_content(key) for key in ("img_size", "sw_batch_size", "overlap", "blending")
    )
    slide = SlidingWindowInferer(size, batch, overlap, blending)
    with torch.no_grad():
        chances = [
            slide(image[None].as_tensor(), lambda x: 1 - network(x).softmax(1)[:, :1])[0] for _ in range(samples)
        ]
    mean = MetaTensor(torch.stack(chances).mean(0)).copy_meta_from(image)
    on_scan = Invertd("pred", prepare, "image", nearest_interp=False)({"image": image, "pred": mean})["pred"]
    return float(torch.special.entr(on_scan.as_tensor().clamp(0)).mean())


def test_epistemic_scoring_ranks_cases(server: Server, studies: Path) -> None:
    """MONAI Label's formula, with dropout, on the chance of any organ; a second time there is nothing left to do.

    One more scan is half air, of which the network is certain.
    """
    image: Any = nib.load(studies / "lps.nii.gz")
    values = np.asanyarray(image.dataobj).copy()
    values[:, :, values.shape[2] // 2 :] = -1000
    half = studies / "half.nii.gz"
    try:
        nib.save(nib.Nifti1Image(values, image.affine), half)
        server.reload()
        done = server.run("scoring", FLARE, simulation_size=2)
        assert done["status"] == "DONE", done["log"]
        names = ("half", *SCANS)
        scores = {name: server.get(f"/datastore/image/info?image={name}")["epistemic_entropy"] for name in names}
        expected = {name: epistemic(server.bundle(FLARE), studies / f"{name}.nii.gz", 2) for name in names}
        # Dropout draws at random on both sides: scores of a scan have a standard deviation of 0.7 %.
        assert scores == pytest.approx(expected, rel=0.04)
        assert scores["half"] < 0.6 * scores["lps"]
        assert '"executed": 0' in server.run("scoring", FLARE, simulation_size=2)["log"]
    finally:
        half.unlink()
        server.reload()
