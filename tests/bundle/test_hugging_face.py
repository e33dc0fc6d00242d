"""Releases on Hugging Face: its own client uploads and downloads them, from a hub of ours that runs on this machine."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from zipfile import ZipFile

import nibabel as nib
import numpy as np
import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from monai.bundle import ConfigParser

from shared_networks.bundle.card import model_card, released_card
from shared_networks.bundle.release import release
from shared_networks.networks.checkpoints import half_precision
from shared_networks.version import __version__
from tests.conftest import BUNDLES, ROOT

pytestmark = pytest.mark.integration

COMMIT = "0" * 40
TOKEN = "hf_of_the_test"


class Hub(ThreadingHTTPServer):
    """What the Hugging Face Hub's HTTP interface does for a repository of one commit.

    Attributes:
        files: content by path, as committed.
        blobs: large files by SHA-256, as uploaded before the commit.
        tags: of the commit.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("localhost", 0), _Requests)
        self.files: dict[str, bytes] = {}
        self.blobs: dict[str, bytes] = {}
        self.tags: list[str] = []
        self.url = f"http://localhost:{self.server_port}"


class _Requests(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def answer(self, content: Any = None, status: int = 200, **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content or {}).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers["Content-Length"]))

    def do_PUT(self) -> None:
        content = self.body()
        if (name := self.path.rpartition("/")[2]) == hashlib.sha256(content).hexdigest():
            self.server.blobs[name] = content
        self.answer(status=200 if name in self.server.blobs else 400)

    def do_POST(self) -> None:
        hub, body = self.server, self.body()
        if self.headers["Authorization"] != f"Bearer {TOKEN}":
            self.answer(status=401)
        elif self.path == "/api/repos/create":
            self.answer({"url": f"{hub.url}/us/{json.loads(body)['name']}"})
        elif self.path == "/api/validate-yaml":
            front = re.match(r"---\n(.*?)\n---\n", json.loads(body)["content"], re.DOTALL)
            self.answer(status=200 if front and yaml.safe_load(front[1])["license"] else 400)
        elif "/preupload/" in self.path:
            paths = [file["path"] for file in json.loads(body)["files"]]
            modes = {True: "lfs", False: "regular"}
            files = [
                {"path": p, "uploadMode": modes[p.endswith((".pt", ".png"))], "shouldIgnore": False} for p in paths
            ]
            self.answer({"files": files})
        elif self.path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            actions = [{"upload": {"href": f"{hub.url}/blobs/{entry['oid']}"}} for entry in objects]
            found = [{**entry, "actions": action} for entry, action in zip(objects, actions, strict=True)]
            self.answer({"transfer": "basic", "objects": found})
        elif "/commit/" in self.path:
            for operation in map(json.loads, body.splitlines()):
                value = operation["value"]
                if operation["key"] == "file":
                    hub.files[value["path"]] = base64.b64decode(value["content"])
                elif operation["key"] == "lfsFile":
                    hub.files[value["path"]] = hub.blobs[value["oid"]]
            self.answer({"success": True, "commitOid": COMMIT, "commitUrl": f"{hub.url}/us/bundle/commit/{COMMIT}"})
        elif "/tag/" in self.path:
            hub.tags.append(json.loads(body)["tag"])
            self.answer()
        else:
            self.answer(status=404)

    def do_GET(self) -> None:
        hub = self.server
        revision, _, path = self.path.partition("/resolve/")[2].partition("/")
        if revision and path in hub.files:
            content = hub.files[path]
            self.answer(content, ETag=f'"{hashlib.sha256(content).hexdigest()}"', X_Repo_Commit=COMMIT)
        elif self.path.endswith("/refs"):
            refs = {
                kind: [{"name": name, "ref": f"refs/{where}/{name}", "targetCommit": COMMIT} for name in names]
                for kind, where, names in (("branches", "heads", ["main"]), ("tags", "tags", hub.tags))
            }
            self.answer({**refs, "converts": []})
        elif "/revision/" in self.path and self.path.rpartition("/")[2] in (*hub.tags, "main"):
            self.answer({"id": "us/bundle", "sha": COMMIT, "siblings": [{"rfilename": name} for name in hub.files]})
        elif f"/tree/{COMMIT}" in self.path:
            files = hub.files.items()
            self.answer([{"type": "file", "path": p, "size": len(c), "oid": "0" * 40} for p, c in files])
        else:
            self.answer(status=404)

    do_HEAD = do_GET  # noqa: N815 (as http.server names it)


