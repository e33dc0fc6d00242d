"""Folders as people have them: each scan is read as its header says, refused by name, or passed over and counted."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle import ConfigWorkflow

from shared_networks.datasets.dicom import BadScanError
from shared_networks.datasets.scans import Source, Sources, find_scans, names_labels, read_scan
from shared_networks.errors import InputError, input_error_in
from shared_networks.inference import save as saving
from shared_networks.inference.predict import output_names
from shared_networks.inference.save import label_image
from tests.conftest import ROOT

from .odd_dicom import SPACING, ct, dataset, spread, write, write_enhanced, write_series, write_study

BUNDLE = ROOT / "hi_end_mae_btcv_seg"
AFFINE = np.diag([-SPACING[0], -SPACING[1], SPACING[2], 1.0])
AFFINE[:3, 3] = 20, 30, 7


def save(file: Path, values: np.ndarray | None = None, affine: np.ndarray = AFFINE) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(ct() if values is None else values, affine), file)
    return file


def reason(folder: Path) -> str:
    """Why the only scan of a folder is refused."""
    (source,) = find_scans(folder)
    with pytest.raises(BadScanError) as caught:
        read_scan(source, "CT")
    return str(caught.value)


# DICOM


@pytest.mark.parametrize("frames", [[*range(16)], [*range(15, -1, -1)], [5, 3, 9, *range(10, 16), 0, 1, 2, 4, 6, 7, 8]])
def test_a_multi_frame_ct_is_read_frame_by_frame(frames: list[int], tmp_path: Path) -> None:
    """In whatever order frames are stored, each with its own slope."""
    write_enhanced(tmp_path / "ENH.dcm", frames, ct())
    (source,) = find_scans(tmp_path)
    scan = read_scan(source, "CT")
    np.testing.assert_array_equal(scan.image[0], ct() // 2 * 2)
    np.testing.assert_allclose(scan.affine, AFFINE, atol=1e-6)


def test_frames_that_are_missing_are_missing_slices(tmp_path: Path) -> None:
    write_enhanced(tmp_path / "ENH.dcm", [k for k in range(16) if k not in (6, 7)])
    assert reason(tmp_path) == "slices are missing: a gap of 12 mm where others have 4 mm"


def test_two_volumes_in_one_file_are_refused(tmp_path: Path) -> None:
    write_enhanced(tmp_path / "ENH.dcm", stacks=2)
    assert "2 volumes in one series" in reason(tmp_path)


def test_without_pixel_spacing_the_size_of_a_voxel_is_unknown(tmp_path: Path) -> None:
    write_series(tmp_path / "series", PixelSpacing=None)
    write_enhanced(tmp_path / "enhanced" / "ENH.dcm", spacing=False)
    for folder in ("series", "enhanced"):
        assert reason(tmp_path / folder) == "no geometry: slices have no PixelSpacing; export the series again"


@pytest.mark.parametrize("folders", [2, 16])
def test_a_series_in_several_folders_is_one_scan(folders: int, tmp_path: Path) -> None:
    files = write_series(tmp_path / "study" / "all")
    spread(files, [tmp_path / "study" / f"{index:02d}" for index in range(folders)])
    (source,) = find_scans(tmp_path / "study")
    assert source.case == "study" and len(source.files) == 16
    np.testing.assert_array_equal(read_scan(source, "CT").image[0], ct())


def test_series_without_an_id_are_scans_by_folder(tmp_path: Path) -> None:
    for name in "ab":
        write_series(tmp_path / name, SeriesInstanceUID=None)
    sources = find_scans(tmp_path)
    assert [(source.case, len(source.files)) for source in sources] == [
        (f"{tmp_path.name}/{name}", 16) for name in "ab"
    ]
    assert all(np.array_equal(read_scan(source, "CT").image[0], ct()) for source in sources)


def test_copies_of_a_series_stay_apart(tmp_path: Path) -> None:
    for file in write_series(tmp_path / "a"):
        copy = tmp_path / "b" / file.name
        copy.parent.mkdir(exist_ok=True)
        copy.write_bytes(file.read_bytes())
    assert [source.case for source in find_scans(tmp_path)] == [f"{tmp_path.name}/a", f"{tmp_path.name}/b"]


def test_what_lies_beside_a_ct_is_passed_over(tmp_path: Path) -> None:
    write_study(tmp_path)
    sources = find_scans(tmp_path)
    assert [(source.case, len(source.files)) for source in sources] == [(tmp_path.name, 16)]
    np.testing.assert_array_equal(read_scan(sources[0], "CT").image[0], ct())
    reasons = {Path(path).name[:2]: why for path, why in sources.passed_over.items()}
    assert reasons == {
        "SC": "1 slice(s), such as a localiser",
        "DO": "a secondary capture, such as a dose sheet",
        "VR": "colour pictures",
        "SR": "X-Ray Radiation Dose SR Storage, no image",
    }


def test_one_slice_is_no_data_set_and_a_multi_frame_file_is(tmp_path: Path) -> None:
    file = write_series(tmp_path / "d")[3]
    with pytest.raises(InputError, match=rf"one slice of a DICOM series; give the folder of all, {tmp_path}/d"):
        find_scans(file)
    (source,) = find_scans(write_enhanced(tmp_path / "e" / "ENH.dcm"))
    assert source.case == "e/ENH" and read_scan(source, "CT").image.shape == (1, 24, 20, 16)
    (tmp_path / "list.json").write_text('["e/ENH.dcm"]')
    (source,) = find_scans(tmp_path / "list.json")
    assert source.case.endswith("/e/ENH") and read_scan(source, "CT").image.shape == (1, 24, 20, 16)


def test_a_multi_frame_file_given_also_by_its_folder_is_one_scan(tmp_path: Path) -> None:
    file = write_enhanced(tmp_path / "e" / "ENH.dcm")
    for paths in ([file, file.parent], [file.parent, file]):
        (source,) = find_scans(paths)
        assert source.case == "e" and source.files == (str(file),)


def test_a_lonely_localiser_is_said_to_be_one(tmp_path: Path) -> None:
    write(dataset(ct()[:, :, 3], (0, 0, 0), "1.2.3.5"), tmp_path / "SCOUT")
    assert reason(tmp_path) == "too small: a series of 1 slice(s), such as a localiser"


# Folders and names


@pytest.mark.parametrize(
    ("name", "labels"),
    [
        *[
            (name, True)
            for name in ("labelsTr", "labels", "Segmentations", "seg", "liver_mask", "label-maps", "masks2")
        ],
        *[(name, False) for name in ("Segal_J", "Labelle_M", "Maskell_K", "imagesTr", "segmented_by_hand")],
    ],
)
def test_only_words_name_folders_of_labels(name: str, labels: bool) -> None:
    assert names_labels(name) == labels


def test_a_link_to_the_folder_itself_ends(tmp_path: Path) -> None:
    save(tmp_path / "scans" / "a.nii.gz")
    (tmp_path / "scans" / "again").symlink_to(tmp_path / "scans")
    sources = find_scans(tmp_path / "scans")
    assert [source.case for source in sources] == ["scans/a"]
    assert sources.passed_over == {f"{tmp_path}/scans/again": "a folder that is read already"}


def test_files_of_any_spelling_are_read_or_counted(tmp_path: Path) -> None:
    save(tmp_path / "a.nii.gz").rename(tmp_path / "a.NII.GZ")
    save(tmp_path / "b.nii.gz").rename(tmp_path / "b.Nii.gz")
    nib.save(nib.Nifti1Pair(ct(), AFFINE), tmp_path / "c.img")
    (tmp_path / "d.mha").write_bytes(b"x")
    (tmp_path / "gone.nii.gz").symlink_to(tmp_path / "nowhere.nii.gz")
    sources = find_scans(tmp_path)
    assert [Path(source.files[0]).name for source in sources] == ["a.NII.GZ", "b.Nii.gz", "gone.nii.gz"]
    for source in sources[:2]:
        np.testing.assert_array_equal(read_scan(source, "CT").image[0], ct())
    assert sorted(Path(path).name for path in sources.passed_over) == ["c.hdr", "c.img", "d.mha"]


def test_an_empty_test_set_leaves_the_training_scans(tmp_path: Path) -> None:
    save(tmp_path / "imagesTr" / "a_0000.nii.gz")
    (tmp_path / "imagesTs").mkdir()
    assert [Path(source.files[0]).name for source in find_scans(tmp_path)] == ["a_0000.nii.gz"]


def test_one_odd_number_costs_its_case_alone(tmp_path: Path) -> None:
    for name in ("a_0000", "b_0000", "b_0002", "c_0000"):
        save(tmp_path / "imagesTr" / f"{name}.nii.gz")
    problems = {source.case.rpartition("/")[2]: source.problem for source in find_scans(tmp_path)}
    assert problems.pop("b").startswith(
        "one case needs one file a channel, named b_0000, b_0001; b_0000.nii.gz, b_0002"
    )
    assert problems == {"a": "", "c": ""}


def test_names_of_results_are_never_shared() -> None:
    cases = ["d/a/b_c", "d/a_b/c", "d/x", "d/X", "d/p/s", "d/q/s", "d/y", "d/y_seg"]
    files = {"d/y": ("y.nii",), "d/y_seg": ("y_seg.nii.gz",)}
    names = output_names([Source(case, files.get(case, (f"{case}.nii",))) for case in cases])
    assert len({name.casefold() for name in names.values()}) == len(cases)
    assert names["d/p/s"] == "d_p_s" and names["d/y_seg"] == "y_seg"
    assert f"{names['d/y']}_seg" != "y_seg"  # which is the other scan's file
    assert all("/" not in name for name in names.values())


def test_labels_beyond_a_byte_are_written_whole(tmp_path: Path) -> None:
    labels = np.arange(24 * 20 * 16).reshape(24, 20, 16) % 301
    nib.save(label_image(labels.astype(np.int16), AFFINE, str(save(tmp_path / "a.nii.gz"))), tmp_path / "out.nii.gz")
    read: Any = nib.load(tmp_path / "out.nii.gz")
    np.testing.assert_array_equal(np.asanyarray(read.dataobj), labels)
    assert read.get_data_dtype() == np.int16


@pytest.mark.parametrize(("unit", "factor"), [("meter", 1000.0), ("micron", 0.001)])
def test_labels_of_a_scan_in_another_unit_lie_on_its_grid(unit: str, factor: float, tmp_path: Path) -> None:
    affine = AFFINE.copy()
    affine[:3] /= factor
    image = nib.Nifti1Image(ct(), affine)
    image.header.set_xyzt_units(unit)
    nib.save(image, tmp_path / "a.nii.gz")
    (source,) = find_scans(tmp_path)
    np.testing.assert_allclose(read_scan(source, "CT").affine, AFFINE, rtol=1e-5)
    written = label_image(np.zeros(ct().shape, np.uint8), AFFINE, source.files[0])
    np.testing.assert_allclose(written.affine, affine, rtol=1e-5)
    assert written.header.get_xyzt_units()[0] == unit


# Segmentation of a folder


def workflow(data: Path, out: Path, **settings: Any) -> ConfigWorkflow:
    """Inference with a tiny network of random weights."""
    flow = ConfigWorkflow(
        config_file=[str(BUNDLE / "configs" / f"{name}.json") for name in ("inference", "tiny")],
        workflow_type="infer",
        logging_file=False,
        bundle_root=str(BUNDLE),
        dataset_dir=str(data),
        output_dir=str(out),
        **{"checkpoint": str(out.parent / "model.pt"), "network_def#feature_size": 4, **settings},
    )
    torch.manual_seed(0)
    flow.parser.parse(reset=True)
    torch.save(flow.parser.get_parsed_content("network_def").state_dict(), out.parent / "model.pt")
    flow.initialize()
    return flow


@pytest.mark.integration
def test_each_failure_costs_its_scan_alone_and_all_is_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    data, out = tmp_path / "data", tmp_path / "out"
    for name in ("a", "b$1_$2", "c", "d", "e"):
        save(data / f"{name}.nii.gz")
    save(data / "two" / "f_0000.nii.gz"), save(data / "two" / "f_0001.nii.gz")
    (data / "two").rename(data / "imagesX")
    (data / "d.nii.gz").write_bytes(b"no scan")
    (data / "odd.mha").write_bytes(b"x")
    flow = workflow(data, out)
    infer = flow.parser.get_parsed_content("inferer")
    draw, label = saving.overlay_figure, type(infer).begin

    def fails_on_c(image: np.ndarray, *args: Any, title: str, **kwargs: Any) -> Any:
        if title == "c":
            raise ValueError("cannot be drawn")
        return draw(image, *args, title=title, **kwargs)

    def fails_on_e(self: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if "e.nii" in str(inputs.meta["filename_or_obj"]):
            raise TypeError("unforeseen")
        return label(self, inputs, *args, **kwargs)

    monkeypatch.setattr(saving, "overlay_figure", fails_on_c)
    monkeypatch.setattr(type(infer), "begin", fails_on_e)
    with pytest.raises(RuntimeError) as caught:
        flow.run()
    lines = {Path(line.partition(": ")[0]).name: line for line in str(input_error_in(caught.value)).splitlines()[1:]}
    assert set(lines) == {"d.nii.gz", "e.nii.gz", "f_0000.nii.gz"}
    assert "TypeError: unforeseen" in lines["e.nii.gz"]
    assert (
        "has 2 channel(s), one a file, and the network takes 1; pass --network_def#in_channels 2"
        in lines["f_0000.nii.gz"]
    )
    assert "3 segmented, 0 there already, 3 failed, 1 passed over" in capsys.readouterr().out
    written = sorted(file.name for file in out.iterdir())
    kinds = ("seg.json", "seg.nii.gz", "overlay.png", "preview.png")
    results = {f"{name}_{kind}" for name in ("a", "b$1_$2", "c") for kind in kinds}
    assert written == sorted(results - {"c_overlay.png"} | {"statistics.csv", "report.json"})

    monkeypatch.undo()
    (data / "d.nii.gz").unlink()
    with pytest.raises(RuntimeError):
        workflow(data, out).run()  # a picture that could not be drawn is not tried for ever
    assert "1 segmented, 3 there already, 1 failed, 1 passed over" in capsys.readouterr().out


@pytest.mark.integration
def test_results_in_the_folder_that_is_read_are_no_scans(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "data"
    save(data / "a.nii.gz")
    for again in range(2):
        workflow(data, data, organ_probability="liver", skip_existing=False).run()
        printed = capsys.readouterr().out
        assert f"1 segmented, 0 there already, 0 failed, {2 * again} passed over" in printed
    assert not list(data.glob("*_seg_seg*"))
    content = json.loads((data / "a_seg.json").read_text())
    assert content["files"] == ["a_seg.nii.gz", "a_liver.nii.gz", "a_overlay.png", "a_preview.png"]
    (weights,) = content["made_with"]["weights"]
    assert len(weights.rpartition(": ")[2]) == 64  # a digest, and no time


@pytest.mark.integration
def test_no_result_replaces_a_scan_or_a_file_of_somebody_else(tmp_path: Path) -> None:
    """A scan that is named as an organ's probability, a label of the user's own, and a scan of the same name."""
    both, own, lab = (tmp_path / name for name in ("both", "own", "lab"))
    for file in (both / "ct.nii.gz", both / "ct_liver.nii.gz", own / "ct.nii.gz"):
        save(file)
    (own / "ct_seg.nii.gz").write_text("drawn by hand")

    def failures(data: Path, out: Path, **settings: Any) -> dict[str, str]:
        before = {file: file.read_bytes() for folder in (both, own) for file in folder.glob("ct*.nii.gz")}
        flow = workflow(data, out, overlay=False, **settings)
        scans = flow.parser.get_parsed_content("dataset")
        with suppress(RuntimeError):
            flow.run()
        assert {file: file.read_bytes() for file in before} == before
        return {Path(file).name: reason for file, reason in scans.failed.items()}

    advice = ", and would be lost; give another --output_dir, or rename one of them"
    liver = f"{both}/ct_liver.nii.gz: is a scan of this run{advice}"
    assert failures(both, both, organ_probability="liver") == {"ct.nii.gz": liver}
    assert (both / "ct_liver_liver.nii.gz").is_file() and not (both / "ct_seg.nii.gz").exists()
    found = f"{own}/ct_seg.nii.gz: is no result of this scan, as far as records say{advice}"
    for settings in ({}, {"skip_existing": False}):
        assert failures(own / "ct.nii.gz", own, **settings) == {"ct.nii.gz": found}
    assert failures(both / "ct.nii.gz", lab) == {}
    first = f"{lab}/ct_seg.nii.gz: is a result of another scan, {both}/ct.nii.gz{advice}"
    assert failures(own / "ct.nii.gz", lab) == {"ct.nii.gz": first}
    assert failures(both / "ct.nii.gz", lab, overlap=0.0) == {}
    (both / "ct.nii.gz").unlink()
    assert failures(own / "ct.nii.gz", lab) == {}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_without_permission_is_passed_over(tmp_path: Path) -> None:
    save(tmp_path / "a.nii.gz")
    (tmp_path / "closed").mkdir(mode=0)
    assert "cannot be read" in find_scans(tmp_path).passed_over[f"{tmp_path}/closed"]


def test_sources_are_a_list_with_what_was_passed_over() -> None:
    assert Sources([Source("a", ("a.nii",))]).passed_over == {}
