from __future__ import annotations

import gzip
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from monai.transforms import Compose, EnsureChannelFirstd, LoadImaged

from shared_networks.datasets.nifti import read_nifti
from shared_networks.datasets.validate import check_cases, image_problems, side_problems
from shared_networks.errors import InputError

SHAPE = (9, 7, 5)
LPS = np.array([[-1.5, 0, 0, 20], [0, -0.8, 0, 30], [0, 0, 3, -40], [0, 0, 0, 1]])
LPS_TEXT = "[[-1.5, 0.0, 0.0, 20.0], [0.0, -0.8, 0.0, 30.0], [0.0, 0.0, 3.0, -40.0]]"
TILT = np.array([[1, 0, 0], [0, np.cos(0.2), -np.sin(0.2)], [0, np.sin(0.2), np.cos(0.2)]])
OBLIQUE = nib.affines.from_matvec(TILT @ np.diag([1.5, 0.8, 3.0]), [1, 2, 3])
NIFTI_OFFSETS = {"sform_code": 254, "qform_code": 252, "pixdim3": 88, "srow_z": 312, "vox_offset": 108}


def hounsfield(shape=SHAPE, seed=0) -> np.ndarray:
    return np.random.default_rng(seed).integers(-1000, 1000, shape).astype(np.int16)


def organs(shape=SHAPE) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 4, shape).astype(np.uint8)


@pytest.fixture
def save(tmp_path: Path):
    def save(name: str, values: np.ndarray, affine: np.ndarray = LPS) -> str:
        nib.save(nib.Nifti1Image(values, affine), tmp_path / name)
        return str(tmp_path / name)

    return save


def patch_header(file: str, field: str, value: np.ndarray) -> None:
    """Overwrites bytes of a .nii header, because nibabel would not write a wrong one."""
    content = bytearray(Path(file).read_bytes())
    start = NIFTI_OFFSETS[field]
    content[start : start + value.nbytes] = value.tobytes()
    Path(file).write_bytes(content)


def problems(cases: list[dict], **settings) -> list[str]:
    with pytest.raises(InputError) as caught:
        check_cases(cases, **settings)
    heading, *lines = str(caught.value).splitlines()
    assert heading.startswith(f"{len(lines)} problem(s) in ")
    return lines


@pytest.mark.parametrize("affine", [LPS, OBLIQUE], ids=["LPS", "oblique"])
def test_good_cases_come_back_unchanged(save, affine, caplog):
    blocks = np.zeros(SHAPE, np.uint8)
    blocks[1:4], blocks[5:8, :3], blocks[5:8, 4:] = 1, 2, 3
    case = {"image": save("a_0000.nii.gz", hounsfield(), affine), "label": save("a.nii.gz", blocks, affine)}
    second = {"image": [save(f"b_000{c}.nii", hounsfield(seed=1), affine) for c in range(2)], "label": case["label"]}
    cases = [case, second, case]
    copy = [dict(c) for c in cases]
    assert check_cases(cases, num_classes=4) is cases
    assert cases == copy
    assert caplog.text == ""


def test_unlabelled_scaled_and_float_scans_are_good(save):
    scaled = nib.Nifti1Image(hounsfield().astype(np.float32), LPS)
    scaled.header.set_data_dtype(np.int16)
    scaled.header.set_slope_inter(0.5, -1024)
    file = save("a_0000.nii.gz", hounsfield())
    nib.save(scaled, file)
    assert nib.load(file).dataobj.inter == -1024
    check_cases([{"image": file}, {"image": save("b.nii", hounsfield().astype(np.float64))}])


def test_a_fourth_axis_of_length_one_is_what_monai_makes_the_channel(save):
    image, label = save("a_0000.nii.gz", hounsfield((*SHAPE, 1))), save("a.nii.gz", organs())
    assert nib.load(image).shape == (9, 7, 5, 1)
    check_cases([{"image": image, "label": label}], num_classes=4)
    loaded = Compose([LoadImaged("image"), EnsureChannelFirstd("image")])({"image": image})["image"]
    assert loaded.shape == (1, 9, 7, 5)
    np.testing.assert_allclose(loaded.affine, LPS, atol=1e-6)
    np.testing.assert_array_equal(loaded[0], hounsfield((*SHAPE, 1))[..., 0])


