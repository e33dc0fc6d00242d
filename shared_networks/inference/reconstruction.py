"""Turn a pre-training prediction into volumes in the scan's intensities."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

from monai.config import KeysCollection
from monai.transforms import MapTransform
from monai.utils import convert_to_dst_type, convert_to_tensor, ensure_tuple_rep

from shared_networks.datasets.pairs import source_file
from shared_networks.errors import not_finite
from shared_networks.networks.hi_end_mae import restore_intensities


def named(meta: Mapping[str, Any], _saver: Any) -> dict[str, Any]:
    """Name a file by its case, as :class:`monai.transforms.SaveImage` asks for its `output_name_formatter`.

    MONAI cuts a suffix off, which of a name with dots alone would be a part of it.
    """
    return {"subject": f"{meta['name']}.nii.gz", "idx": None}


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
