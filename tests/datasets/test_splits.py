from __future__ import annotations

from pathlib import Path

import pytest
import torch

from shared_networks.datasets.leaks import check_evaluation, check_start, check_unseen, unseen_cases
from shared_networks.datasets.pairs import case_name
from shared_networks.datasets.record import training_record, write_model
from shared_networks.datasets.splits import Split, report_cases, split_dataset
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


@pytest.mark.parametrize("given", [cases(BTCV), [*cases(list("abcd")), *cases(["v"], part="validation")]])
def test_a_share_is_refused_where_names_choose_the_validation_cases(given):
    for share in (0.0, 0.3):
        with pytest.raises(InputError, match=rf"val_fraction is {share}, but .* validate by name, of val_cases or of"):
            split_dataset(given, val_cases=PUBLISHED, val_fraction=share)
    assert split_dataset(given, val_cases=PUBLISHED).settings["val_fraction"] == 0.2
    assert names(split_dataset(given, val_cases=PUBLISHED, val_fraction=0.3, fold=0, num_folds=3))["test"]


def record(
    found: dict, dataset: str = "/data/ours", start_weights: tuple = (), label_names=("background", "liver"), **settings
) -> dict:
    settings = {"seed": 0, "fold": None, "num_folds": 3, "num_train_cases": None, **settings}
    return training_record(dataset, Split(found, settings), {}, label_names=label_names, start_weights=start_weights)


def scans(folder: Path, names: str, rename: str = "") -> dict[str, dict]:
    """Cases whose files are different from each other, and the same wherever they lie and whatever their names."""
    folder.mkdir(parents=True, exist_ok=True)
    found = {}
    for name in names:
        image = folder / f"{rename}{name}_0000.nii.gz"
        image.write_bytes(name.encode() * 99)
        found[name] = {"image": str(image), "label": str(folder / f"{rename}{name}.nii.gz")}
    return found


