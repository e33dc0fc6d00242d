"""Build, train and run Hi-End-MAE: what the three bundles share."""

from shared_networks.networks.checkpoints import load_hi_end_mae_10k
from shared_networks.networks.hi_end_mae import HiEndMAE
from shared_networks.networks.unetr import HiEndUNETR
from shared_networks.version import __version__

__all__ = ["HiEndMAE", "HiEndUNETR", "__version__", "load_hi_end_mae_10k"]
