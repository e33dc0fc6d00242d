"""Tell tissue maps, from which training draws CTs, from scans."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from shared_networks.errors import InputError
from shared_networks.files import read_json

TISSUE_CHANNEL = "tissue map"
"""What `dataset.json` calls the first channel of a folder of tissue maps."""


_DRAW = "to train or to evaluate on CTs drawn from it, add configs/synthetic.json to --config_file"


def refuse_tissue_maps(images: Iterable[str], advice: str = _DRAW) -> None:
    """Refuse images whose data set says that they are tissue maps.

    Args:
        images: files of an nnU-Net folder; others are passed over.
        advice: what to do, where no CT could be drawn from them.

    Raises:
        InputError: `dataset.json` in a folder names the first channel :data:`TISSUE_CHANNEL`.
    """
    for file in dict.fromkeys(Path(image).parent.parent / "dataset.json" for image in images):
        content = read_json(file) if file.is_file() else None
        channels = content.get("channel_names") if isinstance(content, dict) else None
        if isinstance(channels, dict) and channels.get("0") == TISSUE_CHANNEL:
            raise InputError(f"{file}: channel 0 is {TISSUE_CHANNEL!r}, no scan; {advice}")


def tissue_problems(values: np.ndarray, num_tissues: int) -> list[str]:
    """Return what is wrong with the voxels of a tissue map of any shape: no whole numbers, or not in the table.

    Args:
        values: of the map.
        num_tissues: in the table, so that indices are 0 to `num_tissues - 1`.
    """
    if values.dtype.kind == "f" and len(fractions := values[values != np.rint(values)]):
        return [f"no tissue map, as it holds {fractions[0]:g}; leave out configs/synthetic.json to train on scans"]
    outside = np.unique(values[(values < 0) | (values >= num_tissues)])
    if not len(outside):
        return []
    listed = ", ".join(f"{value:g}" for value in outside[:5]) + (", ..." if len(outside) > 5 else "")
    return [
        f"tissues {listed} are not in the table, which has {num_tissues}, 0 to {num_tissues - 1}; give another "
        "--tissue_table, or leave out configs/synthetic.json to train on scans"
    ]
