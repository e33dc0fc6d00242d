from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from shared_networks.datasets.cases import find_cases, find_images
from shared_networks.datasets.lists import read_list
from shared_networks.datasets.pairs import case_name, channels_note, find_labels, pair_cases
from shared_networks.datasets.splits import report_cases, split_cases, split_dataset
from shared_networks.datasets.validate import channel_problem
from shared_networks.errors import InputError
from tests.datasets.test_scans import ORIGIN, STRAIGHT, hounsfield, write_series


def touch(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def relative(root: Path, files: list) -> list:
    return [relative(root, f) if isinstance(f, list) else Path(f).relative_to(root).as_posix() for f in files]


@pytest.mark.parametrize(
    ("image", "name"),
    [
        ("imagesTr/img0001_0000.nii.gz", "img0001"),
        ("/data/img0001_0000.nii", "img0001"),
        ("img0001.nii.gz", "img0001"),
        (["a.b_0000.nii.gz", "a.b_0001.nii.gz"], "a.b"),
        ("FLARE22_Tr_0001_0000.nii.gz", "FLARE22_Tr_0001"),
        ("FLARE22_Tr_0001.nii.gz", "FLARE22_Tr_0001"),
        ("case_00000_0000.nii.gz", "case_00000"),
    ],
)
def test_case_name(image, name):
    assert case_name(image) == name


def test_images_of_an_nnunet_folder_are_sorted_by_case_name(tmp_path):
    touch(tmp_path, "imagesTr/b_0000.nii.gz", "imagesTr/a_0000.nii", "imagesTr/a1_0000.nii.gz")
    touch(tmp_path, "imagesTr/._a_0000.nii.gz", "imagesTr/notes.txt", "dataset.json", "labelsTr/a.nii.gz")
    found = find_images(str(tmp_path))
    assert relative(tmp_path, found) == ["imagesTr/a_0000.nii", "imagesTr/a1_0000.nii.gz", "imagesTr/b_0000.nii.gz"]
    assert all(isinstance(file, str) for file in found)


def test_images_of_another_folder(tmp_path):
    touch(tmp_path, "imagesTr/a_0000.nii.gz", "imagesTs/z_0000.nii.gz")
    assert relative(tmp_path, find_images(tmp_path, "imagesTs")) == ["imagesTs/z_0000.nii.gz"]


def test_channels_of_a_case_come_in_order(tmp_path):
    touch(tmp_path, *(f"imagesTr/{name}_000{channel}.nii.gz" for name in "ba" for channel in (1, 0, 2)))
    assert relative(tmp_path, find_images(tmp_path)) == [
        [f"imagesTr/{name}_000{channel}.nii.gz" for channel in range(3)] for name in "ab"
    ]


def test_numbers_that_end_case_names_are_not_channels(tmp_path):
    touch(tmp_path, "imagesTr/Tr_0001.nii.gz", "imagesTr/Tr_0002.nii.gz")
    assert relative(tmp_path, find_images(tmp_path)) == ["imagesTr/Tr_0001.nii.gz", "imagesTr/Tr_0002.nii.gz"]


def test_files_at_any_depth_of_a_folder_are_cases(tmp_path):
    touch(tmp_path, "s_0002.nii.gz", "s_0000.nii.gz", "s_0001.nii", "other/x.nii.gz", "readme.md")
    expected = ["other/x.nii.gz", "s_0000.nii.gz", "s_0001.nii", "s_0002.nii.gz"]
    assert relative(tmp_path, find_images(tmp_path)) == expected


def test_an_empty_test_set_leaves_the_training_scans(tmp_path):
    touch(tmp_path, "imagesTr/a_0000.nii.gz")
    (tmp_path / "imagesTs").mkdir()
    assert find_images(tmp_path, "imagesTs") == [str(tmp_path / "imagesTr/a_0000.nii.gz")]
    touch(tmp_path, "imagesTs/t_0000.nii.gz")
    assert find_images(tmp_path, "imagesTs") == [str(tmp_path / "imagesTs/t_0000.nii.gz")]


def test_the_odd_case_is_blamed_and_not_all_others(tmp_path):
    touch(tmp_path, *(f"imagesTr/{name}_0000.nii.gz" for name in "abc"), "imagesTr/c_0001.nii.gz")
    with pytest.raises(InputError) as caught:
        find_images(tmp_path)
    assert str(caught.value).splitlines() == [
        f"{tmp_path}/imagesTr/c_0000.nii.gz, {tmp_path}/imagesTr/c_0001.nii.gz: "
        "2 channel(s), where most cases have 1; add what lacks or remove the case; c_0000.nii.gz, c_0001.nii.gz were "
        "read as channels of one case: if each is a case, end all names with _0000, such as c_0001_0000.nii.gz"
    ]


def test_incomplete_and_double_channels_are_listed_together(tmp_path):
    touch(tmp_path, *(f"imagesTr/{name}.nii.gz" for name in ("a_0000", "a_0001", "b_0000", "c_0000", "c_0002")))
    touch(tmp_path, "imagesTr/d_0000.nii", "imagesTr/d_0000.nii.gz")
    with pytest.raises(InputError) as caught:
        find_images(tmp_path)
    folder = tmp_path / "imagesTr"
    assert str(caught.value).splitlines() == [
        f"{folder}/b_0000.nii.gz: 1 channel(s), where most cases have 2; add what lacks or remove the case; "
        "a_0000.nii.gz, a_0001.nii.gz were read as channels of one case: if each is a case, end all names with _0000, "
        "such as a_0001_0000.nii.gz",
        f"{folder}/c_0000.nii.gz, {folder}/c_0002.nii.gz: one case needs one file a channel, named c_0000, c_0001; "
        "c_0000.nii.gz, c_0002.nii.gz were read as channels of one case: if each is a case, end all names with _0000, "
        "such as c_0002_0000.nii.gz",
        f"{folder}/d_0000.nii, {folder}/d_0000.nii.gz: one case needs one file a channel, named d_0000, d_0001; "
        "d_0000.nii, d_0000.nii.gz were read as channels of one case",
    ]


def test_what_was_read_as_channels_is_said_and_renamed_as_advised_they_are_cases(tmp_path):
    names = [f"ct_{number:04d}" for number in range(6)]
    touch(tmp_path, *(f"images/{name}.nii.gz" for name in names))
    (channels,) = find_images(tmp_path)
    note = (
        "; ct_0000.nii.gz, ct_0001.nii.gz, ct_0002.nii.gz, ..., ct_0005.nii.gz were read as channels of one case: "
        "if each is a case, end all names with _0000, such as ct_0001_0000.nii.gz"
    )
    assert channels_note(channels) == note
    assert channel_problem(6, 1, channels).endswith(
        f"pass --network_def#in_channels 6, or leave the other files out{note}"
    )
    for name in names:
        (tmp_path / "images" / f"{name}.nii.gz").rename(tmp_path / "images" / f"{name}_0000.nii.gz")
    assert [case_name(image) for image in find_images(tmp_path)] == names


def test_files_of_which_none_is_numbered_are_not_to_be_renamed(tmp_path):
    assert channels_note(["t1.nii.gz", "t2.nii.gz"]) == "; t1.nii.gz, t2.nii.gz were read as channels of one case"
    assert channels_note(["t1_0000.nii.gz"]) == channels_note([]) == ""
    assert channel_problem(1, 2, ["slice1", "slice2"]).endswith("or leave the other files out")  # of a series


def test_one_name_twice_in_a_flat_folder_is_refused(tmp_path):
    touch(tmp_path, "a.nii.gz", "a_0000.nii.gz")
    with pytest.raises(InputError, match="one case needs one file a channel"):
        find_images(tmp_path)


@pytest.mark.parametrize("find", [find_images, find_labels])
@pytest.mark.parametrize("unset", ["", None])
def test_an_unset_folder_is_named(find, unset):
    with pytest.raises(InputError, match="dataset_dir is not set; pass --dataset_dir FOLDER"):
        find(unset)


@pytest.mark.parametrize(
    ("find", "said"), [(find_images, "file or folder; give a scan"), (find_labels, "folder; pass --dataset_dir")]
)
def test_a_missing_folder_is_named(find, said, tmp_path):
    with pytest.raises(InputError) as caught:
        find(tmp_path / "nowhere")
    assert str(caught.value).startswith(f"{tmp_path}/nowhere: no such {said}")


def test_folders_without_scans_are_named_with_what_is_read(tmp_path):
    (tmp_path / "imagesTr").mkdir()
    with pytest.raises(InputError) as caught:
        find_images(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path}: no scan found; read are NIfTI (.nii.gz or .nii), DICOM series and .json lists of cases"
    )


