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
    own = bundle / "shared_networks"
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
    assert f"1 file(s) differ, such as {file}; give all" in str(error)
