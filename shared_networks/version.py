"""The version of the package, what of a bundle is released, and the check that both are of one release."""

from __future__ import annotations

from pathlib import Path

from shared_networks.errors import InputError

__version__ = "0.1.0"

RELEASED_FILES = ("LICENSE", "large_files.yml", "configs/[!.]*", "docs/[!.]*", "weights/[!.]*")
"""What of a bundle's folder is in zips and in the wheel, beside weights that are given."""


def bundle_names(root: Path) -> list[str]:
    """Return the names of the bundles in a folder, such as a source tree.

    Raises:
        InputError: it has none.
    """
    names = sorted(file.parts[-3] for file in root.glob("*/configs/metadata.json"))
    if not names:
        raise InputError(f"{root}: no bundles beside shared_networks; run in a clone of the repository")
    return names


def check_copy(bundle_root: str | Path) -> None:
    """Refuse a bundle whose own copy of this package is not the one that runs, byte for byte.

    MONAI Label serves all its bundles from one process, in which the first one's copy is everyone's.

    Args:
        bundle_root: the bundle's folder; without a copy in it, as in the repository, there is nothing to compare.

    Raises:
        InputError: a file differs, or only one of the copies has it.
    """
    own, running = Path(str(bundle_root)).absolute() / "shared_networks", Path(__file__).parent
    if not (own / "version.py").is_file() or own.samefile(running):
        return
    copies = [{file.relative_to(root): file.read_bytes() for file in root.rglob("*.py")} for root in (own, running)]
    differing = sorted(file for file in {**copies[0], **copies[1]} if copies[0].get(file) != copies[1].get(file))
    if differing:
        raise InputError(
            f"{own}: another version than {running}, which is loaded already: {len(differing)} file(s) differ, such as "
            f"{differing[0]}; give all Hi-End-MAE bundles of a server the same release"
        )
