"""Draw a scan beside its masked input and its reconstruction."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ignite.engine import Engine
from matplotlib.figure import Figure
from monai.engines import IterationEvents
from monai.transforms import MapTransform
from monai.utils import convert_to_numpy, ensure_tuple_rep
from torch.utils.tensorboard import SummaryWriter

from shared_networks.datasets.pairs import named_case
from shared_networks.figures.planes import (
    add_caption,
    add_title,
    draw_panels,
    orthogonal_planes,
    require_same_grid,
    shown_channel,
)
from shared_networks.networks.hi_end_mae import restore_intensities


def reconstruction_figure(
    original: np.ndarray, masked: np.ndarray, reconstruction: np.ndarray, affine: np.ndarray, title: str = ""
) -> Figure:
    """Draw three planes of a scan beside its masked input and its reconstruction.

    Args:
        original: `[X, Y, Z]`, in [0, 1].
        masked: `[X, Y, Z]`, in [0, 1], NaN where masked.
        reconstruction: `[X, Y, Z]`, in [0, 1], its masked patches put back with the true patches' mean and deviation.
        affine: `[4, 4]`, from voxel indices to RAS millimetres.
        title: heading of the figure, such as the name of the case.
    """
    columns = {"original": original, "masked input": masked, "reconstruction": reconstruction}
    grid = list(zip(*(orthogonal_planes(volume, affine) for volume in columns.values()), strict=True))
    names = [row[0].name for row in grid]
    figure, _ = draw_panels(grid, names, list(columns), (0.0, 1.0), (0.3, 0.1, 0.5, 0.4), "nearest")
    add_title(figure, title)
    add_caption(
        figure,
        "Means and standard deviations of masked patches come from the truth; only the pattern within is predicted.",
    )
    return figure


class DrawReconstructiond(MapTransform):
    """Draw a scan beside its reconstruction, of several channels the first, and return the data with `figure`.

    Args:
        keys: key of the reconstruction `[C, X, Y, Z]` in [0, 1].
        image_key: key of the scan `[C, X, Y, Z]` in [0, 1], whose file names the case.
        mask_key: key of the mask `[1, X, Y, Z]`, true where the network did not see the scan.

    Raises:
        ValueError: on call, if the grids differ or the image does not know its file.
    """

    def __init__(self, keys: str = "reconstruction", image_key: str = "image", mask_key: str = "mask") -> None:
        super().__init__(keys)
        self.image_key = image_key
        self.mask_key = mask_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Draw one decollated case."""
        keys = (self.image_key, self.mask_key, self.keys[0])
        image = data[self.image_key]
        title = shown_channel(named_case(data, self.image_key), len(image))
        require_same_grid(data, keys)
        original, mask, reconstruction = (convert_to_numpy(data[key][0]) for key in keys)
        masked = np.where(mask, np.nan, original)
        affine = convert_to_numpy(image.affine)
        return {**data, "figure": reconstruction_figure(original, masked, reconstruction, affine, title)}


class ReconstructionPanel:
    """Write a picture of the first validation crop for TensorBoard: the crop, what was seen of it, what was rebuilt.

    Args:
        log_dir: folder of TensorBoard's files.
        patch_size: patch size in voxels, one number or (p_h, p_w, p_d).
        spacing: voxel size in mm.
    """

    def __init__(self, log_dir: str | Path, patch_size: Sequence[int] | int, spacing: Sequence[float]) -> None:
        self.log_dir = log_dir
        self.patch_size = ensure_tuple_rep(patch_size, 3)
        self.affine = np.diag([*spacing, 1.0])

    def attach(self, engine: Engine) -> None:
        """Attach to an evaluator that does not decollate."""
        engine.add_event_handler(IterationEvents.MODEL_COMPLETED, self)

    def __call__(self, engine: Any) -> None:
        """Draw the first batch of a validation."""
        if engine.state.rank != 0 or engine.state.iteration != 1:
            return
        image, output = (engine.state.output[key][:1].float().cpu() for key in ("image", "pred"))
        mask = output[:, -1:]
        restored = image + (restore_intensities(output[:, :-1], image, self.patch_size) - image) * mask
        scan, mask_plane, rebuilt = (np.asarray(volume[0, 0]) for volume in (image, mask, restored))
        masked = np.where(mask_plane > 0, np.nan, scan)
        title = shown_channel(f"epoch {engine.state.epoch}", image.shape[1])
        figure = reconstruction_figure(scan, masked, rebuilt, self.affine, title)
        with SummaryWriter(str(self.log_dir)) as writer:
            writer.add_figure("reconstruction", figure, engine.state.epoch)