def test_no_case_is_refused():
    with pytest.raises(InputError, match="no case to check; look at dataset_dir"):
        check_cases([])


def test_missing_file(tmp_path):
    file = f"{tmp_path}/a_0000.nii.gz"
    assert problems([{"image": file}]) == [f"{file}: no such file; correct the path or remove the case"]


def test_truncated_gzip_is_found(save):
    file = save("a_0000.nii.gz", hounsfield((60, 50, 40)))
    content = Path(file).read_bytes()
    Path(file).write_bytes(content[: len(content) // 2])
    [line] = problems([{"image": file}])
    assert line.startswith(f"{file}: cannot be read (EOFError: Compressed file ended before the end-of-stream marker")
    assert line.endswith("; copy or download it again")


def test_other_unreadable_files(save, tmp_path):
    raw = save("raw.nii", hounsfield())
    Path(raw).write_bytes(Path(raw).read_bytes()[:-100])
    damaged = save("damaged.nii.gz", hounsfield((60, 50, 40)))
    content = bytearray(Path(damaged).read_bytes())
    content[len(content) // 2] ^= 1
    Path(damaged).write_bytes(content)
    assert nib.load(damaged).get_fdata().shape == (60, 50, 40)  # nibabel, and so MONAI, takes it
    text = tmp_path / "text.nii.gz"
    text.write_text("no gzip")
    empty = tmp_path / "empty.nii"
    empty.touch()
    other = tmp_path / "other.mgz"
    nib.save(nib.MGHImage(hounsfield(), LPS), other)
    lines = problems([{"image": str(file)} for file in (raw, damaged, text, empty, other)])
    assert [line.split(":")[0] for line in lines] == [raw, damaged, str(text), str(empty), str(other)]
    assert "(OSError: Expected 630 bytes, got 530 bytes from" in lines[0]
    assert "cannot be read (BadGzipFile: CRC check failed" in lines[1]
    assert "(BadGzipFile: Not a gzipped file" in lines[2]
    assert "(ImageFileError: empty file)" in lines[3]
    assert "cannot be read (" in lines[4]


@pytest.mark.parametrize("offset", [0, 348, 352, 400])
def test_voxels_begin_behind_the_header(save, offset):
    """Where the file says that they begin earlier, each program reads others."""
    file = save("a_0000.nii", hounsfield())
    patch_header(file, "vox_offset", np.float32(offset))
    content = bytearray(Path(file).read_bytes())
    Path(file).write_bytes(content[:352] + bytes(max(0, offset - 352)) + content[352:])
    if offset < 352:
        [line] = problems([{"image": file}])
        assert line.startswith(f"{file}: cannot be read (HeaderDataError: vox") and f" {offset}" in line
    else:
        np.testing.assert_array_equal(read_nifti(file).values, hounsfield())


def test_voxels_of_nifti_2_begin_behind_its_longer_header(save, tmp_path):
    file = tmp_path / "a.nii.gz"
    content = bytearray(nib.Nifti2Image(hounsfield(), LPS).to_bytes())
    file.write_bytes(gzip.compress(bytes(content)))
    np.testing.assert_array_equal(read_nifti(str(file)).values, hounsfield())
    content[168:176] = bytes(8)  # vox_offset
    file.write_bytes(gzip.compress(bytes(content)))
    for voxels in (True, False):
        assert read_nifti(str(file), voxels).problems == [
            "cannot be read (HeaderDataError: vox_offset is 0, and voxels begin behind the header, at 544 or later); "
            "put its header right"
        ]


@pytest.mark.parametrize("shape", [(9, 7), (9, 7, 5, 3), (9, 7, 5, 1, 2)])
def test_images_that_are_not_3d(save, shape):
    file = save("a_0000.nii.gz", hounsfield(shape))
    [line] = problems([{"image": file}])
    assert line.startswith(f"{file}: shape {shape} is not 3D; save each volume as a file of its own")


@pytest.mark.parametrize("spacing", [0.0, -3.0, np.nan])
def test_spacings_that_nibabel_would_mend_silently(save, spacing):
    file = save("a_0000.nii", hounsfield())
    patch_header(file, "pixdim3", np.float32([spacing]))
    expected = f"{file}: spacing (1.5, 0.8, {spacing}) mm in pixdim is not positive; write the true one into the header"
    assert problems([{"image": file}]) == [expected]


@pytest.mark.parametrize("row", [[0, 0, 0, -40], [0, 0, np.nan, -40]])
def test_singular_and_nan_affines(save, row):
    file = save("a_0000.nii", hounsfield())
    patch_header(file, "srow_z", np.float32(row))
    text = f"[[-1.5, 0.0, 0.0, 20.0], [0.0, -0.8, 0.0, 30.0], {[float(value) for value in row]}]"
    expected = f"{file}: affine {text} is singular or not finite; write the true one into the header"
    assert problems([{"image": file}]) == [expected]


def test_header_whose_spacing_makes_monai_drop_the_affine(save):
    file = save("a_0000.nii", hounsfield(), OBLIQUE)
    patch_header(file, "pixdim3", np.float32([2.0]))
    [line] = problems([{"image": file}])
    loaded = LoadImaged("image")({"image": file})["image"]
    np.testing.assert_allclose(np.linalg.norm(loaded.affine[:3, :3], axis=0), [1.5, 0.8, 2.0], rtol=1e-6)
    np.testing.assert_allclose(nib.load(file).affine, OBLIQUE, atol=1e-6)
    rows = [(np.round(affine[:3], 4) + 0.0).tolist() for affine in (nib.load(file).affine, loaded.affine.numpy())]
    assert f"the header holds two affines, {rows[0]} and by its spacing" in line
    assert f"which MONAI uses, {rows[1]}; write the true one into both sform and qform" in line


def test_label_on_another_grid(save):
    moved = LPS.copy()
    moved[2, 3] = -38.5
    case = {"image": save("a_0000.nii.gz", hounsfield()), "label": save("a.nii.gz", organs((9, 7, 6)), moved)}
    shape, affine = problems([case], num_classes=4)
    assert shape == (
        f"{case['label']}: shape (9, 7, 6) is not (9, 7, 5) as in {case['image']}; resample it to the image's grid"
    )
    moved_text = LPS_TEXT.replace("-40.0", "-38.5")
    assert affine.startswith(f"{case['label']}: affine {moved_text} is not {LPS_TEXT} as in {case['image']}; resample")


def test_channel_on_another_grid(save):
    image = [save("a_0000.nii.gz", hounsfield()), save("a_0001.nii.gz", hounsfield(), OBLIQUE)]
    [line] = problems([{"image": image}])
    assert line.startswith(f"{image[1]}: affine ") and f"is not {LPS_TEXT} as in {image[0]}" in line
    assert "a_0000.nii.gz, a_0001.nii.gz were read as channels of one case: if each is a case, end all names" in line


@pytest.mark.parametrize(("shift", "accepted"), [(0.0007, True), (0.0009, False)])
def test_affines_agree_to_a_thousandth_of_the_smallest_voxel_size(save, shift, accepted):
    moved = LPS.copy()
    moved[0, 3] = 0.0  # float32 headers cannot hold the shift beside 20
    near = moved.copy()
    near[0, 3] = shift
    case = {"image": save("a_0000.nii.gz", hounsfield(), moved), "label": save("a.nii.gz", organs(), near)}
    if accepted:
        check_cases([case], num_classes=4)
    else:
        assert len(problems([case], num_classes=4)) == 1


def test_label_values_that_are_no_classes(save):
    high, low = organs().astype(np.int16), organs().astype(np.int16)
    high[0, :3, 0] = [4, 200, 4]
    low[0, 0, 0] = -1
    cases = [
        {"image": save("a_0000.nii.gz", hounsfield()), "label": save("a.nii.gz", high)},
        {"image": save("b_0000.nii.gz", hounsfield(seed=1)), "label": save("b.nii.gz", low)},
    ]
    fix = "are not among the 4 classes, 0 to 3; map them to those or change the number of classes"
    expected = [f"{cases[0]['label']}: label values 4, 200 {fix}", f"{cases[1]['label']}: label values -1 {fix}"]
    assert problems(cases, num_classes=4) == expected
    check_cases(cases)
    many = {"image": cases[0]["image"], "label": save("many.nii", np.arange(315, dtype=np.int16).reshape(SHAPE))}
    assert "label values 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, ... are not" in problems([many], num_classes=4)[0]


def test_label_values_that_are_not_integers(save):
    values = organs().astype(np.float32)
    image = save("a_0000.nii.gz", hounsfield())
    check_cases([{"image": image, "label": save("whole.nii.gz", values)}], num_classes=4)
    values[0, 0, :3] = [0.5, 1.25, 0.5]
    label = save("a.nii.gz", values)
    expected = f"{label}: label values 0.5, 1.25 are not integers; resample labels with nearest neighbour"
    assert problems([{"image": image, "label": label}], num_classes=4) == [expected]


def test_label_values_with_noise_are_printed_with_it(save):
    values = organs().astype(np.float32)
    values[0, 0, :4] = np.float32([1, 2, 3, 3]) + np.float32([1e-6, 1e-6, -1e-6, -1e-6])
    case = {"image": save("a_0000.nii.gz", hounsfield()), "label": save("a.nii.gz", values)}
    expected = "label values 1.000001, 2.000001, 2.999999 are not integers, but for noise; round them"
    assert problems([case], num_classes=4) == [f"{case['label']}: {expected}"]


def test_another_modality_is_advised_where_it_can_be_right():
    body = np.random.default_rng(2).normal(40, 30, (12, 10, 8)).round()
    body[:3], body[3:5] = -1000, -100
    shifted, mr = body + 1024, np.abs(body) % 400
    line = "values from 24 to 1156 are not HU, as hardly any is below -50, and look as if about 1000 were added"
    for declared in (False, True):
        assert image_problems(shifted, "CT", declared) == [f"{line}; put the rescale intercept right"]
        assert image_problems((shifted).astype(np.uint16), "CT", declared) == image_problems(shifted, "CT")
    spread = np.random.default_rng(3).uniform(0, 1200, (12, 10, 8))  # of which a part lies where tissue + 1024 does
    assert "pass --modality MR" in image_problems(spread, "CT")[0]
    [other], [declared] = image_problems(mr, "CT"), image_problems(mr, "CT", declared=True)
    assert other.startswith("wrong modality") and "pass --modality MR" in other and "--modality" not in declared
    [other], [declared] = image_problems(body, "MR"), image_problems(body, "MR", declared=True)
    assert "pass --modality CT or remove the case" in other and declared.endswith("as in HU; remove the case")


def test_label_that_is_all_background_is_only_a_warning(save, caplog):
    case = {"image": save("a_0000.nii.gz", hounsfield()), "label": save("a.nii.gz", np.zeros(SHAPE, np.uint8))}
    check_cases([case], num_classes=4)
    assert f"{case['label']}: the label is all background" in caplog.text


def test_voxels_that_are_nan_or_infinite(save):
    values = hounsfield().astype(np.float32)
    values[0, 0, :3] = [np.nan, np.inf, -np.inf]
    image, label = save("a_0000.nii.gz", values), save("a.nii.gz", values)
    fix = "3 of 315 voxels are NaN or infinite; replace them or export the file again"
    assert problems([{"image": image, "label": label}]) == [f"{image}: {fix}", f"{label}: {fix}"]


@pytest.mark.parametrize("value", [0, -1024])
def test_images_of_one_value(save, value):
    file = save("a_0000.nii.gz", np.full(SHAPE, value, np.int16))
    expected = f"{file}: all voxels are {value}, so it is no scan; export it again or remove the case"
    assert problems([{"image": file}]) == [expected]


@pytest.mark.parametrize(
    ("values", "modality", "reason"),
    [
        (
            hounsfield().clip(0, 500),
            "CT",
            "wrong modality: values from 0 to 500 are not HU, as hardly any is below -50",
        ),
        (
            hounsfield().clip(-1000, 300),
            "MR",
            "wrong modality: 23% of voxels are below -500, as in HU; pass --modality CT",
        ),
        (hounsfield().clip(-1000, -175), "CT", "no voxel is above -175, where intensity_range begins"),
    ],
)
def test_values_of_another_modality_or_range(save, values, modality, reason):
    file = save("a_0000.nii.gz", values)
    [line] = problems([{"image": file}], modality=modality, intensity_range=(-175, 250))
    assert line.startswith(f"{file}: {reason}")
    check_cases([{"image": file}])
    other = {"CT": "MR", "MR": "CT"}[modality]
    if "modality" in reason:
        check_cases([{"image": file}], modality=other, intensity_range=(-175, 250))


def test_a_modality_that_is_not_known(save):
    with pytest.raises(InputError, match="modality is 'ct'; pass --modality CT"):
        check_cases([{"image": save("a_0000.nii.gz", hounsfield())}], modality="ct")


def test_axes_that_are_not_at_right_angles(save):
    """Of a labelled image, as results must come back to its grid; by more than the rounding of headers."""
    tilted, rounded = OBLIQUE.copy(), OBLIQUE.copy()
    tilted[:3, 2] += 0.02 * OBLIQUE[:3, 1]
    rounded[:3, 2] += 0.01 * OBLIQUE[:3, 1]
    for affine, lines in ((tilted, 1), (rounded, 0)):
        image, label = save("a_0000.nii", hounsfield((9, 7, 6)), affine), save("a.nii", organs((9, 7, 6)), affine)
        check_cases([{"image": image}])
        if lines:
            [line] = problems([{"image": image, "label": label}])
            assert line.startswith(f"{image}: affine [[")
            assert line.endswith("as of a CT with gantry tilt; resample the scan and its label with a tool that "
                                 "corrects tilt")  # fmt: skip
        else:
            check_cases([{"image": image, "label": label}])


def test_a_scan_larger_than_the_memory_is_refused_unread(save):
    file = save("a_0000.nii", hounsfield())
    content = bytearray(Path(file).read_bytes())
    content[42:48] = np.array([20000] * 3, np.int16).tobytes()  # its dimensions; there is nothing behind the header
    Path(file).write_bytes(content)
    [line] = problems([{"image": file}])
    assert line.startswith(f"{file}: 20000 x 20000 x 20000 voxels take 16000.0 GB, ")
    assert line.endswith(" GB are free; crop the scan or remove the case")


def test_voxels_that_are_no_numbers(save):
    colour = np.zeros(SHAPE, dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])
    [line] = problems([{"image": save("a_0000.nii.gz", colour)}])
    assert "are no numbers; save one number a voxel" in line


def test_everything_is_listed_at_once_and_each_file_once(save, tmp_path):
    bad_label = organs()
    bad_label[0, 0, 0] = 9
    flat, zero = save("flat_0000.nii.gz", hounsfield((9, 7))), save("zero_0000.nii.gz", np.zeros(SHAPE, np.int16))
    good, label = save("good_0000.nii.gz", hounsfield()), save("label.nii.gz", bad_label, OBLIQUE)
    missing = str(tmp_path / "missing_0000.nii.gz")
    cases = [{"image": flat}, {"image": zero}, {"image": good, "label": label}, {"image": missing}]
    lines = problems(cases * 2, num_classes=4)
    assert [line.split(":")[0] for line in lines] == [flat, zero, missing, label, label]
    words = ["is not 3D", "all voxels are 0", "no such file", "label values 9", "affine"]
    assert all(word in line for word, line in zip(words, lines, strict=True))
    with pytest.raises(InputError, match=r"^5 problem\(s\) in 5 file\(s\):\n"):
        check_cases(cases, num_classes=4)


NAMES = ["background", "liver", "spleen", "right kidney", "left kidney"]


def body(swapped: bool = False, shape: tuple[int, int, int] = (140, 90, 70)) -> np.ndarray:
    """A label on an LPS grid, whose first axis runs from right to left: liver and right kidney come first."""
    label = np.zeros(shape, np.uint8)
    third, half = shape[0] // 3, shape[1] // 2
    label[:third, :half], label[-third:, :half] = 1, 2
    label[:third, half:], label[-third:, half:] = 3, 4
    return label[::-1].copy() if swapped else label


@pytest.mark.parametrize("affine", [LPS, OBLIQUE @ np.diag([-1, 1, 1, 1])], ids=["LPS", "oblique"])
def test_sides_are_the_patients(save, affine, caplog):
    image = save("a_0000.nii.gz", hounsfield((140, 90, 70)), affine)
    good = {"image": image, "label": save("a.nii.gz", body(), affine)}
    swapped = {"image": image, "label": save("b.nii.gz", body(swapped=True), affine)}
    assert check_cases([good], num_classes=5, label_names=NAMES) == [good]
    [line] = problems([good, swapped], num_classes=5, label_names=NAMES)
    assert line == (
        f"{swapped['label']}: left and right are swapped (liver is to the left of spleen, "
        "right kidney is to the left of left kidney); put the affine or the labels right, pass --label_names "
        "@dataset_labels if the data set has its labels in another order, or pass --datalist#check#sides False if the "
        "patient has situs inversus"
    )
    check_cases([swapped], num_classes=5, label_names=NAMES, sides=False)
    check_cases([swapped], num_classes=5)
    one_side = save("c.nii.gz", np.where(body(swapped=True) == 1, 1, 0).astype(np.uint8), affine)
    check_cases([{"image": image, "label": one_side}], num_classes=5, label_names=NAMES)
    assert "no label has a voxel of: 2 spleen, 3 right kidney, 4 left kidney" in caplog.text


def test_sides_that_differ_by_little_tell_nothing():
    def wrong_by(distance: float) -> list[str]:
        return side_problems({1: np.zeros(3), 2: np.array([distance, 50.0, 0.0])}, [(1, 2)], NAMES)

    assert wrong_by(10.0) == wrong_by(-100.0) == []
    assert len(wrong_by(10.5)) == 1


def test_an_organ_of_one_voxel_is_not_taken_for_absent(save, caplog):
    label = body()
    label[1, 1, 1] = 5
    case = {"image": save("a_0000.nii.gz", hounsfield(label.shape)), "label": save("a.nii.gz", label)}
    check_cases([case], num_classes=7, label_names=[*NAMES, "adrenal gland", "pancreas"])
    assert "no label has a voxel of: 6 pancreas" in caplog.text


def test_a_label_that_is_mirrored_to_its_image_is_called_so(save):
    mirror = LPS @ np.diag([-1.0, 1, 1, 1])
    mirror[0, 3] = LPS[0, 3] + LPS[0, 0] * (SHAPE[0] - 1)
    case = {"image": save("a_0000.nii.gz", hounsfield()), "label": save("a.nii.gz", organs(), mirror)}
    [line] = problems([case], num_classes=4)
    assert "and mirrored to it, so that left and right may be swapped; resample" in line


def test_copies_of_a_labelled_image_are_refused(save):
    files = [save(f"{name}_0000.nii.gz", hounsfield(seed=name == "b")) for name in "abc"]
    cases = [{"image": file, "label": save(f"{n}.nii.gz", organs())} for n, file in zip("abc", files, strict=True)]
    expected = [f"{files[2]}: the same voxels as {files[0]}; remove one, or a scan may both train and test"]
    assert problems(cases, num_classes=4) == expected
    check_cases([{"image": file} for file in files])  # without labels a copy does no harm
