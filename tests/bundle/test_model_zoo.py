"""What the CI of MONAI's model zoo (Project-MONAI/model-zoo, `ci/`) asks of a bundle, asked of each release.

As there, bundles lie in `models/NAME` with their weights, are verified by monai's own functions, and then train,
evaluate and infer from Python on volumes of random numbers that do not have our layout: configs are told by ids where
these are. As there, each in a process of its own. Unlike there, what comes out is looked at.
"""

from __future__ import annotations

import csv
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser, ckpt_export, verify_metadata, verify_net_in_out

from shared_networks.bundle.release import release
from shared_networks.networks.checkpoints import check_weights, half_precision
from tests.conftest import BUNDLES, ROOT

pytestmark = pytest.mark.integration

PRETRAIN, BTCV, FLARE = BUNDLES
CASES = [f"image_{index}" for index in range(4)]
SHAPE, AFFINE = (50, 40, 30), np.diag([-2.0, -2.5, 3.0, 1.0])  # LPS

IMAGES = {"images": "$list(sorted(glob.glob(@dataset_dir + '/image_*.nii.gz')))"}
PAIRS = {**IMAGES, "labels": "$list(sorted(glob.glob(@dataset_dir + '/label_*.nii.gz')))"}
DATALIST = {"datalist": IMAGES["images"]}
# What the zoo's tests override in its spleen bundle, and in its Swin UNETR of BTCV.
SPLEEN = {
    "epochs": 1,
    "train#dataset#cache_rate": 0.0,
    "validate#dataset#cache_rate": 0.0,
    "train#dataloader#num_workers": 1,
    "validate#dataloader#num_workers": 1,
    "train#random_transforms#0#spatial_size": [36, 36, 36],
}
SWIN = {
    "val_interval": 1,
    "train#random_transforms#0#num_samples": 3,
    "train#deterministic_transforms#3#pixdim": [5.0, 4.0, 6.0],
    "train#trainer#max_epochs": 1,
    "train#dataset#cache_rate": 0.0,
    "train#dataloader#batch_size": 1,
    "validate#dataset#cache_rate": 0.0,
    "train#dataloader#num_workers": 0,
}
TRAINING = {
    PRETRAIN: {**IMAGES, **SWIN},
    BTCV: {**PAIRS, **SPLEEN},
    FLARE: {**PAIRS, **SWIN},
}
CROPS = {  # a scan: how many, their size and the size of their voxels in mm
    PRETRAIN: [3, [48, 48, 48], [5.0, 4.0, 6.0]],
    BTCV: [1, [36, 36, 36], [4.0, 4.0, 4.0]],
    FLARE: [3, [48, 48, 48], [5.0, 4.0, 6.0]],
}
INFERENCE = {
    PRETRAIN: DATALIST,
    BTCV: DATALIST,
    FLARE: {**DATALIST, "preprocessing#transforms#3#pixdim": [5.0, 4.0, 6.0]},
}
FILES = ["train.json", "evaluate.json", "inference.json", "multi_gpu_train.json", "logging.conf", "metadata.json"]

RUN = """
import json, sys
from monai.bundle import ConfigWorkflow

train, *others = (ConfigWorkflow(**arguments) for arguments in json.loads(sys.argv[1]))
for workflow in (train, *others):
    workflow.initialize()
    wrong = workflow.check_properties()
    assert not wrong, wrong
    workflow.run()
    workflow.finalize()
crops = train.train_dataset[0]
seen = [len(crops), list(crops[0]["image"].shape[1:]), crops[0]["image"].pixdim.tolist()]
package = sys.modules["shared_networks"].__file__
print(json.dumps({"package": package, "epoch": train.trainer.state.epoch, "crops": seen}))
"""
CHECK = """
import sys
from monai.bundle import ConfigWorkflow

workflow = ConfigWorkflow(sys.argv[1], workflow_type="train", logging_file=False)
workflow.initialize()
wrong = workflow.check_properties()
assert not wrong, wrong
"""


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that holds `models/`, with the three bundles, small, and weights in each, as float16 like ours."""
    root = tmp_path_factory.mktemp("zoo")
    for archive in release(root / "dist", overlay="tiny"):
        ZipFile(archive).extractall(root / "models")
    for name in BUNDLES:
        bundle = root / "models" / name
        torch.manual_seed(0)
        (bundle / "models").mkdir()
        torch.save(half_precision(network(bundle).state_dict(), name), bundle / "models" / "model.pt")
    return root


@pytest.fixture(scope="module")
def volumes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random images and labels, as the zoo makes them, but neither cubic nor RAS."""
    folder = tmp_path_factory.mktemp("volumes")
    rng = np.random.default_rng(0)
    for index in range(len(CASES)):
        image = rng.integers(-200, 300, SHAPE, dtype=np.int16)  # Hounsfield units, or they would be refused
        label = rng.integers(0, 14, SHAPE, dtype=np.uint8)
        nib.save(nib.Nifti1Image(image, AFFINE), folder / f"image_{index}.nii.gz")
        nib.save(nib.Nifti1Image(label, AFFINE), folder / f"label_{index}.nii.gz")
    return folder


