from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from monai.bundle import verify_net_in_out

from shared_networks.bundle.relabel import relabel
from shared_networks.datasets.labels import (
    check_dataset_labels,
    check_model_labels,
    count_classes,
    dataset_labels,
    model_labels,
    read_labels,
    sided_pairs,
)
from shared_networks.datasets.organs import canonical_name
from shared_networks.datasets.record import training_record, write_model
from shared_networks.errors import InputError
from shared_networks.synthetic.tissues import label_names
from tests.conftest import BUNDLES, ROOT

SIDES = ("left", "right")
BTCV, FLARE = list(label_names("btcv")), list(label_names("flare"))
ABBREVIATED = [
    *("background", "Spleen", "rkid", "lkid", "gall", "eso", "Liver", "sto", "aorta", "IVC"),
    *("portal_vein-and splenic  vein", "pancreas", "rad", "lad"),
]


def write(folder: Path, labels: object, name: str = "dataset.json") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps({"labels": labels}))
    return folder / name


def by_name(names: list[str]) -> dict[str, int]:
    return {name: value for value, name in enumerate(names)}


@pytest.mark.parametrize(
    "labels",
    [
        {"background": 0, "spleen": 2, "liver": 1},
        {"0": "background", "2": "spleen", "1": "liver"},
        {"00": "background", "02": "spleen", "01": "liver"},
    ],
    ids=["v2", "v1", "zeros"],
)
def test_both_forms_are_read_in_order_of_value(tmp_path, labels):
    file = write(tmp_path, labels)
    assert (
        read_labels(file) == dataset_labels(tmp_path) == dataset_labels(str(file)) == ["background", "liver", "spleen"]
    )


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ({"background": 0, "liver": 2}, "label values are 0, 2; map labels and names to 0 to 1, none left out"),
        ({"background": 0, "liver": 0}, "label values are 0, 0; map"),
        ({"liver": 1, "spleen": 2}, "label values are 1, 2; map labels and names to 0 to 1"),
        ({"background": 0, "whole": [1, 2]}, r"label 'whole' is a region, \[1, 2\]; give one integer a label"),
        ({"background": 0, "liver": 1, "Ignore": 2}, "the label 'ignore' is not supported"),
        ({"background": 0, "liver": "1"}, "the value of label 'liver' is '1'; give an integer"),
        ({"background": 0, "liver": True}, "the value of label 'liver' is True"),
        ({"0": "background", "1": "kidney", "2": "kidney"}, r"kidney stand\(s\) for several values"),
        ({"background": 0}, "names no organ"),
        ({}, "names no organ"),
        (["background", "liver"], "no label names in it .*AttributeError"),
    ],
)
def test_labels_that_cannot_be_trained_on(tmp_path, labels, message):
    file = write(tmp_path, labels)
    with pytest.raises(InputError, match=message) as caught:
        read_labels(file)
    assert str(caught.value).startswith(f"{file}: ") and "\n" not in str(caught.value)


def test_files_without_labels(tmp_path):
    with pytest.raises(
        InputError, match=r"dataset\.json: no such file; write one, .* or name the labels: --label_names"
    ):
        dataset_labels(tmp_path)
    with pytest.raises(InputError, match="dataset_dir is not set"):
        dataset_labels("")
    for text in ("{", "[]", "{}"):
        (tmp_path / "dataset.json").write_text(text)
        with pytest.raises(InputError, match="no label names in it"):
            dataset_labels(tmp_path)


@pytest.mark.parametrize(
    ("theirs", "here", "words"),
    [
        (
            FLARE,
            BTCV,
            ["1 is 'liver' there and 'spleen' here; 3 is 'spleen' there and 'left kidney' here", "12 differ"],
        ),
        (BTCV, FLARE, ["1 is 'spleen' there and 'liver' here"]),
        (BTCV[:13], BTCV, ["13 labels there, 14 here"]),
        ([*BTCV, "duodenum"], BTCV, ["15 labels there, 14 here; 14 is 'duodenum' there and nothing here"]),
        ([f"rib {i}" for i in range(14)], BTCV, ["0 is 'rib 0' there and 'background' here", "14 differ"]),
    ],
)
def test_another_order_is_refused_with_the_first_values(tmp_path, theirs, here, words):
    file = write(tmp_path, by_name(theirs))
    with pytest.raises(InputError) as caught:
        count_classes(here, dataset_dir=tmp_path)
    message = str(caught.value)
    assert message.startswith(f"{file}: its labels are not label_names: ") and "\n" not in message
    assert all(word in message for word in words), message
    assert "Pass --label_names @dataset_labels for the data set's, or put dataset.json right" in message


