"""The page of settings is what its program makes of the configs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from shared_networks.bundle.settings_table import argument_of, bundle_settings, settings_page, write_settings_page
from shared_networks.errors import InputError
from shared_networks.networks.unetr import strict_segmenter
from shared_networks.settings.table import SETTINGS
from tests.conftest import BUNDLES, ROOT


def bundle_with(folder: Path, **configs: dict[str, Any]) -> Path:
    (folder / "configs").mkdir(parents=True)
    for name, content in configs.items():
        (folder / "configs" / f"{name}.json").write_text(json.dumps(content))
    return folder


def test_page_is_up_to_date(tmp_path: Path) -> None:
    write_settings_page(str(tmp_path / "settings.md"))
    made = (tmp_path / "settings.md").read_text()
    hint = "run: python -m shared_networks.bundle.settings_table"
    assert made == (ROOT / "docs" / "settings.md").read_text(), hint


@pytest.mark.parametrize("bundle", BUNDLES)
def test_every_declared_setting_of_the_configs_is_listed(bundle: str) -> None:
    listed = {(config, row[0].strip("`")) for config, rows in bundle_settings(ROOT / bundle).items() for row in rows}
    for file in (ROOT / bundle / "configs").glob("*.json"):
        if file.stem not in ("metadata", "small", "tiny", "multi_gpu_train"):
            names = SETTINGS.keys() & json.loads(file.read_text()).keys()
            assert {name for name in names if (file.stem, name) not in listed} == set()


def test_description_is_of_the_config_then_the_value_then_the_docstring(tmp_path: Path) -> None:
    network = {"_target_": "shared_networks.networks.hi_end_mae.HiEndMAE", "mask_ratio": 0.75, "dropout": 0.0}
    train = {
        "_desc_epochs": "how often | all cases",
        "epochs": 3,
        "cache_rate": {"_target_": "a.b", "_desc_": "what fits"},
        "seed": 0,
        "output": "",
        "network_def": network,
        "private": 1,
    }
    (rows,) = bundle_settings(bundle_with(tmp_path, train=train, tiny={"epochs": 1})).values()
    assert {name: (default, meaning) for name, default, _, meaning in rows} == {
        "`epochs`": ("`3`", r"how often \| all cases"),
        "`cache_rate`": ("computed", "what fits"),
        "`seed`": ("`0`", ""),
        "`output`": ("none", ""),
        "`network_def#mask_ratio`": ("`0.75`", "share of the patches masked, above 0 and below 1"),
        "`network_def#dropout`": ("`0.0`", ""),
    }


def test_a_setting_that_only_hands_another_on_is_not_listed(tmp_path: Path) -> None:
    train = {"val_fraction": 0.1, "split": {"_target_": "a.b", "val_fraction": "@val_fraction"}}
    (rows,) = bundle_settings(bundle_with(tmp_path, train=train)).values()
    assert [row[0] for row in rows] == ["`val_fraction`"]


def test_argument_of_a_wrapped_class_is_found() -> None:
    assert argument_of(strict_segmenter, "use_checkpoint") == (
        "recompute encoder blocks in the backward pass to save memory"
    )
    assert argument_of(strict_segmenter, "nothing") == ""
    assert argument_of(None, "nothing") == ""


def test_a_bundle_like_another_lists_what_differs(tmp_path: Path) -> None:
    for name, epochs in (("a", 1), ("b", 2)):
        train = {"epochs": epochs, "seed": 0}
        bundle_with(tmp_path / name, train=train, metadata={})
    page = settings_page(tmp_path)
    assert page.index("## a") < page.index("As `a`, but for:")
    second = page.split("## b")[1]
    assert "| `epochs` | `2` |" in second and "`seed`" not in second


def test_a_tree_without_bundles_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no bundles beside shared_networks"):
        settings_page(tmp_path)
