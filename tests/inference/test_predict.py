from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor, decollate_batch, list_data_collate
from monai.data.meta_tensor import get_spatial_ndim
from monai.transforms import (
    Compose,
    EnsureChannelFirstd,
    Identityd,
    LoadImaged,
    Orientationd,
    SaveImaged,
    ScaleIntensityRanged,
    SpatialPadd,
    Zoomd,
)

from shared_networks.datasets.labels import LABEL_COLOURS
from shared_networks.datasets.scans import Source, find_scans
from shared_networks.errors import InputError
from shared_networks.figures.overlay import SaveOverlayd
from shared_networks.files import UNFINISHED
from shared_networks.inference import predict, save
from shared_networks.inference.predict import Scans, memory_estimate, one_case, output_names
from shared_networks.inference.save import SaveImageLabelsd, keep_largest_components, label_image, label_table
from shared_networks.transforms.spacing import Spacingd
from tests.conftest import full_disk
from tests.datasets.test_scans import ORIGIN, STRAIGHT, even, hounsfield, write_series

SHAPE = (14, 9, 11)
AFFINE = nib.affines.from_matvec([[0, 0, 3.1], [-1.2, 0, 0], [0, 1.7, 0]], [4, 5, -60])
NAMES = ["background", "liver", "left kidney"]
PREPARE = Compose(
    [LoadImaged("image"), EnsureChannelFirstd("image"), ScaleIntensityRanged("image", -175, 250, 0.0, 1.0, clip=True)]
)


def write(file: Path, values: np.ndarray | None = None, affine: np.ndarray = AFFINE) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(hounsfield(SHAPE) if values is None else values, affine), file)
    return file


def test_pictures_of_several_channels_show_the_first_and_say_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[tuple[float, str]] = []
    for name in ("overlay_figure", "preview_figure"):
        draw = getattr(save, name)

        def record(image: np.ndarray, *args: Any, draw: Any = draw, **named: Any) -> Any:
            shown.append((float(image.max()), named["title"]))
            return draw(image, *args, **named)

        monkeypatch.setattr(save, name, record)
    saver = SaveImageLabelsd(label_names=NAMES, output_dir=tmp_path)
    scan = np.stack([np.full(SHAPE, 40.0), np.full(SHAPE, 90.0)])
    for channels in (1, 2):
        assert saver.draw("ct", scan[:channels], np.ones(SHAPE, np.uint8), AFFINE) == [
            "ct_overlay.png",
            "ct_preview.png",
        ]
    assert shown == [(40, "ct")] * 2 + [(40, "ct   first of 2 channels")] * 2


def test_a_scan_that_fails_in_a_transform_is_said_by_what_it_failed_of(tmp_path: Path) -> None:
    write(tmp_path / "a.nii.gz")

    def fail(data: Any) -> Any:
        raise ValueError("a matrix that is\nsingular")

    data = Scans(find_scans(tmp_path), Compose([Compose([fail])]), (2.0, 2.0, 2.0), 3)
    assert list(data) == []
    expected = "failed (ValueError: a matrix that is singular); report this if other programs read the scan, else"
    assert data.failed == {str(tmp_path / "a.nii.gz"): f"{expected} export it again"}


def scans(folder: Path, **settings: Any) -> Scans:
    return Scans(find_scans(folder, "imagesTs"), PREPARE, (2.0, 2.0, 2.0), 3, **settings)


def test_scans_are_found_in_every_layout(tmp_path: Path) -> None:
    one = write(tmp_path / "flat" / "a.nii.gz")
    write(tmp_path / "flat" / "deep" / "b.nii")
    for name in ("imagesTr/x_0000.nii.gz", "imagesTs/y_0000.nii.gz", "labelsTs/y.nii.gz"):
        write(tmp_path / "nnunet" / name)
    assert [s.case for s in find_scans(tmp_path / "flat")] == ["flat/a", "flat/deep/b"]
    assert [s.case for s in find_scans(tmp_path / "nnunet", "imagesTs")] == ["imagesTs/y"]
    assert [s.case for s in find_scans(tmp_path / "nnunet")] == ["nnunet/imagesTr/x"]
    assert find_scans(one) == [Source("flat/a", (str(one),))]
    with pytest.raises(InputError, match="dataset_dir is not set"):
        find_scans("")


