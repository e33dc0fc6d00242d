"""The table of tissues: written and read alike, and refused by name where it is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shared_networks.errors import InputError
from shared_networks.synthetic.tissue_table import (
    SOFT,
    count_tissues,
    phantom_tissues,
    read_tissue_table,
    table_content,
)
from shared_networks.synthetic.tissues import TISSUE_ID, TISSUES

AIR = {"name": "air", "hu": -1000, "texture": 0, "spread": 0, "variation": 0}


def write(folder: Path, content: Any) -> Path:
    file = folder / "tissues.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    return file


def test_the_phantoms_table_is_written_and_read_alike(tmp_path: Path) -> None:
    ours = phantom_tissues()
    read = read_tissue_table(write(tmp_path, table_content(ours)))
    assert read.names == ours.names == tuple(TISSUES) and read.source == str(tmp_path / "tissues.json")
    assert read.hu.shape == (len(TISSUES), 4) and count_tissues(tmp_path / "tissues.json") == len(TISSUES)
    for name in ("hu", *SOFT):
        np.testing.assert_allclose(getattr(read, name), getattr(ours, name), atol=0.01)
    assert read.hu[TISSUE_ID["liver"]].tolist() == [56, 68, 108, 92]


def test_air_is_sure_and_the_content_of_bowel_is_not() -> None:
    table = phantom_tissues()
    spread = dict(zip(table.names, table.spread.tolist(), strict=True))
    assert spread["air"] == 0 and table.variation[TISSUE_ID["air"]] == 0
    assert 10 <= spread["liver"] <= 20 and spread["stool"] > 2 * spread["spleen"] and spread["bile"] < 10


def test_what_is_left_out_is_soft_tissue_in_all_phases(tmp_path: Path) -> None:
    rows = [AIR, {"name": "liver", "hu": [56, 108]}, {"name": "cyst", "hu": 5, "spread": 3}]
    table = read_tissue_table(write(tmp_path, {"tissues": rows}))
    np.testing.assert_array_equal(table.hu, [[-1000, -1000], [56, 108], [5, 5]])
    np.testing.assert_array_equal(table.spread, [0, SOFT["spread"], 3])
    np.testing.assert_array_equal(table.texture, [0, SOFT["texture"], SOFT["texture"]])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not readable as JSON"),
        ([AIR], r"'tissues' is None; give a list of 1 to 256 tissues"),
        ({"tissues": []}, r"'tissues' has 0 entries"),
        ({"tissues": [AIR] * 257}, r"'tissues' has 257 entries"),
        ({"tissues": [AIR, "liver"]}, r"tissue 1 is 'liver'; give such as"),
        ({"tissues": [{"hu": 5}]}, r"tissue 0 is \{'hu': 5\}"),
        ({"tissues": [{**AIR, "HU": 5}]}, r"tissue 0: 'HU' is unknown"),
        ({"tissues": [{"name": "liver"}]}, r"tissue 0: 'hu' of 'liver' is None; give a number"),
        ({"tissues": [{"name": "liver", "hu": []}]}, r"'hu' of 'liver' is \[\]"),
        ({"tissues": [{"name": "liver", "hu": [5, "6"]}]}, r"'hu' of 'liver' is \[5, '6'\]"),
        ({"tissues": [{"name": "liver", "hu": True}]}, r"'hu' of 'liver' is True"),
        ('{"tissues": [{"name": "liver", "hu": NaN}]}', r"'hu' of 'liver' is nan"),
        (
            {"tissues": [{"name": "liver", "hu": 5, "texture": -1}]},
            r"'texture' of 'liver' is -1; give HU of at least 0",
        ),
        ({"tissues": [{"name": "liver", "hu": 5, "spread": "wide"}]}, r"'spread' of 'liver' is 'wide'"),
        ({"tissues": [AIR, {"name": "a", "hu": [1, 2]}, {"name": "b", "hu": [1, 2, 3]}]}, r"2 values .* 3 in another"),
        ({"tissues": [AIR, AIR]}, r"air stand\(s\) for several tissues"),
    ],
)
def test_a_bad_table_is_refused_with_file_and_value(tmp_path: Path, content: Any, message: str) -> None:
    file = write(tmp_path, content)
    with pytest.raises(InputError, match=message) as caught:
        read_tissue_table(file)
    assert str(caught.value).startswith(f"{file}: ") and "\n" not in str(caught.value)


def test_a_missing_table_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none.json: no such file; .*docs/data.md"):
        read_tissue_table(tmp_path / "none.json")
