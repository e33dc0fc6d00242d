"""What MONAI Label's start script unpacks."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest

from shared_networks.bundle.monai_label.serve import copy_app, install
from shared_networks.bundle.release import write_release
from tests.conftest import full_disk

FILES = {"configs/inference.json": b"{}", "models/model.pt": b"weights"}


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    return write_release(tmp_path, "a_seg", FILES)


def rewritten(archive: Path, changes: dict[str, bytes | None]) -> Path:
    """The zip with other entries; None leaves one out."""
    with ZipFile(archive) as source:
        content: dict[str, bytes | None] = {name: source.read(name) for name in source.namelist()}
    with ZipFile(archive, "w") as target:
        for name, data in {**content, **changes}.items():
            if data is not None:
                target.writestr(name, data)
    return archive


def test_release_is_unpacked_once(archive: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert install(str(archive), tmp_path / "app") == "a_seg"
    unpacked = tmp_path / "app" / "model" / "a_seg"
    assert {name: (unpacked / name).read_bytes() for name in FILES} == FILES
    checked = subprocess.run(["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=unpacked, capture_output=True)
    assert checked.returncode == 0  # as the guide says
    (unpacked / "models" / "model.pt").write_bytes(b"trained")
    assert install(str(archive), tmp_path / "app") == install("a_seg", tmp_path / "app") == "a_seg"
    assert (unpacked / "models" / "model.pt").read_bytes() == b"trained"
    assert "exists already and stays unchanged" in capsys.readouterr().out


def test_what_does_not_fit_the_disk_leaves_nothing_and_is_unpacked_later(tmp_path: Path) -> None:
    archive = write_release(tmp_path, "a_seg", {**FILES, "models/model.pt": b"weights" * 2000})
    with full_disk(), pytest.raises(SystemExit, match=r"^error: .*a_seg.*zip: .*File too large"):
        install(str(archive), tmp_path / "app")
    assert list((tmp_path / "app" / "model").iterdir()) == []
    install(str(archive), tmp_path / "app")
    assert [folder.name for folder in (tmp_path / "app" / "model").iterdir()] == ["a_seg"]
    assert (tmp_path / "app" / "model" / "a_seg" / "models" / "model.pt").stat().st_size == 14_000


def test_the_app_is_copied_whole_and_one_that_is_there_stays(tmp_path: Path) -> None:
    source, app = tmp_path / "monaibundle", tmp_path / "served" / "app"
    (source / "lib").mkdir(parents=True)
    (source / "lib" / "a.py").write_text("a" * 5000)
    (source / "main.py").write_text("pass")
    with full_disk(), pytest.raises(SystemExit, match=rf"^error: {app}: .*File too large"):
        copy_app(source, app)
    assert list(app.parent.iterdir()) == []
    app.mkdir()  # as a user may have made it
    for _ in range(2):
        copy_app(source, app)
        assert sorted(file.name for file in app.iterdir()) == ["lib", "main.py"]
        source = tmp_path / "another"
    app.joinpath("main.py").unlink()
    copy_app(source, app)
    assert [file.name for file in app.iterdir()] == ["lib"]
    with pytest.raises(SystemExit, match=r"^error: .*new: .*another"):
        copy_app(source, tmp_path / "new")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"a_seg/models/model.pt": b"others"},
            "1 file(s) not as in SHA256SUMS, such as a_seg/models/model.pt; download",
        ),
        ({"a_seg/models/model.pt": None}, "1 file(s) not as in SHA256SUMS, such as a_seg/models/model.pt"),
        ({"a_seg/more.py": b""}, "1 file(s) not as in SHA256SUMS, such as a_seg/more.py"),
        ({"a_seg/SHA256SUMS": None}, "no SHA256SUMS in it"),
        ({"a_seg/SHA256SUMS": b"nonsense"}, "3 file(s) not as in SHA256SUMS, such as a_seg/"),
        ({"../victim": b""}, "../victim lies outside of one folder"),
        ({"a_seg/../../victim": b""}, "a_seg/../../victim lies outside of one folder"),
        ({"/victim": b""}, "/victim lies outside of one folder"),
        ({"a_seg/..\\victim": b""}, "lies outside of one folder"),
        ({"b_seg/victim": b""}, "b_seg/victim lies outside of one folder"),
        ({"victim": b""}, "victim lies outside of one folder"),
    ],
)
def test_other_zips_are_refused(changes: dict[str, bytes | None], said: str, archive: Path, tmp_path: Path) -> None:
    rewritten(archive, changes)
    with pytest.raises(SystemExit) as caught:
        install(str(archive), tmp_path / "app")
    assert str(caught.value).startswith(f"error: {archive}: ") and said in str(caught.value)
    assert not (tmp_path / "app").exists()


@pytest.mark.parametrize("content", [None, b"no zip"])
def test_what_is_no_zip_is_refused(content: bytes | None, tmp_path: Path) -> None:
    file = tmp_path / "a_seg.zip"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(SystemExit, match=r"error: .*a_seg\.zip: "):
        install(str(file), tmp_path / "app")


def test_script_refuses_in_one_line(archive: Path, tmp_path: Path) -> None:
    rewritten(archive, {"a_seg/more.py": b""})
    script = Path(sys.modules[install.__module__].__file__ or "")
    (tmp_path / "app" / "model").mkdir(parents=True)
    words = [sys.executable, str(script), "--app", str(tmp_path / "app"), "--studies", str(tmp_path), str(archive)]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
    assert "not as in SHA256SUMS, such as a_seg/more.py" in done.stderr