def test_files_are_scans_of_their_own_whatever_their_folders(tmp_path: Path) -> None:
    files = [str(tmp_path / name) for name in ("a/b/ct.nii", "c/b/ct.nii", "c/other_0000.nii")]
    data = Scans(files, PREPARE, (2.0, 2.0, 2.0), 3)
    assert [source.files for source in data.data] == [(file,) for file in files]
    inside = str(tmp_path).replace("/", "_").removeprefix("_")
    assert list(output_names(data.data).values()) == [f"{inside}_a_b_ct", f"{inside}_c_b_ct", "other"]


def test_names_are_short_where_they_can_be() -> None:
    sources = [Source(case, ()) for case in ("set/imagesTs/a", "set/p1/ct", "set/p2/ct")]
    assert list(output_names(sources).values()) == ["a", "set_p1_ct", "set_p2_ct"]


def test_a_scan_comes_as_monai_would_load_it(tmp_path: Path) -> None:
    file = write(tmp_path / "a.nii.gz")
    (item,) = scans(tmp_path)
    expected = PREPARE({"image": str(file)})["image"]
    assert torch.equal(item["image"].as_tensor(), expected.as_tensor())
    np.testing.assert_allclose(item["image"].affine, expected.affine)
    for name in ("original_affine", "spatial_shape"):
        np.testing.assert_allclose(item["image"].meta[name], expected.meta[name])
    assert item["scan"].dtype == torch.int16
    assert torch.equal(item["scan"][0].as_tensor(), torch.from_numpy(hounsfield(SHAPE)))
    assert item["name"] == "a"


@pytest.mark.parametrize("dtype", [">i2", "u2", "f8", "i4"])
def test_number_types_that_torch_lacks(dtype: str, tmp_path: Path) -> None:
    values = hounsfield(SHAPE).clip(-200 if dtype != "u2" else 0).astype(dtype)
    write(tmp_path / "a.nii", values)
    (item,) = scans(tmp_path, modality="CT" if dtype != "u2" else "MR")
    np.testing.assert_array_equal(item["scan"][0].numpy(), values)


def test_batches_of_one_share_memory_and_come_apart_again(tmp_path: Path) -> None:
    write(tmp_path / "a.nii.gz")
    (item,) = scans(tmp_path)
    batch = one_case([item])
    assert batch["image"].data_ptr() == item["image"].data_ptr()
    assert batch["image"].shape == (1, 1, *SHAPE)
    (back,) = decollate_batch(batch)
    for name in ("image", "scan"):
        assert isinstance(back[name], MetaTensor)
        assert torch.equal(back[name].as_tensor(), item[name].as_tensor())
        np.testing.assert_array_equal(back[name].affine, item[name].affine)
        assert back[name].meta["filename_or_obj"] == item[name].meta["filename_or_obj"]
    assert back["name"] == "a"


def test_batches_of_one_are_inverted_as_monais_are(tmp_path: Path) -> None:
    write(tmp_path / "a.nii.gz")
    data = scans(tmp_path)
    chain = [Orientationd("image", axcodes="RAS", labels=None), Zoomd("image", 1.5, keep_size=False)]
    data.transform = Compose([*PREPARE.transforms, *chain, SpatialPadd("image", (40, 40, 40))])
    (item,) = data
    ours, monais = (decollate_batch(collate([item]))[0]["image"] for collate in (one_case, list_data_collate))
    assert get_spatial_ndim(ours) == get_spatial_ndim(monais) == 3
    ours, monais = (data.transform.inverse({"image": image})["image"] for image in (ours, monais))
    np.testing.assert_allclose(ours.affine, AFFINE, atol=1e-5)
    np.testing.assert_array_equal(ours.affine, monais.affine)
    np.testing.assert_array_equal(ours.as_tensor(), monais.as_tensor())


def tilted() -> np.ndarray:
    affine = np.diag([1.0, 1.0, 3.0, 1.0])
    affine[1, 2] = 0.5
    return affine


