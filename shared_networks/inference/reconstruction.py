"""Turn a pre-training prediction into volumes in the scan's intensities."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from monai.config import KeysCollection
from monai.transforms import MapTransform
from monai.utils import convert_to_dst_type, convert_to_numpy, convert_to_tensor, ensure_tuple_rep

from shared_networks.datasets.pairs import source_file
from shared_networks.errors import not_finite
from shared_networks.files import atomic_write
from shared_networks.inference.save import label_image
from shared_networks.networks.hi_end_mae import restore_intensities


class RestoreReconstructiond(MapTransform):
    """Split a prediction into `reconstruction` and `mask`, both on the image's grid.

    Masked patches show the prediction, given the mean and standard deviation of the true patch (a viewer must be told);
    visible patches show the image.

    Args:
        keys: key of the prediction [C + 1, H, W, D] of :class:`HiEndMAE`, sizes a multiple of the patch.
        patch_size: patch size in voxels, one number or (p_h, p_w, p_d), as in the network.
        image_key: key of the image [C, H, W, D] that was reconstructed.

    Returns:
        The data with `reconstruction` [C, H, W, D] in the image's intensities and `mask` [1, H, W, D], 1 = masked.

    Raises:
        InputError: on call, if the prediction is not finite.
        ValueError: on call, if the image does not divide into patches.
    """

    def __init__(self, keys: KeysCollection, patch_size: Sequence[int] | int, image_key: str = "image") -> None:
        super().__init__(keys)
        self.patch_size = ensure_tuple_rep(patch_size, 3)
        self.image_key = image_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Add `reconstruction` and `mask`."""
        out = dict(data)
        image = out[self.image_key]
        for key in self.key_iterator(out):
            output = convert_to_tensor(out[key])  # its own metadata, if any, must not outdo the image's
            if not output.isfinite().all():
                raise not_finite(f"{source_file(image)}: the reconstruction")
            prediction, mask = output[:-1], output[-1:]
            restored = restore_intensities(prediction[None], image[None], self.patch_size)[0]
            out["reconstruction"] = convert_to_dst_type(image + (restored - image) * mask, image)[0]
            out["mask"] = convert_to_dst_type(mask, image)[0]
        return out


class SaveReconstructiond(MapTransform):
    """Write a reconstruction, its mask and its picture, and return the data as they came.

    `{name}_reconstruction.nii.gz` is int16 with the grid, unit and codes of the scan's file; several channels are along
    a fourth axis. `{name}_mask.nii.gz` is uint8, 1 where the network did not see the scan. `{name}_reconstruction.png`
    is the figure. All are made before the first is written.

    Args:
        keys: key of the reconstruction [C, X, Y, Z] on the scan's own grid, in the unit of the file.
        mask_key: key of the mask [1, X, Y, Z] on the same grid.
        figure_key: key of the matplotlib figure.
        output_dir: folder of the files, created if need be.

    Raises:
        InputError: on call, if a file cannot be written.
    """

    def __init__(
        self,
        keys: str = "reconstruction",
        mask_key: str = "mask",
        figure_key: str = "figure",
        *,
        output_dir: str | Path,
    ) -> None:
        super().__init__(keys)
        self.mask_key, self.figure_key = mask_key, figure_key
        self.output_dir = Path(output_dir)

    def __call__(self, data: Mapping[Hashable, Any]) -> Mapping[Hashable, Any]:
        """Write the files of one decollated case of :class:`shared_networks.inference.predict.Scans`."""
        name, scan = data["name"], data["scan"]
        affine, file = convert_to_numpy(scan.affine), source_file(scan)
        volume, mask = (np.rint(convert_to_numpy(data[key])) for key in (self.keys[0], self.mask_key))
        values = volume[0] if len(volume) == 1 else np.moveaxis(volume, 0, -1)
        images = {
            "reconstruction": label_image(values.astype(np.int16), affine, file, "reconstruction"),
            "mask": label_image(mask[0].astype(np.uint8), affine, file, "1 = masked"),
        }
        for kind, image in images.items():
            with atomic_write(self.output_dir / f"{name}_{kind}.nii.gz") as part:
                nib.save(image, part)
        with atomic_write(self.output_dir / f"{name}_reconstruction.png") as part:
            data[self.figure_key].savefig(part, bbox_inches="tight")
        return data