def test_abbreviations_are_only_warned_of(tmp_path, caplog):
    write(tmp_path, by_name(ABBREVIATED))
    check_dataset_labels(BTCV, tmp_path)
    [line] = caplog.messages
    assert "2 is 'rkid' there and 'right kidney' here" in line and "spleen" not in line and "(7 differ)" in line
    assert line.endswith(". If they are others, pass --label_names @dataset_labels")
    assert count_classes(BTCV, dataset_dir=tmp_path) == 14


def total_segmentator(names: list[str]) -> list[str]:
    """Names with the side last: `kidney_left`."""
    return ["_".join([*(w for w in n.split() if w not in SIDES), *(w for w in n.split() if w in SIDES)]) for n in names]


@pytest.mark.parametrize(
    "theirs",
    [
        [name.title().replace(" ", "_") for name in BTCV],
        [name.title().replace(" ", "") for name in BTCV if " and " not in name],
        total_segmentator(BTCV),
        [{"gallbladder": "gall_bladder", "esophagus": "Oesophagus"}.get(name, name) for name in BTCV],
    ],
    ids=["title", "camel", "side last", "British"],
)
def test_another_spelling_is_the_same_organ(theirs, tmp_path, caplog):
    write(tmp_path, by_name(theirs))
    ours = [name for name in BTCV if len(theirs) == len(BTCV) or " and " not in name]
    check_dataset_labels(ours, tmp_path)
    assert caplog.text == "" and [canonical_name(name) for name in theirs] == ours


@pytest.mark.parametrize(
    ("theirs", "words"),
    [
        ({4: "oesophagus", 5: "gall_bladder"}, "4 is 'oesophagus' there and 'gallbladder' here; 5 is 'gall_bladder'"),
        ({2: "kidney_left", 3: "kidney_right"}, "2 is 'kidney_left' there and 'right kidney' here; 3 is"),
        ({12: "LeftAdrenalGland", 13: "adrenal-right"}, "12 is 'LeftAdrenalGland' there and 'right adrenal gland'"),
        ({8: "postcava", 9: "arota"}, "8 is 'postcava' there and 'aorta' here; 9 is 'arota' there and 'inferior"),
        ({2: "lkid", 3: "right_kidney"}, "3 is 'right_kidney' there and 'left kidney' here. Pass"),
    ],
)
def test_another_order_is_refused_however_it_is_spelt(theirs, words, tmp_path, caplog):
    write(tmp_path, by_name([theirs.get(value, name) for value, name in enumerate(BTCV)]))
    with pytest.raises(InputError, match=f"its labels are not label_names: {words}"):
        count_classes(BTCV, dataset_dir=tmp_path)
    assert caplog.text == ""


@pytest.mark.parametrize(
    ("name", "canonical"),
    [
        *[("Adrenal_gland-LEFT", "left adrenal gland"), ("portal vein & splenic vein", BTCV[10]), (" LIVER_", "liver")],
        *[("IVC", "inferior vena cava"), ("inferior_vena_cava", "inferior vena cava"), ("adrenal", "adrenal gland")],
        *[("left", "left"), ("", ""), ("heart_atrium_left", "left heart atrium"), ("upright", "upright")],
    ],
)
def test_organs_have_one_spelling(name, canonical):
    assert canonical_name(name) == canonical == canonical_name(canonical)


def test_without_a_data_set_or_names_in_it_nothing_is_compared(tmp_path):
    assert count_classes(BTCV) == count_classes(BTCV, "") == count_classes(BTCV, tmp_path) == 14
    (tmp_path / "dataset.json").write_text('{"training": []}')
    assert count_classes(["background", "liver"], tmp_path) == 2
    (tmp_path / "dataset.json").write_text("{")
    with pytest.raises(InputError, match="not readable as JSON"):
        count_classes(BTCV, tmp_path)


@pytest.mark.parametrize("names", [None, "/data/dataset.json", [1, 2], ["background"], ["background", "a", "a"]])
def test_names_that_are_none(names):
    with pytest.raises(InputError, match="label_names"):
        count_classes(names)


def made(folder, names):
    """A model and its record."""
    checkpoint = folder / "model.pt"
    parts = {"train": [], "validation": [], "test": []}
    write_model({"bias": torch.rand(3)}, checkpoint, training_record("", parts, {}, label_names=names))
    return checkpoint


