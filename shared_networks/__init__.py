"""Build, train and run Hi-End-MAE: what the three bundles share."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from shared_networks.version import __version__

if TYPE_CHECKING:
    from shared_networks.doors.segment import segment
    from shared_networks.networks.checkpoints import load_hi_end_mae_10k
    from shared_networks.networks.hi_end_mae import HiEndMAE
    from shared_networks.networks.unetr import HiEndUNETR

__all__ = ["HiEndMAE", "HiEndUNETR", "__version__", "load_hi_end_mae_10k", "segment"]

_ROOMS = {
    "HiEndMAE": "networks.hi_end_mae",
    "HiEndUNETR": "networks.unetr",
    "load_hi_end_mae_10k": "networks.checkpoints",
    "segment": "doors.segment",
}


def __getattr__(name: str) -> Any:
    # Imported when first used: PyTorch and MONAI take seconds, and a build of the wheel has neither.
    if name not in _ROOMS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_ROOMS[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_ROOMS})
