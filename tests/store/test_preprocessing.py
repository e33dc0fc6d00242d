from __future__ import annotations

import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from monai.bundle import ConfigParser
from monai.transforms import Compose, Lambdad

from shared_networks.store.preprocessing import PUBLISHED, other_preprocessing
from shared_networks.transforms.intensity import ScaleByModalityd
from tests.conftest import ROOT

CONFIG = ROOT / "hi_end_mae_pretrain" / "configs" / "prepare.json"
SETTINGS = {"modality": "MR", "spacing": [6.0, 5.0, 7.5], "intensity_range": [-175, 250]}


def preprocessing(**changed: Any) -> Any:
    """What the bundle's config makes, with parts changed."""
    parser = ConfigParser({**ConfigParser.load_config_file(str(CONFIG)), "paths": None, **SETTINGS})
    for name, value in changed.items():
        parser[f"preprocessing#{name}"] = value
    return parser.get_parsed_content("preprocessing")


def noted(transform: Any, **settings: Any) -> dict[str, str]:
    return other_preprocessing(transform, **{**SETTINGS, **settings})


def test_the_published_transforms_are_those_of_the_config() -> None:
    transforms = json.loads(CONFIG.read_text())["preprocessing"]["transforms"]
    assert [{key: value for key, value in step.items() if key != "_requires_"} for step in transforms] == PUBLISHED


def test_the_published_preprocessing_is_not_noted() -> None:
    assert noted(preprocessing()) == {}
    assert noted(preprocessing(), intensity_range=(-175.0, 250.0)) == {}
    assert noted(preprocessing(**{"transforms#1#mode": "bilinear"}).set_random_state(3)) == {}


CHANGED = {
    "another mode": {"transforms#1#mode": "nearest"},
    "another orientation": {"transforms#0#axcodes": "LPS"},
    "a setting that it had by default": {"transforms#1#align_corners": True},
    "another spacing": {"transforms#1#pixdim": [6.0, 5.0, 7.0]},
    "another modality": {"transforms#2#modality": "CT"},
    "a transform disabled": {"transforms#2#_disabled_": True},
    "another transform": {"transforms#0": {"_target_": "Identityd", "keys": "image"}},
    "a function": {"transforms#0": {"_target_": "Lambdad", "keys": "image", "func": "$lambda image: image + 1"}},
    "another function": {"transforms#0": {"_target_": "Lambdad", "keys": "image", "func": "$lambda image: image + 2"}},
}


def test_every_other_preprocessing_has_a_note_of_its_own() -> None:
    notes = {why: noted(preprocessing(**changed))["preprocessing"] for why, changed in CHANGED.items()}
    assert len(set(notes.values())) == len(CHANGED)
    assert notes == {why: noted(preprocessing(**changed))["preprocessing"] for why, changed in CHANGED.items()}


def adder(number: float, factor: float = 1) -> Any:
    return lambda image, more=factor: image + number * more


def test_what_functions_and_paths_hold_is_noted() -> None:
    functions = [adder(1), adder(2), adder(1, 3), partial(adder, 1), partial(adder, 2), partial(adder, factor=2)]
    functions += [partial(adder, Path("a")), partial(adder, Path("b")), partial(adder, np.bool_(True))]
    notes = [noted(Lambdad("image", function))["preprocessing"] for function in functions]
    assert len(set(notes)) == len(notes)
    assert notes[0] == noted(Lambdad("image", adder(1)))["preprocessing"]


def test_an_object_that_holds_itself_can_be_noted() -> None:
    scale = ScaleByModalityd("image", "MR", (0, 1))
    scale.owner = scale  # type: ignore[attr-defined]
    assert len(noted(Compose([scale]))["preprocessing"]) == 12


@pytest.mark.integration
def test_a_note_is_the_same_in_another_process() -> None:
    transform = Compose([Lambdad("image", lambda image: image if image in {"a", "b", "c"} else len(image))])
    source = "Compose([Lambdad('image', lambda image: image if image in {'a', 'b', 'c'} else len(image))])"
    words = "from monai.transforms import Compose, Lambdad; from shared_networks.store.preprocessing import *"
    line = f"{words}; print(other_preprocessing({source}, **{SETTINGS!r})['preprocessing'])"
    notes = {
        subprocess.run([sys.executable, "-W", "ignore", "-c", line], cwd=ROOT, text=True, capture_output=True).stdout
        for _ in range(2)
    }
    assert len(notes) == 1 and len(notes.pop().strip()) == 12 == len(noted(transform)["preprocessing"])
