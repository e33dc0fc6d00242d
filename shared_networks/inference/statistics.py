"""Measure the organs of a label map, and name what deserves a look."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from nibabel.affines import apply_affine
from nibabel.orientations import io_orientation
from scipy import ndimage

from shared_networks.datasets.labels import sided_pairs
from shared_networks.datasets.organs import canonical_name
from shared_networks.inference.adult_volumes import ADULT_VOLUMES

Row = dict[str, Any]
_COLUMNS = ("organ", "volume_ml", "mean", "std", "pieces", "largest_piece", "touches_edge", "left_right")
"""An organ's statistics, as :func:`organ_statistics` returns them."""

SCATTERED = 0.05
"""Share of an organ's volume outside its largest piece from which the pieces are named."""

_SIDES = (("left", "right"), ("posterior", "anterior"), ("inferior", "superior"))


def organ_statistics(
    labels: np.ndarray, image: np.ndarray, affine: np.ndarray, label_names: Sequence[str]
) -> list[Row]:
    """Measure every label but the background.

    Args:
        labels: [X, Y, Z] integers.
        image: [X, Y, Z] intensities on the same grid, in HU for CT, of the first channel.
        affine: [4, 4], from voxels to RAS millimetres.
        label_names: names in order of label value, background first.

    Returns:
        A row a label, in order of value:

        - `organ`, its name;
        - `volume_ml`;
        - `mean`, `std` of its intensities, `None` where the organ was not found;
        - `pieces`, their number; voxels with a common corner touch;
        - `largest_piece`, its share of the volume;
        - `touches_edge`, sides of the patient on which the organ reaches the edge of the scan;
        - `left_right`, `plausible` or `implausible` with respect to the organ of the other side, `None` without one;
        - `adult_range_ml`, see :data:`shared_networks.inference.adult_volumes.ADULT_VOLUMES`, `None` where unknown;
        - `in_adult_range`, `None` where unknown, as for a small organ that the edge of the scan cuts off.
    """
    ml = abs(np.linalg.det(affine[:3, :3])) / 1000
    touching = ndimage.generate_binary_structure(3, 3)
    boxes = ndimage.find_objects(labels, max_label=len(label_names) - 1)
    rows, centres = [], {}
    for name, value, box in zip(label_names[1:], range(1, len(label_names)), boxes, strict=True):
        row: Row = {"organ": name, "volume_ml": 0.0, "mean": None, "std": None, "pieces": 0, "largest_piece": None}
        row |= {"touches_edge": [], "left_right": None}
        if box is not None:
            organ = labels[box] == value
            found, pieces = ndimage.label(organ, touching)
            sizes = np.bincount(found.ravel())[1:]
            values = image[box][organ].astype(np.float64)
            corner = [part.start for part in box]
            centres[value] = apply_affine(affine, ndimage.center_of_mass(organ) + np.array(corner))
            row |= {"volume_ml": round(float(sizes.sum() * ml), 3), "pieces": int(pieces)}
            row |= {"mean": round(float(values.mean()), 1), "std": round(float(values.std()), 1)}
            row |= {"largest_piece": round(float(sizes.max() / sizes.sum()), 3)}
            row |= {"touches_edge": _edges(box, labels.shape, affine)}
        rows.append(row)
    for pair in sided_pairs(label_names):
        if centres.keys() >= set(pair):
            right, left = (centres[value][0] for value in pair)
            for row in (rows[value - 1] for value in pair):
                if row["left_right"] != "implausible":
                    row["left_right"] = "plausible" if right > left else "implausible"
    return [{**row, **_against_adults(row)} for row in rows]


def _edges(box: tuple[slice, ...], shape: Sequence[int], affine: np.ndarray) -> list[str]:
    """Sides of the patient, in a fixed order, on which a box reaches the edge of the volume."""
    found = set()
    for part, size, (axis, direction) in zip(box, shape, io_orientation(affine), strict=True):
        low, high = _SIDES[int(axis)][:: int(direction)]
        found |= {side for side, there in ((low, part.start == 0), (high, part.stop == size)) if there}
    return [side for pair in _SIDES for side in pair if side in found]


def _against_adults(row: Row) -> Row:
    """Compare a volume with those of adults; of what the edge cuts off only that it is too large can be said."""
    if (known := ADULT_VOLUMES.get(canonical_name(row["organ"]))) is None:
        return {"adult_range_ml": None, "in_adult_range": None}
    low, high = known.range_ml
    inside: bool | None = low <= row["volume_ml"] <= high
    if row["volume_ml"] < low and (row["touches_edge"] or not row["pieces"]):
        inside = None
    return {"adult_range_ml": [low, high], "in_adult_range": inside}


def findings(rows: Sequence[Row]) -> list[str]:
    """Say in words what deserves a look, a line each.

    Organs whose volume is known in adults are whole organs: these are named also if they are missing or cut off.
    """
    said = []
    for row in rows:
        organ, whole = row["organ"], row["adult_range_ml"] is not None
        if whole and not row["pieces"]:
            said.append(f"{organ}: not found")
        if whole and row["touches_edge"]:
            said.append(f"{organ}: cut off by the edge of the scan ({', '.join(row['touches_edge'])})")
        if row["in_adult_range"] is False:
            low, high = row["adult_range_ml"]
            side = "below" if row["volume_ml"] < low else "above"
            said.append(f"{organ}: {row['volume_ml']:.4g} ml, {side} the range of adults, {low:g} to {high:g} ml")
        if row["pieces"] > 1 and row["largest_piece"] <= 1 - SCATTERED:
            said.append(f"{organ}: {row['pieces']} pieces, the largest has {100 * row['largest_piece']:.0f} % of it")
    for pair in sided_pairs(["", *(row["organ"] for row in rows)]):
        right, left = (rows[value - 1] for value in pair)
        if right["left_right"] == left["left_right"] == "implausible":
            said.append(f"{right['organ']} and {left['organ']}: left and right look swapped")
    return said


def statistics_table(cases: Mapping[str, Sequence[Row]], hounsfield: bool) -> list[list[Any]]:
    """Lay out the rows of `statistics.csv`, in order of case and label value; a cell is empty without a value.

    Args:
        cases: rows of :func:`organ_statistics` by case.
        hounsfield: whether intensities are in HU, so that their columns say so.
    """
    names = [f"{name}_hu" if hounsfield and name in ("mean", "std") else name for name in _COLUMNS]
    table: list[list[Any]] = [["case", *names, "adult_range_ml", "in_adult_range"]]
    for case, rows in sorted(cases.items()):
        for row in rows:
            table.append([case, *(_cell(row[name]) for name in _COLUMNS)])
            table[-1] += ["-".join(f"{ml:g}" for ml in row["adult_range_ml"] or ()), _cell(row["in_adult_range"])]
    return table


def are_complete(rows: Sequence[Row]) -> bool:
    """Return whether rows, as a record has them, have all columns of the table: an earlier version wrote fewer."""
    return all(row.keys() >= {*_COLUMNS, "adult_range_ml", "in_adult_range"} for row in rows)


def _cell(value: Any) -> Any:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return " ".join(value)
    return "" if value is None else value
