"""Training data of odd kinds: read as their headers say, or refused by name before anything is written."""

from __future__ import annotations

import csv
import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle import ConfigWorkflow
from monai.transforms import Compose, EnsureChannelFirstd, LoadImaged, Orientationd
from scipy.ndimage import zoom

from shared_networks.datasets.cases import find_cases, find_images
from shared_networks.datasets.lists import write_list
from shared_networks.datasets.nifti import NiftiReader, read_nifti
from shared_networks.datasets.pairs import find_labels, pair_cases
from shared_networks.datasets.validate import check_cases, image_problems
from shared_networks.errors import InputError, input_error_in
from shared_networks.inference.sliding_window import SlidingWindowLabels
from tests.conftest import ROOT
from tests.inference.test_sliding_window import ROI, SCANS, prepared, write

from . import odd_nifti as odd

pytestmark = pytest.mark.integration

BTCV, PRETRAIN = (ROOT / bundle / "configs" for bundle in ("hi_end_mae_btcv_seg", "hi_end_mae_pretrain"))


@pytest.fixture(scope="module")
def ct(datasets: dict[str, Path]) -> np.ndarray:
    values: np.ndarray = np.asanyarray(nib.load(min(datasets["btcv"].glob("imagesTr/*"))).dataobj).astype(np.float32)
    return values


@pytest.fixture
def data(datasets: dict[str, Path], tmp_path: Path) -> Path:
    return shutil.copytree(datasets["btcv"], tmp_path / "data")


@pytest.mark.parametrize("kind", odd.HOUNSFIELD)
def test_hounsfield_units_of_any_scanner_pass(kind: str, ct: np.ndarray) -> None:
    assert image_problems(odd.HOUNSFIELD[kind](ct), "CT") == []


@pytest.mark.parametrize("kind", odd.NOT_HOUNSFIELD)
def test_values_that_are_no_hounsfield_units_are_refused(kind: str, ct: np.ndarray) -> None:
    values = odd.NOT_HOUNSFIELD[kind](ct)
    [line] = image_problems(values, "CT")
    assert "not HU" in line and "put the rescale" in line
    assert image_problems(values) == []


