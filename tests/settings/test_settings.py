"""Settings as a user types them: the value that is meant, or a line that says what to give."""

from __future__ import annotations

import inspect
import itertools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import fire
import monai.utils.module
import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser, ConfigWorkflow, run

from shared_networks.errors import InputError
from shared_networks.networks.hi_end_mae import HiEndMAE
from shared_networks.networks.unetr import HiEndUNETR
from shared_networks.settings.command_line import (
    Given,
    call_with_options,
    command_line_settings,
    read_settings,
    take_settings,
    unknown_options,
)
from shared_networks.settings.kinds import COUNT, PATH
from shared_networks.settings.table import SETTINGS
from shared_networks.settings.words import command_line_options, positional_words
from shared_networks.synthetic import phantom
from tests.conftest import BUNDLES, ROOT

BTCV, FLARE, PRETRAIN = "hi_end_mae_btcv_seg", "hi_end_mae_flare_seg", "hi_end_mae_pretrain"
TRAIN, INFERENCE = (BTCV, "train.json"), (BTCV, "inference.json")
UNCERTAINTY = (BTCV, "inference.json", "uncertainty.json")
ATTENTION = (PRETRAIN, "inference.json", "attention.json")
EVALUATE = (BTCV, "train.json", "evaluate.json")
PREPARE = (PRETRAIN, "prepare.json")
STRUCTURE = {"imports", "paths", "initialize", "run", "finalize", "network", "datalist", "handlers"}
"""Top-level items of configs that are no settings."""


def files_of(config: tuple[str, ...]) -> str:
    return repr([str(ROOT / config[0] / "configs" / name) for name in config[1:]])


@pytest.fixture
def command_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., ConfigWorkflow]:
    """Makes the workflow of `python -m monai.bundle run WORDS`, with the values that fire hands to MONAI."""
    spec = type("Spec", (), {"name": "monai.bundle.__main__"})
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", spec)
    monkeypatch.chdir(tmp_path)

    def workflow(config: tuple[str, ...], *words: str) -> ConfigWorkflow:
        """Initialized up to and with the settings."""
        words = ("--config_file", files_of(config), "--bundle_root", str(ROOT / config[0]), *words)
        monkeypatch.setattr(sys, "argv", ["__main__.py", "run", *words])
        passed: dict[str, Any] = {}
        fire.Fire(lambda **options: passed.update(options), command=list(words))
        passed = {key: value for key, value in passed.items() if value is not None}  # as MONAI does
        flow = ConfigWorkflow(**passed, workflow_type=None, logging_file=False)
        items = flow.parser["initialize"]
        assert items[1] == "$@settings(__local_refs)"
        flow.parser["initialize"] = items[:2]
        try:
            flow.initialize()
        except RuntimeError as error:
            raise error.__cause__ or error from None
        return flow

    return workflow


@pytest.mark.parametrize("bundle", BUNDLES)
def test_every_setting_of_every_config_is_declared_and_its_default_passes(bundle: str) -> None:
    files = [file for file in sorted((ROOT / bundle / "configs").glob("*.json")) if file.name != "metadata.json"]
    assert len(files) >= 7
    for file in files:
        for name, value in json.loads(file.read_text()).items():
            if name.startswith(("_", "+")) or "#" in name or isinstance(value, dict) or name in STRUCTURE:
                continue
            assert name in SETTINGS, f"{file}: declare what {name} takes in shared_networks/settings/command_line.py"
            if not str(value).startswith(("$", "@")):
                assert SETTINGS[name].read(value) == value, name


@pytest.mark.parametrize("bundle", BUNDLES)
def test_every_config_takes_its_settings_first(bundle: str) -> None:
    """Overlays that replace `initialize` too; the first item is the one that makes errors one line."""
    for file in (ROOT / bundle / "configs").glob("*.json"):
        items = json.loads(file.read_text()).get("initialize")
        assert items is None or items[1] == "$@settings(__local_refs)", file


VALUES: list[tuple[tuple[str, ...], str, str, Any]] = [
    (TRAIN, "amp", "yes", True),
    (TRAIN, "amp", "OFF", False),
    (TRAIN, "amp", "0", False),
    (TRAIN, "overwrite", "no", False),
    (TRAIN, "overwrite", "false", False),
    (TRAIN, "resume", "TRUE", True),
    (TRAIN, "spacing", "4", [4, 4, 4]),
    (TRAIN, "spacing", "1.5,1.5,3", [1.5, 1.5, 3]),
    (TRAIN, "img_size", "48", [48, 48, 48]),
    (TRAIN, "label_names", "[0012, 1_000, 'a, b']", ["0012", "1_000", "a, b"]),
    (TRAIN, "label_names", "['background', 'None', '1']", ["background", "None", "1"]),
    (TRAIN, "flip_axes", "1", [1]),
    (TRAIN, "flip_axes", "[]", []),
    (TRAIN, "flip_axes", "0,2", [0, 2]),
    (TRAIN, "learning_rate", "1e-3", 0.001),
    (TRAIN, "epochs", "1e2", 100),
    (TRAIN, "max_grad_norm", "None", None),
    (TRAIN, "images", "null", None),
    (TRAIN, "images", "['a#1.nii.gz', 20261125]", ["a#1.nii.gz", "20261125"]),
    (TRAIN, "modality", "mr", "MR"),
    (TRAIN, "device", "cpu", torch.device("cpu")),
    (TRAIN, "precision", "bfloat16", torch.bfloat16),
    (TRAIN, "num_classes", "5", 5),
    (TRAIN, "cache_rate", "0.5", 0.5),
    (INFERENCE, "checkpoints", "fold#1.pt", ["fold#1.pt"]),
    (INFERENCE, "checkpoints", "['a.pt','b.pt']", ["a.pt", "b.pt"]),
    (INFERENCE, "tta_flip_axes", "0", [0]),
    (INFERENCE, "organ_probability", "liver", "liver"),
    (INFERENCE, "organ_probability", "6", 6),
    (EVALUATE, "nsd_tolerance", "1.5", 1.5),
    (EVALUATE, "nsd_tolerance", "{'spleen': 2.0, 'right kidney': 1}", {"spleen": 2.0, "right kidney": 1}),
    (ATTENTION, "voxel", "(30, 60, 10)", [30, 60, 10]),
    (PREPARE, "num_workers", "0", 0),
]
PATHS = [
    "20261125",
    "1_000",
    "007",
    "out#1",
    "a#b#c",
    "$HOME",
    "$x + 1",
    "@spacing",
    "(a)",
    "{a}",
    "[a]",
    "None",
    "a b",
    "'q'",
]