def test_dicom_is_no_image_to_train_on(tmp_path):
    write_series(tmp_path / "series", hounsfield((20, 24, 8)), STRAIGHT, ORIGIN)
    with pytest.raises(InputError, match="a DICOM series; training reads NIfTI: convert it, or pre-train from a store"):
        find_images(tmp_path)


def test_labels(tmp_path):
    touch(tmp_path, "labelsTr/b.nii.gz", "labelsTr/a_0001.nii")
    assert relative(tmp_path, find_labels(tmp_path)) == ["labelsTr/a_0001.nii", "labelsTr/b.nii.gz"]
    with pytest.raises(InputError, match="labelsTs: no such folder; labels are read from labelsTs/NAME"):
        find_labels(tmp_path, "labelsTs")
    (tmp_path / "labelsTs").mkdir()
    with pytest.raises(InputError, match="labelsTs: no NIfTI file"):
        find_labels(tmp_path, "labelsTs")


def test_pairs_are_made_by_name_and_not_by_position():
    images = ["i/FLARE22_Tr_0002_0000.nii.gz", ["i/b_0000.nii.gz", "i/b_0001.nii.gz"], "i/c.nii"]
    labels = ["l/b.nii", "l/c.nii.gz", "l/FLARE22_Tr_0002.nii.gz"]
    assert pair_cases(images, labels) == [
        {"image": "i/FLARE22_Tr_0002_0000.nii.gz", "label": "l/FLARE22_Tr_0002.nii.gz"},
        {"image": ["i/b_0000.nii.gz", "i/b_0001.nii.gz"], "label": "l/b.nii"},
        {"image": "i/c.nii", "label": "l/c.nii.gz"},
    ]