def test_a_shift_is_told_from_padding_by_how_many_values_lie_below_air(ct: np.ndarray) -> None:
    """Bone and metal alone would look like tissue after a shift: what lies below air cannot be."""
    shifted = ct - 1024
    shifted[: len(ct) // 3] = 40  # a table, or a second object
    [line] = image_problems(shifted, "CT")
    assert "lies below -1100" in line
    padded = odd.in_a_circle(ct, -2000)
    padded[: len(ct) // 4] = -3024  # of another value
    assert image_problems(padded, "CT") == []


@pytest.mark.parametrize("modality", ["CT", "MR"])
def test_label_maps_among_images_are_called_so(modality: str, datasets: dict[str, Path]) -> None:
    labels = np.asanyarray(nib.load(min(datasets["btcv"].glob("labelsTr/*"))).dataobj)
    for values in (
        labels,
        (labels > 0).astype(np.uint8),
        labels.astype(np.float32),
        labels[:, :, labels.shape[2] // 2 :],
    ):
        [line] = image_problems(values, modality)
        assert line.startswith("looks like a label map")


def test_a_brain_in_much_black_is_no_label_map() -> None:
    brain = np.zeros((40, 36, 30), np.uint8)
    brain[15:25, 14:22, 10:20] = np.random.default_rng(0).integers(30, 200, (10, 8, 10))
    assert image_problems(brain, "MR") == image_problems(brain[20:21], "MR") == []


def meter(file: str) -> None:
    odd.save(file, odd.voxels(), odd.scaled(odd.AFFINE, 0.001), unit="meter")


def micron(file: str) -> None:
    odd.save(file, odd.voxels(), odd.scaled(odd.AFFINE, 1000), unit="micron")


def stored_shifted(file: str) -> None:
    odd.save(file, (odd.voxels() + 1024).astype(np.uint16))
    odd.patch(file, scl_slope=1, scl_inter=-1024)


def big_endian(file: str) -> None:
    header = nib.Nifti1Header(endianness=">")
    header.set_data_dtype(">i2")
    scan = nib.Nifti1Image(odd.voxels().astype(">i2"), odd.AFFINE, header)
    scan.set_qform(odd.AFFINE, 1)
    nib.save(scan, file)


def patched(**fields: object) -> Callable[[str], None]:
    def make(file: str) -> None:
        odd.save(file, odd.voxels())
        odd.patch(file, **fields)

    return make


READ: dict[str, tuple[str, Callable[[str], object]]] = {
    "metres": ("a.nii.gz", meter),
    "micrometres": ("a.nii.gz", micron),
    "a unit that is none": ("a.nii.gz", patched(xyzt_units=6)),
    "a fourth axis": ("a.nii.gz", lambda file: odd.save(file, odd.voxels()[..., None])),
    "a fourth and a fifth axis": ("a.nii.gz", lambda file: odd.save(file, odd.voxels()[..., None, None])),
    "64-bit floats": ("a.nii.gz", lambda file: odd.save(file, odd.voxels().astype(np.float64))),
    "big-endian": ("a.nii", big_endian),
    "an intercept": ("a.nii", stored_shifted),
    "slope and intercept NaN": ("a.nii.gz", patched(scl_slope=np.nan, scl_inter=np.nan)),
    "slope 0": ("a.nii.gz", patched(scl_slope=0, scl_inter=-1024)),
    "capitals": ("A.NII.GZ", lambda file: odd.save(file, odd.voxels())),
    "capitals, not zipped": ("A.NII", lambda file: odd.save(file, odd.voxels())),
    "both kinds of letters": ("a.Nii.gz", lambda file: odd.save(file, odd.voxels())),
}


@pytest.mark.parametrize("kind", READ)
def test_transforms_read_what_the_check_reads(kind: str, tmp_path: Path) -> None:
    name, make = READ[kind]
    file = str(tmp_path / name)
    make(file)
    scan = read_nifti(file)
    assert scan.problems == [] and scan.grid is not None and scan.values is not None
    assert scan.grid[0] == odd.SHAPE
    np.testing.assert_allclose(scan.grid[1], odd.AFFINE, rtol=1e-5, atol=1e-4)
    np.testing.assert_array_equal(scan.values, odd.voxels())
    load = Compose([LoadImaged("image", reader=NiftiReader), EnsureChannelFirstd("image")])
    loaded = load({"image": file})["image"]
    assert loaded.shape == (1, *odd.SHAPE)
    np.testing.assert_allclose(loaded.affine, odd.AFFINE, rtol=1e-5, atol=1e-4)
    np.testing.assert_array_equal(loaded[0], odd.voxels())
    two = Compose([load, Orientationd("image", "RAS", labels=None)])({"image": [file, file]})["image"]
    assert two.shape == (2, 7, 9, 5)
    check_cases([{"image": [file, file]}], in_channels=2)


REFUSED: dict[str, tuple[str, Callable[[str], object], str]] = {
    "qform mirrored": (
        "a.nii.gz",
        lambda file: odd.save(file, odd.voxels(), qform=odd.mirrored(odd.AFFINE)),
        "the header holds two orientations, PLS in the sform and PRS in the qform",
    ),
    "no orientation": ("a.nii.gz", patched(sform_code=0, qform_code=0), "the header has no orientation"),
    "not zipped": (
        "a.nii.gz",
        lambda file: Path(file).write_bytes(Path(odd.save(f"{file}.nii", odd.voxels())).read_bytes()),
        "is not gzipped, though its name says so; rename it to a.nii",
    ),
    "zipped": (
        "a.nii",
        lambda file: Path(file).write_bytes(Path(odd.save(f"{file}.gz", odd.voxels())).read_bytes()),
        "is gzipped, though its name says that it is not; rename it to a.nii.gz",
    ),
    "a pair": (
        "a.img",
        lambda file: nib.save(nib.Nifti1Pair(odd.voxels(), odd.AFFINE), file),
        "is half of a pair of .hdr and .img; convert it to a.nii.gz",
    ),
    "Git LFS": (
        "a.nii.gz",
        lambda file: Path(file).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"),
        "is a pointer of Git LFS and no scan",
    ),
    "intercept NaN": (
        "a.nii.gz",
        patched(scl_slope=1, scl_inter=np.nan),
        "cannot be read (HeaderDataError: Valid slope but invalid intercept nan); put its header right",
    ),
    "mm said to be metres": (
        "a.nii.gz",
        lambda file: odd.save(file, odd.voxels(), unit="meter"),
        "voxels of 800 x 1500 x 3000 mm make a scan 15000 mm long; put the voxel size, or its unit, right",
    ),
    "mm said to be micrometres": (
        "a.nii.gz",
        lambda file: odd.save(file, odd.voxels(), unit="micron"),
        "voxels of 0.0008 x 0.0015 x 0.003 mm make a scan 0.015 mm long",
    ),
    "volumes": ("a.nii.gz", lambda file: odd.save(file, np.stack([odd.voxels()] * 3, -1)), "shape (9, 7, 5, 3) is not"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_readers_take_otherwise_is_refused_by_name(kind: str, tmp_path: Path) -> None:
    name, make, line = REFUSED[kind]
    file = str(tmp_path / name)
    make(file)
    with pytest.raises(InputError) as caught:
        check_cases([{"image": file}])
    assert str(caught.value).splitlines()[1].startswith(f"{file}: {line}")
    if name.endswith("nii.gz"):
        with pytest.raises(Exception) as read:
            LoadImaged("image", reader=NiftiReader)({"image": file})
        assert line in str(input_error_in(read.value))


@pytest.mark.parametrize("degrees", [44.99999, 45.0, 45.00001])
def test_forms_that_differ_by_rounding_alone_are_one_orientation(degrees: float, tmp_path: Path) -> None:
    """Halfway between two axes the last digit decides what an axis is called."""
    turn = nib.affines.from_matvec(nib.eulerangles.euler2mat(z=np.radians(degrees)))
    file = odd.save(tmp_path / "a.nii.gz", odd.voxels(), turn @ odd.AFFINE)
    near = nib.affines.from_matvec(nib.eulerangles.euler2mat(z=np.radians(90 - degrees + 0.00002)))
    other = odd.save(tmp_path / "b.nii.gz", odd.voxels(), turn @ odd.AFFINE, qform=near @ odd.AFFINE)
    assert [read_nifti(each).problems for each in (file, other)] == [[], []]


def test_suffixes_in_capitals_are_found_and_other_formats_are_told(tmp_path: Path, caplog) -> None:
    for folder, names in {"imagesTr": ("a_0000.NII.GZ", "b_0000.nii"), "labelsTr": ("a.nii.gz", "b.NII")}.items():
        (tmp_path / folder).mkdir()
        for name in (*names, "c.img", "c.hdr", "d.MHA", "notes.txt"):
            (tmp_path / folder / name).touch()
    pairs = pair_cases(find_images(tmp_path), find_labels(tmp_path))
    found = [(Path(case["image"]).name, Path(case["label"]).name) for case in pairs]
    assert found == [("a_0000.NII.GZ", "a.nii.gz"), ("b_0000.nii", "b.NII")]
    assert f"{tmp_path}: 3 passed over, such as {tmp_path}/imagesTr/c.hdr: neither NIfTI nor DICOM" in caplog.text
    assert f"{tmp_path}/labelsTr: 3 file(s) passed over, such as c.hdr" in caplog.text


def test_cases_whose_files_are_named_alike_are_named_by_their_folders(
    datasets: dict[str, Path], tmp_path: Path
) -> None:
    folder = odd.case_folders(datasets["btcv"], tmp_path / "kits")
    write_list(str(folder), "case_*/imaging.nii.gz", "case_*/segmentation.nii.gz", str(folder / "written.json"))
    by_pattern = find_cases(folder / "written.json")
    assert [case["case"] for case in by_pattern] == ["case_00000", "case_00001", "case_00002"]
    assert all(Path(case["image"]).parent == Path(case["label"]).parent for case in by_pattern)
    pairs = [{"image": f"case_0000{i}/imaging.nii.gz", "label": f"case_0000{i}/segmentation.nii.gz"} for i in range(3)]
    (folder / "list.json").write_text(json.dumps({"training": pairs}))
    assert find_cases(folder / "list.json") == by_pattern
    sites = [str(tmp_path / name) for name in ("one/a_0000.nii.gz", "one/b_0000.nii.gz", "two/a_0000.nii.gz")]
    assert [case["case"] for case in find_cases("", images=sites, labels=["1", "2", "3"])] == [
        "one_a",
        "one_b",
        "two_a",
    ]


def workflow(configs: Path, files: tuple[str, ...], data: Path, out: Path, **override: object) -> ConfigWorkflow:
    return ConfigWorkflow(
        workflow_type="train",
        config_file=[str(configs / f"{file}.json") for file in files],
        logging_file=False,
        dataset_dir=str(data),
        bundle_root=str(configs.parent),
        **{"ckpt_dir": str(out), "output_dir": str(out), **override},
    )


def refused(flow: ConfigWorkflow) -> list[str]:
    with pytest.raises(Exception) as caught:
        flow.initialize()
    error = input_error_in(caught.value)
    assert error is not None, caught.value
    return str(error).splitlines()[1:]


@pytest.mark.parametrize("files", [("train", "tiny"), ("train", "tiny", "evaluate")], ids=["train", "evaluate"])
def test_pre_training_takes_nothing_but_ct_in_hounsfield_units(files, datasets, tmp_path: Path) -> None:
    unsigned = odd.flat_folder(datasets["btcv"], tmp_path / "unsigned", lambda v: (v + 1024).clip(0))
    lines = refused(workflow(PRETRAIN, files, unsigned, tmp_path / "out"))
    count = 3 if "evaluate" not in files else 1
    assert len(lines) == count and all("look as if about 1000 were added" in line for line in lines)
    mixed = odd.flat_folder(datasets["btcv"], tmp_path / "mixed", with_labels=True)
    lines = refused(workflow(PRETRAIN, files, mixed, tmp_path / "out"))
    assert lines and all("/label000" in line and "looks like a label map" in line for line in lines)
    assert not (tmp_path / "out").exists()


def all_labels(data: Path) -> Iterator[Path]:
    yield from sorted(data.glob("labelsTr/*"))


def one_hot(data: Path) -> None:
    for file in all_labels(data):
        odd.rewrite(file, lambda v: np.stack([v == value for value in range(14)], -1).astype(np.uint8))


def second_channel(data: Path) -> None:
    for file in sorted(data.glob("images*/*_0000.nii.gz")):
        shutil.copy(file, str(file).replace("_0000", "_0001"))


def mirrored_labels(data: Path) -> None:
    for file in all_labels(data):
        odd.rewrite(file, lambda v: v[::-1], qform=odd.mirrored)


def without_orientation(data: Path) -> None:
    for file in (*all_labels(data), *data.glob("imagesTr/*")):
        odd.patch(file, sform_code=0, qform_code=0)


def tenths(data: Path) -> None:
    for file in data.glob("imagesTr/*"):
        odd.rewrite(file, lambda v: (v * 10).astype(np.int16))


ODD_SETS: dict[str, tuple[Callable[[Path], None], int, str]] = {
    "one-hot labels": (one_hot, 3, "take the argmax over it"),
    "two channels": (second_channel, 3, "has 2 channel(s), one a file, and the network takes 1; pass --network_def#in"),
    "labels with two orientations": (mirrored_labels, 3, "the header holds two orientations"),
    "no orientation": (without_orientation, 6, "the header has no orientation"),
    "tenths of HU": (tenths, 3, "values are not HU"),
}


@pytest.mark.parametrize("kind", ODD_SETS)
def test_a_training_set_of_another_kind_is_refused_at_once(kind: str, data: Path, tmp_path: Path) -> None:
    spoil, count, text = ODD_SETS[kind]
    spoil(data)
    lines = refused(workflow(BTCV, ("train", "tiny"), data, tmp_path / "out", pretrained_encoder=""))
    assert len(lines) == count and all(text in line for line in lines)
    assert not (tmp_path / "out").exists()


def test_odd_names_units_and_suffixes_train_and_are_reported(datasets: dict[str, Path], tmp_path: Path) -> None:
    """A folder a case whose name holds `$`, in metres, with suffixes in capitals."""
    folder = odd.case_folders(datasets["btcv"], tmp_path / "kits", "p$_{}$")
    for file in folder.glob("*/*.nii.gz"):
        odd.rewrite(file, form=lambda affine: odd.scaled(affine, 0.001), unit="meter")
        file.rename(str(file).replace(".nii.gz", ".NII.GZ"))
    file, out = tmp_path / "kits.json", tmp_path / "out"
    write_list(str(folder), "p*/imaging.NII.GZ", "p*/segmentation.NII.GZ", str(file))
    names = {"split#val_cases": ["p$_1$"]}
    flow = workflow(BTCV, ("train", "tiny"), file, out, pretrained_encoder="", epochs=1, num_samples=1, **names)
    flow.initialize()
    flow.run()
    record = json.loads((out / "model.json").read_text())
    assert sorted(record["train"]) == ["p$_0$", "p$_2$"] and list(record["validation"]) == ["p$_1$"]
    report = workflow(
        BTCV, ("train", "tiny", "evaluate"), file, out, overlap=0.0, **{**names, "output_dir": str(out / "e")}
    )
    report.initialize()
    report.run()
    assert (out / "e" / "p$_1$_evaluation.png").is_file()
    with (out / "e" / "dice.csv").open(newline="") as stream:
        assert [row[0] for row in csv.reader(stream)][:2] == ["case", "p$_1$"]


def test_labels_beyond_255_are_read_and_checked_as_they_are(data: Path) -> None:
    file = min(all_labels(data))
    odd.rewrite(file, lambda v: np.where(v > 0, v.astype(np.uint16) + 287, 0).astype(np.uint16))
    highest = int(np.asanyarray(nib.load(file).dataobj).max())
    assert highest > 255
    image = min(data.glob("imagesTr/*"))
    check_cases([{"image": str(image), "label": str(file)}], num_classes=highest + 1)
    with pytest.raises(InputError, match=f"label values .*{highest}.* are not among the {highest} classes"):
        check_cases([{"image": str(image), "label": str(file)}], num_classes=highest)
    assert int(LoadImaged("label", reader=NiftiReader)({"label": str(file)})["label"].max()) == highest


def test_labels_beyond_255_do_not_wrap_in_inference(tmp_path: Path) -> None:
    network = torch.nn.Conv3d(1, 300, 1)
    torch.nn.init.zeros_(network.weight)
    with torch.no_grad():
        network.bias.copy_(torch.arange(300.0))
        labels = SlidingWindowLabels(ROI)(prepared(write(tmp_path / "scan.nii.gz", *SCANS["LPS"])), network)
    assert set(labels.unique().tolist()) <= {0, 299} and 299 in labels


def test_interpolated_labels_are_warned_of(data: Path, caplog) -> None:
    """Rounded to integers, values between those of organ and background are other organs'."""
    label, good = list(all_labels(data))[:2]
    images = sorted(data.glob("imagesTr/*"))
    smooth = zoom(np.asanyarray(nib.load(label).dataobj).astype(float), 0.5, order=1)
    shape = nib.load(label).shape
    odd.rewrite(label, lambda v: np.rint(zoom(smooth, np.divide(shape, smooth.shape), order=1)).astype(np.uint8))
    check_cases([{"image": str(image), "label": str(file)} for image, file in zip(images, (label, good), strict=False)])
    assert re.search(rf"{label}: [2-6]\d% of the labelled voxels lie between a lower and a higher value", caplog.text)
    assert str(good) not in caplog.text
