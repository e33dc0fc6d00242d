"""Scale intensities to [0, 1] by modality."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.transforms import MapTransform, ScaleIntensityRange
from monai.utils import convert_to_dst_type, convert_to_numpy
from scipy import ndimage

from shared_networks.datasets.validate import otsu_threshold
from shared_networks.errors import InputError

PERCENTILES = (0.5, 99.5)
"""Of an MR's foreground, that become 0 and 1: MR has no unit."""

_DARKEST = 1 / 1024  # what is in the body stays above background, however dark: `image > 0` is foreground everywhere
_SAMPLE = 1 << 20


class ScaleByModalityd(MapTransform):
    """Scale images [C, H, W, D] to [0, 1].

    CT: Hounsfield units by a window, as MONAI's `ScaleIntensityRanged` with clipping. MR: each channel by
    :data:`PERCENTILES` of its foreground; outside of :func:`body_mask` it becomes 0.

    Args:
        keys: of images.
        modality: `"MR"`; all else is scaled as CT.
        intensity_range: HU that become 0 and 1.
    """

    def __init__(self, keys: KeysCollection, modality: str | None, intensity_range: Sequence[float]) -> None:
        super().__init__(keys)
        self.modality = modality
        low, high = intensity_range
        self.by_window = ScaleIntensityRange(low, high, 0.0, 1.0, clip=True)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Scale.

        Raises:
            InputError: an MR has no foreground.
        """
        out = dict(data)
        for key in self.key_iterator(out):
            out[key] = self.scale_mr(out[key]) if self.modality == "MR" else self.by_window(out[key])
        return out

    def scale_mr(self, image: Any) -> Any:
        """Scale an MR [C, H, W, D]; see the class."""
        values = convert_to_numpy(image).astype(np.float32, copy=False)
        body = body_mask(values)
        if not body.any():
            raise InputError("no foreground: all voxels of the MR are alike")
        scaled = np.zeros_like(values)
        for channel, result in zip(values, scaled, strict=True):
            inside = channel[body]
            low, high = np.percentile(inside[:: max(1, inside.size // _SAMPLE)], PERCENTILES)
            result[body] = np.clip((inside - low) / max(high - low, 1e-6), _DARKEST, 1.0)
        return convert_to_dst_type(torch.from_numpy(scaled), image)[0]


def body_mask(values: np.ndarray) -> np.ndarray:
    """Tell the body from the air around it in an MR.

    Otsu's threshold is taken of the logarithm: noise in air and dark tissue are both far below bright fat. Pieces
    smaller than a hundredth of the largest are noise; what the body encloses in a slice of any axis belongs to it.

    Args:
        values: [C, H, W, D], of any scale; the air is dark.

    Returns:
        [H, W, D] bool.
    """
    smooth = ndimage.uniform_filter(values.max(axis=0), 3)
    levels = np.log1p(np.clip(smooth - smooth.min(), 0, None) * (1000 / max(float(np.ptp(smooth)), 1e-6)))
    if np.ptp(levels) == 0:
        return np.zeros(levels.shape, bool)
    mask = levels > otsu_threshold(levels.ravel()[:: max(1, levels.size // _SAMPLE)])
    pieces, count = ndimage.label(mask)
    sizes = np.bincount(pieces.ravel(), minlength=count + 1)
    sizes[0] = 0
    mask = (sizes >= max(sizes.max() / 100, 1))[pieces]
    for axis in range(3):
        for index in range(mask.shape[axis]):
            plane = (slice(None),) * axis + (index,)
            mask[plane] = ndimage.binary_fill_holes(mask[plane])
    return ndimage.binary_erosion(mask, border_value=1)  # smoothing has moved its edge outwards
