"""The wheel, installed into an environment of its own: the doors give what the bundle gives in the repository."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from pathlib import Path
from zipfile import ZipFile

import nibabel as nib
import numpy as np
import pytest

from shared_networks.version import RELEASED_FILES, __version__
from tests.conftest import BUNDLES, ROOT

pytestmark = pytest.mark.integration

BTCV = BUNDLES[1]
SHIPPED = "shared_networks/doors/shipped"


def build(kind: str, source: Path, out: Path) -> Path:
    """Have setuptools build a `sdist` or `wheel`."""
    code = f"import setuptools.build_meta as build; print(build.build_{kind}({str(out)!r}))"
    environment = {**os.environ, "PYTHONPATH": ""}
    done = subprocess.run([sys.executable, "-c", code], cwd=source, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return out / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def wheel(clone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built of a source distribution, as an index has it."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    for name in (*BUNDLES, "shared_networks"):
        shutil.copytree(clone / name, folder / name)
    (folder / BTCV / "models").mkdir(exist_ok=True)  # the clone is shared, and another test may have trained in it
    (folder / BTCV / "models" / "model.pt").write_text("my own")
    with tarfile.open(build("sdist", folder, folder / "dist")) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    (source,) = (folder / "unpacked").iterdir()
    return build("wheel", source, folder / "dist")


@pytest.fixture(scope="module")
def programs(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs of an environment with the wheel, and beside it what this environment has."""
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    python = folder / "bin" / "python"
    install = ["--python", python, "install", "--quiet", "--no-deps", "--no-index", wheel]
    run([sys.executable, "-m", "pip", *install], folder)
    (packages,) = (folder / "lib").glob("python*/site-packages")
    (packages / "others.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    return python.parent


def run(command: list[str | Path], folder: Path, code: int = 0) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [str(word) for word in command], cwd=folder, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == code, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    assert "Traceback" not in done.stderr
    return done


@pytest.fixture(scope="module")
def truth(ct: Path, tmp_path_factory: pytest.TempPathFactory) -> np.ndarray:
    """Labels of the CT by the bundle in the repository."""
    out = tmp_path_factory.mktemp("bundle")
    files = "['configs/inference.json','configs/small.json']"
    words = ["-m", "monai.bundle", "run", "--config_file", files, "--dataset_dir", ct, "--output_dir", out]
    run([sys.executable, *words, "--overlay", "False"], ROOT / BTCV)
    return voxels(out / "case_seg.nii.gz")


def voxels(file: Path) -> np.ndarray:
    return np.asanyarray(nib.load(file).dataobj)  # type: ignore[attr-defined]


def test_the_wheel_holds_what_is_released_of_each_bundle(wheel: Path) -> None:
    with ZipFile(wheel) as content:
        names = content.namelist()
        assert f"{SHIPPED}/{BTCV}/configs/small.json" in names
        for bundle in BUNDLES:
            files = {file for pattern in RELEASED_FILES for file in (ROOT / bundle).glob(pattern)}
            expected = {f"{SHIPPED}/{bundle}/{file.relative_to(ROOT / bundle)}" for file in files}
            assert {name for name in names if name.startswith(f"{SHIPPED}/{bundle}/")} == expected
            weights, record = (f"{bundle}/weights/small.{ending}" for ending in ("pt", "json"))
            assert content.read(f"{SHIPPED}/{weights}") == (ROOT / weights).read_bytes()
            released, own = content.read(f"{SHIPPED}/{record}").decode(), json.loads((ROOT / record).read_text())
            assert not [name for part in ("train", "validation") for name in own[part] if f'"{name}"' in released]
            assert json.loads(released)["weights_sha256"] == own["weights_sha256"]
    assert not [name for name in names if name.startswith(("tests/", *BUNDLES))]
    assert [name for name in names if name.endswith("setup.py")] == []


def test_one_line_segments_a_file_as_the_bundle_does(
    programs: Path, ct: Path, truth: np.ndarray, tmp_path: Path
) -> None:
    shutil.copy(ct, tmp_path / "ct.nii.gz")
    shown = run([programs / "hi-end-mae", "segment", "ct.nii.gz", "--out", "labels"], tmp_path)
    assert "results are in labels" in shown.stdout
    np.testing.assert_array_equal(voxels(tmp_path / "labels" / "ct_seg.nii.gz"), truth)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["ct.nii.gz", "labels"]


def test_a_folder_and_a_file_too_though_a_scan_fails(
    programs: Path, ct: Path, truth: np.ndarray, tmp_path: Path
) -> None:
    scans = tmp_path / "scans"
    (scans / "below").mkdir(parents=True)
    shutil.copy(ct, scans / "below")
    (scans / "broken.nii.gz").write_bytes(b"no scan")
    shutil.copy(ct, tmp_path / "another.nii.gz")
    words = ["segment", scans, "another.nii.gz", "--out", tmp_path / "labels", "--overlay", "False"]
    shown = run([programs / "hi-end-mae", *words], tmp_path, code=1)
    assert "error: 1 of 3 scan(s) not segmented:\n" in shown.stderr and "broken.nii.gz: " in shown.stderr
    for name in ("case", "another"):
        np.testing.assert_array_equal(voxels(tmp_path / "labels" / f"{name}_seg.nii.gz"), truth)


def test_image_array_and_path_in_python(programs: Path, ct: Path, truth: np.ndarray, tmp_path: Path) -> None:
    code = f"""
import nibabel as nib, numpy as np
import shared_networks
from shared_networks import segment
print(shared_networks.__file__)
scan = nib.load({str(ct)!r})
for name, found in {{
    "path": segment({str(ct)!r}),
    "image": segment(scan),
    "array": segment(np.asarray(scan.dataobj, dtype=np.float32), scan.affine),
}}.items():
    assert (found.affine == scan.affine).all()
    np.save(name, np.asanyarray(found.dataobj))
"""
    shown = run([programs / "python", "-c", code], tmp_path)
    assert shown.stdout.startswith(str(programs.parent))
    for name in ("path", "image", "array"):
        np.testing.assert_array_equal(np.load(tmp_path / f"{name}.npy"), truth)


def test_help_information_and_a_wrong_command(programs: Path, tmp_path: Path) -> None:
    command = programs / "hi-end-mae"
    assert "exit codes:" in run([command], tmp_path).stdout
    assert str(programs.parent) in run([command, "segment", "--help"], tmp_path).stdout
    found = json.loads(run([command, "info", "--json"], tmp_path).stdout)
    assert found["version"] == __version__ and list(found["bundles"]) == sorted(BUNDLES)
    assert all(bundle["folder"].startswith(str(programs.parent)) for bundle in found["bundles"].values())
    assert "cpu" in found["devices"]
    wrong = run([command, "segmnt", "ct.nii.gz"], tmp_path, code=2)
    assert wrong.stderr.startswith("error: segmnt: is no command; give segment or info")
    assert list(tmp_path.iterdir()) == []
