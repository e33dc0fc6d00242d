"""Lists of cases: read, and written from two patterns."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from monai.bundle import ConfigParser

from shared_networks.datasets.cases import find_cases, find_images, unlabelled_cases
from shared_networks.datasets.lists import pair_patterns, write_list
from shared_networks.datasets.pairs import UnpairedError, name_of
from shared_networks.datasets.scans import find_scans
from shared_networks.datasets.splits import split_dataset
from shared_networks.errors import InputError
from tests.conftest import ROOT
from tests.datasets.test_pairs import relative, touch


def pairs(root: Path, found: list[dict]) -> list[tuple[str, str]]:
    return [tuple(relative(root, [case["image"], case["label"]])) for case in found]


def test_patterns_pair_by_what_varies_and_not_by_position(tmp_path):
    touch(tmp_path, *(f"{kind}-{n}.nii.gz" for kind in ("volume", "labels") for n in (0, 2, 10)), "readme.txt")
    expected = [(f"volume-{n}.nii.gz", f"labels-{n}.nii.gz") for n in (0, 10, 2)]
    assert pairs(tmp_path, pair_patterns(tmp_path, "volume-*.nii.gz", "labels-*.nii.gz")) == expected
    absolute = pair_patterns(tmp_path, f"{tmp_path}/volume-*.nii.gz", f"{tmp_path}/labels-*.nii.gz")
    assert pairs(tmp_path, absolute) == expected
    chosen = pair_patterns(str(tmp_path), "volume-[!2]*.nii.gz", "labels-[!2]*.nii.gz")
    assert pairs(tmp_path, chosen) == [expected[0], expected[1]]
    one = pair_patterns(tmp_path, "volume-?.nii.gz", "labels-?.nii.gz")
    assert pairs(tmp_path, one) == [expected[0], expected[2]]


def test_patterns_over_folders(tmp_path):
    root = touch(tmp_path / "odd [1]", "x/ct_a.nii", "x/seg_a.nii", "x/y/ct_b.nii", "x/y/seg_b.nii", "ct_c.nii")
    touch(root, "seg_c.nii")
    found = pair_patterns(root, "**/ct_*.nii", "**/seg_*.nii")
    assert pairs(root, found) == [
        ("ct_c.nii", "seg_c.nii"),
        ("x/ct_a.nii", "x/seg_a.nii"),
        ("x/y/ct_b.nii", "x/y/seg_b.nii"),
    ]


def test_patterns_list_all_that_is_without_partner(tmp_path):
    touch(tmp_path, "volume-1.nii.gz", "volume-2.nii.gz", "labels-2.nii.gz", "labels-3.nii.gz")
    with pytest.raises(UnpairedError) as caught:
        pair_patterns(tmp_path, "volume-*.nii.gz", "labels-*.nii.gz")
    assert caught.value.problems == [
        f"{tmp_path}/volume-1.nii.gz: no label; add the label labels-1.nii.gz or remove the image",
        f"{tmp_path}/labels-3.nii.gz: no image; add the image volume-3.nii.gz or remove the label",
    ]
    assert pairs(tmp_path, caught.value.pairs) == [("volume-2.nii.gz", "labels-2.nii.gz")]


@pytest.mark.parametrize(
    ("images", "labels", "files"),
    [
        ("*.nii.gz", "*_seg.nii.gz", [("case{}.nii.gz", "case{}_seg.nii.gz")]),
        ("*_0000.nii.gz", "*.nii.gz", [("case{}_0000.nii.gz", "case{}.nii.gz")]),
        ("**/*.nii.gz", "**/seg-*.nii.gz", [("p{}/ct.nii.gz", "p{}/seg-ct.nii.gz")]),
    ],
)
def test_a_file_in_reach_of_both_patterns_belongs_to_the_narrower(tmp_path, images, labels, files):
    expected = [(image.format(n), label.format(n)) for n in range(3) for image, label in files]
    touch(tmp_path, *(file for pair in expected for file in pair))
    assert pairs(tmp_path, pair_patterns(tmp_path, images, labels)) == expected
    assert pairs(tmp_path, pair_patterns(tmp_path, f"{tmp_path}/{images}", labels)) == expected
    (tmp_path / expected[1][1]).unlink()
    with pytest.raises(UnpairedError) as caught:
        pair_patterns(tmp_path, images, labels)
    advice = f"no label; add the label {expected[1][1]} or remove the image"
    assert caught.value.problems == [f"{tmp_path}/{expected[1][0]}: {advice}"]


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (
            "a*.nii",
            "?1.nii",
            r"'a\*\.nii' and labels '\?1\.nii' find the same 1 file\(s\), such as .*/a1\.nii; give the",
        ),
        ("a*.nii", "", "labels is not set; give both"),
        ("", "a*.nii", "images is not set; give both"),
        ("a*.nii", "*/a*.nii", r"1 wildcard\(s\) and labels '\*/a\*.nii' 2"),
        ("a.nii", "b.nii", "at least one"),
        ("[]]x*.nii", "a?.nii", r"images: '\[\]\]x\*.nii' is too intricate"),
        ("a*.nii", "z*.nii", r"labels: 'z\*.nii' finds no file in"),
        ("liver-*.mhd", "a*.nii", r"finds 1 file\(s\) that are no NIfTI, such as .*liver-1.mhd; .*convert"),
    ],
)
def test_patterns_that_cannot_be(tmp_path, images, labels, message):
    touch(tmp_path, "a1.nii", "]x1.nii", "liver-1.mhd")
    with pytest.raises(InputError, match=message):
        pair_patterns(tmp_path, images, labels)


def test_a_written_list_is_read_for_training_and_inference(tmp_path, capsys):
    touch(tmp_path, *(f"kits/case_{n}/{kind}.nii.gz" for n in "01" for kind in ("imaging", "segmentation")))
    file = tmp_path / "lists" / "kits.json"
    write_list(str(tmp_path / "kits"), "case_*/imaging.nii.gz", "case_*/segmentation.nii.gz", str(file))
    assert capsys.readouterr().out == f"{file}: 2 cases; give it as --dataset_dir\n"
    assert json.loads(file.read_text())["training"][0] == {
        "image": "../kits/case_0/imaging.nii.gz",
        "label": "../kits/case_0/segmentation.nii.gz",
    }
    found = find_cases(file)
    assert [name_of(case) for case in found] == ["case_0", "case_1"]
    assert [Path(case["label"]).is_file() for case in found] == [True, True]
    assert [scan.files for scan in find_scans(file, "imagesTs")] == [(case["image"],) for case in found]


def listed(root: Path, **lists: object) -> Path:
    (root / "list.json").write_text(json.dumps(lists))
    return root / "list.json"


def entries(*names: str, **more: object) -> list[dict]:
    return [{"image": f"{name}_0000.nii.gz", "label": f"{name}.nii.gz", **more} for name in names]


@pytest.mark.parametrize("train", ["training", "train"])
@pytest.mark.parametrize(("validation", "test"), [("validation", "test"), ("val", "testing")])
def test_lists_go_by_several_names_and_mean_the_same_to_all_who_read_them(tmp_path, train, validation, test):
    touch(tmp_path, *(f"{name}_0000.nii.gz" for name in "abvt"))
    file = listed(tmp_path, **{test: entries("t"), validation: entries("v"), train: entries("a", "b")})
    found = find_cases(file)
    assert [(name_of(case), case.get("part")) for case in found] == [
        *[("a", None), ("b", None), ("v", "validation"), ("t", "test")]
    ]
    parts = {part: [name_of(case) for case in cases] for part, cases in split_dataset(found).items()}
    assert parts == {"train": ["a", "b"], "validation": ["v"], "test": ["t"]}
    assert sorted(Path(scan.case).name for scan in find_scans(file, "imagesTs")) == ["a", "b", "t", "v"]
    unlabelled = split_dataset(unlabelled_cases(find_images(file)))
    assert {part: [name_of(case) for case in cases] for part, cases in unlabelled.items()} == {**parts, "test": []}


def test_test_cases_of_a_list_are_told_and_neither_train_nor_enter_a_store(tmp_path, caplog):
    touch(tmp_path, *(f"{name}_0000.nii.gz" for name in "avst"))
    tests = ["t_0000.nii.gz", "s_0000.nii.gz"]
    file = listed(tmp_path, training=entries("a"), validation=["v_0000.nii.gz"], test=tests)
    found = find_scans(file)  # as preparing a store does
    assert [(Path(scan.case).name, scan.part) for scan in found] == [("a", ""), ("v", "validation")]
    told = f"{tmp_path}/t_0000.nii.gz: a test case, which trains nothing, with 1 more of its list"
    assert [f"{path}: {reason}" for path, reason in found.passed_over.items()] == [told]
    assert unlabelled_cases(find_images(file)) == [
        {"image": f"{tmp_path}/a_0000.nii.gz"},
        {"image": f"{tmp_path}/v_0000.nii.gz", "part": "validation"},
    ]
    assert f"1 passed over, such as {told}" in caplog.text
    parser = ConfigParser()
    parser.read_config(ROOT / "hi_end_mae_pretrain" / "configs" / "train.json")
    parser["dataset_dir"], parser["bundle_root"] = str(file), str(ROOT / "hi_end_mae_pretrain")
    split = parser.get_parsed_content("split")  # without the share that is drawn where no list chooses
    assert {part: [name_of(case) for case in cases] for part, cases in split.items()} == {
        "train": ["a"],
        "validation": ["v"],
        "test": [],
    }
    with pytest.raises(InputError, match=r"no scan found.*\n.*t_0000.nii.gz: passed over: a test case"):
        find_scans(listed(tmp_path, test=["t_0000.nii.gz"]))


def test_a_file_that_is_one_list_lists_the_training_cases(tmp_path):
    file = tmp_path / "list.json"
    file.write_text(json.dumps(entries("a", "b")))
    assert [name_of(case) for case in find_cases(file)] == ["a", "b"]


def test_labelled_cases_under_another_key_are_refused(tmp_path):
    file = listed(tmp_path, training=entries("a"), Validation=entries("v", "w"), holdout=entries("h"))
    with pytest.raises(InputError) as caught:
        find_cases(file)
    assert str(caught.value) == (
        f"{file}: labelled cases that are not read, 2 under 'Validation', 1 under 'holdout'; rename the key to "
        "training, validation or test, or remove it"
    )
    with pytest.raises(InputError, match="not read, 1 under 'Training'; rename"):
        find_cases(listed(tmp_path, Training=entries("a")))
    others = {"unlabelled": ["u.nii.gz"], "reference": ["https://example.org/x"], "labels": ["background", "liver"]}
    assert len(find_cases(listed(tmp_path, training=entries("a"), **others))) == 1


def test_folds_of_a_list_are_not_used_and_it_is_said(tmp_path, caplog):
    file = listed(tmp_path, training=[*entries("a", fold=0), *entries("b", "c", fold=1)], testing=entries("t"))
    assert [set(case) for case in find_cases(file)] == [{"image", "label"}] * 3 + [{"image", "label", "part"}]
    assert caplog.messages == [
        f"{file}: the 'fold' of 3 case(s) is not used, as --split#fold draws its own folds; list the cases of the fold "
        "that validates under 'validation' and not under 'training', or name them by --split#val_cases"
    ]
    caplog.clear()
    find_cases(listed(tmp_path, training=entries("a")))
    assert caplog.messages == []


def test_a_file_that_is_listed_twice_is_named_with_its_parts(tmp_path):
    training = [*entries("a", "b", "b"), {"image": f"{tmp_path}/x/../c_0000.nii.gz", "label": "c.nii.gz"}]
    file = listed(tmp_path, training=training, val=entries("a", "v"), test=[*entries("c"), *entries("a")])
    with pytest.raises(InputError) as caught:
        find_cases(file)
    assert str(caught.value).splitlines() == [
        f"{file}: 3 problem(s):",
        f"{tmp_path}/a_0000.nii.gz: listed 3 times, in training, validation and test; list it once",
        f"{tmp_path}/b_0000.nii.gz: listed 2 times in training; list it once",
        f"{tmp_path}/c_0000.nii.gz: listed 2 times, in training and test; list it once",
    ]
    with pytest.raises(InputError, match=r"a\.nii: listed 2 times in training; list it once"):
        find_cases("", images=["a.nii", "./a.nii"], labels=["x.nii", "y.nii"])


@pytest.mark.integration
def test_the_command_writes_a_list_or_says_in_one_line_what_is_wrong(tmp_path):
    touch(tmp_path, "volume-0.nii.gz", "labels-0.nii.gz")

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "shared_networks.datasets.lists", *words]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)

    options = ["--dataset_dir", ".", "--labels", "labels-*.nii.gz", "--output", "own.json"]
    assert run(*options, "--images", "volume-*.nii.gz").returncode == 0
    assert len(find_cases(tmp_path / "own.json")) == 1
    failed = run(*options, "--images", "scan-*.nii.gz")
    assert failed.returncode == 1 and failed.stderr == (
        "error: images: 'scan-*.nii.gz' finds no file in .; give a pattern such as 'volume-*.nii.gz'\n"
    )