def test_an_image_named_as_its_label_is_paired_though_it_ends_like_a_channel():
    assert pair_cases(["i/s_0000.nii.gz"], ["l/s_0000.nii.gz"]) == [
        {"image": "i/s_0000.nii.gz", "label": "l/s_0000.nii.gz"}
    ]


def test_everything_without_partner_is_listed():
    images = ["i/a_0000.nii.gz", "i/b_0000.nii.gz", ["i/c_0000.nii.gz", "i/c_0001.nii.gz"], "j/b_0000.nii.gz"]
    with pytest.raises(InputError) as caught:
        pair_cases(images, ["l/b.nii.gz", "l/d.nii.gz", "l/e.nii"])
    assert str(caught.value).splitlines() == [
        "images and labels do not pair, 5 problem(s):",
        "i/a_0000.nii.gz: no label; add the label a.nii.gz or remove the image",
        "i/c_0000.nii.gz: no label; add the label c.nii.gz or remove the image",
        "i/b_0000.nii.gz, j/b_0000.nii.gz, l/b.nii.gz: several files for the case b; give each case its own name",
        "l/d.nii.gz: no image; add the image d_0000.nii.gz or remove the label",
        "l/e.nii: no image; add the image e_0000.nii.gz or remove the label",
    ]


def cases(*names: str) -> list[dict]:
    return [{"image": f"imagesTr/{name}_0000.nii.gz"} for name in names]


def names(split: dict, part: str) -> list[str]:
    return [case_name(case["image"]) for case in split[part]]


def test_published_btcv_split():
    btcv = [f"img{number:04d}" for number in (*range(1, 11), *range(21, 41))]
    split = split_cases(cases(*reversed(btcv)), [f"img{number:04d}" for number in range(35, 41)])
    assert names(split, "validation") == ["img0035", "img0036", "img0037", "img0038", "img0039", "img0040"]
    assert names(split, "train") == btcv[:24]