def parts(found: dict[str, dict], train: str, validation: str, test: str = "") -> dict[str, list]:
    return {
        part: [found[n] for n in names]
        for part, names in {"train": train, "validation": validation, "test": test}.items()
    }


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model that `ab` trained and `c` chose, tested on `d`, in fold 1 of 3."""
    file = tmp_path / "models" / "model.pt"
    split = parts(scans(tmp_path / "ours", "abcdef"), "ab", "c", "d")
    write_model({}, file, record(split, tmp_path / "ours", fold=1))
    return file


def test_a_report_on_the_split_of_the_training(tmp_path, model):
    split = parts(scans(tmp_path / "ours", "abcdef"), "ab", "c", "d")
    check_evaluation([model], record(split, tmp_path / "ours", fold=1), split["test"])
    check_evaluation([tmp_path / "without_record.pt"], record(split), split["train"])


@pytest.mark.parametrize(("settings", "said"), [({"fold": 0}, "fold was 1 and is 0"), ({"fold": 1, "seed": 3}, "seed")])
def test_a_report_with_other_settings_than_the_trainings(tmp_path, model, settings, said):
    split = parts(scans(tmp_path / "ours", "abcdef"), "ab", "c", "d")
    with pytest.raises(InputError) as caught:
        check_evaluation([model], record(split, tmp_path / "ours", **settings), split["test"])
    assert str(caught.value).startswith(
        f"{model.with_suffix('.json')}: the model was trained with another split: {said}"
    )
    assert str(caught.value).endswith("Give the settings of training: --seed 0 --split#fold 1 --split#num_folds 3")


@pytest.mark.parametrize(
    ("tested", "said"),
    [("a", "a (1 in all) trained and would now test"), ("ce", "c (1 in all) chose the model and would now test")],
)
def test_a_report_on_cases_that_the_model_has_seen(tmp_path, model, tested, said):
    """Whatever the folder and the files are called."""
    ours = scans(tmp_path / "ours", "abcdef")
    moved = scans(tmp_path / "moved", "abcdef", rename="patient_")
    for found in (ours, moved):
        split = parts(found, "f", "", tested)
        with pytest.raises(InputError) as caught:
            check_evaluation([model], record(split, Path(found["a"]["image"]).parent, fold=1), split["test"])
        assert said in str(caught.value).replace("patient_", "")


def test_every_model_of_an_ensemble_is_compared(tmp_path, model):
    ours = scans(tmp_path / "ours", "abcdef")
    other = tmp_path / "other" / "model.pt"
    write_model({"other": torch.zeros(1)}, other, record(parts(ours, "d", "f"), tmp_path / "ours", fold=1))
    now = record(parts(ours, "ab", "c", "d"), tmp_path / "ours", fold=1)
    with pytest.raises(InputError, match=r"other/model\.json: d \(1 in all\) trained and would now test"):
        check_evaluation([model, other], now, [ours["d"]])


def test_a_report_beside_the_split(tmp_path, model):
    """`imagesTs`: any model may be reported on it, unless it has seen a copy, or is reported as a few-shot model."""
    ours = scans(tmp_path / "ours", "abcdef")
    held_out, copied = scans(tmp_path / "imagesTs", "xy"), scans(tmp_path / "imagesTs", "a", rename="y")
    split = parts(ours, "ab", "cd")
    check_evaluation([model], record(split, tmp_path / "ours"), [held_out["x"]])
    with pytest.raises(InputError, match=r"ya \(1 in all\) trained and would now test"):
        check_evaluation([model], record(split, tmp_path / "ours"), [held_out["x"], copied["a"]])
    with pytest.raises(InputError, match="num_train_cases was None and is 1"):
        check_evaluation([model], record(split, tmp_path / "ours", num_train_cases=1), [held_out["x"]])


def test_names_of_another_data_set_mean_other_cases(tmp_path, model):
    others = scans(tmp_path / "others", "uvwxyz")
    renamed = {name: {"image": str(Path(c["image"]).rename(tmp_path / "others" / f"{n}_0000.nii.gz")), "label": ""}
               for (name, c), n in zip(others.items(), "abcdef", strict=True)}  # fmt: skip
    split = parts(renamed, "", "", "uvw")
    check_evaluation([model], record(split, tmp_path / "others"), split["test"])


def test_all_cases_of_a_data_set_that_is_new_to_the_model_are_reported_on(tmp_path, model):
    """Unless somebody chose which."""
    others = tmp_path / "others"
    new = list(scans(others, "uvwxyz").values())
    split = split_dataset(new)
    assert len(split["validation"]) == 1
    assert unseen_cases([model], others, split) == new == report_cases(others, split["validation"], (), new)
    for chosen in (
        {"val_cases": "w"},
        {"val_fraction": 0.2},
        {"fold": 0},
        {"test_fraction": 0.2},
        {"num_train_cases": 1},
    ):
        assert unseen_cases([model], others, split_dataset(new, **chosen)) == []
    listed = [{**case, "part": "validation"} if case is new[2] else case for case in new]
    assert unseen_cases([model], others, split_dataset(listed)) == []
    (only,) = unseen_cases([model], others, split_dataset(new[:1]))
    assert only == new[0]


def test_a_data_set_of_which_a_model_has_seen_a_case_is_not_new(tmp_path, model):
    ours, copied = scans(tmp_path / "ours", "abcdef"), scans(tmp_path / "others", "c", rename="y")
    others = scans(tmp_path / "others", "uvwxyz")
    for folder, cases in (("ours", ours), ("others", copied | others)):
        assert unseen_cases([model], tmp_path / folder, split_dataset(list(cases.values()))) == []
    new = split_dataset(list(others.values()))
    write_model({}, tmp_path / "second" / "model.pt", record(parts(others, "u", "v"), "/elsewhere"))
    assert unseen_cases([model, tmp_path / "second" / "model.pt"], tmp_path / "others", new) == []
    assert unseen_cases([tmp_path / "without_record.pt"], tmp_path / "others", new) == []


def test_validation_cases_may_be_reported_on_where_nothing_is_held_out(tmp_path):
    ours = scans(tmp_path / "ours", "abc")
    split = parts(ours, "ab", "c")
    write_model({}, tmp_path / "model.pt", record(split, tmp_path / "ours"))
    check_evaluation([tmp_path / "model.pt"], record(split, tmp_path / "ours"), split["validation"])


def test_unlabelled_scans_that_trained_are_not_evaluated(tmp_path):
    """By name, as they have no digests, and within the data set alone."""
    found = {name: {"image": f"{name}.nii.gz"} for name in "abcd"}
    write_model({}, tmp_path / "model.pt", record(parts(found, "ab", "cd"), label_names=(), val_fraction=0.5))
    same = parts(found, "ab", "c")
    check_evaluation([tmp_path / "model.pt"], record(same, label_names=(), val_fraction=0.3), same["validation"])
    other = parts(found, "bc", "ad")
    check_evaluation([tmp_path / "model.pt"], record(other, "/others", label_names=()), other["validation"])
    with pytest.raises(InputError) as caught:
        check_evaluation([tmp_path / "model.pt"], record(other, label_names=(), seed=3), other["validation"])
    assert str(caught.value) == (
        f"{tmp_path}/model.json: a (1 in all) trained and would now test. Give the settings of training: --seed 0 "
        "--val_fraction 0.5"
    )


@pytest.mark.parametrize("label_names", [("background", "liver"), ()])
def test_a_training_goes_on_with_more_cases_if_its_validation_cases_are_kept(tmp_path, label_names):
    found = scans(tmp_path / "ours", "abcdef")
    share = {"val_cases": [], "val_fraction": 0.3, "label_names": label_names}
    before = record(parts(found, "abc", "d"), **share)
    check_start(record(parts(found, "abcef", "d"), **{**share, "val_cases": ["d"], "val_fraction": 0.2}), before, "s")
    with pytest.raises(InputError) as caught:
        check_start(record(parts(found, "bcdef", "a"), **share), before, "s")
    assert str(caught.value) == (
        "s: a (1 in all) trained and would now choose the model. The settings are those of training, so the data set "
        "has changed: keep its validation cases, --split#val_cases \"['d']\", or start anew in another --ckpt_dir"
    )
    with pytest.raises(InputError, match=r"val_fraction was 0\.3 and is 0\.5"):
        check_start(record(parts(found, "ab", "cd"), **{**share, "val_fraction": 0.5}), before, "s")


@pytest.mark.parametrize("label_names", [("background", "liver"), ()])
def test_validation_cases_that_are_gone_are_to_be_put_back(tmp_path, label_names):
    """They were excluded from a store, say; to keep them by name is no advice then."""
    found = scans(tmp_path / "ours", "abcdef")
    share = {"val_cases": [], "val_fraction": 0.3, "label_names": label_names}
    before, now = record(parts(found, "abc", "de"), **share), record(parts(found, "bcf", "ae"), **share)
    write_model({}, tmp_path / "model.pt", before)
    changed = "The settings are those of training, so the data set has changed"
    lacks = f"{changed}: it lacks the validation cases d (1 in all)"
    with pytest.raises(InputError) as caught:
        check_start(now, before, "s")
    assert str(caught.value) == (
        f"s: a (1 in all) trained and would now choose the model. {lacks}. Put them back, or start anew in another "
        "--ckpt_dir"
    )
    with pytest.raises(InputError) as caught:
        check_evaluation([tmp_path / "model.pt"], now, [found["a"]])
    assert str(caught.value) == (
        f"{tmp_path}/model.json: a (1 in all) trained and would now test. {lacks}. Put them back, or report on cases "
        "that the model has not seen"
    )
    few = {**share, "num_train_cases": 2}  # the rest of the cases is in no part
    before = record(parts(found, "ab", "de"), **few)
    with pytest.raises(InputError, match=r"keep its validation cases, --split#val_cases \"\['d','e'\]\", or "):
        check_start(record(parts(found, "bc", "ae"), **few), before, "s")


def test_the_advice_names_no_share_where_names_chose_the_validation_cases(tmp_path):
    split = parts(scans(tmp_path / "ours", "abcd"), "ab", "c")
    before = record(split, val_cases=["c"], val_fraction=0.2)
    with pytest.raises(InputError, match=r"Give the settings of training, --seed 0 --split#val_cases \"\['c'\]\","):
        check_start(record(split, val_cases=["c"], val_fraction=0.2, num_train_cases=1), before, "s")


def drawn(table: str = "", ranges: str = "a") -> dict:
    drawing = {"tissue_table": table, "ranges": ranges} if table else {}
    return training_record("", parts({}, "", ""), {"spacing": 2.0}, drawing=drawing)


@pytest.mark.parametrize(
    ("before", "now", "said"),
    [
        (drawn("a"), drawn("b"), "s: trained on CTs drawn with another tissue table; give the --tissue_table and the "),
        (drawn("a"), drawn("a", "b"), "s: trained on CTs drawn with other ranges; give the --tissue_table and the con"),
        (drawn("a"), drawn("b", "b"), "s: trained on CTs drawn with another tissue table and other ranges; give"),
        (drawn("a"), drawn(), "s: trained on CTs drawn from tissue maps; give configs/synthetic.json, or give another"),
        (drawn(), drawn("a"), "s: trained on scans; leave out configs/synthetic.json, or give another --ckpt_dir"),
    ],
)
def test_a_training_goes_on_with_cts_drawn_alike(before, now, said):
    """The scores of its validation CTs are compared; scans of a report are no part of that."""
    with pytest.raises(InputError) as caught:
        check_start(now, before, "s")
    assert str(caught.value).startswith(said)
    check_start(before, before, "s")
    assert before["preparation"] == now["preparation"]
    check_start(now, {key: value for key, value in before.items() if key != "drawing"}, "s")


def test_the_only_case_may_train_choose_and_be_reported_on(tmp_path):
    split = parts(scans(tmp_path / "ours", "a"), "a", "a")
    now = record(split, tmp_path / "ours")
    write_model({}, tmp_path / "model.pt", now)
    check_evaluation([tmp_path / "model.pt"], now, split["validation"])
    check_start(now, now, "state.ckpt")


def test_weights_that_have_seen_test_or_validation_cases_are_no_start(tmp_path, model):
    ours = scans(tmp_path / "ours", "abcdef")
    again = record(parts(ours, "ab", "c", "d"), start_weights=(model, "", tmp_path / "none.pt"))
    assert {part: set(found) for part, found in again["seen_before"].items()} == {"train": {*"ab"}, "validation": {"c"}}
    check_unseen(again, again["seen_before"], "weights")
    mixed = record(parts(ours, "d", "a", "bc"), start_weights=(model,))
    with pytest.raises(InputError) as caught:
        check_unseen(mixed, mixed["seen_before"], "weights")
    assert str(caught.value) == (
        "weights: b (1 in all) trained and would now test; a (1 in all) trained and would now choose the model; "
        "c (1 in all) chose the model and would now test. Start from weights that have not seen these cases, or split "
        "the cases as they were split there"
    )
    write_model({}, tmp_path / "next.pt", again)
    third = record(parts(ours, "d", "e", "b"), start_weights=(tmp_path / "next.pt",))
    with pytest.raises(InputError, match=r"b \(1 in all\) trained and would now test"):
        check_unseen(third, third["seen_before"], "weights")