@pytest.mark.parametrize(("config", "name", "text", "value"), VALUES)
def test_a_setting_gets_the_value_that_is_meant(command_line, config, name, text, value) -> None:
    words = (f"--{name}", text) if text[0] != "-" else (f"--{name}={text}",)
    found = command_line(config, *words).parser.get_parsed_content(name)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize("text", PATHS)
def test_a_path_is_the_text_as_typed(command_line, text) -> None:
    flow = command_line(TRAIN, "--output_dir", text, f"--ckpt_dir={text}")
    typed = text.strip("'")
    assert flow.parser.get_parsed_content("output_dir") == flow.parser.get_parsed_content("ckpt_dir") == typed


@pytest.mark.parametrize("text", ["20261125", "bundle#1"])
def test_the_bundles_folder_is_the_text_as_typed(command_line, monkeypatch, tmp_path, text) -> None:
    """Its copy of the package is looked for there, and nowhere else."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    parser = command_line(TRAIN, "--bundle_root", text).parser
    assert parser.get_parsed_content("ckpt_dir") == f"{text}/models"
    assert sys.path[0] == str(tmp_path / text) and sys.path[-1] == str(tmp_path)


def test_what_is_made_from_a_setting_gets_it_as_typed(command_line, tmp_path) -> None:
    """References in components, expressions and lists: all stand for the value that was taken."""
    scan = tmp_path / "scans#1" / "20261125" / "case#2.nii.gz"
    scan.parent.mkdir(parents=True)
    nib.save(nib.Nifti1Image(np.zeros((4, 5, 6), np.int16), np.diag([-2, 2, 3, 1])), scan)
    words = ("--dataset_dir", "scans#1/20261125", "--spacing", "3", "--checkpoints", "m#1/model.pt", "--amp", "no")
    parser = command_line(INFERENCE, *words, "--intensity_range", "-100,200").parser
    assert [source.files for source in parser.get_parsed_content("datalist")] == [(str(scan),)]
    assert parser.get_parsed_content("checkpoint") == "m#1/model.pt"
    assert parser.get_parsed_content("precision") is None
    transforms = parser.get_parsed_content("preprocessing").transforms
    assert np.allclose(transforms[3].spacing_transform.pixdim, 3)
    assert (transforms[4].by_window.a_min, transforms[4].by_window.a_max) == (-100, 200)


def test_an_option_without_a_value_or_given_twice_is_what_fire_makes_of_it(command_line) -> None:
    for words, value in ((["--amp"], True), (["--noamp"], False), (["--amp=False"], False)):
        assert command_line(TRAIN, *words).parser.get_parsed_content("amp") is value
    assert command_line(TRAIN, "--epochs", "73", "--epochs=74").parser.get_parsed_content("epochs") == 74


def test_references_and_expressions_are_still_evaluated(command_line) -> None:
    parser = command_line(TRAIN, "--label_names", "$['background', 'liver']", "--epochs", "$2 + 3").parser
    assert parser.get_parsed_content("label_names") == ["background", "liver"]
    assert parser.get_parsed_content("epochs") == 5
    words = ("--num_samples", "@batch_size", "--batch_size", "7")
    assert command_line(TRAIN, *words).parser.get_parsed_content("num_samples") == 7


REFUSED = [
    (TRAIN, "amp", "maybe", "give True or False"),
    (TRAIN, "device", "cuda:99", "give a device of this machine: cpu"),
    (TRAIN, "device", "0", "give a device of this machine: cpu"),
    (TRAIN, "device", "gpu", "give a device of this machine: cpu"),
    (TRAIN, "img_size", "[48,48,40]", "is no multiple of --patch_size 12; give such as --img_size [48,48,36]"),
    (TRAIN, "epochs", "0", "give a whole number of at least 1"),
    (TRAIN, "epochs", "20", "ends within --warmup_epochs 50, at the highest learning rate; give such as --warmup_e"),
    (TRAIN, "epochs", "1.5", "give a whole number of at least 1"),
    (TRAIN, "epochs", "True", "give a whole number of at least 1"),
    (TRAIN, "epochs", "4#5", "give a whole number of at least 1"),
    (TRAIN, "val_interval", "0", "give a whole number of at least 1"),
    (TRAIN, "batch_size", "0", "give a whole number of at least 1"),
    (TRAIN, "num_samples", "0", "give a whole number of at least 1"),
    (TRAIN, "learning_rate", "1e-3x", "give a number above 0"),
    (TRAIN, "learning_rate", "nan", "give a number above 0"),
    (TRAIN, "num_workers", "-1", "give a whole number of at least 0"),
    (TRAIN, "seed", "abc", "give a whole number from 0 to 4294967295"),
    (TRAIN, "seed", "-1", "give a whole number from 0 to 4294967295"),
    (TRAIN, "seed", "None", "give a whole number from 0 to 4294967295"),
    (TRAIN, "intensity_range", "250", "give two numbers, the lower one first, such as [-175,250]"),
    (TRAIN, "intensity_range", "[250,-175]", "give two numbers, the lower one first, such as [-175,250]"),
    (TRAIN, "spacing", "[0,4,4]", "give three numbers above 0"),
    (TRAIN, "spacing", "[4,4]", "give three numbers above 0"),
    (TRAIN, "spacing", "[4,4,4", "give three numbers above 0"),
    (TRAIN, "flip_axes", "3", "give axes out of 0 (left-right)"),
    (TRAIN, "flip_axes", "[1,1]", "give axes out of 0 (left-right)"),
    (TRAIN, "output_dir", "", "give a path"),
    (TRAIN, "optimizer#params#layer_decay", "0", "give a number above 0 and at most 1"),
    (TRAIN, "modality", "PET", "give CT or MR"),
    (TRAIN, "label_names", "liver", "give a list of two names or more"),
    (TRAIN, "label_names", "@dataset_lables", "did you mean @dataset_labels?"),
    (INFERENCE, "overlap", "1", "give a number of at least 0 and below 1"),
    (INFERENCE, "blending", "linear", "give constant or gaussian"),
    (UNCERTAINTY, "dropout", "1", "give a number of at least 0 and below 1"),
    (UNCERTAINTY, "measure", "std", "give entropy or variance"),
    (ATTENTION, "voxel", "30", "give three whole numbers"),
    (EVALUATE, "nsd_tolerance", "0", "give a number above 0, or one for each organ, such as \"{'spleen':2.0,"),
    (EVALUATE, "nsd_tolerance", "{'spleen':0}", "give a number above 0, or one for each organ"),
    (EVALUATE, "nsd_tolerance", "{'spleen':2.0", "give a number above 0, or one for each organ"),
    (EVALUATE, "nsd_tolerance", "{spleen:2.0}", "give a number above 0, or one for each organ"),
    (EVALUATE, "nsd_tolerance", "{'spleen','liver'}", "give a number above 0, or one for each organ"),
]


@pytest.mark.parametrize(("config", "name", "text", "message"), REFUSED)
def test_a_value_that_cannot_be_is_one_line_that_says_what_to_give(command_line, config, name, text, message) -> None:
    with pytest.raises(InputError) as caught:
        command_line(config, f"--{name}", text)
    line = str(caught.value)
    assert "\n" not in line
    assert line.startswith(f"--{name} ") and message in line
    assert text.replace(" ", "") in line.replace(" ", "")


@pytest.mark.parametrize("name", ["pretrained_encoder", "spacing", "epochs", "label_names", "device", "max_grad_norm"])
def test_an_option_that_lacks_its_value_is_refused(command_line, name) -> None:
    with pytest.raises(InputError, match=f"^--{name}: has no value; give "):
        command_line(TRAIN, f"--{name}", "--amp", "False")


NESTED = [
    ("network_def#hidden_size", "192"),
    ("network_def#use_checkpoint", "True"),
    ("network_def#out_indices", "[0,1,2]"),
    ("network_def#norm_name", "batch"),
    ("loss#lambda_dice", "2"),
    ("optimizer#lr", "0.1"),
    ("optimizer#eps", "1e-6"),
    ("train#trainer#max_epochs", "3"),
    ("train#handlers#1#epoch_level", "False"),
    ("split#fold", "2"),
    ("split#val_cases", "['0012']"),
    ("train#random_transforms#0#neg", "0"),
    ("train#dataloader#num_workers", "0"),
    ("spacing#2", "3"),
    ("validate#evaluator#decollate", "False"),
    ("optimizer#_disabled_", "False"),
]


@pytest.mark.parametrize(("name", "text"), NESTED)
def test_a_deeper_setting_that_exists_or_is_a_parameter_is_taken(command_line, name, text) -> None:
    value = command_line(TRAIN, f"--{name}", text).parser.get(name)
    assert str(value).replace(" ", "") in (text, str(float(text)) if text[0].isdigit() else text)


def test_a_part_of_a_list_goes_into_the_list(command_line) -> None:
    assert command_line(TRAIN, "--spacing#2", "3").parser.get_parsed_content("spacing") == [1.5, 1.5, 3]


NESTED_REFUSED = [
    (
        "network_def#hiden_size",
        "8",
        "there is no setting 'network_def#hiden_size'; did you mean --network_def#hidden_size?",
    ),
    ("network_def::hiden_size", "8", "did you mean --network_def#hidden_size?"),
    ("network_def#hidden_size", "abc", "--network_def#hidden_size abc: give a whole number of at least 1"),
    ("network_def#hidden_size", "0", "give a whole number of at least 1"),
    ("network_def#use_checkpoint", "true", "write --network_def#use_checkpoint True"),
    ("network_def#use_checkpoint", "maybe", "give True or False"),
    ("network_def#out_indices", "3", "write --network_def#out_indices [3]"),
    ("loss#lambda_dce", "2", "did you mean --loss#lambda_dice?"),
    ("loss#lambda_dice", "x", "--loss#lambda_dice x: give a number"),
    ("train#trainer#max_epochs", "0", "give a whole number of at least 1"),
    ("train#handlers#99#epoch_level", "True", "there is no setting 'train#handlers#99'"),
    ("train#maximum", "3", "there is no setting 'train#maximum'"),
    ("train#dataset#data", "a#b.json", "MONAI cannot take a # in this setting"),
    ("validate#dataloader#batch_size", "2.5", "give a whole number"),
    ("spacing#2", "x", "give a number"),
    ("spacing#2", "0", "--spacing#2 0: spacing would be [1.5, 1.5, 0]; give three numbers above 0"),
    ("loss", "5", "set its parts, as --loss#PART VALUE"),
    ("split", "{'fold':0}", "split is not one value; set its parts, as --split#PART VALUE"),
    ("training_run#ema", "0.99", "training_run#ema is not one value; set its parts, as --training_run#ema#PART VALUE"),
    ("training_run#ema", "None", "set its parts, as --training_run#ema#PART VALUE"),
    ("datalist#check", "False", "set its parts, as --datalist#check#PART VALUE"),
    ("datset_dir", "x", "--datset_dir: there is no setting 'datset_dir'; did you mean --dataset_dir?"),
]


@pytest.mark.parametrize(("name", "text", "message"), NESTED_REFUSED)
def test_a_deeper_setting_that_is_not_there_or_cannot_be_is_refused(name, text, message) -> None:
    with pytest.raises(InputError) as caught:
        command_line_settings(["--config_file", files_of(TRAIN), f"--{name}", text])
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_the_optimisers_learning_rate_is_that_of_all_its_groups(command_line) -> None:
    parser = command_line(TRAIN, "--optimizer#lr", "0.5").parser
    assert parser.get_parsed_content("optimizer#params#learning_rate") == 0.5


STORE = (PRETRAIN, "train.json", "prepared.json", "tiny.json")
DEEP = ["train#trainer#accumulation_steps"]


@pytest.mark.parametrize(
    ("config", "words", "unused"),
    [
        ((BTCV, "train.json"), ("--flip_axes", "[0]", "--compile", "True"), []),
        ((BTCV, "train.json", "synthetic.json"), ("--flip_axes", "[0]", "--epochs", "99"), ["flip_axes"]),
        ((BTCV, "train.json", "evaluate.json"), ("--compile", "True", "--overlap", "0.0"), ["compile"]),
        ((PRETRAIN, "train.json", "prepared.json"), ("--images", "[a.nii.gz]", "--spacing#2", "3.0"), ["images"]),
        (STORE, ("--dataset_dir", "CT", "--prepared_dir", "S", "--val_fraction", "0.1"), ["dataset_dir"]),
        (STORE, ("--dataset_dir", "CT", "--datalist", "@images"), []),
        ((BTCV, "train.json", "evaluate.json"), ("--epochs", "99", "--muon", "True"), ["epochs", "muon"]),
        ((BTCV, "train.json", "evaluate.json"), ("--train#trainer#accumulation_steps", "2", "--split#fold", "1"), DEEP),
        ((BTCV, "train.json", "evaluate.json", "small.json"), ("--ckpt_dir", "/runs/own"), []),
        ((PRETRAIN, "prepare.json", "small.json"), ("--network_def#num_heads", "3"), ["network_def#num_heads"]),
        (
            (PRETRAIN, "inference.json", "convert.json"),
            ("--dataset_dir", "CT", "--format", "official"),
            ["dataset_dir"],
        ),
        (
            PREPARE,
            ("--run_id", "preprocessing", "--spacing", "3", "--seed", "1", "--imports#0", "$import os"),
            ["seed"],
        ),
    ],
)
def test_a_setting_that_an_overlay_leaves_without_effect_is_named(config, words, unused, caplog) -> None:
    command_line_settings(["--config_file", files_of(config), *words])
    assert [line.partition(":")[0] for line in caplog.messages] == [f"--{name}" for name in unused]
    assert all("has no effect, as nothing that " in line for line in caplog.messages)


FOREIGN = {
    *itertools.product(["train"], ["inference_trt", "attention", "features"]),
    *itertools.product(["inference"], ["evaluate", "multi_gpu_train", "prepared", "strong_augmentation", "synthetic"]),
    *itertools.product(["prepare"], ["attention", "evaluate", "features", "multi_gpu_train", "prepared", "synthetic"]),
}
"""Pairs of a config and an overlay of parts that it has not: MONAI itself ends there, before any code of the bundle."""


@pytest.mark.parametrize("bundle", BUNDLES)
def test_every_overlay_is_read_over_every_config_that_has_its_parts(bundle) -> None:
    contents = {file.stem: json.loads(file.read_text()) for file in (ROOT / bundle / "configs").glob("*.json")}
    wholes = [name for name, content in contents.items() if "bundle_root" in content]
    overlays = contents.keys() - {*wholes, "metadata"}
    assert {"train", "inference"} <= set(wholes) and {"small", "tiny", "evaluate", "synthetic"} <= overlays
    foreign = set()
    for whole, overlay in itertools.product(wholes, sorted(overlays)):
        try:
            found = command_line_settings(["--config_file", files_of((bundle, f"{whole}.json", f"{overlay}.json"))])
        except KeyError as error:
            foreign.add((whole, overlay))
            assert str(error).startswith("'query key: "), (whole, overlay)
        else:
            expected = contents[overlay].get("spacing", contents[whole]["spacing"])
            assert found["spacing"] == expected, (whole, overlay)
    assert foreign == FOREIGN.intersection(itertools.product(wholes, overlays))


@pytest.mark.parametrize("overlays", list(itertools.permutations(["prepared.json", "synthetic.json"])))
def test_no_ct_is_drawn_from_a_store(overlays, command_line) -> None:
    with pytest.raises(InputError) as caught:
        command_line((PRETRAIN, "train.json", *overlays, "tiny.json"))
    assert str(caught.value) == (
        "configs/prepared.json and configs/synthetic.json are given together, but a store holds scans and no tissue "
        "maps; leave one of the two out"
    )


@pytest.mark.parametrize("overlay", ["small.json", "tiny.json"])
def test_a_store_has_the_spacing_of_an_overlay_of_another_size(overlay, command_line) -> None:
    spacing = json.loads((ROOT / PRETRAIN / "configs" / overlay).read_text())["spacing"]
    parser = command_line((*PREPARE, overlay), "--num_workers", "3").parser
    assert spacing != json.loads((ROOT / PRETRAIN / "configs" / "prepare.json").read_text())["spacing"]
    assert parser.get_parsed_content("spacing") == spacing
    assert parser.get_parsed_content("preprocessing").transforms[1].spacing_transform.pixdim.tolist() == spacing
    assert parser.get_parsed_content("num_workers") == 3
    with pytest.raises(InputError, match=r"there is no setting 'network_def#hidden_size'; there are none$"):
        command_line(PREPARE, "--network_def#hidden_size", "96")


@pytest.mark.parametrize("bundle", [BTCV, PRETRAIN])
def test_the_model_of_the_folder_that_is_given_comes_before_the_weights_that_ship(bundle, command_line) -> None:
    config = (bundle, "train.json", "evaluate.json", "small.json")
    for words, model in (
        ((), f"{ROOT / bundle}/weights/small.pt"),
        (("--ckpt_dir", "/runs/own"), "/runs/own/model.pt"),
        (("--ckpt_dir", "/runs/own", "--checkpoint", "/other.pt"), "/other.pt"),
    ):
        assert command_line(config, *words).parser.get_parsed_content("checkpoint") == model
    if bundle == BTCV:
        parser = command_line(config, "--ckpt_dir", "/runs/own", "--checkpoints", "['/a.pt','/b.pt']").parser
        assert parser.get_parsed_content("checkpoint") == "/a.pt"


def test_all_that_is_wrong_is_said_at_once(command_line) -> None:
    with pytest.raises(InputError) as caught:
        command_line(TRAIN, "--epochs", "x", "--no-amp", "--datset_dir", "d", "--spacing", "0")
    starts = [
        "--epochs x: give",
        "--no-amp: is no option; write --amp False",
        "--datset_dir: there is no",
        "--spacing 0: give",
    ]
    lines = str(caught.value).splitlines()
    assert len(lines) == len(starts)
    assert all(line.startswith(start) for line, start in zip(lines, starts, strict=True))


def test_a_stray_word_is_refused() -> None:
    with pytest.raises(InputError, match=r"^5: is neither an option nor its value.*give a list as"):
        command_line_settings(["--config_file", files_of(TRAIN), "--spacing", "4", "5"])
    with pytest.raises(InputError, match=r"^runn: "):
        command_line_settings(["--config_file", files_of(TRAIN), "--run_id", "runn"])


def test_settings_of_files_are_taken_alike(command_line, tmp_path) -> None:
    """The user's own overlay and args_file hold typed values; paths in them are as written, too."""
    own, arguments = tmp_path / "own.json", tmp_path / "args.json"
    own.write_text(json.dumps({"spacing": 3, "output_dir": "o#1", "label_names": [1, "02"], "num_workers": "2"}))
    arguments.write_text(json.dumps({"flip_axes": 1, "ckpt_dir": "c#1", "epochs": 7, "checkpoint_dir": "x"}))
    config = (BTCV, "train.json", str(own))
    with pytest.raises(InputError, match=r"--checkpoint_dir: there is no setting 'checkpoint_dir'.*\(.*args\.json; "):
        command_line(config, "--args_file", str(arguments))
    arguments.write_text(json.dumps({"flip_axes": 1, "ckpt_dir": "c#1", "epochs": 77}))
    found = command_line_settings(["--config_file", files_of(config), "--args_file", str(arguments), "--epochs", "78"])
    expected = {"spacing": [3, 3, 3], "output_dir": "o#1", "label_names": ["1", "02"], "num_workers": 2}
    expected |= {"flip_axes": [1], "ckpt_dir": "c#1", "epochs": 78}
    assert {name: found[name] for name in expected} == expected
    own.write_text(json.dumps({"spacing": 0}))
    with pytest.raises(InputError, match=r"^spacing = 0 in .*own\.json.*: give three numbers above 0"):
        command_line_settings(["--config_file", files_of(config)])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("optimizer#params#freeze_encoder: 'no'", "freeze_encoder = 'no' in .*: is text; write false$"),
        ("optimizer#params#layer_decay: '0.5'", "layer_decay = '0.5' in .*: is text; write 0.5$"),
        ("optimizer#weight_decay: 1e-2", "weight_decay = '1e-2' in .*: is text; give a number, without quotes"),
        ("validate#inferer#inferer#overlap: '0'", "overlap = '0' in .*: is text; give a number, without quotes"),
        ("optimizer#fused: 'no'", "fused = 'no' in .*: is text; give True or False, without quotes"),
        ("split#num_folds: '4'", "num_folds = '4' in .*: is text; write 4$"),
    ],
)
def test_deeper_settings_of_files_are_no_texts(tmp_path: Path, text: str, said: str) -> None:
    """MONAI hands them over as they are, and a text counts as true."""
    (own := tmp_path / "own.yaml").write_text(text)
    for files in (files_of((BTCV, "train.json", str(own))), f"{ROOT / BTCV / 'configs' / 'train.json'},{own}"):
        with pytest.raises(InputError, match=f"^[a-z#]*{said}"):
            command_line_settings(["--config_file", files])


