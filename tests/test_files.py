from __future__ import annotations

from pathlib import Path

import pytest

from shared_networks import files
from shared_networks.errors import InputError
from shared_networks.files import check_beginning, check_output_folder


def test_an_output_folder_that_cannot_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="file is not a folder; give another --output_dir"):
        check_output_folder(tmp_path / "file" / "out")
    check_output_folder(tmp_path / "new" / "out")
    assert not (tmp_path / "new").exists()
    monkeypatch.setattr(files.os, "access", lambda *_: False)  # root may write anywhere
    with pytest.raises(InputError, match="is read-only; give another --ckpt_dir"):
        check_output_folder(tmp_path / "out", "ckpt_dir")


def test_a_table_of_someone_else_is_not_replaced(tmp_path: Path) -> None:
    check_beginning(table := tmp_path / "table.csv", "rank,case")
    table.write_text("rank,case\n1,a\n")
    check_beginning(table, "rank,case")
    with pytest.raises(InputError, match=r"table.csv: does not begin with val_masked_mse, .*give another --output_dir"):
        check_beginning(table, "val_masked_mse")
    with pytest.raises(InputError, match="does not begin with"):
        check_beginning(tmp_path, "rank")
