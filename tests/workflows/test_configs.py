"""The bundles as they lie in the tree: valid, alike where they should be, and true to their metadata."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from monai.bundle import ConfigWorkflow, verify_net_in_out

from shared_networks.synthetic.tissues import label_names
from shared_networks.version import __version__
from tests.conftest import BUNDLES, ROOT

pytestmark = pytest.mark.integration

SEGMENTERS = BUNDLES[1:]
WORKFLOWS = {
    "train": ("train", ["train.json"]),
    "evaluate": ("train", ["train.json", "evaluate.json"]),
    "multi_gpu_train": ("train", ["train.json", "multi_gpu_train.json"]),
    "inference": ("infer", ["inference.json"]),
}


def read(bundle: str, file: str) -> dict[str, Any]:
    return json.loads((ROOT / bundle / "configs" / file).read_text())


def without_keys(transforms: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Transforms with the image's settings only: what a segmenter does to the label beside it left out."""
    return [
        {
            k: v[0] if k == "mode" and isinstance(v, list) else v
            for k, v in t.items()
            if k not in ("keys", "allow_smaller")
        }
        for t in transforms
    ]


@pytest.mark.parametrize("bundle", BUNDLES)
def test_bundle_has_all_files_of_the_specification(bundle: str) -> None:
    configs = ("metadata", "train", "evaluate", "inference", "multi_gpu_train", "tiny")
    files = [f"configs/{name}.json" for name in configs]
    files += ["configs/logging.conf", "docs/README.md", "docs/data_license.txt", "LICENSE"]
    assert [file for file in files if not (ROOT / bundle / file).is_file()] == []


@pytest.mark.parametrize("bundle", BUNDLES)
def test_metadata_is_valid(bundle: str) -> None:
    schema = json.loads((ROOT / "tests" / "data" / "meta_schema_20240725.json").read_text())
    metadata = read(bundle, "metadata.json")
    jsonschema.validate(metadata, schema)
    assert metadata["schema"].endswith("/meta_schema_20240725.json")
    assert metadata["version"] == __version__
    assert __version__ in metadata["changelog"]


@pytest.mark.parametrize(("bundle", "label_set"), [*zip(SEGMENTERS, ("btcv", "flare"), strict=True)])
def test_labels_are_the_published_ones_everywhere(bundle: str, label_set: str) -> None:
    names = read(bundle, "train.json")["label_names"]
    outputs = read(bundle, "metadata.json")["network_data_format"]["outputs"]["pred"]
    assert names == read(bundle, "inference.json")["label_names"] == list(label_names(label_set))
    assert [outputs["channel_def"][str(value)] for value in range(outputs["num_channels"])] == names


@pytest.mark.parametrize("file", sorted(path.name for path in (ROOT / SEGMENTERS[0] / "configs").glob("*.json")))
def test_segmenters_differ_in_labels_only(file: str) -> None:
    btcv, flare = (read(bundle, file) for bundle in SEGMENTERS)
    assert list(btcv) == list(flare)
    if file == "metadata.json":
        return
    assert {key for key in btcv if btcv[key] != flare[key]} <= {"label_names", "split"}


@pytest.mark.parametrize("bundle", BUNDLES)
def test_inference_prepares_images_as_training_does(bundle: str) -> None:
    train, inference = read(bundle, "train.json"), read(bundle, "inference.json")
    trained = train["train"]["deterministic_transforms"]
    assert trained[3]["_target_"].endswith("Spacingd")  # where MONAI Label looks for it
    assert train["train"]["random_transforms"][0]["_target_"] == "RandCropByPosNegLabeld"
    prepared = inference["preprocessing"]["transforms"]
    if bundle == "hi_end_mae_pretrain":  # whole volumes there
        assert prepared.pop() == {"_target_": "DivisiblePadd", "keys": "image", "k": "@img_size"}
    assert without_keys(prepared) == without_keys(trained)
    assert inference["network_def"] == train["network_def"]
    settings = ("spacing", "intensity_range", "img_size", "patch_size", "paths", "device", "amp")
    assert {key: inference[key] for key in settings} == {key: train[key] for key in settings}


@pytest.mark.parametrize("bundle", BUNDLES)
@pytest.mark.parametrize("workflow", WORKFLOWS)
def test_properties_are_complete(
    bundle: str, workflow: str, datasets: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every property that MONAI defines is there, and resolves to a real object (tiny, on small data)."""
    for name, value in {"LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    kind, files = WORKFLOWS[workflow]
    configs = ROOT / bundle / "configs"
    flow = ConfigWorkflow(
        config_file=[str(configs / file) for file in [*files, "tiny.json"]],
        workflow_type=kind,
        logging_file=False,
        bundle_root=str(ROOT / bundle),
        dataset_dir=str(datasets["flare" if "flare" in bundle else "btcv"]),
        cache_rate=0.0,
        **({"network": "$@network_def"} if workflow == "multi_gpu_train" else {}),
    )
    flow.parser.parse(reset=True)
    flow._is_initialized = True
    assert flow.check_properties() == []


@pytest.mark.parametrize("bundle", BUNDLES)
def test_network_is_as_the_metadata_say(bundle: str) -> None:
    """At full size; the other configs have the same network, or leave it as train.json defines it."""
    assert all("network_def" not in read(bundle, overlay) for overlay in ("evaluate.json", "multi_gpu_train.json"))
    configs = ROOT / bundle / "configs"
    verify_net_in_out(
        net_id="network_def",
        meta_file=str(configs / "metadata.json"),
        config_file=str(configs / "inference.json"),
        bundle_root=str(ROOT / bundle),
        device="cpu",
    )


def test_configs_use_no_position_to_override() -> None:
    """Overlays name what they change; a number in an id would silently change another item after an edit."""
    for bundle in BUNDLES:
        for overlay in ("evaluate.json", "multi_gpu_train.json", "tiny.json"):
            assert not [key for key in read(bundle, overlay) if any(part.isdigit() for part in key.split("#"))]


def components(config: Any) -> Iterator[dict[str, Any]]:
    """All parts of a config, however deep, that are made by this package."""
    if isinstance(config, dict) and str(config.get("_target_", "")).startswith("shared_networks."):
        yield config
    for value in config.values() if isinstance(config, dict) else config if isinstance(config, list) else ():
        yield from components(value)


@pytest.mark.parametrize("bundle", BUNDLES)
def test_our_package_is_found_before_it_is_used(bundle: str) -> None:
    """In a release, which has a copy of its own, `paths` must come first, and be the same in all configs."""
    paths = read(BUNDLES[0], "train.json")["paths"]
    for file in (ROOT / bundle / "configs").glob("*.json"):
        config = read(bundle, file.name)
        if "bundle_root" in config:
            assert config.pop("paths") == paths, file
        assert [c["_target_"] for c in components(config) if "_requires_" not in c] == [], file
