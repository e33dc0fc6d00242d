"""Find the bundles of an installed wheel or of a clone, and the weights that they hold."""

from __future__ import annotations

from pathlib import Path

from shared_networks.errors import InputError
from shared_networks.files import read_json
from shared_networks.version import bundle_names

SHIPPED = Path(__file__).with_name("shipped")
"""Where a wheel has the bundles."""


def bundles_folder() -> Path:
    """Return the folder that holds the bundles: within the installed package, else the clone."""
    return SHIPPED if SHIPPED.is_dir() else Path(__file__).resolve().parents[2]


def all_bundles() -> dict[str, Path]:
    """Return the folders of all bundles, by name.

    Raises:
        InputError: none is found.
    """
    folder = bundles_folder()
    return {name: folder / name for name in bundle_names(folder)}


def label_names(bundle: Path) -> list[str]:
    """Return the labels that a bundle segments, in order of value, background first; none for another kind."""
    return list(read_json(bundle / "configs" / "inference.json").get("label_names", ()))


def short_name(bundle: Path) -> str:
    """Return how a bundle of segmentation may be called: `btcv` for `hi_end_mae_btcv_seg`."""
    return bundle.name.removeprefix("hi_end_mae_").removesuffix("_seg")


def segmenters() -> dict[str, Path]:
    """Return the folders of the bundles that segment, by short name."""
    return {short_name(bundle): bundle for bundle in all_bundles().values() if label_names(bundle)}


def find_segmenter(name: str) -> Path:
    """Return the folder of a bundle that segments.

    Args:
        name: short, such as `btcv`, or the folder's, `hi_end_mae_btcv_seg`.

    Raises:
        InputError: no such bundle.
    """
    found = segmenters()
    for short, bundle in found.items():
        if str(name) in (short, bundle.name):
            return bundle
    raise InputError(f"--bundle {name}: no bundle of segmentation has this name; give {' or '.join(sorted(found))}")
