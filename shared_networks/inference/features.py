"""Token features of whole scans, as arrays that know where in the patient each token lies."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from monai.config import KeysCollection
from monai.transforms import MapTransform
from monai.utils import convert_to_numpy, ensure_tuple_rep
from nibabel.affines import apply_affine, from_matvec, voxel_sizes
from torch import Tensor, nn

from shared_networks.datasets.pairs import named_case
from shared_networks.errors import InputError, not_finite
from shared_networks.files import atomic_write
from shared_networks.networks.hi_end_mae import HiEndMAE
from shared_networks.networks.unetr import HiEndUNETR, tokens_to_volume


class TokenFeatures(nn.Module):
    """The encoder of a network, handing out its tokens as volumes.

    All patches are visible. The CLS token, where the encoder has one, takes part in the attention as in pre-training
    and is then dropped.

    Args:
        network: whose `vit` is read.
    """

    def __init__(self, network: HiEndMAE | HiEndUNETR) -> None:
        super().__init__()
        self.vit = network.vit

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        """Encode an image.

        Args:
            image: [B, C, H, W, D], sizes a multiple of the patch size.

        Returns:
            `block_N`, the tokens after the encoder block with zero-based index N, before any final norm, and
            `latent`, the normalised last tokens; each [B, E, h, w, d] in float32.

        Raises:
            ValueError: if the image does not divide into patches.
        """
        grid = self.vit.patch_grid(image)
        latent, features = self.vit(image)
        named = {f"block_{n}": tokens for n, tokens in zip(self.vit.out_indices, features, strict=True)}
        layers = {**named, "latent": latent}
        first = 0 if self.vit.cls_token is None else 1
        return {name: tokens_to_volume(tokens[:, first:], grid).float() for name, tokens in layers.items()}


def token_affine(affine: np.ndarray, patch_size: Sequence[int]) -> np.ndarray:
    """Return the affine [4, 4] from indices (h, w, d) of tokens to the millimetres of their patches' centres.

    Args:
        affine: [4, 4], from voxel indices of the image that was cut into patches to RAS millimetres.
        patch_size: (p_h, p_w, p_d).
    """
    size = np.asarray(patch_size, dtype=float)  # of integers nibabel would make an integer affine
    return affine @ from_matvec(np.diag(size), (size - 1) / 2)


def centres_inside(
    affine: np.ndarray, grid: Sequence[int], scan_affine: np.ndarray, shape: Sequence[int]
) -> np.ndarray:
    """Return which tokens [h, w, d] have their patch's centre in the scan; the others are mostly padding.

    Args:
        affine: [4, 4] of :func:`token_affine`.
        grid: tokens along (h, w, d).
        scan_affine: [4, 4] of the scan's file, from voxel indices to RAS millimetres.
        shape: (X, Y, Z) of the scan's file.
    """
    centres = apply_affine(np.linalg.inv(scan_affine) @ affine, np.moveaxis(np.indices(grid), 0, -1))
    return ((centres >= -0.5) & (centres <= np.asarray(shape) - 0.5)).all(axis=-1)


class SaveFeaturesd(MapTransform):
    """Write `{case}_features.npz`, the token features of a whole scan, and return the data as they came.

    A network sees one window at a time: windows tile the padded scan without overlap, each is encoded by itself, and
    their tokens are put side by side. So tokens attend to none beyond their window.

    The file holds no pickles (`numpy.load` reads it):

    - `block_N` and `latent`: [h, w, d, E], see :class:`TokenFeatures`;
    - `affine`: [4, 4] float64, from token indices (h, w, d) to RAS millimetres of the patches' centres;
    - `inside`: [h, w, d] bool, false where the patch's centre is padding beyond the scan;
    - `patch_size`: (p_h, p_w, p_d) in voxels, and `spacing`: millimetres a voxel along them.

    Args:
        keys: key of the features, a dict of [E, h, w, d].
        patch_size: patch size in voxels, one number or (p_h, p_w, p_d), as in the network.
        output_dir: folder of the files, created if need be.
        dtype: `float16` or `float32`, of the features in the file.
        image_key: key of the image [C, H, W, D] that was encoded, whose file names the case, unless `name` does.

    Raises:
        InputError: for another dtype; on call, if a feature is not finite, or too large for float16.
        ValueError: on call, if the image does not know its file.

    Example:
        >>> with numpy.load("ct_001_features.npz") as file:  # doctest: +SKIP
        ...     latent, affine = file["latent"], file["affine"]
        >>> centre_in_mm = affine @ [2, 3, 4, 1]  # of the patch behind latent[2, 3, 4]  # doctest: +SKIP
    """

    def __init__(
        self,
        keys: KeysCollection,
        patch_size: Sequence[int] | int,
        output_dir: str | Path,
        dtype: str = "float16",
        image_key: str = "image",
    ) -> None:
        super().__init__(keys)
        if dtype not in ("float16", "float32"):
            raise InputError(f"feature_dtype is {dtype!r}: give float16 or float32")
        self.patch_size = ensure_tuple_rep(patch_size, 3)
        self.output_dir = Path(output_dir)
        self.dtype = np.dtype(dtype)
        self.image_key = image_key

    def __call__(self, data: Mapping[Hashable, Any]) -> Mapping[Hashable, Any]:
        """Write the file of one decollated case."""
        image = data[self.image_key]
        case = named_case(data, self.image_key)
        features = {name: convert_to_numpy(volume) for key in self.keys for name, volume in data[key].items()}
        for name, volume in features.items():
            if not np.isfinite(volume).all():
                raise not_finite(f"{case}: {name}")
            if (largest := float(np.abs(volume).max())) > float(np.finfo(self.dtype).max):
                raise InputError(
                    f"{case}: {name} reaches {largest:g}, beyond {self.dtype}: give --feature_dtype float32"
                )
        affine = token_affine(convert_to_numpy(image.affine), self.patch_size)
        grid = next(iter(features.values())).shape[1:]
        scan_affine, shape = (convert_to_numpy(image.meta[key]) for key in ("original_affine", "spatial_shape"))
        with atomic_write(self.output_dir / f"{case}_features.npz") as part:
            np.savez(
                part,
                affine=affine,
                inside=centres_inside(affine, grid, scan_affine, shape),
                patch_size=np.array(self.patch_size),
                spacing=voxel_sizes(convert_to_numpy(image.affine)),
                **{name: np.moveaxis(volume, 0, -1).astype(self.dtype) for name, volume in features.items()},
            )
        return data
