"""Releases: the same bytes wherever they are made, and bundles that need nothing of this repository.

Whatever runs a bundle here runs in an environment with our dependencies and without our package, somewhere else than
in the bundle's folder, and is asked at its end which copy of the package it had.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import re
import shlex
import shutil
import stat
import subprocess
import sys
import venv
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from zipfile import ZIP_STORED, ZipFile

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser

from shared_networks.bundle.config_format import format_config
from shared_networks.bundle.halve import halve
from shared_networks.bundle.release import GUIDES, bake, bundle_files, check_versions, main, release, with_settings
from shared_networks.datasets.labels import model_labels
from shared_networks.datasets.record import PARTS, file_digest, read_record, save_tensors, training_record, write_model
from shared_networks.datasets.splits import Split
from shared_networks.errors import InputError
from shared_networks.networks.checkpoints import check_weights
from shared_networks.synthetic.tissues import label_names
from shared_networks.version import __version__
from tests.conftest import BUNDLES, ROOT

pytestmark = pytest.mark.integration

PRETRAIN, BTCV, FLARE = BUNDLES
SCHEMA = ROOT / "tests" / "data" / "meta_schema_20240725.json"
IMAGE = torch.rand(1, 1, 48, 48, 48, generator=torch.Generator().manual_seed(1))
FOLDERS = ("configs", "docs", "weights")
QUICK = ["--epochs", "1", "--warmup_epochs", "1", "--num_samples", "1", "--batch_size", "1"]

Run = Callable[..., str]


def data_of(bundle: str, datasets: dict[str, Path]) -> Path:
    return datasets["flare" if bundle == FLARE else "btcv"]


def unzip(archive: Path, folder: Path) -> Path:
    """Unpacks a release and returns the bundle's folder."""
    ZipFile(archive).extractall(folder)
    return folder / archive.name.removesuffix(f"_v{__version__}.zip")


def config_of(bundle: Path) -> ConfigParser:
    parser = ConfigParser()
    parser.read_config(bundle / "configs" / "inference.json")
    parser.update({"bundle_root": str(bundle), "device": "cpu"})
    return parser


