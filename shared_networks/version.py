"""The version of the package, and the check that a bundle and the package that runs are of one release."""

from __future__ import annotations

from pathlib import Path

from shared_networks.errors import InputError

__version__ = "0.1.0"

_VERSION = Path("shared_networks") / "version.py"


def check_copy(bundle_root: str | Path) -> None:
    """Refuse a bundle whose own copy of this package is of another version than the one that runs.

    MONAI Label serves all its bundles from one process, in which the first one's copy is everyone's.

    Args:
        bundle_root: the bundle's folder; without a copy in it, as in the repository, there is nothing to compare.

    Raises:
        InputError: the versions differ.
    """
    own, running = Path(str(bundle_root)).absolute() / _VERSION, Path(__file__).with_name(_VERSION.name)
    if own.is_file() and own.read_bytes() != running.read_bytes():
        raise InputError(
            f"{own}: another version than {running}, which is loaded already; "
            "give all Hi-End-MAE bundles of a server the same release"
        )