def test_bad_scans_cost_only_themselves(tmp_path: Path) -> None:
    for name in ("a_good", "z_good"):
        write(tmp_path / f"{name}.nii.gz")
    (tmp_path / "broken.nii.gz").write_bytes(b"no scan")
    write(tmp_path / "four.nii.gz", np.stack([hounsfield(SHAPE)] * 2, -1))
    write(tmp_path / "no_hu.nii.gz", hounsfield(SHAPE) % 200)
    write(tmp_path / "air.nii.gz", hounsfield(SHAPE).clip(-1000, -300))
    write(tmp_path / "tilted.nii.gz", affine=tilted())
    nan = hounsfield(SHAPE).astype(np.float32)
    nan[1, 2, 3] = np.nan
    write(tmp_path / "nan.nii.gz", nan)
    flat = nib.Nifti1Image(hounsfield(SHAPE), np.diag([1.0, 1, 1, 1]))
    flat.header["pixdim"][3], flat.header["vox_offset"] = 0, 352
    (tmp_path / "flat.nii").write_bytes(flat.header.binaryblock + bytes(4) + hounsfield(SHAPE).tobytes("F"))
    resampling = Compose([*PREPARE.transforms, Spacingd("image", pixdim=(2.0, 2.0, 2.0))])
    data = Scans(find_scans(tmp_path), resampling, (2.0, 2.0, 2.0), 3)
    assert [item["name"] for item in data] == ["a_good", "z_good"]
    reasons = {Path(file).name.split(".")[0]: reason for file, reason in data.failed.items()}
    expected = {
        "broken": "cannot be read",
        "four": r"shape (14, 9, 11, 2) is not 3D",
        "no_hu": "wrong modality: values from 0 to 199 are not HU",
        "air": "values are not HU: nothing lies above",
        "tilted": "gantry tilt",
        "nan": "1 of 1386 voxels are NaN or infinite",
        "flat": "spacing",
    }
    assert {name: text for name, text in expected.items() if text not in reasons.get(name, "")} == {}
    assert all("\n" not in reason for reason in reasons.values())
    with pytest.raises(InputError, match=r"^7 of 9 scan\(s\) not segmented:\n"):
        data.report()


def test_a_scan_larger_than_the_memory_is_refused_unread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "a.nii.gz")
    monkeypatch.setattr(predict, "free_memory", lambda: 10_000_000)
    monkeypatch.setattr(predict, "read_scan", lambda *_: pytest.fail("was read"))
    data = scans(tmp_path)
    assert list(data) == []
    assert "14 x 9 x 11 voxels need about 0.6 GB beside the network, 0.0 GB are free" in next(
        iter(data.failed.values())
    )


def test_the_estimate_grows_with_the_cross_section_not_with_classes_times_length() -> None:
    sizes = [memory_estimate((512, 512, n), (0.8, 0.8, 2.5), (1.5, 1.5, 1.5), 14) for n in (300, 600, 1000)]
    assert 1.3e9 < sizes[0] < 3.0e9
    assert sizes[2] < 5e9


def test_largest_components() -> None:
    labels = np.zeros((9, 8, 7), np.uint8)
    labels[:3, :3, :3], labels[3, 3, 3] = 1, 1  # joined by a corner
    labels[6:, 6:, 6:], labels[0, 7, 0], labels[4:6, 0, 0] = 1, 3, 3
    kept = keep_largest_components(labels)
    expected = labels.copy()
    expected[6:, 6:, 6:], expected[0, 7, 0] = 0, 0
    np.testing.assert_array_equal(kept, expected)


def test_label_table_has_the_figures_colours() -> None:
    first, second = label_table(NAMES)
    assert (first["value"], first["name"]) == (1, "liver")
    assert "#{:02x}{:02x}{:02x}".format(*second["rgb"]) == LABEL_COLOURS[1]


