"""Read and write the table that gives the indices of a tissue map their Hounsfield units.

A table is a JSON file, `tissues.json`, with the tissues in order of index:

    {"phases": ["without contrast", "portal venous"],
     "tissues": [{"name": "air", "hu": -1000, "texture": 0, "spread": 0, "variation": 0},
                 {"name": "liver", "hu": [56, 108], "texture": 6}]}
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from shared_networks.errors import InputError
from shared_networks.files import read_json
from shared_networks.synthetic.tissues import TISSUES

TABLE_FILE = "tissues.json"
"""Name of the table in a folder of tissue maps."""
PHASES = ("without contrast", "late arterial", "portal venous", "delayed")
SOFT = {"texture": 6.0, "spread": 10.0, "variation": 4.0}
"""Of a tissue that a file says nothing else of, in HU."""

# Spread and variation in HU where the rule of `phantom_tissues` does not fit.
_KNOWN = {
    "fat": (7, 2),
    "liver": (18, 4),
    "bile": (7, 2),
    "urine": (6, 2),
    "cyst": (7, 2),
    "chyme": (30, 18),
    "stool": (45, 30),
}
_MOST = 256  # indices of a uint8
_FORM = '{"name": "liver", "hu": [56, 108], "texture": 6, "spread": 10, "variation": 4}'


class TissueTable(NamedTuple):
    """Hounsfield units of tissues, by index.

    Attributes:
        names: of the tissues; the first surrounds the map.
        hu: `[tissues, phases]` float32 mean in each contrast phase, the first phase without contrast.
        texture: `[tissues]` float32 standard deviation within a few mm.
        spread: `[tissues]` float32 standard deviation of the mean between patients.
        variation: `[tissues]` float32 standard deviation over some cm.
        source: file of the table, for messages.
    """

    names: tuple[str, ...]
    hu: NDArray[np.float32]
    texture: NDArray[np.float32]
    spread: NDArray[np.float32]
    variation: NDArray[np.float32]
    source: str = "the phantom's table of tissues"


def phantom_tissues() -> TissueTable:
    """Return the table of the phantom's tissues; a tissue of rough texture also differs more between patients."""
    rows = np.array(list(TISSUES.values()), np.float32)
    texture = rows[:, -1]
    spread, variation = (8 + 0.7 * texture) * (texture > 0), (3 + 0.25 * texture) * (texture > 0)
    for index, name in enumerate(TISSUES):
        if name in _KNOWN:
            spread[index], variation[index] = _KNOWN[name]
    return TissueTable(tuple(TISSUES), rows[:, :-1], texture, spread, variation)


def table_content(table: TissueTable) -> dict[str, Any]:
    """Return a table as the content of its file."""
    columns = {name: getattr(table, name).tolist() for name in ("hu", *SOFT)}
    rows = [dict(zip(columns, map(_rounded, row), strict=True)) for row in zip(*columns.values(), strict=True)]
    return {
        "phases": list(PHASES),
        "tissues": [{"name": name, **row} for name, row in zip(table.names, rows, strict=True)],
    }


def read_tissue_table(file: str | Path) -> TissueTable:
    """Read a table of tissues.

    Args:
        file: JSON with `tissues`, a list of `{"name": ..., "hu": ...}` in order of index. `hu` is a number, or one a
            phase, the same count for all. `texture`, `spread` and `variation` are :data:`SOFT` where left out.

    Raises:
        InputError: the file cannot be read, or an entry is no tissue.
    """
    if not Path(file).is_file():
        raise InputError(
            f"{file}: no such file; tissue maps need a table of their indices: see 'Tissue maps' in docs/data.md"
        )
    content = read_json(file)
    rows = content.get("tissues") if isinstance(content, dict) else None
    if not isinstance(rows, list) or not 0 < len(rows) <= _MOST:
        shown = f"has {len(rows)} entries" if isinstance(rows, list) else f"is {rows!r}"
        raise InputError(f"{file}: 'tissues' {shown}; give a list of 1 to {_MOST} tissues, such as {_FORM}")
    tissues = [_tissue(row, f"{file}: tissue {index}") for index, row in enumerate(rows)]
    counts = sorted({len(tissue["hu"]) for tissue in tissues} - {1}) or [1]
    if len(counts) > 1:
        raise InputError(
            f"{file}: 'hu' has {counts[0]} values in one tissue and {counts[1]} in another; give one a phase"
        )
    names = [tissue["name"] for tissue in tissues]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise InputError(f"{file}: {', '.join(twice)} stand(s) for several tissues; give each its own name")
    hu = np.array([tissue["hu"] * (counts[0] // len(tissue["hu"])) for tissue in tissues], np.float32)
    columns = {key: np.array([tissue[key] for tissue in tissues], np.float32) for key in SOFT}
    return TissueTable(tuple(names), hu, **columns, source=str(file))


def count_tissues(file: str | Path) -> int:
    """Return the number of tissues in a table. InputError as :func:`read_tissue_table`."""
    return len(read_tissue_table(file).names)


def _tissue(row: Any, where: str) -> dict[str, Any]:
    if not isinstance(row, dict) or not isinstance(row.get("name"), str):
        raise InputError(f"{where} is {row!r}; give such as {_FORM}")
    if unknown := sorted(row.keys() - {"name", "hu", *SOFT}):
        raise InputError(f"{where}: {unknown[0]!r} is unknown; give such as {_FORM}")
    hu = row.get("hu")
    values = hu if isinstance(hu, list) else [hu]
    if not values or not all(map(_is_number, values)):
        raise InputError(f"{where}: 'hu' of {row['name']!r} is {hu!r}; give a number, or a list with one a phase")
    widths = {key: row.get(key, default) for key, default in SOFT.items()}
    for key, value in widths.items():
        if not _is_number(value) or value < 0:
            raise InputError(f"{where}: {key!r} of {row['name']!r} is {value!r}; give HU of at least 0")
    return {"name": row["name"], "hu": values, **widths}


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _rounded(value: Any) -> Any:
    return [_rounded(item) for item in value] if isinstance(value, list) else round(value, 2)
