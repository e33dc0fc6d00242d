"""The Dockerfile, without Docker: linted, and its steps run on what it copies. Neither image nor layers are built."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path
from zipfile import ZipFile

import pytest

from shared_networks.version import __version__
from tests.conftest import BUNDLES, ROOT

pytestmark = pytest.mark.integration

DOCKERFILE = (ROOT / "Dockerfile").read_text().replace("\\\n", "")
SOURCES = [
    source
    for words in re.findall(r"^COPY (.+)", DOCKERFILE, re.MULTILINE)
    if "--from" not in words
    for source in [word for word in words.split() if not word.startswith("--")][:-1]
]


def step(marked: str) -> str:
    """The command of the one RUN that holds a text, with this Python for the image's."""
    (command,) = [line for line in re.findall(r"^RUN (.+)", DOCKERFILE, re.MULTILINE) if marked in line]
    return re.sub(r"\bpython\b", sys.executable, command).replace("pip ", f"{sys.executable} -m pip ")


def run(command: str, folder: Path, package: Path | None = None) -> str:
    environment = {**os.environ, "PYTHONPATH": str(package or folder)}
    done = subprocess.run(["bash", "-c", command], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the Dockerfile copies, and no more."""
    folder = tmp_path_factory.mktemp("context")
    for source in SOURCES:
        if (ROOT / source).is_dir():
            shutil.copytree(
                ROOT / source, folder / source, ignore=shutil.ignore_patterns("models", "outputs", "__pyc*")
            )
        else:
            shutil.copy(ROOT / source, folder)
    return folder


def test_hadolint_finds_nothing() -> None:
    assert run(f"{Path(sys.executable).with_name('hadolint')} Dockerfile", ROOT) == ""


def test_what_is_copied_is_there_and_sent_to_docker() -> None:
    sent = [line.removeprefix("!") for line in (ROOT / ".dockerignore").read_text().splitlines() if line[:1] == "!"]
    assert {*BUNDLES, "shared_networks"} <= set(SOURCES)
    assert [source for source in SOURCES if not (ROOT / source).exists()] == []
    sent += [f"{pattern}/*" for pattern in sent]  # what a folder holds
    assert [source for source in SOURCES if not any(fnmatch(source, pattern) for pattern in sent)] == []


def test_dependencies_are_the_packages_and_fit_its_constraints(context: Path) -> None:
    run(step("tomllib").replace("pip install", "pip install --dry-run"), context)
    names = {re.split(r"[<>=]", line)[0] for line in (context / "requirements.txt").read_text().splitlines()}
    assert {"torch", "monai", "SimpleITK"} <= names


def test_releases_are_made_of_what_is_copied(context: Path, tmp_path: Path) -> None:
    run(step("shared_networks.bundle.release").replace("/tmp/releases", str(tmp_path)), context)
    for pattern in re.findall(r"--from=releases /tmp/releases/(\S+)", DOCKERFILE):
        (archive,) = tmp_path.glob(pattern)  # a name of its own can be given to one alone
        with ZipFile(archive) as content:
            name = archive.name.removesuffix(f"_v{__version__}.zip")
            assert f"{name}/configs/inference.json" in content.namelist()
            assert content.read(f"{name}/models/model.pt") == (ROOT / name / "weights" / "small.pt").read_bytes()


def test_printed_trainings_run_one_after_the_other(context: Path, datasets: dict[str, Path], tmp_path: Path) -> None:
    """With the arguments that the header gives to the image, small, in its folders."""
    header = (ROOT / "Dockerfile").read_text().split("FROM ")[0].replace("\\\n#", "").replace("\n#", "\n")
    runs = re.findall(r"-v /data:/data -w /opt/hi-end-mae/(\S+) hi-end-mae +(run .*)", header)
    assert [bundle for bundle, _ in runs] == [*BUNDLES[:2]]
    for bundle, command in runs:
        command = re.sub(r"/data/(BTCV|CT)\b", str(datasets["btcv"]), command).replace("/data/", f"{tmp_path}/")
        command = command.replace("configs/train.json", "\"['configs/train.json','configs/tiny.json']\"")
        quick = "--epochs 1 --warmup_epochs 1 --num_samples 1 --batch_size 1 --spacing [6.0,6.0,6.0]"
        run(f"{sys.executable} -m monai.bundle {command} {quick}", context / bundle, package=context)
    assert (tmp_path / "models" / "model.pt").is_file()