@pytest.mark.parametrize("codes", [(1, 2), (0, 4), (3, 0)])
def test_geometry_is_that_of_the_file(codes: tuple[int, int], tmp_path: Path) -> None:
    source = nib.Nifti1Image(hounsfield(SHAPE).astype(np.float32), AFFINE)
    square = nib.affines.from_matvec(np.diag([1.5, -2, 3]), [1, 2, 3])  # a qform holds no shear
    source.set_sform(square, codes[0])
    source.set_qform(square, codes[1])
    source.header.set_xyzt_units("mm", "sec")
    source.header.set_slope_inter(2, -1024)
    nib.save(source, tmp_path / "a.nii.gz")
    labels = np.zeros(SHAPE, np.uint8)
    labels[3, 4, 5] = 2
    nib.save(label_image(labels, square, str(tmp_path / "a.nii.gz")), tmp_path / "out.nii.gz")
    there, out = nib.load(tmp_path / "a.nii.gz"), nib.load(tmp_path / "out.nii.gz")
    assert out.get_data_dtype() == np.uint8
    np.testing.assert_array_equal(out.affine, there.affine)
    for field in ("sform_code", "qform_code", "xyzt_units", "pixdim", "quatern_b", "srow_x"):
        np.testing.assert_array_equal(out.header[field], there.header[field])
    np.testing.assert_array_equal(out.dataobj, labels)


def saved(folder: Path, out: Path, **settings: Any) -> tuple[Scans, SaveImageLabelsd]:
    """A run over a folder with a network that labels all above 0 HU liver."""
    weights = out.parent / "model.pt"
    if not weights.exists():
        weights.touch()
    saver = SaveImageLabelsd(**{"label_names": NAMES, **settings}, output_dir=out, checkpoints=[weights])
    data = scans(folder, skip=saver.is_done, check=saver.check)
    for item in data:
        (case,) = decollate_batch(one_case([item]))
        case["organ_probability"] = (case["scan"][0] > 0).half().as_tensor()
        saver({**case, "pred": MetaTensor((case["scan"] > 0).to(torch.uint8).as_tensor(), meta=case["scan"].meta)})
    saver.finish(data)
    return data, saver


def test_results_are_complete_and_done_once(tmp_path: Path) -> None:
    scan = write(tmp_path / "in" / "a.nii.gz")
    out = tmp_path / "out"
    data, saver = saved(tmp_path / "in", out, overlay=True)
    assert isinstance(saver, SaveImaged)  # so that MONAI Label leaves it out
    assert sorted(file.name for file in out.iterdir()) == [
        "a_overlay.png",
        "a_preview.png",
        "a_seg.json",
        "a_seg.nii.gz",
        "report.json",
        "statistics.csv",
    ]
    labels = nib.load(out / "a_seg.nii.gz")
    np.testing.assert_array_equal(labels.affine, nib.load(scan).affine)
    np.testing.assert_array_equal(labels.dataobj, hounsfield(SHAPE) > 0)
    sidecar = json.loads((out / "a_seg.json").read_text())
    assert [label["name"] for label in sidecar["labels"]] == NAMES[1:]
    assert data.done == ["in/a"]
    table = (out / "statistics.csv").read_text()
    (out / "statistics.csv").unlink()
    assert saved(tmp_path / "in", out, overlay=True)[0].skipped == ["in/a"]
    assert (out / "statistics.csv").read_text() == table
    del sidecar["statistics"]  # of a version before
    (out / "a_seg.json").write_text(json.dumps(sidecar))
    assert saved(tmp_path / "in", out, overlay=True)[0].done == ["in/a"]
    assert saved(tmp_path / "in", out, overlay=True, settings={"overlap": 0.7})[0].done == ["in/a"]
    write(scan, hounsfield(SHAPE, seed=2))
    assert saved(tmp_path / "in", out, overlay=True, settings={"overlap": 0.7})[0].done == ["in/a"]
    (out / "a_seg.nii.gz").unlink()
    assert saved(tmp_path / "in", out, overlay=True, settings={"overlap": 0.7})[0].done == ["in/a"]


@pytest.mark.parametrize("file", ["report.json", "statistics.csv"])
def test_a_table_of_someone_else_is_not_replaced(file: str, tmp_path: Path) -> None:
    write(tmp_path / "in" / "a.nii.gz")
    out = tmp_path / "out"
    out.mkdir()
    (out / file).write_text('{"look_at": "mine"}')
    match = f"^{out / file}: is of no earlier run, as far as report.json says, and would be lost; give another --output"
    with pytest.raises(InputError, match=match):
        saved(tmp_path / "in", out)
    assert [path.name for path in out.iterdir()] == [file] and (out / file).read_text() == '{"look_at": "mine"}'


