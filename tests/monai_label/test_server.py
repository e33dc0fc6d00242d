"""What users do with MONAI Label, in order: a bundle without weights is trained, then both segment, score and train."""

from __future__ import annotations

import email
import json
from collections.abc import Iterator
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

from shared_networks.synthetic.tissues import label_names
from shared_networks.version import __version__

from .conftest import BTCV, FLARE, LABELLED, LATER, SCANS, Server, bundle_run, read

NAMES = {BTCV: label_names("btcv"), FLARE: label_names("flare")}


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


def as_slicer_asks(server: Server, part: str, model: str) -> dict[str, Any]:
    """The settings that 3D Slicer and OHIF send with a request for a model: all that info lists, as it lists it."""
    listed = server.get("/info/")[part][model]["config"]
    return {key: value[0] if isinstance(value, list) else value for key, value in listed.items()}


def segmented(server: Server, model: str, image: str, file: Path, **request: Any) -> tuple[np.ndarray, np.ndarray]:
    """Values and affine of the segmentation that the server gives."""
    response = server.infer(model, image, **request)
    assert response.status_code == 200, f"{response.text}\n{server.log.read_text()[-3000:]}"
    file.write_bytes(response.content)
    return read(file)


@pytest.fixture(scope="module")
def scans(studies: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of the scans to segment, as `bundle run` takes it."""
    folder = tmp_path_factory.mktemp("scans")
    for name in SCANS:
        (folder / f"{name}.nii.gz").symlink_to(studies / f"{name}.nii.gz")
    return folder


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


def test_training_without_weights_says_that_it_needs_an_encoder(server: Server) -> None:
    done = server.run("train", BTCV, max_epochs=1)
    assert done["status"] == "ERROR"
    assert "error: " in done["log"]
    assert "hi_end_mae_pretrain/models/model.pt: no pre-trained encoder there" in done["log"]
    assert not (server.bundle(BTCV) / "models").exists()


def test_training_without_weights_and_validation(server: Server) -> None:
    """Two cases, of which none is left for validation; the encoder from scratch, as the guide says."""
    config = server.bundle(BTCV) / "configs" / "train.json"
    lines = config.read_text().splitlines()
    lines = ['    "pretrained_encoder": "",' if '"pretrained_encoder":' in line else line for line in lines]
    config.write_text("\n".join(lines))
    done = server.run("train", BTCV, max_epochs=1)
    assert done["status"] == "DONE", done["log"]
    assert "no validation cases: " in done["log"]
    weights = torch.load(server.bundle(BTCV) / "models" / "model.pt", weights_only=True)
    assert weights["out.conv.conv.bias"].shape == (14,)


def test_both_bundles_are_served_at_once(server: Server) -> None:
    server.reload()
    info = server.get("/info/")
    assert list(info["models"]) == list(info["trainers"]) == [BTCV, FLARE]
    for name, model in info["models"].items():
        assert model["version"] == __version__
        assert model["type"] == "segmentation"
        assert model["labels"] == {organ: value for value, organ in enumerate(NAMES[name]) if value}
        assert model["config"]["model_filename"] == ["model.pt"]


@pytest.mark.parametrize("bundle", [BTCV, FLARE])
def test_segmentation_is_that_of_bundle_run(bundle: str, server: Server, scans: Path, tmp_path: Path) -> None:
    expected = bundle_run(server, bundle, scans, tmp_path / "run")
    assert sorted(expected) == sorted(SCANS)
    for name, file in expected.items():
        labels, affine = segmented(server, bundle, name, tmp_path / "served.nii.gz")
        wanted, wanted_affine = read(file)
        assert labels.dtype == np.uint8
        assert 1 < len(np.unique(wanted)) <= 14
        np.testing.assert_array_equal(labels, wanted, err_msg=name)
        np.testing.assert_allclose(affine, wanted_affine, atol=1e-4)
        np.testing.assert_allclose(affine, read(scans / f"{name}.nii.gz")[1], atol=1e-4)
        assert "".join(nib.aff2axcodes(affine)) == SCANS[name][0]


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


def test_training_on_saved_labels_changes_the_next_segmentation(
    server: Server, studies: Path, scans: Path, tmp_path: Path
) -> None:
    """Labels are saved as a viewer saves them; with four cases one validates, and the better model takes over."""
    before, _ = segmented(server, BTCV, "oblique", tmp_path / "before.nii.gz")
    for name in LATER:
        server.save_label(name, studies.parent / "labels" / f"{name}.nii.gz")
    assert server.get("/info/")["datastore"]["completed"] == 4
    done = server.run("train", BTCV, **{**as_slicer_asks(server, "trainers", BTCV), "max_epochs": 60})
    assert done["status"] == "DONE", done["log"]
    assert server.has_said("only a better model replaces it")
    assert server.has_said(f"Restored all variables from {server.bundle(BTCV) / 'models' / 'model.pt'}")
    after, _ = segmented(server, BTCV, "oblique", tmp_path / "after.nii.gz")
    assert (after != before).mean() > 0.01
    np.testing.assert_array_equal(after, read(bundle_run(server, BTCV, scans, tmp_path / "run")["oblique"])[0])


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


@pytest.fixture
def weights(server: Server) -> Iterator[Path]:
    """BTCV's weights, put back afterwards."""
    file = server.bundle(BTCV) / "models" / "model.pt"
    right = file.read_bytes()
    yield file
    file.write_bytes(right)


def test_wrong_weights_are_refused_and_not_loaded_in_part(server: Server, weights: Path, tmp_path: Path) -> None:
    """With the right ones all is well again."""
    right = torch.load(weights, weights_only=True)
    expected, _ = segmented(server, BTCV, "lps", tmp_path / "expected.nii.gz")
    for wrong, said in (
        (dict(list(right.items())[::2]), "Missing key(s) in state_dict"),
        ({**right, "out.conv.conv.bias": torch.zeros(15)}, "size mismatch for out.conv.conv.bias"),
    ):
        torch.save(wrong, weights)
        assert server.infer(BTCV, "lps").status_code == 500
        assert server.has_said(said)
    torch.save(right, weights)
    np.testing.assert_array_equal(segmented(server, BTCV, "lps", tmp_path / "again.nii.gz")[0], expected)


@pytest.mark.parametrize(("recorded", "said"), [(True, "not the weights that"), (False, "is of another network (183")])
def test_training_does_not_start_from_wrong_weights(server: Server, weights: Path, recorded: bool, said: str) -> None:
    torch.save({"vit.norm.weight": torch.zeros(9)}, weights)
    record = weights.with_suffix(".json")
    if not recorded:
        record = record.rename(record.with_suffix(".kept"))
    wrong = weights.read_bytes()
    done = server.run("train", BTCV, max_epochs=1)
    record.rename(weights.with_suffix(".json"))
    assert done["status"] == "ERROR"
    assert server.has_said(f"{weights}: ")
    assert server.has_said(said)
    assert weights.read_bytes() == wrong