def test_settings_in_python_are_left_as_they_are(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(sys, "argv", ["server", "run", "--epochs", "x"])
    configs = ROOT / BTCV / "configs"
    flow = ConfigWorkflow(
        config_file=str(configs / "train.json"), workflow_type=None, logging_file=False, spacing=[3, 3, 3], device="cpu"
    )
    flow.parser["bundle_root"] = str(ROOT / BTCV)
    flow.parser["initialize"] = flow.parser["initialize"][:2]
    flow.initialize()
    assert flow.parser.get_parsed_content("spacing") == [3, 3, 3]
    resolved = {"spacing": 3}
    take_settings(resolved)
    assert resolved == {"spacing": 3}


@pytest.mark.parametrize("network", [HiEndUNETR, HiEndMAE])
def test_networks_refuse_sizes_that_do_not_fit_as_the_users_errors(network) -> None:
    small = {"hidden_size": 48, "num_heads": 4, "num_layers": 3, "out_indices": (0, 1, 2), "patch_size": 12}
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"img_size": (48, 48, 40)}, r"\(48, 48, 40\) is not divisible by patch size"),
        ({"hidden_size": 50}, "hidden size 50 is not divisible by 6"),
        ({"num_heads": 5}, "hidden size 48 is not divisible by 5 heads"),
        ({"out_indices": (0, 1, 3)}, "must be ascending block indices from 0 to 2"),
    ]
    wrong += [({"mask_ratio": 0.999}, "mask ratio 0.999 leaves 0 of 64")] if network is HiEndMAE else []
    for values, message in wrong:
        with pytest.raises(InputError, match=message):
            network(**{"img_size": 48, **small, **values})