def tiny_weights(bundle: str, folder: Path, labels: str = "", overlay: str = "tiny") -> Path:
    """Fresh weights of the network of an overlay, with a record of a label set and of cases where one is named."""
    parser = ConfigParser()
    parser.read_config([ROOT / bundle / "configs" / f"{name}.json" for name in ("inference", overlay)])
    parser["bundle_root"] = str(ROOT / bundle)
    weights = parser.get_parsed_content("network_def").state_dict()
    if labels:
        cases = {part: [{"image": f"{part}_Smith.nii.gz"}] for part in ("train", "validation", "test")}
        split = Split(cases, {"seed": 0, "val_cases": ["validation_Smith"]})
        preparation = parser.get_parsed_content("preparation")
        record = training_record("/data/X", split, preparation, label_names=label_names(labels))
        write_model(weights, folder / "model.pt", record)
    else:
        folder.mkdir(parents=True)
        torch.save(weights, folder / "model.pt")
    return folder / "model.pt"


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A second source tree, with other times and modes and with what work in it leaves behind."""
    root = tmp_path / "tree"
    for name in (*BUNDLES, "shared_networks", "docs"):
        shutil.copytree(
            ROOT / name, root / name, ignore=shutil.ignore_patterns("models", "outputs"), copy_function=shutil.copyfile
        )
    junk = [f"{PRETRAIN}/{file}" for file in ("models/model.pt", "outputs/a_seg.nii.gz", "docs/.DS_Store", "mlruns/0")]
    for file in (*junk, f"{PRETRAIN}/configs/.train.json.swp", "shared_networks/__pycache__/version.cpython-311.pyc"):
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_text("not to be released")
    (root / PRETRAIN / "LICENSE").chmod(0o700)
    return root


@pytest.fixture
def shipping(tree: Path) -> Path:
    """The second tree with small weights that ship, of pre-training and of BTCV's segmenter, but none of FLARE22's."""
    for bundle, labels in ((PRETRAIN, ""), (BTCV, "btcv")):
        model = tiny_weights(bundle, tree / "trained" / bundle, labels or "btcv", overlay="small")
        halve(model, tree / bundle / "weights" / "small.pt")
    shutil.rmtree(tree / FLARE / "weights", ignore_errors=True)
    return tree


@pytest.mark.parametrize("bundle", BUNDLES)
def test_zip_holds_the_bundle_and_its_package_in_one_folder(bundle: str, tmp_path: Path) -> None:
    (archive,) = release(tmp_path, bundle)
    assert archive == tmp_path / f"{bundle}_v{__version__}.zip"
    tracked = [f"{bundle}/{f.relative_to(ROOT / bundle)}" for d in FOLDERS for f in (ROOT / bundle / d).glob("*")]
    tracked += [f"{bundle}/docs/{guide}.md" for guide in GUIDES]
    package = [f"{bundle}/{file.relative_to(ROOT)}" for file in (ROOT / "shared_networks").rglob("*.py")]
    package.append(f"{bundle}/shared_networks/py.typed")
    more = ["LICENSE", "README.md", "SHA256SUMS", *(["large_files.yml"] if bundle == PRETRAIN else [])]
    with ZipFile(archive) as content:
        entries = content.infolist()
        assert [entry.filename for entry in entries] == sorted([*tracked, *package, *(f"{bundle}/{f}" for f in more)])
        assert content.read(f"{bundle}/configs/train.json") == (ROOT / bundle / "configs" / "train.json").read_bytes()
    assert {entry.date_time for entry in entries} == {(1980, 1, 1, 0, 0, 0)}
    assert {stat.filemode(entry.external_attr >> 16) for entry in entries} == {"-rw-r--r--"}
    assert {entry.compress_type for entry in entries} == {ZIP_STORED}


@pytest.mark.parametrize("bundle", BUNDLES)
def test_links_of_all_pages_lead_to_files_of_the_release(bundle: str, tmp_path: Path) -> None:
    folder = unzip(*release(tmp_path, bundle), tmp_path)
    pages = [folder / "README.md", *(folder / "docs").glob("*.md")]
    assert {page.stem for page in pages} == {"README", *GUIDES}
    for page in pages:
        links = re.findall(r"\]\((?!\w+:|#)([^)#]+)", page.read_text())
        assert links or page.stem == "settings"
        assert [link for link in links if not (page.parent / link).is_file()] == [], page
    readme, card = ((folder / name).read_text() for name in ("README.md", "docs/README.md"))
    assert "](docs/settings.md)" in readme and "](settings.md)" in card


def test_another_copy_of_the_source_gives_the_same_bytes(tree: Path, tmp_path: Path) -> None:
    here, there = release(tmp_path / "here", overlay="tiny"), release(tmp_path / "there", overlay="tiny", root=tree)
    assert [file.name for file in here] == [f"{bundle}_v{__version__}.zip" for bundle in sorted(BUNDLES)]
    assert [file.read_bytes() for file in here] == [file.read_bytes() for file in there]


def test_checksums_are_in_the_zip_and_beside_it(tmp_path: Path) -> None:
    (archive,) = release(tmp_path, BTCV)
    bundle = unzip(archive, tmp_path)
    lines = (bundle / "SHA256SUMS").read_text().splitlines()
    sums = {path: found for found, path in (line.split("  ") for line in lines)}
    files = {f.relative_to(bundle).as_posix(): f for f in bundle.rglob("*") if f.is_file() and f.name != "SHA256SUMS"}
    assert sums == {path: hashlib.sha256(file.read_bytes()).hexdigest() for path, file in files.items()}
    beside = (tmp_path / f"{archive.name}.sha256").read_text()
    assert beside == f"{hashlib.sha256(archive.read_bytes()).hexdigest()}  {archive.name}\n"


@pytest.mark.parametrize(("overlay", "size"), [("tiny", 48), ("small", 60)])
@pytest.mark.parametrize("bundle", BUNDLES)
def test_baked_configs_are_what_monai_makes_of_config_and_overlay(bundle: str, overlay: str, size: int) -> None:
    files = bundle_files(ROOT, bundle)
    baked = bake(files, overlay)
    small = {
        key: value for key, value in json.loads(files[f"configs/{overlay}.json"]).items() if "checkpoint" not in key
    }
    changed = ["train", "inference", "prepare" if bundle == PRETRAIN else "evaluate"]
    assert set(baked) == {f"configs/{name}.json" for name in (*changed, "metadata", overlay)}
    assert json.loads(baked[f"configs/{overlay}.json"]) == small
    for file in (f"configs/{name}.json" for name in changed):
        both = ConfigParser(json.loads(files[file]))
        both.update({key: value for key, value in small.items() if key.split("#")[0] in both})
        assert json.loads(baked[file]) == both.get()
        assert json.loads(baked[file]) != json.loads(files[file])
    data = json.loads(baked["configs/metadata.json"])["network_data_format"]
    assert data["inputs"]["image"]["spatial_shape"] == data["outputs"]["pred"]["spatial_shape"] == [size] * 3


def test_weights_that_ship_are_the_model_of_a_release_with_their_overlay(
    shipping: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for archive in release(tmp_path, overlay="small", root=shipping):
        unzip(archive, tmp_path)
    assert f"{FLARE}: no weights/small.pt, so it is released without models/model.pt\n" in capsys.readouterr().out
    assert not (tmp_path / FLARE / "models").exists()
    for name in (PRETRAIN, BTCV):
        shipped = shipping / name / "weights" / "small.pt"
        assert shipped.stat().st_size < 16e6
        assert not (tmp_path / name / "weights").exists()
        model = tmp_path / name / "models" / "model.pt"
        assert model.read_bytes() == shipped.read_bytes()
        assert read_record(model)["weights_sha256"] == file_digest(shipped)  # type: ignore[index]
        for files in (["inference"], ["inference", "small"]):
            parser = ConfigParser()
            parser.read_config([tmp_path / name / "configs" / f"{file}.json" for file in files])
            parser["bundle_root"] = str(tmp_path / name)
            assert Path(parser.get_parsed_content("checkpoint")) == model
            check_weights(model, parser.get_parsed_content("network_def"))


def test_other_releases_carry_the_weights_that_ship_beside_their_own(shipping: Path, tmp_path: Path) -> None:
    own = tiny_weights(BTCV, tmp_path / "trained", "btcv")
    for overlay, weights in (("", ""), ("tiny", own)):
        (archive,) = release(tmp_path / "dist", BTCV, overlay=overlay, weights=weights, root=shipping)
        bundle = unzip(archive, tmp_path / (overlay or "full"))
        assert sorted(file.name for file in (bundle / "weights").iterdir()) == ["small.json", "small.pt"]
        assert sorted(file.name for file in bundle.glob("models/*.pt")) == (["model.pt"] if weights else [])
    (archive,) = release(
        tmp_path / "dist", BTCV, overlay="small", weights=shipping / "trained" / BTCV / "model.pt", root=shipping
    )
    given = unzip(archive, tmp_path / "given")
    assert (given / "models/model.pt").read_bytes() == (shipping / "trained" / BTCV / "model.pt").read_bytes()
    assert (given / "weights/small.pt").is_file() and "`weights/small.pt` holds" in (given / "README.md").read_text()


@pytest.mark.parametrize("bundle", BUNDLES)
def test_records_of_weights_that_ship_name_no_case(bundle: str, tree: Path) -> None:
    """Also those of older weights, which the record holds where a writing was broken off."""
    file = tree / bundle / "weights" / "small.json"
    before = json.loads(file.read_text())
    case = {"Smith": hashlib.sha256(b"scan").hexdigest()}
    named = {**before, "split": {**before["split"], "val_cases": ["Smith"]}, "seen_before": {**before["seen_before"]}}
    named |= {part: {**before[part], **case} for part in PARTS}
    named["seen_before"]["train"] = case
    file.write_text(json.dumps({**named, "replaces": named}))
    released = bundle_files(tree, bundle)["weights/small.json"]
    names = {name for part in PARTS for name in named[part]}
    assert len(names) > 300 and not [name for name in names if f'"{name}"' in released.decode()]
    after = json.loads(released)
    for record in (after, after["replaces"]):
        for part in PARTS:
            assert sorted(record[part].values()) == sorted(named[part].values()), "scans stay known by digest"
        assert list(record["seen_before"]["train"].values()) == [*case.values()]
        assert {key: record[key] for key in ("labels", "weights_sha256")} == {
            key: before[key] for key in ("labels", "weights_sha256")
        }
    file.write_text('{"train": ["Smith"]}')
    with pytest.raises(InputError, match=f"^{file}: no record of a model"):
        bundle_files(tree, bundle)


NAMED = re.compile(r"\b(?:configs|weights|models|docs)/[\w.-]*\.\w+")


@pytest.mark.parametrize(("bundle", "millions"), [(PRETRAIN, 6.1), (BTCV, 7.7), (FLARE, 7.7)])
def test_a_small_release_says_so_and_its_card_names_only_files_that_it_has(bundle: str, millions: float) -> None:
    files = bundle_files(ROOT, bundle, overlay="small")
    assert "models/model.pt" in files and "no weights" not in files["configs/metadata.json"].decode()
    for card in ("README.md", "docs/README.md"):
        text = files[card].decode()
        paragraph = re.sub(r"^---.*?^---\n\n", "", text, flags=re.DOTALL | re.MULTILINE).split("\n\n")[1]
        said = f"{millions} M parameters, voxels of 3 x 3 x 3 mm, crops of 60 x 60 x 60 voxels."
        assert said in paragraph and "`models/model.pt`" in paragraph
        named = {"configs/train.json", "configs/small.json", "models/model.pt"}
        assert named <= set(NAMED.findall(text)) <= files.keys()
    shipped = [path for path, text in files.items() if path.endswith(".md") and b"weights/small.pt" in text]
    assert shipped == []


def test_the_card_of_other_releases_says_what_they_are(tmp_path: Path) -> None:
    plain = bundle_files(ROOT, BTCV)["docs/README.md"].decode()
    assert "This release" not in plain and "trained/" not in plain and "--init_weights weights/small.pt" in plain
    tiny = bundle_files(ROOT, BTCV, overlay="tiny")["docs/README.md"].decode()
    assert "crops of 48 x 48 x 48 voxels" in tiny and "--ckpt_dir" not in tiny
    own = tiny_weights(BTCV, tmp_path / "own", "btcv")
    given = bundle_files(ROOT, BTCV, overlay="tiny", weights=own)["docs/README.md"].decode()
    assert "Its weights are `models/model.pt`" in given
    # None but training, and the backslash of a command of two lines stays at the end of its first.
    assert given.count(" --ckpt_dir trained\n") == 2 and "--init_weights weights/small.pt --ckpt_dir trained\n" in given


CONFIG = """{
    "spacing": [1.5, 1.5, 1.5],
    "names": [
        "background",
        "œsophagus"
    ],
    "network_def": {
        "_target_": "a.b",
        "names": 3,
        "deep": {
            "spacing": 1
        }
    },
    "spacing_too": "spacing",
    "last": {
        "spacing": 2
    }
}
"""


@pytest.mark.parametrize(
    ("name", "value", "line"),
    [
        ("spacing", [2.0, 2.0, 4.0], '    "spacing": [2.0, 2.0, 4.0],'),
        ("names", ["œ"], '    "names": ["œ"],'),
        ("network_def#names", None, '        "names": null,'),
        ("network_def#deep#spacing", 7, '        "deep": {"spacing": 7}'),
        ("spacing_too", "1\\2", '    "spacing_too": "1\\\\2",'),
        ("last#spacing", False, '    "last": {"spacing": false}'),
        ("last", {}, '    "last": {}'),
    ],
)
def test_one_value_changes_and_no_other_line(name: str, value: Any, line: str) -> None:
    config = format_config(json.loads(CONFIG))
    changed = with_settings(config, {name: value})
    pairs = zip(config.splitlines(), changed.splitlines(), strict=True)
    assert [new for old, new in pairs if old != new] == [line]


@pytest.mark.parametrize("name", ["deep", "network_def#depth", "last#names", "spacing#x"])
def test_a_value_that_is_not_there_cannot_be_changed(name: str) -> None:
    with pytest.raises(InputError, match=f"^{name}: the config has no such setting"):
        with_settings(CONFIG, {name: 1})


@pytest.mark.parametrize(("bundle", "labels"), [(PRETRAIN, ""), (FLARE, "flare")])
def test_weights_go_in_as_they_are(bundle: str, labels: str, tmp_path: Path) -> None:
    weights = tiny_weights(bundle, tmp_path / "trained", labels)
    (archive,) = release(tmp_path, bundle, overlay="tiny", weights=weights)
    models = unzip(archive, tmp_path) / "models"
    assert (models / "model.pt").read_bytes() == weights.read_bytes()
    assert {file.name for file in models.iterdir()} == {"model.pt", *(["model.json"] if labels else [])}
    if labels:
        assert model_labels(models / "model.pt") == list(label_names(labels))
        assert read_record(models / "model.pt")["preparation"]["spacing"] == [4.0, 4.0, 4.0]  # type: ignore[index]
        assert "Smith" not in (models / "model.json").read_text()


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize(("bundle", "labels"), [(PRETRAIN, ""), (BTCV, "btcv")])
def test_safetensors_become_the_model_of_a_release(bundle: str, labels: str, half: bool, tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    weights, file = tiny_weights(bundle, tmp_path / "trained", labels), tmp_path / "own.safetensors"
    content = torch.load(weights, weights_only=True)
    if labels:
        record = read_record(weights) or {}
        write_model({name: tensor.half() if half else tensor for name, tensor in content.items()}, file, record)
    else:
        safetensors.save_file({name: tensor.half() if half else tensor for name, tensor in content.items()}, file)
    files, again = (bundle_files(ROOT, bundle, overlay="tiny", weights=file) for _ in range(2))
    assert files == again, "the same source gives the same bytes"
    for path in ("model.pt", *(["model.json"] if labels else [])):
        (tmp_path / path).write_bytes(files[f"models/{path}"])
    found = torch.load(tmp_path / "model.pt", weights_only=True)
    assert {name: tensor.dtype for name, tensor in found.items()} == {
        name: torch.float16 if half else tensor.dtype for name, tensor in content.items()
    }
    for name, tensor in content.items():
        torch.testing.assert_close(found[name].float(), tensor.half().float() if half else tensor, atol=0, rtol=0)
    assert len(files["models/model.pt"]) < 1.1 * file.stat().st_size + 1e5
    if labels:
        assert model_labels(tmp_path / "model.pt") == list(label_names(labels))
        assert "Smith" not in (tmp_path / "model.json").read_text()


@pytest.fixture
def wrong_weights(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    if request.param == "none":
        return tmp_path / "model.pt"
    weights = tiny_weights(BTCV, tmp_path / "trained", {"unnamed": "", "FLARE's": "flare"}.get(request.param, "btcv"))
    content = torch.load(weights, weights_only=True)
    if request.param == "nested":
        torch.save({"state_dict": content, "epoch": 3}, weights)
    elif request.param == "other":
        torch.save({name: tensor + 1 for name, tensor in content.items()}, weights)
    elif request.param == "prefixed":
        torch.save({f"module.{name}": tensor for name, tensor in content.items()}, weights)
    elif request.param == "prefixed safetensors":
        weights = weights.with_suffix(".safetensors")
        save_tensors({f"module.{name}": tensor for name, tensor in content.items()}, weights)
    elif request.param == "partial":
        content.popitem()
        torch.save(content, weights)
    if request.param.startswith(("nested", "prefixed", "partial")):
        weights.with_suffix(".json").unlink()  # it is of the weights before
    return weights


@pytest.mark.parametrize(
    ("wrong_weights", "message"),
    [
        ("none", "no trained weights there"),
        ("unnamed", "model.json: does not name the labels of"),
        ("FLARE's", "model.json: not the labels of this bundle"),
        ("other", "not the weights that .*model.json is the record of"),
        ("nested", "not a flat state_dict under our names"),
        ("prefixed safetensors", "not a flat state_dict under our names"),
        ("prefixed", "not a flat state_dict under our names"),
        ("partial", r"1 of \d+ tensors do not fit the network"),
    ],
    indirect=["wrong_weights"],
)
def test_wrong_weights_are_refused(wrong_weights: Path, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        release(tmp_path / "dist", BTCV, overlay="tiny", weights=wrong_weights)
    assert not (tmp_path / "dist").exists()


def test_versions_of_the_bundles_are_that_of_the_package() -> None:
    check_versions(ROOT, BUNDLES)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": "0.0.9"}, f"version is '0.0.9', shared_networks/version.py has '{__version__}'"),
        ({"changelog": {"0.0.9": "all"}}, f"changelog has nothing on '{__version__}'"),
    ],
)
def test_no_bundle_is_released_while_one_has_another_version(change: dict[str, Any], message: str, tree: Path) -> None:
    file = tree / FLARE / "configs" / "metadata.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(InputError, match=f"^{file}: {message}"):
        release(tree / "dist", PRETRAIN, root=tree)
    assert not (tree / "dist").exists()


def test_references_are_not_baked_in() -> None:
    """Also behind a quote in the expression."""
    for value in ("@spacing", "$@spacing * 2", '$"a" if @amp else "b"'):
        with pytest.raises(InputError, match="changes more than values"):
            bake({"configs/own.json": json.dumps({"epochs": value}).encode()}, "own")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "the following arguments are required: --output_dir; --help lists the options"),
        ("--output_dir {0} --bundles all", "unrecognized arguments: --bundles all; --help lists"),
        ("--output {0}", "the following arguments are required: --output_dir"),
        ("--output_dir {0} hi_end_mae_pretrain", "unrecognized arguments: hi_end_mae_pretrain"),
        ("--output_dir {0} --bundle btcv", "--bundle btcv: there is no such bundle; give hi_end_mae_btcv_seg, hi_end"),
        ("--output_dir {0} --overlay tony", "--overlay tony: there is no configs/tony.json in the bundle"),
        ("--output_dir {0} --overlay evaluate", "configs/evaluate.json changes more than values"),
        ("--output_dir {0} --overlay multi_gpu_train", "configs/multi_gpu_train.json changes more than values"),
        ("--output_dir {0} --weights model.pt", "--weights model.pt: are one bundle's; name it: --bundle hi_end_mae_b"),
        ("--output_dir {0}/file", "file/hi_end_mae_btcv_seg_v.*cannot be written .*give another --output_dir"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(words: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=message) as caught:
        main(words.format(tmp_path).split())
    assert "\n" not in str(caught.value)
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_an_overlay_with_a_setting_of_no_config_is_refused(tree: Path) -> None:
    (tree / BTCV / "configs" / "large.json").write_text('{"num_samples": 8, "gpus": 4}')
    with pytest.raises(InputError, match=r"--overlay large: no config has gpus of configs/large\.json"):
        release(tree / "dist", BTCV, overlay="large", root=tree)


WITNESS = """
import atexit, os, sys