def test_volumes_are_in_ml_of_the_scan_s_own_voxels(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write(tmp_path / "in" / f"{name}.nii.gz", hounsfield(SHAPE, seed=ord(name)))
    saved(tmp_path / "in", tmp_path / "out", overlay=False)
    rows = list(csv.DictReader((tmp_path / "out" / "statistics.csv").open()))
    assert [(row["case"], row["organ"]) for row in rows] == [(case, organ) for case in "ab" for organ in NAMES[1:]]
    voxel = np.prod(np.linalg.norm(AFFINE[:3, :3], axis=0)) / 1000
    for case in "ab":
        values = hounsfield(SHAPE, seed=ord(case))
        first, second = (row for row in rows if row["case"] == case)
        np.testing.assert_allclose(float(first["volume_ml"]), (values > 0).sum() * voxel, atol=1e-3)
        np.testing.assert_allclose(float(first["mean_hu"]), values[values > 0].mean(), atol=0.06)
        assert (second["volume_ml"], second["mean_hu"], second["pieces"]) == ("0.0", "", "0")


def test_the_table_has_the_cases_of_all_runs_into_a_folder(tmp_path: Path) -> None:
    """Scans are segmented one by one, too. The report is of a run."""
    out = tmp_path / "out"

    def run(name: str, **settings: Any) -> list[str]:
        write(tmp_path / name / f"{name}.nii.gz", hounsfield(SHAPE, seed=ord(name)))
        saved(tmp_path / name, out, overlay=False, **settings)
        assert json.loads((out / "report.json").read_text())["segmented"] == 1
        rows = list(csv.DictReader((out / "statistics.csv").open()))
        return list(dict.fromkeys(row["case"] for row in rows if row["volume_ml"]))

    assert run("a") == ["a"]
    assert run("b", settings={"overlap": 0.7}) == ["a", "b"]
    assert run("c", label_names=["background", "heart"]) == ["c"]
    assert run("d", settings={"modality": "MR"}) == ["d"]
    (out / "a_seg.nii.gz").unlink()
    sidecar = json.loads((out / "b_seg.json").read_text())
    (out / "b_seg.json").write_text(json.dumps({**sidecar, "statistics": [{"organ": "liver"}]}))  # of a version before
    assert run("e") == ["e"]


def test_a_redone_case_keeps_nothing_of_other_settings(tmp_path: Path) -> None:
    write(tmp_path / "in" / "a.nii.gz")
    out = tmp_path / "out"
    saved(tmp_path / "in", out, overlay=True)
    sidecar = json.loads((out / "a_seg.json").read_text())
    (tmp_path / "a_other.txt").write_text("not a result")
    sidecar["files"] += ["../a_other.txt", "b_seg.nii.gz"]  # of a file that somebody has changed
    (out / "a_seg.json").write_text(json.dumps(sidecar))
    (out / "b_seg.nii.gz").write_text("of another case")
    saved(tmp_path / "in", out, overlay=False, settings={"overlap": 0.7})
    assert sorted(file.name for file in out.iterdir()) == [
        "a_seg.json",
        "a_seg.nii.gz",
        "b_seg.nii.gz",
        "report.json",
        "statistics.csv",
    ]
    assert (tmp_path / "a_other.txt").exists()


@pytest.mark.parametrize(
    ("organ", "file"),
    [
        ("prostate/uterus", "a_prostate_uterus.nii.gz"),
        ("../left kidney (both)", "a_.._left_kidney_both_.nii.gz"),
        ("Seg", "a_Seg_probability.nii.gz"),
        ("b/seg", "a_b_seg_probability.nii.gz"),  # labels of the other scan
    ],
)
def test_an_organ_of_any_name_has_a_file_of_its_own_in_the_folder(organ: str, file: str, tmp_path: Path) -> None:
    for name in ("a", "a_b"):
        write(tmp_path / "in" / f"{name}.nii.gz")
    out = tmp_path / "out"
    settings = {"label_names": ["background", organ, "liver"], "organ": organ, "overlay": False}
    assert saved(tmp_path / "in", out, **settings)[0].done == ["in/a", "in/a_b"]
    results = {f"{name}_seg.{ending}" for name in ("a", "a_b") for ending in ("json", "nii.gz")}
    tables = {"report.json", "statistics.csv"}
    assert {path.name for path in out.iterdir()} == {*results, *tables, file, f"a_b{file[1:]}"}
    assert {path.parent for path in tmp_path.rglob("*.nii.gz")} == {tmp_path / "in", out}
    assert nib.load(out / "a_seg.nii.gz").get_data_dtype() == np.uint8
    assert nib.load(out / file).get_data_dtype() == np.float32
    again, _ = saved(tmp_path / "in", out, **settings, settings={"overlap": 0.7})
    assert (again.done, again.failed) == (["in/a", "in/a_b"], {})


def test_a_redone_case_that_fails_midway_is_incomplete_also_for_the_old_settings(tmp_path: Path) -> None:
    write(tmp_path / "in" / "a.nii.gz", hounsfield((60, 50, 40)))
    saved(tmp_path / "in", tmp_path / "out", overlay=False)
    with full_disk(), pytest.raises(InputError, match="cannot be written"):
        saved(tmp_path / "in", tmp_path / "out", overlay=False, settings={"overlap": 0.7})
    assert "made_with" in json.loads((tmp_path / "out" / "a_seg.json").read_text())  # so its labels are no scan
    assert saved(tmp_path / "in", tmp_path / "out", overlay=False)[0].done == ["in/a"]


def test_a_dicom_series(tmp_path: Path) -> None:
    values = even(hounsfield())
    lps = write_series(tmp_path / "in" / "patient", values, STRAIGHT, ORIGIN)
    data, _ = saved(tmp_path / "in", tmp_path / "out", overlay=False)
    assert data.failed == {}
    labels = nib.load(tmp_path / "out" / "patient_seg.nii.gz")
    np.testing.assert_allclose(labels.affine, np.diag([-1, -1, 1, 1]) @ lps, atol=1e-4)
    np.testing.assert_array_equal(labels.dataobj, values > 0)
    assert (labels.header["sform_code"], labels.header["qform_code"]) == (1, 1)


def test_a_full_disk_leaves_nothing_half_written(tmp_path: Path) -> None:
    write(tmp_path / "in" / "a.nii.gz", hounsfield((60, 50, 40)))
    match = r"a_seg\.nii\.gz: cannot be written \(File too large\); make room"
    with full_disk(), pytest.raises(InputError, match=match):
        saved(tmp_path / "in", tmp_path / "out", overlay=False)
    assert [file.name for file in (tmp_path / "out").iterdir()] == [f"{UNFINISHED}a_seg.json"]  # whose they would be
    assert saved(tmp_path / "in", tmp_path / "out", overlay=False)[0].done == ["in/a"]
    assert not list((tmp_path / "out").glob(f"{UNFINISHED}*"))


def test_a_picture_of_evaluation_never_takes_the_place_of_inference_s(tmp_path: Path) -> None:
    """In one folder, of the same scan and of another one of the same name."""
    for folder in ("in", "other"):
        write(tmp_path / folder / "a.nii.gz", hounsfield(SHAPE, seed=len(folder)))
    out = tmp_path / "out"
    draw = SaveOverlayd(image_key="scan", label_names=NAMES, output_dir=out)
    for folder in ("other", "in", "other"):
        (item,) = scans(tmp_path / folder)
        draw({**item, "pred": (item["scan"] > 0).to(torch.uint8)})
        if folder == "in":
            assert saved(tmp_path / "in", out)[0].done == ["in/a"]
            ours = (out / "a_overlay.png").read_bytes()
    assert (out / "a_overlay.png").read_bytes() == ours != (out / "a_evaluation.png").read_bytes()
    assert "a_overlay.png" in json.loads((out / "a_seg.json").read_text())["files"]
    assert saved(tmp_path / "in", out)[0].skipped == ["in/a"]
    assert "is a result of another scan" in "".join(saved(tmp_path / "other", out)[0].failed.values())


def test_preprocessing_without_a_loader_runs_whole(tmp_path: Path) -> None:
    write(tmp_path / "a.nii.gz")
    data = Scans(find_scans(tmp_path), Compose([Identityd("image")]), (2.0, 2.0, 2.0), 3)
    assert [item["name"] for item in data] == ["a"]
