from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
from monai.bundle import ConfigParser

from shared_networks.errors import InputError, input_error_in
from shared_networks.version import check_copy
from tests.conftest import BUNDLES, ROOT


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A released bundle: configs and a copy of the package."""
    shutil.copytree(ROOT / BUNDLES[1] / "configs", tmp_path / "configs")
    shutil.copytree(ROOT / "shared_networks", tmp_path / "shared_networks")
    return tmp_path


def test_the_same_version_is_fine_and_so_is_none(bundle: Path) -> None:
    check_copy(bundle)
    check_copy(ROOT / BUNDLES[1])


@pytest.mark.parametrize("file", ["version.py", "networks/vit.py", "networks/new.py"])
@pytest.mark.parametrize("config", ["train.json", "inference.json"])
def test_a_bundle_with_another_package_is_refused(
    config: str, file: str, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the same version too: one line of another file may compute something else."""
    monkeypatch.setattr(sys, "path", [*sys.path])  # the config adds to it
    error = refusal(bundle, config, file, bundle / "shared_networks")
    assert f"1 file(s) differ, such as {file}; give all" in error


def refusal(bundle: Path, config: str, file: str, own: Path) -> str:
    """What a bundle's config says once a file of its own copy of the package has changed."""
    with (own / file).open("a") as stream:
        stream.write("# changed\n")
    parser = ConfigParser()
    parser.read_config(bundle / "configs" / config)
    parser["bundle_root"] = str(bundle)
    with pytest.raises(RuntimeError) as caught:
        parser.get_parsed_content("network_def")
    error = input_error_in(caught.value)
    assert isinstance(error, InputError)
    assert str(error).startswith(f"{own}: another version than {ROOT / 'shared_networks'}, which is loaded already: ")
    return str(error)


@pytest.mark.parametrize("name", BUNDLES)
def test_a_clone_with_other_code_than_the_installed_package_is_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What runs here stands for the package that `pip install .` installed."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    shutil.copytree(ROOT / name / "configs", tmp_path / name / "configs")
    shutil.copytree(ROOT / "shared_networks", tmp_path / "shared_networks")
    check_copy(tmp_path / name)
    monkeypatch.chdir(tmp_path / name)
    check_copy(".")
    error = refusal(tmp_path / name, "inference.json", "networks/vit.py", tmp_path / "shared_networks")
    assert error.endswith(
        f"networks/vit.py; commands in this clone would not run its own code: pip install -e {tmp_path}"
    )
    with pytest.raises(InputError, match="1 file"):
        check_copy(".")