@atexit.register
def tell():
    if "shared_networks" in sys.modules and "WITNESS" in os.environ:
        with open(os.environ["WITNESS"], "a") as file:
            print(sys.modules["shared_networks"].__file__, file=file)
"""


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Python with the packages of this environment, but not those that are installed to be edited.

    What a `.pth` file names is on the path, but the `.pth` files in there, by which such packages are found, are not
    read.
    """
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, symlinks=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "dependencies.pth").write_text("\n".join(path for path in sys.path if path.endswith("-packages")))
    (packages / "witness.py").write_text(WITNESS)
    (packages / "witness.pth").write_text("import witness")
    return folder / "bin" / "python"


@pytest.fixture(scope="module")
def run(python: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Runs a program that must use the package in `bundle`, by default in an empty folder; returns what it prints."""
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    witness = elsewhere.with_suffix(".txt")

    def run(*words: str | Path, bundle: Path | None, folder: Path = elsewhere, fails: bool = False) -> str:
        witness.unlink(missing_ok=True)
        env = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        env |= {"PYTHONWARNINGS": "ignore", "no_proxy": "127.0.0.1", "WITNESS": str(witness)}
        command = [str(python), *map(str, words)]
        done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=600, check=False)
        assert done.returncode == 1 if fails else done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
        copies = set(witness.read_text().splitlines()) if witness.exists() else set()
        assert copies == ({str(bundle / "shared_networks" / "__init__.py")} if bundle else set())
        return done.stderr if fails else done.stdout

    return run


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of released bundles, small, without weights."""
    root = tmp_path_factory.mktemp("my bundles")
    for archive in release(tmp_path_factory.mktemp("dist"), overlay="tiny"):
        unzip(archive, root)
    return root


def bundle_run(bundle: Path, *configs: str) -> list[str]:
    files = [str(bundle / "configs" / f"{name}.json") for name in configs]
    return ["-m", "monai.bundle", "run", "--config_file", repr(files), "--bundle_root", str(bundle)]


@pytest.fixture(scope="module")
def pretrained(home: Path, run: Run, datasets: dict[str, Path]) -> Path:
    bundle = home / PRETRAIN
    run(*bundle_run(bundle, "train"), "--dataset_dir", datasets["btcv"], *QUICK, bundle=bundle)
    return bundle


@pytest.fixture(scope="module", params=[BTCV, FLARE])
def fine_tuned(
    request: pytest.FixtureRequest, home: Path, pretrained: Path, run: Run, datasets: dict[str, Path]
) -> Path:
    """From the encoder of the pre-training beside it, which is where the bundle looks for it."""
    bundle = home / request.param
    shown = run(*bundle_run(bundle, "train"), "--dataset_dir", data_of(bundle.name, datasets), *QUICK, bundle=bundle)
    assert f"{bundle}/../{PRETRAIN}/models/model.pt" in shown
    assert "missing keys: none" in shown
    return bundle


@pytest.mark.slow
@pytest.mark.parametrize("bundle", [PRETRAIN, BTCV])
def test_a_small_release_runs_the_commands_of_its_card(
    bundle: str, run: Run, datasets: dict[str, Path], tmp_path: Path
) -> None:
    """All but that for two GPUs. Of its ways to train a user takes one."""
    for archive in release(tmp_path / "dist", overlay="small"):
        unzip(archive, tmp_path)
    folder = tmp_path / bundle
    fences = "\n".join(re.findall(r"```bash\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL))
    commands = [c for c in fences.replace("\\\n", " ").splitlines() if c.startswith("python -m monai.bundle run")]
    assert len(commands) == 5
    before = (folder / "models" / "model.pt").read_bytes()
    for command in commands:
        words = [re.sub("^/data/.*", str(datasets["btcv"]), word) for word in shlex.split(command)[1:]]
        trains = "--ckpt_dir" in words
        run(*words, *([*QUICK, "--overwrite", "True"] if trains else []), folder=folder, bundle=folder)
    assert (folder / "trained" / "model.pt").is_file() and (folder / "models" / "model.pt").read_bytes() == before


def test_the_repository_cannot_be_imported(run: Run) -> None:
    error = run("-c", "import monai, torch; import shared_networks", bundle=None, fails=True)
    assert "No module named 'shared_networks'" in error


def test_a_released_copy_cannot_release(home: Path, run: Run) -> None:
    words = ["-m", "shared_networks.bundle.release", "--output_dir", "dist"]
    error = run(*words, folder=home / BTCV, bundle=home / BTCV, fails=True)
    assert error == f"error: {home / BTCV}: no bundles beside shared_networks; run in a clone of the repository\n"


def test_pretraining_alone_writes_its_model_into_the_bundle(pretrained: Path) -> None:
    check_weights(pretrained / "models" / "model.pt", config_of(pretrained).get_parsed_content("network_def"))
    assert list((pretrained / "models" / "state").glob("state_*.ckpt"))


def assert_on_grid(result: Path, scan: Path, values: range) -> np.ndarray:
    source, image = nib.load(scan), nib.load(result)
    np.testing.assert_allclose(image.affine, source.affine, atol=1e-3)
    found = np.asanyarray(image.dataobj)
    assert found.shape == source.shape
    assert found.min() >= values.start
    assert found.max() < values.stop
    return found


@pytest.mark.slow
def test_pretraining_is_evaluated_and_reconstructs_alone(pretrained: Path, run: Run, datasets: dict[str, Path]) -> None:
    data = datasets["btcv"]
    run(*bundle_run(pretrained, "train", "evaluate"), "--dataset_dir", data, bundle=pretrained)
    metrics = dict(csv.reader((pretrained / "outputs" / "metrics.csv").open()))
    assert set(metrics) == {"val_masked_mse", "effective_rank"}
    assert 0.5 < float(metrics["val_masked_mse"]) < 1.5  # 1 is what the mean of each patch gives
    run(*bundle_run(pretrained, "inference"), "--dataset_dir", data, bundle=pretrained)
    (scan,) = (data / "imagesTs").iterdir()
    assert_on_grid(pretrained / "outputs" / "test_000_reconstruction.nii.gz", scan, range(-175, 251))
    mask = assert_on_grid(pretrained / "outputs" / "test_000_mask.nii.gz", scan, range(2))
    assert 0.6 < mask.mean() < 0.9


@pytest.mark.slow
def test_fine_tuned_bundle_is_evaluated_and_segments_alone(
    fine_tuned: Path, run: Run, datasets: dict[str, Path]
) -> None:
    """In its own folder, as its card says, where no `bundle_root` is needed."""
    data = data_of(fine_tuned.name, datasets)
    for files in (["configs/train.json", "configs/evaluate.json"], ["configs/inference.json"]):
        words = ["-m", "monai.bundle", "run", "--config_file", repr(files), "--dataset_dir", data]
        run(*words, folder=fine_tuned, bundle=fine_tuned)
    with (fine_tuned / "outputs" / "dice.csv").open() as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["case", *label_names("flare" if fine_tuned.name == FLARE else "btcv")[1:], "mean"]
    assert [row[0] for row in rows[1:]] == ["test_000", "mean"]
    (scan,) = (data / "imagesTs").iterdir()
    labels = assert_on_grid(fine_tuned / "outputs" / "test_000_seg.nii.gz", scan, range(14))
    assert labels.dtype == np.uint8


@pytest.mark.slow
@pytest.mark.parametrize("bundle", BUNDLES)
def test_metadata_fit_schema_and_network_alone(bundle: str, home: Path, run: Run, tmp_path: Path) -> None:
    """monai takes the schema from `filepath` where it is there already, and else downloads it."""
    root, schema = home / bundle, shutil.copy(SCHEMA, tmp_path / "schema.json")
    verify = ["-m", "monai.bundle", "verify_metadata", "--filepath", schema, "--meta_file"]
    assert "metadata is verified with no error" in run(*verify, root / "configs" / "metadata.json", bundle=None)
    metadata = json.loads((root / "configs" / "metadata.json").read_text())
    wrong = tmp_path / "metadata.json"
    wrong.write_text(json.dumps({**metadata, "required_packages_version": ["nibabel"]}))
    assert "Failed validating" in run(*verify, wrong, bundle=None, fails=True)

    config = root / "configs" / "inference.json"
    words = ["-m", "monai.bundle", "verify_net_in_out", "network_def", "--config_file", config, "--bundle_root", root]
    words += ["--device", "cpu", "--meta_file"]
    run(*words, root / "configs" / "metadata.json", bundle=root)
    metadata["network_data_format"]["outputs"]["pred"]["num_channels"] = 5
    wrong.write_text(json.dumps(metadata))
    assert "doesn't match: `5`" in run(*words, wrong, bundle=root, fails=True)


def network_of(bundle: Path) -> torch.nn.Module:
    """The bundle's network with its weights, made here."""
    network: torch.nn.Module = config_of(bundle).get_parsed_content("network_def").eval()
    network.load_state_dict(torch.load(bundle / "models" / "model.pt", weights_only=True))
    return network


def export(command: str, bundle: Path, output: Path, run: Run, *more: str) -> None:
    words = ["-m", "monai.bundle", command, "network_def", "--filepath", output, "--bundle_root", bundle]
    words += ["--ckpt_file", bundle / "models" / "model.pt", "--meta_file", bundle / "configs" / "metadata.json"]
    run(*words, "--config_file", bundle / "configs" / "inference.json", *more, bundle=bundle)


@pytest.mark.slow
def test_pretrained_network_is_exported_to_torchscript_and_onnx_alone(
    pretrained: Path, run: Run, tmp_path: Path
) -> None:
    export("ckpt_export", pretrained, tmp_path / "model.ts", run)
    scripted, network = torch.jit.load(tmp_path / "model.ts"), network_of(pretrained)
    torch.manual_seed(3)  # scripted, it hides other patches at every call
    found = scripted(IMAGE)
    torch.manual_seed(3)
    expected = network(IMAGE, torch.rand(1, 4**3).argsort(dim=1))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    export("onnx_export", pretrained, tmp_path / "model.onnx", run, "--input_shape", "[1, 1, 48, 48, 48]")
    assert (tmp_path / "model.onnx").stat().st_size > 1e6  # what it computes: tests/bundle/test_exports.py


@pytest.mark.slow
def test_fine_tuned_network_is_exported_to_torchscript_and_onnx_alone(
    fine_tuned: Path, run: Run, tmp_path: Path
) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    export("ckpt_export", fine_tuned, tmp_path / "model.ts", run)
    export("onnx_export", fine_tuned, tmp_path / "model.onnx", run, "--input_shape", "[1, 1, 48, 48, 48]")
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    (onnx,) = session.run(None, {session.get_inputs()[0].name: IMAGE.numpy()})
    expected = network_of(fine_tuned)(IMAGE)
    torch.testing.assert_close(torch.jit.load(tmp_path / "model.ts")(IMAGE), expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(torch.from_numpy(onnx), expected, atol=1e-4, rtol=0)


LOAD = """
import json, sys
import monai.bundle, torch

arguments, image, output = json.loads(sys.argv[1]), sys.argv[2], sys.argv[3]
network = monai.bundle.load(workflow_type="inference", device="cpu", **arguments).eval()
with torch.no_grad():
    torch.save(network(torch.load(image)), output)
"""


def assert_loads(bundle: Path, run: Run, tmp_path: Path) -> None:
    """As the README prints it, beside the bundle, and in the bundle's own folder."""
    torch.save(IMAGE, tmp_path / "image.pt")
    beside = {"bundle_dir": ".", "args_file": {"bundle_root": bundle.name}}
    inside = {"bundle_dir": ".."}
    for arguments, folder in ((beside, bundle.parent), (inside, bundle)):
        words = [json.dumps({"name": bundle.name, **arguments}), tmp_path / "image.pt", tmp_path / "output.pt"]
        run("-c", LOAD, *words, folder=folder, bundle=bundle)
        torch.testing.assert_close(torch.load(tmp_path / "output.pt"), network_of(bundle)(IMAGE), atol=1e-5, rtol=0)


@pytest.mark.slow
def test_pretrained_network_loads_from_python_alone(pretrained: Path, run: Run, tmp_path: Path) -> None:
    assert_loads(pretrained, run, tmp_path)


@pytest.mark.slow
def test_fine_tuned_network_loads_from_python_alone(fine_tuned: Path, run: Run, tmp_path: Path) -> None:
    assert_loads(fine_tuned, run, tmp_path)


WORKFLOW = """
import json, sys
import monai.bundle

flow = monai.bundle.create_workflow(**json.loads(sys.argv[1]))
wrong = flow.check_properties()
assert not wrong, wrong
flow.run()
flow.finalize()
names = ["version", "spatial_shape", "device", "dataset_dir", "bundle_root"]
names += ["max_epochs", "trainer"] if flow.workflow_type == "train" else ["evaluator", "dataset"]
print(json.dumps({name: str(getattr(flow, name)) for name in names}))
"""


def assert_is_a_workflow(bundle: Path, data: Path, run: Run, tmp_path: Path, **training: Any) -> None:
    for kind, settings in (("train", {"epochs": 1, "ckpt_dir": str(tmp_path), **training}), ("inference", {})):
        arguments = {"config_file": str(bundle / "configs" / f"{kind}.json"), "workflow_type": kind, **settings}
        arguments |= {"bundle_root": str(bundle), "dataset_dir": str(data), "output_dir": str(tmp_path)}
        shown = run("-c", WORKFLOW, json.dumps(arguments), folder=tmp_path, bundle=bundle)
        properties = json.loads(shown.splitlines()[-1])
        expected = {"version": __version__, "bundle_root": str(bundle), "dataset_dir": str(data), "device": "cpu"}
        assert properties.items() >= expected.items()
        assert properties["spatial_shape"] == "[48, 48, 48]"
        assert properties.get("max_epochs", "1") == "1"
    check_weights(tmp_path / "model.pt", config_of(bundle).get_parsed_content("network_def"))


@pytest.mark.slow
def test_pretraining_is_a_workflow_in_python_alone(
    pretrained: Path, run: Run, datasets: dict[str, Path], tmp_path: Path
) -> None:
    assert_is_a_workflow(pretrained, datasets["btcv"], run, tmp_path)
    assert (tmp_path / "test_000_reconstruction.png").is_file()


@pytest.mark.slow
def test_fine_tuning_is_a_workflow_in_python_alone(
    fine_tuned: Path, run: Run, datasets: dict[str, Path], tmp_path: Path
) -> None:
    assert_is_a_workflow(fine_tuned, data_of(fine_tuned.name, datasets), run, tmp_path, pretrained_encoder="")
    assert (tmp_path / "test_000_seg.nii.gz").is_file()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A folder and the address under which a web server on this machine offers it."""
    folder = tmp_path / "served"
    folder.mkdir()
    handler = partial(SimpleHTTPRequestHandler, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as http:
        Thread(target=http.serve_forever, daemon=True).start()
        yield folder, f"http://127.0.0.1:{http.server_port}"
        http.shutdown()


@pytest.mark.slow
def test_download_segments_as_the_bundle_that_was_trained_and_trains_on(
    fine_tuned: Path, server: tuple[Path, str], run: Run, datasets: dict[str, Path], tmp_path: Path
) -> None:
    name, data, (folder, url) = fine_tuned.name, data_of(fine_tuned.name, datasets), server
    (archive,) = release(folder, name, overlay="tiny", weights=fine_tuned / "models" / "model.pt")
    words = ["-m", "monai.bundle", "download", "--name", name, "--version", __version__, "--bundle_dir", tmp_path]
    run(*words, "--url", f"{url}/{archive.name}", bundle=None)
    bundle = tmp_path / name
    for root in (fine_tuned, bundle):
        to = ["--output_dir", tmp_path / root.parent.name]
        run(*bundle_run(root, "inference"), "--dataset_dir", data, *to, bundle=root)
    before, after = (tmp_path / root.parent.name / "test_000_seg.nii.gz" for root in (fine_tuned, bundle))
    assert before.read_bytes() == after.read_bytes()

    weights = bundle / "models" / "model.pt"
    more = ["--dataset_dir", data, "--init_weights", weights, "--ckpt_dir", tmp_path / "models", *QUICK]
    shown = run(*bundle_run(bundle, "train"), *more, bundle=bundle)
    assert f"weights from {weights}: " in shown
    assert (tmp_path / "models" / "model.pt").read_bytes() != weights.read_bytes()


TWO = """
import sys
from monai.bundle import ConfigWorkflow

for root in sys.argv[1:]:
    flow = ConfigWorkflow(f"{root}/configs/inference.json", workflow_type="inference", bundle_root=root)
    flow.parser.parse(reset=True)
    print("it has a", type(flow.parser.get_parsed_content("network_def")).__name__)
"""


@pytest.mark.slow
def test_bundles_of_one_release_share_a_process_and_others_do_not(home: Path, run: Run, tmp_path: Path) -> None:
    first, second = home / PRETRAIN, home / BTCV
    shown = run("-c", TWO, first, second, bundle=first)
    assert re.findall("it has a (.*)", shown) == ["HiEndMAE", "HiEndUNETR"]
    other = Path(shutil.copytree(second, tmp_path / BTCV))
    version = other / "shared_networks" / "version.py"
    version.write_text(version.read_text().replace(__version__, "9.9.9"))
    assert f"{version.parent}: another version than " in run("-c", TWO, first, other, bundle=first, fails=True)