def test_options_are_read_in_every_form() -> None:
    line = "training --dataset_dir /data --net#width=8 --a::b x=y --seed -1 -v 2 --amp --fast-mode more"
    words = line.split()
    assert command_line_options([*words[:-1], "--noise", "--nothing=2"]) == {
        "dataset_dir": "/data",
        "net#width": "8",
        "a::b": "x=y",
        "seed": "-1",
        "v": "2",
        "amp": True,
        "fast_mode": True,
        "ise": False,
        "nothing": "2",
    }
    assert positional_words(["training", "--a", "1", "2", "--b=3", "4", "--", "5"]) == ["training", "2", "4"]


def test_options_equal_what_fire_passes(capsys) -> None:
    received: dict[str, Any] = {}
    line = "--dataset-dir /data --net#width=8x --noamp --+extra word --tta --seed=-1x --twice 1 --twice 2 -- --verbose"
    fire.Fire(lambda **options: received.update(options), command=line)
    assert {key: str(value) for key, value in command_line_options(line.split()).items()} == {
        key: str(value) for key, value in received.items()
    }
    assert received["amp"] is False and received["dataset_dir"] == "/data"


def test_unknown_options_are_named_with_the_nearest_setting() -> None:
    known = {"dataset_dir", "train", "initialize"}
    assert unknown_options(["dataset_dir", "train#trainer#max_epochs", "train::x", "+initialize"], known) == []
    assert unknown_options(["datset_dir", "trian#trainer", "zzz"], known) == [
        "--datset_dir: there is no setting 'datset_dir'; did you mean --dataset_dir?",
        "--trian#trainer: there is no setting 'trian'; did you mean --train?",
        "--zzz: there is no setting 'zzz'; the settings are dataset_dir, initialize, train",
    ]


