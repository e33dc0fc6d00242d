"""The real MONAI Label server on release zips, a small datastore for it, and what `bundle run` makes of the same scans.

Run by `./runtests.sh --monailabel` alone, which makes the server's environment: in it there is no `shared_networks` but
the bundles' own copies.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import requests
from scipy.spatial.transform import Rotation

from shared_networks.synthetic.phantom import phantom_case
from shared_networks.synthetic.tissues import label_names

from ..conftest import ROOT

PYTHON = ROOT / os.environ.get("MONAILABEL_VENV", ".venv-monailabel") / "bin" / "python"
BTCV, FLARE = "hi_end_mae_btcv_seg", "hi_end_mae_flare_seg"
LABELLED = ("first", "second")
LATER = ("third", "fourth")  # labels come over REST
NAMES = {BTCV: label_names("btcv"), FLARE: label_names("flare")}
SCANS = {"lps": ("LPS", (0, 0, 0)), "oblique": ("PIR", (20, -10, 15))}
"""Axes of an array, and its turn in degrees, of the scans to segment."""


def pytest_ignore_collect(config: pytest.Config) -> bool | None:
    """Leave these tests out unless they are asked for by name."""
    return None if any("monai_label" in str(argument) for argument in config.args) else True


class Server:
    """A running server, its app and its log, spoken to over REST."""

    def __init__(self, address: str, app: Path, log: Path) -> None:
        self.address, self.app, self.log = address, app, log

    def bundle(self, name: str) -> Path:
        return self.app / "model" / name

    def get(self, path: str) -> Any:
        response = requests.get(self.address + path, timeout=60)
        response.raise_for_status()
        return response.json()

    def infer(self, model: str, image: str, **request: Any) -> requests.Response:
        """Ask for a segmentation of an image of the datastore; `files` and `data` may hold another and options."""
        url = f"{self.address}/infer/{model}?image={image}&output={request.pop('output', 'image')}"
        return requests.post(url, timeout=300, **request)

    def reload(self) -> None:
        """Have the app looked at anew, with weights and scans that came since."""
        requests.post(f"{self.address}/reload", timeout=60).raise_for_status()

    def save_label(self, image: str, file: Path, model: str = "", names: Sequence[str] = ()) -> None:
        """Save a finished label, as a viewer does, which names the labels that occur and the model."""
        url = f"{self.address}/datastore/label?image={image}&tag=final"
        params = json.dumps({"label_info": [{"name": name, "model_name": model} for name in names]})
        with file.open("rb") as stream:
            files = {"label": (file.name, stream)}
            requests.put(url, files=files, data={"params": params}, timeout=60).raise_for_status()

    def has_said(self, text: str) -> bool:
        """Whether a text is in the log, which may lag behind the answer."""
        for _ in range(20):
            if text in self.log.read_text():
                return True
            time.sleep(0.5)
        return False

    def run(self, task: str, name: str, **settings: Any) -> dict[str, Any]:
        """Start `train`, `batch/infer` or `scoring` in the background and wait for its end."""
        started = requests.post(f"{self.address}/{task}/{name}", json=settings, timeout=60)
        started.raise_for_status()
        deadline = time.monotonic() + 600
        while time.monotonic() < deadline:
            status = self.get(f"/{task}/")
            if status["id"] == started.json()["id"] and status["status"] in ("DONE", "ERROR"):
                return {**status, "log": "\n".join(status["details"])}
            time.sleep(0.5)
        raise TimeoutError(f"{task} {name}: {status}")


def process(words: Sequence[str | Path], folder: Path | None = None) -> None:
    """Run a command to its end, and show what it said if it failed."""
    done = subprocess.run([str(word) for word in words], cwd=folder, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"{words}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"


def read(file: Path | str) -> tuple[np.ndarray, np.ndarray]:
    """Values and affine of a NIfTI file."""
    image: Any = nib.load(file)
    return np.asanyarray(image.dataobj), image.affine


def turned(image: np.ndarray, affine: np.ndarray, axes: str, degrees: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """An array with its axes in another order, in a patient turned about three axes."""
    start = nib.orientations.io_orientation(affine)
    way = nib.orientations.ornt_transform(start, nib.orientations.axcodes2ornt(axes))
    moved = affine @ nib.orientations.inv_ornt_aff(way, image.shape)
    spacing = np.linalg.norm(moved[:3, :3], axis=0)
    straight = np.sign(np.where(np.abs(moved[:3, :3]) == np.abs(moved[:3, :3]).max(axis=0), moved[:3, :3], 0))
    matrix = Rotation.from_euler("xyz", degrees, degrees=True).as_matrix() @ straight * spacing.round(2)
    return nib.orientations.apply_orientation(image, way), nib.affines.from_matvec(matrix, moved[:3, 3].round(1))


@pytest.fixture(scope="module")
def studies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A datastore: two labelled scans, two whose labels lie beside it yet, and two to segment."""
    folder = tmp_path_factory.mktemp("datastore") / "studies"
    for part in ("labels/final", "../labels"):
        (folder / part).mkdir(parents=True)
    for number, name in enumerate((*LABELLED, *LATER, *SCANS)):
        image, label, affine = phantom_case(np.random.default_rng([5, number]), "btcv", 6.0)
        if name in SCANS:
            image, affine = turned(image, affine, *SCANS[name])
        else:
            place = folder / ("labels/final" if name in LABELLED else "../labels")
            nib.save(nib.Nifti1Image(label, affine), place / f"{name}.nii.gz")
        nib.save(nib.Nifti1Image(image, affine), folder / f"{name}.nii.gz")
    return folder