@pytest.fixture
def hub() -> Iterator[Hub]:
    server = Hub()
    Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with our releases, small, unpacked and with weights, as float16 like ours."""
    folder = tmp_path_factory.mktemp("bundles")
    for archive in release(folder / "dist", overlay="tiny"):
        ZipFile(archive).extractall(folder)
    for name in BUNDLES:
        parser = ConfigParser()
        parser.read_config(folder / name / "configs" / "inference.json")
        parser["bundle_root"] = str(folder / name)
        (folder / name / "models").mkdir()
        weights = parser.get_parsed_content("network_def").state_dict()
        torch.save(half_precision(weights, name), folder / name / "models" / "model.pt")
    return folder


def client(hub: Hub, home: Path, folder: Path, *words: str) -> None:
    """Runs a Python program that knows no other hub than ours, and no cache."""
    known = {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
    environment = {**os.environ, **known, "HF_HUB_DISABLE_TELEMETRY": "1", "PYTHONPATH": ""}
    done = subprocess.run(
        [sys.executable, *words], cwd=folder, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-6000:]}"


def content_of(folder: Path) -> dict[str, bytes]:
    files = (file for file in folder.rglob("*") if file.is_file() and ".cache" not in file.parts)
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in files}


def test_monai_pushes_downloads_and_runs_a_release(
    hub: Hub, bundles: Path, datasets: dict[str, Path], tmp_path: Path
) -> None:
    name = "hi_end_mae_btcv_seg"
    released = shutil.copytree(bundles / name, tmp_path / "released" / name)  # its README.md is replaced
    where = f"'us/{name}', '{name}', '{released.parent}', version='{__version__}', tag_as_latest_version=True"
    client(hub, tmp_path / "home", tmp_path, "-c", f"import monai.bundle as b; b.push_to_hf_hub({where})")
    assert hub.tags == [__version__, "latest_version"]
    assert hub.files == content_of(released)
    assert hub.files["README.md"].endswith(hub.files["docs/README.md"])
    assert {"models/model.pt", "docs/overlay.png"} <= {path for path, c in hub.files.items() if c in hub.blobs.values()}

    download = f"download --name {name} --source huggingface_hub --repo us/{name} --bundle_dir {tmp_path}"
    client(hub, tmp_path / "home", tmp_path, "-m", "monai.bundle", *download.split())
    assert content_of(tmp_path / name) == hub.files

    run = "run --config_file configs/inference.json --dataset_dir"
    scans = datasets["btcv"] / "imagesTs"
    client(hub, tmp_path / "home", tmp_path / name, "-m", "monai.bundle", *run.split(), str(scans))
    result = nib.load(tmp_path / name / "outputs" / "test_000_seg.nii.gz")
    assert result.shape == nib.load(scans / "test_000_0000.nii.gz").shape
    assert np.asanyarray(result.dataobj).max() < 14


def test_its_own_command_uploads_a_release_as_it_is(hub: Hub, bundles: Path, tmp_path: Path) -> None:
    name = "hi_end_mae_flare_seg"
    words = ["-m", "huggingface_hub.cli.hf", "upload", f"us/{name}", str(bundles / name)]
    client(hub, tmp_path, tmp_path, *words)
    assert hub.files == content_of(bundles / name)


@pytest.mark.parametrize("bundle", BUNDLES)
def test_card_has_front_matter_and_links_that_hold(bundle: str, bundles: Path) -> None:
    card = ModelCard.load(bundles / bundle / "README.md")
    segments = bundle != "hi_end_mae_pretrain"
    assert card.data.to_dict() == {
        "license": "apache-2.0",
        "library_name": "monai",
        "pipeline_tag": "image-segmentation" if segments else "image-feature-extraction",
        "tags": ["monai", "medical", "ct", "hi-end-mae"],
    }
    source = (ROOT / bundle / "docs" / "README.md").read_text()
    assert not source.startswith("---")  # GitHub would show it as a table
    assert card.text.lstrip().startswith(source.splitlines()[0])
    for text, folder in ((source, ROOT / bundle / "docs"), (card.text, bundles / bundle)):
        links = [link for link in re.findall(r"\]\(([^)#]+)", text) if ":" not in link]
        assert "data_license.txt" in {Path(link).name for link in links}
        assert [link for link in links if not (folder / link).is_file()] == []


def test_links_elsewhere_stay_as_they_are() -> None:
    metadata = json.loads((ROOT / BUNDLES[1] / "configs" / "metadata.json").read_text())
    card = "[a](https://x.org/a) [b](#b) [c](mailto:c) [d](d.png#e) ![f](g/f.png) [h](../h.json)"
    moved = "[a](https://x.org/a) [b](#b) [c](mailto:c) [d](docs/d.png#e) ![f](docs/g/f.png) [h](h.json)"
    assert model_card(card, metadata).endswith(f"---\n\n{moved}")


def test_links_to_guides_lead_to_their_copies_in_the_release() -> None:
    card = "[a](../../docs/a.md) [b](../../docs/b.md#c) `../../docs/x.md` [d](../configs/d.json)"
    assert released_card(card) == "[a](a.md) [b](b.md#c) `../../docs/x.md` [d](../configs/d.json)"


def test_segmenters_have_one_card_but_for_their_data() -> None:
    def common(bundle: str) -> list[str]:
        lines = (ROOT / bundle / "docs" / "README.md").read_text().splitlines()
        return [line for line in lines if line.startswith(("## ", "| `")) and not line.startswith("| `val_cases`")]

    assert common("hi_end_mae_btcv_seg") == common("hi_end_mae_flare_seg")
