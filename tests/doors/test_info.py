from __future__ import annotations

import hashlib
import json
import platform
from importlib import metadata
from typing import Any

import pytest
import torch

from shared_networks.doors.command_line import run_command
from shared_networks.doors.info import PACKAGES, as_text, installation
from shared_networks.version import __version__
from tests.conftest import BUNDLES, ROOT


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    return installation()


def test_versions_are_those_of_this_environment(found: dict[str, Any]) -> None:
    assert found["version"] == __version__ and found["python"] == platform.python_version()
    assert list(found["packages"]) == list(PACKAGES)
    assert found["packages"]["monai"] == metadata.version("monai")
    assert found["packages"]["torch"] == torch.__version__


def test_a_package_that_is_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shared_networks.doors.info.PACKAGES", ("numpy", "no-such-package"))
    found = installation()
    assert found["packages"]["no-such-package"] is None
    assert "  no-such-package not installed\n" in as_text(found)


def test_bundles_have_their_versions_and_weights_their_digests(found: dict[str, Any]) -> None:
    assert list(found["bundles"]) == sorted(BUNDLES)
    for name, bundle in found["bundles"].items():
        assert bundle["version"] == __version__ and bundle["folder"] == str(ROOT / name)
        digest = hashlib.sha256((ROOT / name / "weights" / "small.pt").read_bytes()).hexdigest()
        assert bundle["weights"] == {"small.pt": digest}


def test_devices_are_those_that_pytorch_has(found: dict[str, Any]) -> None:
    gpus = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    assert [name for name in found["devices"] if name != "mps"] == ["cpu", *gpus]
    assert found["devices"]["cpu"] == platform.machine()


def test_it_is_printed_for_programs_and_for_people(capsys: pytest.CaptureFixture[str], found: dict[str, Any]) -> None:
    assert run_command(["info", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == found
    assert run_command(["info"]) == 0
    assert capsys.readouterr().out == as_text(found) + "\n"
    assert f"hi-end-mae {__version__}, Python" in as_text(found) and "SHA-256" in as_text(found)