@pytest.fixture(scope="module")
def scans(studies: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of the scans to segment, as `bundle run` takes it."""
    folder = tmp_path_factory.mktemp("scans")
    for name in SCANS:
        (folder / f"{name}.nii.gz").symlink_to(studies / f"{name}.nii.gz")
    return folder


@pytest.fixture(scope="session")
def releases(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The segmenters' release zips: BTCV's tiny and without weights, FLARE22's with the small ones that ship."""
    folder = tmp_path_factory.mktemp("releases")
    for bundle, overlay in ((BTCV, "tiny"), (FLARE, "small")):
        release = [sys.executable, "-m", "shared_networks.bundle.release", "--output_dir", folder, "--bundle", bundle]
        process([*release, "--overlay", overlay], ROOT)
    return sorted(folder.glob("*.zip"))


@contextmanager
def serving(releases: Sequence[Path], studies: Path | str, folder: Path, **environment: str) -> Iterator[Server]:
    """The server, started as the guide says, from zips on studies; its files are in a folder."""
    if not PYTHON.is_file():
        raise pytest.UsageError(f"{PYTHON}: no such file; run ./runtests.sh --monailabel, which makes it")
    port = free_port()
    words: list[str | Path | int] = [PYTHON, ROOT / "shared_networks" / "bundle" / "monai_label" / "serve.py"]
    words += ["--app", folder / "app", "--studies", studies, *releases]
    words += ["--host", "127.0.0.1", "--port", port, "--conf", "epistemic_model", FLARE]
    environment = {
        **os.environ,
        "MONAI_LABEL_AUTO_UPDATE_SCORING": "false",  # it would run after each training
        "MONAI_LABEL_SESSION_PATH": str(folder / "sessions"),
        **environment,
    }
    log = folder / "server.log"
    with log.open("w") as stream:
        running = subprocess.Popen([str(word) for word in words], env=environment, stdout=stream, stderr=stream)
        try:
            yield started(Server(f"http://127.0.0.1:{port}", folder / "app", log), running)
        finally:
            running.terminate()
            running.wait(30)


def free_port() -> int:
    """A port that nothing listens to."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.fixture(scope="module")
def server(releases: list[Path], studies: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The server on the folder of studies."""
    extensions = '["*.nii.gz", "*.dicom"]'
    folder = tmp_path_factory.mktemp("server")
    with serving(releases, studies, folder, MONAI_LABEL_DATASTORE_FILE_EXT=extensions) as running:
        yield running


def started(server: Server, running: subprocess.Popen[bytes]) -> Server:
    """Wait until the server answers."""
    for _ in range(180):
        try:
            server.get("/info/")
            return server
        except requests.ConnectionError:
            time.sleep(1)
        assert running.poll() is None, server.log.read_text()[-4000:]
    raise TimeoutError(server.log.read_text()[-4000:])


def bundle_run(server: Server, bundle: str, scans: Path, output: Path) -> dict[str, Path]:
    """What `bundle run` makes of a folder of scans with the bundle that the server has, by scan."""
    options = ["--dataset_dir", scans, "--output_dir", output, "--overlay", "False"]
    command = [PYTHON, "-m", "monai.bundle", "run", "--config_file", "configs/inference.json", *options]
    process(command, server.bundle(bundle))
    return {file.name.removesuffix("_seg.nii.gz"): file for file in output.glob("*_seg.nii.gz")}


def as_slicer_asks(server: Server, part: str, model: str) -> dict[str, Any]:
    """The settings that 3D Slicer and OHIF send with a request for a model: all that info lists, as it lists it."""
    listed = server.get("/info/")[part][model]["config"]
    return {key: value[0] if isinstance(value, list) else value for key, value in listed.items()}


def segmented(server: Server, model: str, image: str, file: Path, **request: Any) -> tuple[np.ndarray, np.ndarray]:
    """Values and affine of the segmentation that the server gives."""
    response = server.infer(model, image, **request)
    assert response.status_code == 200, f"{response.text}\n{server.log.read_text()[-3000:]}"
    file.write_bytes(response.content)
    return read(file)


def assert_segmentation_is_that_of_bundle_run(server: Server, bundle: str, scans: Path, tmp_path: Path) -> None:
    """Ask for each scan to segment, and compare labels and place with those of the command."""
    expected = bundle_run(server, bundle, scans, tmp_path / "run")
    assert sorted(expected) == sorted(SCANS)
    for name, file in expected.items():
        labels, affine = segmented(server, bundle, name, tmp_path / "served.nii.gz")
        wanted, wanted_affine = read(file)
        assert labels.dtype == np.uint8
        assert 1 < len(np.unique(wanted)) <= 14
        np.testing.assert_array_equal(labels, wanted, err_msg=name)
        np.testing.assert_allclose(affine, wanted_affine, atol=1e-4)
        np.testing.assert_allclose(affine, read(scans / f"{name}.nii.gz")[1], atol=1e-4)
        assert "".join(nib.aff2axcodes(affine)) == SCANS[name][0]