def test_names_that_are_partly_missing_are_warned_of(caplog):
    split = split_cases(cases("a", "b", "c"), ["b", "img0035"])
    assert (names(split, "train"), names(split, "validation")) == (["a", "c"], ["b"])
    assert "validation cases that are not in the data set: img0035" in caplog.text


def test_one_name_may_be_given_as_a_string():
    assert names(split_cases(cases("img1", "img2"), "img2"), "validation") == ["img2"]


def test_draw_is_fixed_by_the_seed_and_free_of_the_input_order(caplog):
    letters = list("abcdefghij")
    with caplog.at_level(logging.INFO):
        split = split_cases(cases(*letters), ["img0035"])
    assert names(split, "validation") == ["c", "i"]  # RandomState(0).permutation(10) starts with 2, 8
    assert names(split, "train") == list("abdefghj")
    assert split == split_cases(cases(*reversed(letters)))
    assert names(split_cases(cases(*letters), seed=1), "validation") == ["c", "j"]
    assert "none of val_cases (img0035) is in the data set" in caplog.text
    assert "validation cases, 2 of 10 drawn with seed 0: c, i" in caplog.text


@pytest.mark.parametrize(("count", "fraction", "expected"), [(2, 0.99, 1), (3, 0.2, 1), (99, 0.001, 1), (10, 0.35, 4)])
def test_size_of_the_draw(count, fraction, expected):
    split = split_cases(cases(*map(str, range(count))), val_fraction=fraction)
    assert (len(split["validation"]), len(split["train"])) == (expected, count - expected)


def test_labels_and_channels_stay_with_their_case():
    given = [{"image": [f"{n}_0000.nii", f"{n}_0001.nii"], "label": f"{n}.nii"} for n in "ab"]
    assert split_cases(given, ["a"]) == {"train": [given[1]], "validation": [given[0]]}


def test_a_single_case_serves_for_both(caplog):
    split = split_cases(cases("a"), ["a"])
    assert split == {"train": cases("a"), "validation": cases("a")}
    assert "a is the only case: it trains and validates, so validation measures memorisation" in caplog.text


@pytest.mark.parametrize("count", [1, 2, 9])
def test_no_case_validates_at_a_fraction_of_0_unless_it_is_named(count, caplog):
    given = cases(*map(str, range(count)))
    for val_cases in ((), ["img0035"]):
        assert split_cases(given, val_cases, val_fraction=0) == {"train": given, "validation": []}
    assert "val_fraction is 0: no case validates, so the last weights become the model" in caplog.text
    assert "only case" not in caplog.text
    if count > 1:
        assert names(split_cases(given, ["1"], val_fraction=0), "validation") == ["1"]


def test_splits_that_cannot_be():
    with pytest.raises(InputError, match="no case to split; look at dataset_dir"):
        split_cases([])
    with pytest.raises(InputError, match="val_cases names all 2 cases"):
        split_cases(cases("a", "b"), ["a", "b"])
    for fraction in (1.0, -0.1):
        with pytest.raises(InputError, match=f"val_fraction is {fraction}"):
            split_cases(cases("a", "b"), val_fraction=fraction)


def test_report_cases_are_those_held_out_and_else_the_test_set(tmp_path, caplog):
    touch(tmp_path, "imagesTr/a_0000.nii.gz", "labelsTr/a.nii.gz")
    touch(tmp_path, "imagesTs/t_0000.nii.gz")
    assert report_cases(tmp_path, cases("a"), cases("h")) == cases("h")
    assert caplog.text == ""
    assert report_cases(tmp_path, cases("a")) == cases("a")
    (tmp_path / "labelsTs").mkdir()
    assert report_cases(tmp_path, cases("a")) == cases("a")
    assert (
        "has no labels in labelsTs: reporting on the validation cases, which chose the model: the figures"
        in caplog.text
    )
    assert report_cases(tmp_path / "list.json", cases("a")) == cases("a")
    with pytest.raises(InputError, match=rf"{tmp_path}: no case to report on: .*\(val_fraction is 0\)"):
        report_cases(tmp_path, [])
    caplog.clear()
    touch(tmp_path, "labelsTs/t.nii.gz")
    expected = {"image": str(tmp_path / "imagesTs/t_0000.nii.gz"), "label": str(tmp_path / "labelsTs/t.nii.gz")}
    assert report_cases(tmp_path, cases("a")) == [expected]
    assert report_cases(tmp_path, cases("a"), cases("h")) == cases("h")
    assert caplog.text == ""
    with pytest.raises(InputError, match="dataset_dir is not set"):
        report_cases("", cases("a"))