def test_what_monai_reads_itself_is_known() -> None:
    config = ["--config_file", files_of(TRAIN)]
    parameters = {p.name for p in inspect.signature(run).parameters.values() if p.kind is not p.VAR_KEYWORD}
    assert "logging_file" in parameters
    others = parameters - {"config_file", "args_file", "tracking", "run_id"}
    command_line_settings([*config, *(f"--{name}=x" for name in others), "--run_id", "run"])
    command_line_settings([*config, "--tracking", "mlflow", "--experiment_name", "x", "--_meta_#version", "2"])
    command_line_settings(["training"])
    with pytest.raises(InputError, match="--experiment_name: there is no setting"):
        command_line_settings([*config, "--experiment_name", "x"])
    with pytest.raises(InputError, match="--output_dir a#b: MONAI's --tracking cannot take a #"):
        command_line_settings([*config, "--tracking", "mlflow", "--output_dir", "a#b"])


def test_settings_that_a_config_has_not_are_not_searched_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """MONAI's `name in config` compares a missing name with all others: 0.2 s a start for some forty."""
    compared = []
    monkeypatch.setattr(monai.utils.module, "damerau_levenshtein_distance", lambda *names: compared.append(names))
    config = ConfigParser(ConfigParser.load_config_files(str(ROOT / BTCV / "configs" / "train.json")))
    settings = read_settings(config, [Given("train#trainer#max_epochs", 2, 2), Given("seed", "3", "3")])
    assert settings["seed"] == 3 and config["train#trainer#max_epochs"] == 2
    assert compared == []


