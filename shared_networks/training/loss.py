"""Compute the pre-training loss."""

from __future__ import annotations

from collections.abc import Sequence

from monai.utils import ensure_tuple_rep
from torch import Tensor, nn

from shared_networks.networks.hi_end_mae import standardise_patches
from shared_networks.networks.vit import patchify


class MaskedPatchLoss(nn.Module):
    """Mean squared error on masked patches, against voxels standardised patch by patch.

    Source: He et al., "Masked autoencoders are scalable vision learners" (norm_pix_loss); the published Hi-End-MAE
    uses it unchanged.

    Args:
        patch_size: patch size in voxels, one number or (p_h, p_w, p_d), as in the network.
    """

    def __init__(self, patch_size: Sequence[int] | int) -> None:
        super().__init__()
        self.patch_size = list(ensure_tuple_rep(patch_size, 3))

    def forward(self, prediction: Tensor, image: Tensor) -> Tensor:
        """Compute the loss of a prediction.

        Args:
            prediction: [B, C + 1, H, W, D] of :class:`HiEndMAE`: standardised voxels and the mask (1 = masked).
            image: [B, C, H, W, D], the truth.

        Returns:
            Scalar, in float32.

        Raises:
            ValueError: if the shapes do not belong together.
        """
        if prediction.shape[2:] != image.shape[2:] or prediction.shape[1] != image.shape[1] + 1:
            raise ValueError(
                f"prediction {list(prediction.shape)} must have one channel more than image {list(image.shape)} "
                "(the mask) and its size."
            )
        target = standardise_patches(patchify(image.float(), self.patch_size))
        predicted = patchify(prediction[:, :-1].float(), self.patch_size)
        masked = patchify(prediction[:, -1:].float(), self.patch_size)[..., 0]
        error = (predicted - target).square().mean(dim=-1)
        return (error * masked).sum() / masked.sum()
