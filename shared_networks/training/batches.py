"""What a batch of pre-training means."""

from __future__ import annotations

from typing import Any

import torch
from monai.engines.utils import PrepareBatch, default_prepare_batch
from torch import Tensor


class PrepareBatchSelfSupervised(PrepareBatch):
    """The image is its own target: a batch ``{"image": [B, C, H, W, D]}`` becomes (image, image) on the device."""

    def __call__(
        self,
        batchdata: dict[str, Tensor],
        device: str | torch.device | None = None,
        non_blocking: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        """Move the image of ``batchdata`` to ``device``; see :class:`PrepareBatchSelfSupervised`."""
        image, _ = default_prepare_batch({"image": batchdata["image"]}, device, non_blocking, **kwargs)
        return image, image