def test_the_device_of_each_process_is_left_to_the_overlay_for_several_gpus() -> None:
    files = files_of((BTCV, "train.json", "multi_gpu_train.json"))
    assert "device" not in command_line_settings(["--config_file", files])
    with pytest.raises(InputError, match="--device cuda:99: give a device of this machine"):
        command_line_settings(["--config_file", files, "--device", "cuda:99"])


@pytest.mark.parametrize("bundle", BUNDLES)
@pytest.mark.parametrize(
    ("configs", "missing"),
    [
        ("train", "multi_gpu_train"),
        ("train prepared", "multi_gpu_train"),
        ("train tiny multi_gpu", "multi_gpu_train"),
        ("train multi_gpu_train", ""),
        ("train evaluate", "multi_gpu"),
        ("train evaluate multi_gpu", ""),
        ("inference", ""),
        ("inference multi_gpu", ""),
        ("prepare", ""),
    ],
)
def test_several_processes_need_the_overlay_that_makes_them_work_together(
    bundle: str, configs: str, missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if bundle != PRETRAIN and "prepare" in configs:
        return
    words = ["--config_file", files_of((bundle, *(f"{name}.json" for name in configs.split())))]
    command_line_settings(words)
    monkeypatch.setenv("WORLD_SIZE", "2")
    said = rf"WORLD_SIZE is 2: .* add 'configs/{missing}\.json'"
    with pytest.raises(InputError, match=said) if missing else nullcontext():
        command_line_settings(words)


def test_what_a_component_takes_is_not_guessed_where_it_cannot_be_known() -> None:
    config = ConfigParser({"a": {"_target_": "no.such.module.Thing"}, "b": {"_target_": "builtins.dict", "x": 1}})
    assert read_settings(config, [Given("a#anything", "x", "x"), Given("b#y", "2", 2)]) == {}
    assert config["a"]["anything"] == "x" and config["b"] == {"_target_": "builtins.dict", "x": 1, "y": 2}


def test_settings_of_a_config_in_python() -> None:
    config = ConfigParser({"spacing": [1, 1, 1], "net": {"width": 4}, "epochs": "$1 + 1"})
    given = [Given("spacing", "2", 2), Given("net#width", "8", 8)]
    assert read_settings(config, given) == {"spacing": [2, 2, 2]}
    assert config["net"]["width"] == 8


def made(out: str, count: int = 3) -> tuple[str, int]:
    """Make something.

    Args:
        out: where.
        count: how many.
    """
    return out, count


def test_modules_take_their_options_as_typed(capsys, tmp_path) -> None:
    kinds = {"out": PATH, "count": COUNT}
    assert call_with_options(made, kinds, ["--out", "20261125"]) == ("20261125", 3)
    assert call_with_options(made, kinds, ["--out=a#b", "--count", "4"]) == ("a#b", 4)
    assert call_with_options(made, kinds, ["--help"]) is None
    assert "out: where" in capsys.readouterr().out
    for words, message in (
        ([], "--out: is missing; give a path"),
        (["--out"], "--out: has no value; give a path"),
        (["--out", "x", "--count", "0"], "--count 0: give a whole number of at least 1"),
        (["--out", "x", "--cout", "2"], "--cout: there is no setting 'cout'; did you mean --count?"),
        (["--out", "x", "y"], "y: is no option and no value; give --name value"),
    ):
        with pytest.raises(InputError) as caught:
            call_with_options(made, kinds, words)
        assert str(caught.value) == message


def test_the_phantom_writes_to_the_folder_that_is_named(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["--train", "0", "--test", "1", "--voxel_mm", "6"]
    call_with_options(phantom.write_dataset, phantom.OPTIONS, ["--out", "p#1/20261125", *words])
    assert [path.name for path in tmp_path.iterdir()] == ["p#1"]
    assert (tmp_path / "p#1" / "20261125" / "imagesTs" / "test_000_0000.nii.gz").is_file()
    with pytest.raises(InputError, match="already holds other scans"):
        call_with_options(phantom.write_dataset, phantom.OPTIONS, ["--out", "p#1/20261125", "--test", "0"])
    with pytest.raises(InputError, match=r"^--voxel_mm 9: give a size from 0\.4 to 6 mm$"):
        call_with_options(phantom.write_dataset, phantom.OPTIONS, ["--out", "q", "--voxel_mm", "9"])


def start(command: list[str], cwd: Path) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        command, cwd=cwd, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


@pytest.mark.integration
def test_real_command_lines(tmp_path) -> None:
    """What MONAI's own process makes of them: one ends well in the folders that are named, the others in one line."""
    scan = tmp_path / "ct#1" / "1.nii.gz"
    scan.parent.mkdir()
    voxels = np.random.default_rng(0).integers(-100, 200, (20, 24, 28)).astype(np.int16)
    nib.save(nib.Nifti1Image(voxels, np.diag([-4, 4, 5, 1])), scan)
    monai = [sys.executable, "-W", "ignore", "-m", "monai.bundle", "run"]
    prepare = ["--config_file", files_of(PREPARE), "--bundle_root", str(ROOT / PRETRAIN), "--dataset_dir", "ct#1"]
    train = ["--config_file", files_of(TRAIN), "--bundle_root", str(ROOT / BTCV)]
    good = [*prepare, "--prepared_dir", "20261125", "--num_workers", "0", "--spacing", "4", "--min_size", "4"]
    processes = [
        start([*monai, *good], tmp_path),
        start([*monai, *train, "--network_def#hiden_size", "8"], tmp_path),
        start([sys.executable, "-m", "shared_networks.bundle.relabel", "--bundle", "a#b", "--lables", "x"], tmp_path),
        start([str(ROOT / "quickstart.sh"), "--data", "here"], tmp_path),
    ]
    ends = [(*process.communicate(), process.returncode) for process in processes]

    assert ends[0][2] == 0, ends[0][1]
    assert json.loads((tmp_path / "20261125" / "manifest.jsonl").read_text().splitlines()[0])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["20261125", "ct#1"]
    lines = [
        "error: --network_def#hiden_size: there is no setting 'network_def#hiden_size'; "
        "did you mean --network_def#hidden_size?",
        "error: --lables: there is no setting 'lables'; did you mean --labels?\n--labels: is missing; give a path",
        "error: --data here: no such folder",
    ]
    for (_, error, code), line, expected in zip(ends[1:], lines, (1, 1, 2), strict=True):
        assert error.strip().endswith(line) and "Traceback" not in error
        assert code == expected


BUNDLES_OF_QUICKSTART = f"give {BTCV} or {FLARE} of this clone; for others see docs/training.md"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--epochs", "abc"], "--epochs abc: give a whole number of at least 1"),
        (["--epochs", "0"], "--epochs 0: give a whole number of at least 1"),
        (["--spacing", "x"], "--spacing x: give a number of mm above 0"),
        (["--spacing", "0.0"], "--spacing 0.0: give a number of mm above 0"),
        (["--epochs"], "--epochs: has no value; give one after it"),
        (["--data", "--epochs", "2"], "--data: has no value; give one after it"),
        (["--data", ""], "--data : no such folder"),
        (["--segment", "scan.nii.gz"], "--segment scan.nii.gz: no such file or folder"),
        (["--segment"], "--segment: has no value; give one after it"),
        *((["--bundle", name], f"--bundle {name}: {BUNDLES_OF_QUICKSTART}") for name in ("own_seg", PRETRAIN, "", "/")),
    ],
)
def test_quickstart_refuses_before_it_does_anything(words, message, tmp_path) -> None:
    done = subprocess.run([str(ROOT / "quickstart.sh"), *words], cwd=tmp_path, capture_output=True, text=True)
    assert (done.stdout, done.stderr, done.returncode) == ("", f"error: {message}\n", 2)