def network(bundle: Path) -> torch.nn.Module:
    parser = ConfigParser()
    parser.read_config(bundle / "configs" / "inference.json")
    parser["bundle_root"] = str(bundle)
    net: torch.nn.Module = parser.get_parsed_content("network_def")
    return net


def run(words: list[str], folder: Path, **environment: str) -> str:
    """Runs a program as the zoo does: where bundles are told by relative paths, and nothing else is on Python's."""
    env = {**os.environ, "PYTHONWARNINGS": "ignore", "PYTHONPATH": "", **environment}
    done = subprocess.run([sys.executable, *words], cwd=folder, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    return done.stdout


def workflow(bundle: str, kind: str, files: list[str], data: Path, overrides: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `ConfigWorkflow`, with the relative paths that the zoo gives."""
    configs = f"models/{bundle}/configs"
    paths = [f"{configs}/{file}" for file in files]
    return {
        "workflow_type": kind,
        "config_file": paths if len(paths) > 1 else paths[0],
        "logging_file": f"{configs}/logging.conf",
        "meta_file": f"{configs}/metadata.json",
        "bundle_root": f"models/{bundle}",
        "dataset_dir": str(data),
        **overrides,
    }


@pytest.mark.parametrize("bundle", BUNDLES)
def test_files_are_there_and_of_a_size_for_git(bundle: str, zoo: Path) -> None:
    root = zoo / "models" / bundle
    wanted = ["LICENSE", "docs/README.md", "docs/data_license.txt", *(f"configs/{file}" for file in FILES)]
    assert [file for file in wanted if not (root / file).stat().st_size] == []
    assert [file.name for file in (root / "models").iterdir()] == ["model.pt"]
    assert max(f.stat().st_size for f in root.rglob("*") if f.is_file() and f.suffix != ".pt") < 1e6
    for listed in (ConfigParser.load_config_file(file)["large_files"] for file in root.glob("large_files.yml")):
        assert all({"path", "url"} <= entry.keys() and entry["url"].startswith("https://") for entry in listed)


@pytest.mark.parametrize("bundle", BUNDLES)
def test_metadata_follow_the_schema_and_describe_the_version(bundle: str, zoo: Path) -> None:
    root = zoo / "models" / bundle
    schema = root / "eval" / "schema.json"  # where the zoo's CI has downloaded it to
    schema.parent.mkdir()
    shutil.copy(ROOT / "tests" / "data" / "meta_schema_20240725.json", schema)
    verify_metadata(meta_file=str(root / "configs" / "metadata.json"), filepath=str(schema))
    metadata = json.loads((root / "configs" / "metadata.json").read_text())
    assert metadata["version"] == next(iter(metadata["changelog"]))  # newest first
    assert metadata["name"]  # how the zoo's page shows the bundle


@pytest.mark.parametrize("bundle", BUNDLES)
def test_ids_have_the_names_that_the_zoo_asks_for(bundle: str, zoo: Path) -> None:
    parser = ConfigParser()
    parser.read_config(zoo / "models" / bundle / "configs" / "inference.json")
    ids = ["bundle_root", "device", "output_dir", "network_def", "inferer", "datalist", "checkpointloader"]
    assert [name for name in ids if name not in parser] == []
    parser.read_config(zoo / "models" / bundle / "configs" / "train.json")
    ids = ["bundle_root", "device", "output_dir", "dataset_dir", "train#trainer#max_epochs", "train#dataset#data"]
    ids += ["train#handlers", "validate#handlers", "validate#evaluator", "validate#dataset#data", "train#inferer"]
    assert [name for name in [*ids, "validate#key_metric", "train#preprocessing"] if name not in parser] == []
    validation = next(h for h in parser["train"]["handlers"] if h["_target_"] == "ValidationHandler")
    assert validation["interval"] == "@val_interval"


@pytest.mark.parametrize("bundle", BUNDLES)
def test_network_takes_and_gives_what_the_metadata_declare(bundle: str, zoo: Path) -> None:
    root = zoo / "models" / bundle
    meta_file = root / "configs" / "metadata.json"
    verify_net_in_out(
        net_id="network_def",
        meta_file=str(meta_file),
        config_file=str(root / "configs" / "inference.json"),
        bundle_root=str(root),
        device="cpu",
    )
    declared = json.loads(meta_file.read_text())["network_data_format"]
    (source,), (result,) = declared["inputs"].values(), declared["outputs"].values()
    output = network(root).eval()(torch.rand(1, source["num_channels"], 48, 48, 48))
    assert output.shape == (1, result["num_channels"], 48, 48, 48)
    assert str(output.dtype) == f"torch.{result['dtype']}" == f"torch.{source['dtype']}" == "torch.float32"
    assert set(result["channel_def"]) == {str(channel) for channel in range(result["num_channels"])}


@pytest.mark.parametrize("bundle", BUNDLES)
def test_torchscript_of_the_weights_computes_the_same(bundle: str, zoo: Path, tmp_path: Path) -> None:
    root = zoo / "models" / bundle
    ckpt_export(
        net_id="network_def",
        filepath=str(tmp_path / "model.ts"),
        ckpt_file=str(root / "models" / "model.pt"),
        meta_file=str(root / "configs" / "metadata.json"),
        config_file=str(root / "configs" / "inference.json"),
        bundle_root=str(root),
    )
    net = network(root).eval()
    net.load_state_dict(torch.load(root / "models" / "model.pt", weights_only=True))
    inputs = [torch.rand(1, 1, 48, 48, 48)]
    if bundle == PRETRAIN:  # what it hides is drawn
        inputs.append(torch.randperm(4**3)[None])
    with torch.no_grad():
        torch.testing.assert_close(torch.jit.load(tmp_path / "model.ts")(*inputs), net(*inputs), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bundle", BUNDLES)
def test_it_trains_evaluates_and_infers_on_volumes_told_by_ids(bundle: str, zoo: Path, volumes: Path) -> None:
    root = zoo / "models" / bundle
    model = root / "models" / "model.pt"
    before = torch.load(model, weights_only=True)
    model.unlink()  # else the training would be refused
    training = TRAINING[bundle]
    steps = [
        workflow(bundle, "train", ["train.json"], volumes, training),
        workflow(bundle, "train", ["train.json", "evaluate.json"], volumes, training),
        workflow(bundle, "infer", ["inference.json"], volumes, INFERENCE[bundle]),
    ]
    facts = json.loads(run(["-c", RUN, json.dumps(steps)], zoo).splitlines()[-1])
    assert Path(facts["package"]).is_relative_to(root)  # its own copy of the code
    assert (facts["epoch"], facts["crops"]) == (1, CROPS[bundle])

    after = torch.load(model, weights_only=True)
    check_weights(model, network(root))
    assert not all(torch.equal(before[name], after[name]) for name in after)
    outputs = {file.name for file in (root / "outputs").iterdir()}
    assert "metrics.csv" in outputs
    if bundle == PRETRAIN:
        assert {f"{case}_{kind}.nii.gz" for case in CASES for kind in ("reconstruction", "mask")} <= outputs
        return
    split = json.loads((root / "models" / "model.json").read_text())
    assert sorted([*split["train"], *split["validation"]]) == CASES
    with (root / "outputs" / "dice.csv").open() as stream:
        rows = list(csv.reader(stream))
    assert [row[0] for row in rows[1:-1]] == list(split["validation"])
    assert all(0 <= float(value) < 0.5 for value in rows[-1][1:])  # there is nothing to learn in random numbers
    for case in CASES:
        result = nib.load(root / "outputs" / f"{case}_seg.nii.gz")
        assert result.shape == SHAPE
        np.testing.assert_allclose(result.affine, AFFINE, atol=1e-5)
        assert np.asanyarray(result.dataobj).max() < 14


@pytest.mark.slow
@pytest.mark.parametrize("bundle", [PRETRAIN, BTCV])
def test_two_processes_train_from_an_exported_config(bundle: str, zoo: Path, volumes: Path) -> None:
    """The zoo writes the merged and overridden config to a file, checks it, and gives it to torchrun."""
    root = zoo / "models" / bundle
    shutil.rmtree(root / "outputs", ignore_errors=True)
    (root / "models" / "model.pt").unlink()
    exported = root / "configs" / "train_override.json"
    parser = ConfigParser()
    parser.read_config([root / "configs" / "train.json", root / "configs" / "multi_gpu_train.json"])
    parser.update({**TRAINING[bundle], "bundle_root": f"models/{bundle}", "dataset_dir": str(volumes)})
    ConfigParser.export_config_file(parser.config, str(exported), indent=4)

    with socket.socket() as free:
        free.bind(("localhost", 0))
        alone = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1])}
    run(["-c", CHECK, str(exported)], zoo, **alone, RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
    words = ["-m", "torch.distributed.run", "--standalone", "--nnodes=1", "--nproc_per_node=2", "-m", "monai.bundle"]
    words += ["run", "--config_file", str(exported), "--meta_file", str(root / "configs" / "metadata.json")]
    words += ["--logging_file", str(root / "configs" / "logging.conf")]
    run(words, zoo, PYTHONPATH=f"models/{bundle}")
    check_weights(root / "models" / "model.pt", network(root))