def test_scans_that_must_be_converted_first_are_named(tmp_path):
    touch(tmp_path, "imagesTr/liver-orig001.mhd", "imagesTr/liver-orig001.raw", "labelsTr/x.nii.gz")
    with pytest.raises(
        InputError, match=r"no scan found; .*\n.*liver-orig001\.mhd: passed over: neither NIfTI nor DICOM; convert it"
    ):
        find_cases(tmp_path)


def test_two_cases_of_one_name_are_refused_as_results_are_named_after_them(tmp_path):
    touch(tmp_path, *(f"{case}/{kind}.{end}" for case in "ab" for kind in ("ct", "seg") for end in ("nii", "nii.gz")))
    with pytest.raises(InputError) as caught:
        find_cases("", images=[f"{tmp_path}/a/ct.nii", f"{tmp_path}/a/ct.nii.gz"], labels=["a.nii", "b.nii"])
    line = str(caught.value).splitlines()[1]
    assert line == f"{tmp_path}/a/ct.nii, {tmp_path}/a/ct.nii.gz: all are the case ct; name each apart"


def test_a_report_needs_no_case_that_trains(tmp_path):
    touch(tmp_path, "imagesTs/a_0000.nii.gz", "labelsTs/a.nii.gz")
    assert find_cases(tmp_path, trains=False) == []
    assert [case["image"] for case in report_cases(tmp_path, [])] == [f"{tmp_path}/imagesTs/a_0000.nii.gz"]
    with pytest.raises(InputError, match="labelsTr: no such folder"):
        find_cases(tmp_path)
    touch(tmp_path, "labelsTr/b.nii.gz")  # a training set that lost its images is not passed over
    with pytest.raises(InputError, match=r"2 problem\(s\)"):
        find_cases(tmp_path, trains=False)


@pytest.mark.parametrize("listed", [{}, {"training": []}, {"training": [], "validation": []}])
def test_a_report_needs_no_case_of_a_list_that_trains(tmp_path, listed):
    file = tmp_path / "list.json"
    tested = {"image": f"{tmp_path}/t.nii.gz", "label": f"{tmp_path}/l/t.nii.gz"}
    file.write_text(json.dumps({**listed, "test": [{"image": "t.nii.gz", "label": "l/t.nii.gz"}, "u.nii.gz"]}))
    split = split_dataset(find_cases(file, trains=False), val_cases=["img0035"], test_fraction=0.2, num_train_cases=1)
    assert split.data == {"train": [], "validation": [], "test": [tested]}
    assert report_cases(file, split["validation"], split["test"]) == [tested]
    with pytest.raises(InputError, match="no 'training' cases"):
        find_cases(file)
    file.write_text(json.dumps({**listed, "test": ["u.nii.gz"]}))
    with pytest.raises(InputError, match=r"no case with a label among .*'test'\)"):
        find_cases(file, trains=False)


def test_a_report_on_a_lists_validation_cases_needs_no_other(tmp_path):
    (tmp_path / "list.json").write_text('{"validation": [{"image": "v.nii.gz", "label": "l.nii.gz"}]}')
    split = split_dataset(find_cases(tmp_path / "list.json", trains=False))
    assert [split[part] for part in ("train", "test")] == [[], []]
    assert split["validation"] == [{"image": f"{tmp_path}/v.nii.gz", "label": f"{tmp_path}/l.nii.gz"}]


def test_no_folder_is_no_case():
    assert find_cases("") == find_cases(None) == []


