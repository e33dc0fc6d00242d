from __future__ import annotations

from pathlib import Path

import pytest

from shared_networks import files
from shared_networks.errors import InputError
from shared_networks.files import check_output_folder


def test_an_output_folder_that_cannot_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="file is not a folder; give another --output_dir"):
        check_output_folder(tmp_path / "file" / "out")
    check_output_folder(tmp_path / "new" / "out")
    assert not (tmp_path / "new").exists()
    monkeypatch.setattr(files.os, "access", lambda *_: False)  # root may write anywhere
    with pytest.raises(InputError, match="is read-only; give another --ckpt_dir"):
        check_output_folder(tmp_path / "out", "ckpt_dir")
