from __future__ import annotations

import json
from pathlib import Path

import pytest

from shared_networks.data.datalist import case_name
from shared_networks.data.splits import check_split, record_training, split_dataset
from shared_networks.errors import InputError

BTCV = [f"img{number:04d}" for number in (*range(1, 11), *range(21, 41))]
PUBLISHED = [f"img{number:04d}" for number in range(35, 41)]


def cases(names: list[str], **more: str) -> list[dict]:
    return [{"image": f"imagesTr/{n}_0000.nii.gz", "label": f"labelsTr/{n}.nii.gz", **more} for n in names]


def names(split: dict) -> dict[str, list[str]]:
    return {part: [case_name(case["image"]) for case in found] for part, found in split.items()}


def split(given: list[str], **settings) -> dict[str, list[str]]:
    return names(split_dataset(cases(given), **settings))


def test_the_published_btcv_split_tests_nobody():
    expected = {"train": BTCV[:24], "validation": PUBLISHED, "test": []}
    assert split(BTCV, val_cases=PUBLISHED) == split(BTCV[::-1], val_cases=PUBLISHED) == expected


def test_no_case_makes_empty_parts():
    assert split([], fold=1, val_cases=PUBLISHED) == {"train": [], "validation": [], "test": []}


@pytest.mark.parametrize("num_folds", [2, 4, 5, 30])
def test_each_case_is_tested_in_one_fold_and_never_chooses_there(num_folds):
    folds = [split(BTCV, fold=fold, num_folds=num_folds, val_cases=PUBLISHED) for fold in range(num_folds)]
    assert sorted(name for fold in folds for name in fold["test"]) == BTCV
    assert {len(fold["test"]) for fold in folds} <= {30 // num_folds, -(-30 // num_folds)}
    for fold in folds:
        assert sorted([*fold["train"], *fold["validation"], *fold["test"]]) == BTCV
        assert len(fold["validation"]) == max(1, round(0.2 * (30 - len(fold["test"]))))


def test_folds_are_fixed_by_names_and_seed():
    settings = {"fold": 1, "num_folds": 3}
    letters = list("abcdefghi")
    assert split(letters, **settings)["test"] == ["a", "c", "i"]  # RandomState(0).permutation(9)[1::3] is 2, 8, 0
    assert split(letters[::-1], **settings) == split(letters, **settings)
    assert split(letters, **settings, seed=1) != split(letters, **settings)


def test_few_training_cases_are_among_more_and_leave_the_others_as_they_are():
    whole = split(BTCV, val_cases=PUBLISHED, test_fraction=0.25, seed=3)
    few = [split(BTCV, val_cases=PUBLISHED, test_fraction=0.25, num_train_cases=n, seed=3) for n in range(1, 19)]
    assert len(whole["train"]) == 18 and len(whole["test"]) == 6 and whole["validation"] == PUBLISHED
    for count, (smaller, larger) in enumerate(zip(few, [*few[1:], whole], strict=True), 1):
        assert len(smaller["train"]) == count
        assert set(smaller["train"]) < set(larger["train"]) or count == 18
        assert smaller["train"] == sorted(smaller["train"])
        assert smaller["validation"] == PUBLISHED and smaller["test"] == whole["test"]
    other = split(BTCV, val_cases=PUBLISHED, test_fraction=0.25, num_train_cases=1, seed=4)
    assert other["train"] != few[0]["train"]


def test_a_share_is_tested_and_the_validation_cases_are_drawn_from_the_rest():
    found = split(BTCV, test_fraction=0.2, val_fraction=0.25)
    assert [len(found[part]) for part in ("train", "validation", "test")] == [18, 6, 6]
    assert sorted([*found["train"], *found["validation"], *found["test"]]) == BTCV


def test_a_lists_own_parts_hold_unless_there_is_a_fold():
    given = [*cases(list("abcd")), *cases(["v"], part="validation"), *cases(["t"], part="test")]
    found = split_dataset(given, val_cases=PUBLISHED)
    assert names(found) == {"train": list("abcd"), "validation": ["v"], "test": ["t"]}
    assert all(set(case) == {"image", "label"} for part in found.values() for case in part)
    folds = [names(split_dataset(given, fold=fold, num_folds=3))["test"] for fold in range(3)]
    assert sorted(name for fold in folds for name in fold) == list("abcdtv")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fold": 5}, "fold is 5; give one from 0 to 4, as num_folds is 5"),
        ({"fold": -1}, "fold is -1"),
        ({"fold": 0, "num_folds": 1}, "num_folds is 1; give from 2 to the number of cases, 30"),
        ({"fold": 0, "num_folds": 31}, "num_folds is 31"),
        ({"fold": 0, "test_fraction": 0.1}, "fold is 0 and test_fraction 0.1; give one of them"),
        ({"test_fraction": 1.0}, "test_fraction is 1.0; give a share"),
        ({"test_fraction": -0.1}, "test_fraction is -0.1"),
        ({"test_fraction": 0.99}, "test_fraction is 0.99, which leaves no case of 30 for training"),
        ({"num_train_cases": 0}, "num_train_cases is 0; give from 1 to the number of training cases, 24"),
        ({"num_train_cases": 25}, "num_train_cases is 25"),
        ({"val_fraction": 1.5}, "val_fraction is 1.5"),
    ],
)
def test_splits_that_cannot_be(settings, message):
    with pytest.raises(InputError, match=message):
        split(BTCV, **settings)