def test_lists_take_the_place_of_the_folder_and_pair_in_order():
    cases = [{"image": "b_0000.nii", "label": "x.nii"}, {"image": ["a_0000.nii", "a_0001.nii"], "label": "y.nii"}]
    lists = {key: [case[f"{key[:-1]}"] for case in cases] for key in ("images", "labels")}
    assert find_cases("", **lists) == find_cases("no/such/folder", **lists) == cases
    for images, labels in ((2, 1), (0, 2), (0, 0)):
        with pytest.raises(InputError, match=rf"images: {images} file\(s\), labels: {labels}; give both lists"):
            find_cases("", images=lists["images"][:images] or None, labels=lists["labels"][:labels])
    with pytest.raises(InputError, match="all are the case x"):
        find_cases("", images=["a/x.nii", "a/x.nii.gz"], labels=["a.nii", "b.nii"])


def test_what_is_unpaired_and_what_is_bad_is_listed_at_once(tmp_path):
    touch(tmp_path, "imagesTr/a_0000.nii.gz", "imagesTr/b_0000.nii.gz", "labelsTr/b.nii.gz")

    def check(found: list[dict]) -> None:
        raise InputError("\n".join(["heading", *(f"{case['label']}: is bad" for case in found)]))

    with pytest.raises(InputError) as caught:
        find_cases(tmp_path, check=check)
    assert str(caught.value).splitlines() == [
        f"{tmp_path}: 2 problem(s):",
        f"{tmp_path}/imagesTr/a_0000.nii.gz: no label; add the label a.nii.gz or remove the image",
        f"{tmp_path}/labelsTr/b.nii.gz: is bad",
    ]
    touch(tmp_path, "labelsTr/a.nii.gz")
    assert len(find_cases(tmp_path, check=check)) == 2  # whoever trains checks what is used


def test_decathlon_list(tmp_path):
    content = {
        "labels": {"0": "background", "1": "liver"},
        "training": [
            {"image": "./imagesTr/img2.nii.gz", "label": "./labelsTr/label2.nii.gz", "fold": 0},
            {"image": ["i/a_0000.nii", "i/a_0001.nii"], "label": ["l/a.nii"]},
        ],
        "validation": [{"image": "/abs/v.nii.gz", "label": "../l/v.nii.gz"}],
        "test": [{"image": "t.nii.gz", "label": "l/t.nii.gz"}, {"image": "u.nii.gz"}, "imagesTs/w.nii.gz"],
    }
    file = tmp_path / "sub" / "list.json"
    file.parent.mkdir()
    file.write_text(json.dumps(content))
    root = tmp_path / "sub"
    assert find_cases(str(file)) == [
        {"image": f"{root}/imagesTr/img2.nii.gz", "label": f"{root}/labelsTr/label2.nii.gz"},
        {"image": [f"{root}/i/a_0000.nii", f"{root}/i/a_0001.nii"], "label": f"{root}/l/a.nii"},
        {"image": "/abs/v.nii.gz", "label": f"{tmp_path}/l/v.nii.gz", "part": "validation"},
        {"image": f"{root}/t.nii.gz", "label": f"{root}/l/t.nii.gz", "part": "test"},
    ]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (None, "No such file"),
        ("{", "Expecting property name"),
        ("[]", "no 'training' cases"),
        ('{"training": {"image": "a.nii", "label": "b.nii"}}', "no 'training' cases"),
        ('{"training": []}', "no 'training' cases"),
        (
            '{"training": [{"image": "a.nii"}, "b.nii"]}',
            r"2 case\(s\) without an image and one label, first {'image': 'a.nii'}",
        ),
        ('{"training": [{"image": "a.nii", "label": "b.nii"}], "validation": ["c.nii"]}', "first 'c.nii'"),
        (
            '{"training": [{"image": "a.nii", "label": ["b.nii", "c.nii"]}]}',
            r"1 case\(s\) without an image and one label",
        ),
    ],
)
def test_files_that_are_no_list(tmp_path, text, reason):
    file = tmp_path / "list.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(InputError, match=f"{file}: no list of labelled cases .*{reason}.*it needs"):
        read_list(file)