@pytest.mark.parametrize(
    "name", [FLARE, f"{FLARE}/", f"./{FLARE}", f"../clone/{FLARE}/", f"{{clone}}/{FLARE}", "copy_seg"]
)
def test_quickstart_takes_a_bundle_that_ships_under_any_path(name, tmp_path) -> None:
    """With a Python that says its words and fails, a step after the options. A copy with other labels is refused."""
    clone = tmp_path / "clone"
    (clone / ".venv/bin").mkdir(parents=True)
    for bundle in (FLARE, BTCV, "copy_seg"):
        (clone / bundle / "configs").mkdir(parents=True)
        (clone / bundle / "configs" / "train.json").write_text('{"label_names": ["background", "liver"]}')
    shutil.copy(ROOT / "quickstart.sh", clone)
    for program, line in (("pip", "exit 0"), ("python", 'echo "$@"; exit 7')):
        (clone / ".venv/bin" / program).write_text(f"#!/bin/sh\n{line}\n")
        (clone / ".venv/bin" / program).chmod(0o755)
    words = ["./quickstart.sh", "--bundle", name.format(clone=clone)]
    done = subprocess.run(words, cwd=clone, capture_output=True, text=True)
    if name == "copy_seg":
        said = f"error: --bundle copy_seg: {BUNDLES_OF_QUICKSTART}\n"
        assert (done.stdout, done.stderr, done.returncode) == ("", said, 2)
    else:
        assert done.returncode == 7 and "shared_networks.synthetic.phantom --label_set flare --out" in done.stdout
        assert done.stderr == ""
