"""Read NIfTI files in transforms exactly as the checks of scans read them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from monai.config import PathLike
from monai.data import ImageReader
from monai.utils import MetaKeys, SpaceKeys, ensure_tuple

from shared_networks.data.checks import Nifti, read_nifti
from shared_networks.data.datalist import is_nifti
from shared_networks.errors import InputError


class NiftiReader(ImageReader):
    """Read NIfTI for MONAI's `LoadImaged`: what is checked is what is trained on.

    MONAI's own reader takes affines in metres for millimetres, axes of length 1 for channels, and a file without
    orientation as it lies; see :func:`shared_networks.data.checks.read_nifti`. Files of other formats are left to
    MONAI's readers.
    """

    def verify_suffix(self, filename: Sequence[PathLike] | PathLike) -> bool:
        """Return whether all files are NIfTI by their names."""
        return all(is_nifti(str(file)) for file in ensure_tuple(filename))

    def read(self, data: Sequence[PathLike] | PathLike, **_: Any) -> list[tuple[str, Nifti]]:
        """Read a file, or a file a channel.

        Raises:
            ValueError: a file is no NIfTI by its name, so that MONAI tries another reader.
        """
        if not self.verify_suffix(data):
            raise ValueError(f"{data} is no NIfTI")
        return [(str(file), read_nifti(str(file))) for file in ensure_tuple(data)]

    def get_data(self, img: Sequence[tuple[str, Nifti]]) -> tuple[np.ndarray, dict[str, Any]]:
        """Return voxels and metadata.

        Args:
            img: of :meth:`read`.

        Returns:
            `[X, Y, Z]`, or of several files `[C, X, Y, Z]`, in the type they are stored in; and affine to mm (RAS),
            shape and channel as MONAI's transforms need them.

        Raises:
            InputError: a file cannot be used.
        """
        if problems := [f"{file}: {problem}" for file, scan in img for problem in scan.problems]:
            raise InputError("\n".join(problems))
        channels = [scan.values for _, scan in img if scan.values is not None]
        grid = img[0][1].grid
        if grid is None or len({channel.shape for channel in channels}) > 1:
            raise InputError(f"{img[0][0]}: its channels have different shapes; resample them to one grid")
        values = channels[0] if len(channels) == 1 else np.stack(channels)
        affine = np.asarray(grid[1], dtype=float)
        return values.astype(values.dtype.newbyteorder("="), copy=False), {
            MetaKeys.AFFINE: affine,
            MetaKeys.ORIGINAL_AFFINE: affine.copy(),
            MetaKeys.SPATIAL_SHAPE: np.array(grid[0]),
            MetaKeys.SPACE: SpaceKeys.RAS,
            MetaKeys.ORIGINAL_CHANNEL_DIM: float("nan") if len(channels) == 1 else 0,
        }