def test_a_model_is_used_with_its_own_labels(tmp_path):
    assert count_classes(BTCV, checkpoints=[tmp_path / "none.pt"]) == 14
    checkpoint = made(tmp_path, BTCV)
    assert model_labels(checkpoint) == BTCV
    assert count_classes(BTCV, checkpoints=[checkpoint]) == 14
    with pytest.raises(InputError) as caught:
        count_classes(FLARE, checkpoints=[checkpoint])
    assert str(caught.value) == (
        f"{tmp_path}/model.json: the model was trained on other labels than label_names (14 there, 14 here; 1 is "
        "'spleen' there and 'liver' here). Pass --label_names @model_labels"
    )
    with pytest.raises(InputError, match="14 there, 13 here; 13 is 'left adrenal gland' there and nothing here"):
        check_model_labels(BTCV[:13], checkpoint)


def test_every_member_of_an_ensemble_has_these_labels(tmp_path):
    members = [made(tmp_path / f"fold_{fold}", names) for fold, names in enumerate((BTCV, BTCV, FLARE))]
    assert count_classes(BTCV, checkpoints=members[:2]) == 14
    with pytest.raises(InputError, match=r"fold_2/model\.json: the model was trained on other labels"):
        count_classes(BTCV, checkpoints=members)


def test_other_weights_than_the_record_is_of_have_no_labels(tmp_path):
    checkpoint = made(tmp_path, BTCV)
    torch.save({"bias": torch.zeros(3)}, checkpoint)
    for ask in (model_labels, lambda file: count_classes(BTCV, checkpoints=[file])):
        with pytest.raises(InputError, match=r"model\.pt: not the weights that .*model\.json is the record of"):
            ask(checkpoint)


def test_a_model_without_a_record_names_no_labels(tmp_path):
    checkpoint = made(tmp_path, ())  # as of pre-training
    with pytest.raises(InputError, match=r"model\.json: does not name the labels of .*model\.pt"):
        model_labels(checkpoint)
    (tmp_path / "model.json").unlink()
    with pytest.raises(InputError, match=r"model\.json: does not name the labels of .*model\.pt"):
        model_labels(checkpoint)
    assert count_classes(BTCV, checkpoints=[checkpoint]) == 14


@pytest.mark.parametrize("bundle", BUNDLES[1:])
def test_a_relabelled_copy_of_a_bundle_is_a_bundle_of_these_labels(bundle, tmp_path, capsys):
    names = ["background", "liver", "bladder"]
    copy = shutil.copytree(ROOT / bundle, tmp_path / "own", ignore=shutil.ignore_patterns("models", "outputs"))
    relabel(copy, write(tmp_path, by_name(names)))
    assert "0 background, 1 liver, 2 bladder" in capsys.readouterr().out
    for config in ("train.json", "inference.json"):
        changed, before = (json.loads((root / "configs" / config).read_text()) for root in (copy, ROOT / bundle))
        assert changed["label_names"] == names
        differing = {key for key in changed if changed[key] != before[key]}
        assert list(changed) == list(before) and differing <= {"label_names", "split"}
    channels = json.loads((copy / "configs/metadata.json").read_text())["network_data_format"]["outputs"]["pred"]
    assert channels["num_channels"] == 3 and list(channels["channel_def"].values()) == names
    small = {"network_def#feature_size": 8, "network_def#hidden_size": 48, "network_def#num_heads": 2}
    verify_net_in_out(
        net_id="network_def",
        meta_file=str(copy / "configs/metadata.json"),
        config_file=str(copy / "configs/inference.json"),
        device="cpu",
        bundle_root=str(ROOT / bundle),
        **{"network_def#num_layers": 12, **small},
    )


def test_only_a_segmentation_bundle_can_be_relabelled(tmp_path):
    labels = write(tmp_path, by_name(BTCV))
    with pytest.raises(InputError, match=r"train\.json: no such file; give --bundle a copy"):
        relabel(tmp_path / "nowhere", labels)
    with pytest.raises(InputError, match=r"train\.json: has no label_names"):
        relabel(ROOT / BUNDLES[0], labels)


def test_sided_pairs_of_names_however_written():
    names = ["background", "Spleen", "right_kidney", "Liver", "Left-Kidney", "upright", "adrenal right", "adrenal left"]
    assert sided_pairs(names) == [(3, 1), (2, 4), (6, 7)]
    assert sided_pairs([]) == sided_pairs(["background", "right lung", "spleen"]) == []