def record(folder: Path, dataset: str, found: dict, resume: bool = False, **settings) -> dict:
    record_training(folder, dataset, ["background", "liver"], found, settings, resume)
    return json.loads((folder / "split.json").read_text())


def test_the_split_and_the_labels_are_written_beside_the_model(tmp_path):
    found = split_dataset(cases(list("abcdef")), fold=2, num_folds=3)
    written = record(tmp_path / "models", "/data/ours/", found, seed=0, fold=2)
    assert written == {"dataset": "ours", "seed": 0, "fold": 2, **names(found)}
    assert json.loads((tmp_path / "models/labels.json").read_text()) == {"labels": {"background": 0, "liver": 1}}
    assert sorted(file.name for file in (tmp_path / "models").iterdir()) == ["labels.json", "split.json"]
    assert record(tmp_path, "/data/ours/list.json", found)["dataset"] == "ours/list.json"
    assert record(tmp_path, "", found)["dataset"] == ""


def test_a_record_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "models").write_text("a file")
    with pytest.raises(InputError, match=r"models/split\.json: cannot be written \(.+\); give another --ckpt_dir"):
        record(tmp_path / "models", "d", {})


def test_no_case_tests_or_chooses_that_trained(tmp_path):
    first = split_dataset(cases(list("abcdef")), fold=0, num_folds=3)
    record(tmp_path, "/data/ours", first, seed=0, fold=0, num_folds=3, test_fraction=0.0, val_cases=[])
    check_split(tmp_path, "/data/ours", first)
    check_split(tmp_path / "elsewhere", "/data/ours", {})
    second = split_dataset(cases(list("abcdef")), fold=1, num_folds=3)
    with pytest.raises(InputError) as caught:
        record(tmp_path, "/data/ours", second, resume=True)
    message = str(caught.value)
    assert message.startswith(f"{tmp_path}/split.json: ") and "would now test" in message
    assert message.endswith("Give the settings of training: --seed 0 --fold 0 --num_folds 3")
    with pytest.raises(InputError, match="would now test"):
        check_split(tmp_path, "/data/ours", second, second["test"])
    check_split(tmp_path, "/data/ours", second, [{"image": "imagesTs/a_0000.nii.gz"}])
    check_split(tmp_path, "/data/others", second)  # names of another data set mean other cases
    assert (
        record(tmp_path, "/data/ours", second)["train"] == names(second)["train"]
    )  # a new training: no model to spoil


def test_all_three_leaks_are_named(tmp_path):
    parts = {"train": cases(["a", "b"]), "validation": cases(["c"]), "test": []}
    record(tmp_path, "d", parts, seed=2, val_fraction=0.3, val_cases=["c", "d"], fold=None, num_folds=5)
    now = {"train": cases(["x"]), "validation": cases(["b"]), "test": cases(["a", "c"])}
    with pytest.raises(InputError) as caught:
        check_split(tmp_path, "d", now)
    assert str(caught.value) == (
        f"{tmp_path}/split.json: a (1 in all) trained and would now test; "
        "b (1 in all) trained and would now choose the model; c (1 in all) chose the model and would now test. "
        "Give the settings of training: --seed 2 --val_fraction 0.3 --val_cases \"['c','d']\""
    )


@pytest.mark.parametrize("text", ["{", "[]", '{"train": []}'])
def test_a_damaged_record_is_named(tmp_path, text):
    (tmp_path / "split.json").write_text(text)
    with pytest.raises(InputError, match=r"split\.json: no record of a split .*; remove it"):
        check_split(tmp_path, "d", {"train": [], "validation": [], "test": []})
