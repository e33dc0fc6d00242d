"""HiEndUNETR: a UNETR on the pre-trained encoder.

Hatamizadeh et al., "UNETR: Transformers for 3D medical image segmentation", WACV 2022, as the Hi-End-MAE paper
fine-tunes it: the token grid is doubled three times, and a trilinear resize closes the gap to the image size
(8 -> 64 -> 96 for patches of 12). Small patches need two doublings alone (12 -> 48 -> 72 for patches of 6), and those
below 4 voxels one: a further one makes the volume finer than the image. For patches of 6 it costs five times the work.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from monai.networks.blocks import UnetOutBlock, UnetrBasicBlock, UnetResBlock, UnetrPrUpBlock, UnetrUpBlock
from torch import Tensor, nn

from shared_networks.errors import InputError
from shared_networks.networks.vit import ViTEncoder


def tokens_to_volume(tokens: Tensor, grid: list[int]) -> Tensor:
    """Reshape tokens [B, L, E] to a volume [B, E, h, w, d]."""
    return tokens.transpose(1, 2).reshape(tokens.shape[0], tokens.shape[2], grid[0], grid[1], grid[2])


class ResizeUpBlock(nn.Module):
    """Last up-step: trilinear resize to the skip's size, 3x3x3 convolution, concatenation, residual block."""

    def __init__(self, in_channels: int, out_channels: int, norm_name: str) -> None:
        super().__init__()
        self.conv3d = nn.Conv3d(in_channels, out_channels, kernel_size=3, padding=1)
        self.conv_block = UnetResBlock(3, 2 * out_channels, out_channels, kernel_size=3, stride=1, norm_name=norm_name)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        x = F.interpolate(x, size=skip.shape[2:], mode="trilinear", align_corners=False)
        return self.conv_block(torch.cat([self.conv3d(x), skip], dim=1))


class HiEndUNETR(nn.Module):
    """The segmentation network: an image in, logits of its size out.

    The defaults are the published fine-tuning's: vit_large_p12 on 96^3 crops. Other input sizes work as long as the
    patch divides them; positions are interpolated.

    Args:
        in_channels: image channels C.
        out_channels: classes, background included.
        img_size: training crop in voxels, one number or (H, W, D); a multiple of the patch size.
        patch_size: patch size in voxels, one number or (p_h, p_w, p_d).
        feature_size: width f of the full-resolution convolutions.
        hidden_size: token width, a multiple of 6 and of `num_heads`.
        num_layers: encoder blocks.
        num_heads: attention heads.
        mlp_ratio: hidden width of the MLPs over the token width.
        out_indices: three zero-based encoder blocks that feed the skips, ascending.
        num_upsamples: doublings of the token grid before the resize: 3 as published, 2 for patches below 8 voxels, or 1
            below 4.
        norm_name: normalisation of the convolution blocks.
        dropout: dropout in the encoder; MONAI Label's uncertainty scoring sets it.
        use_checkpoint: recompute encoder blocks in the backward pass to save memory.

    Raises:
        ValueError: for sizes that do not divide, `out_indices` out of range or not three, or other `num_upsamples`.
    """

    def __init__(
        self,
        in_channels: int = 1,
        out_channels: int = 14,
        img_size: Sequence[int] | int = 96,
        patch_size: Sequence[int] | int = 12,
        feature_size: int = 32,
        hidden_size: int = 1536,
        num_layers: int = 12,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        out_indices: Sequence[int] = (3, 6, 9),
        num_upsamples: int = 3,
        norm_name: str = "instance",
        dropout: float = 0.0,
        use_checkpoint: bool = False,
    ) -> None:
        super().__init__()
        if len(out_indices) != 3:
            raise InputError(f"out_indices {list(out_indices)} must be three, one for each skip of the UNETR.")
        if num_upsamples not in (1, 2, 3):
            raise InputError(f"num_upsamples is {num_upsamples}; give 3, 2 for patches below 8 voxels, or 1 below 4.")
        self.vit = ViTEncoder(
            in_channels=in_channels,
            img_size=img_size,
            patch_size=patch_size,
            hidden_size=hidden_size,
            num_layers=num_layers,
            num_heads=num_heads,
            mlp_ratio=mlp_ratio,
            out_indices=out_indices,
            norm_eps=1e-5,
            dropout=dropout,
            use_checkpoint=use_checkpoint,
        )
        f = feature_size
        conv: dict[str, Any] = {"kernel_size": 3, "norm_name": norm_name, "res_block": True}
        lift: dict[str, Any] = {**conv, "stride": 1, "upsample_kernel_size": 2, "conv_block": True}
        deepest, middle = (2 if num_upsamples > above else 1 for above in (2, 1))  # 1 stays on the token grid
        lift_middle, lift_deepest = ({**lift, "upsample_kernel_size": size} for size in (middle, deepest))
        self.encoder1 = UnetrBasicBlock(3, in_channels, f, stride=1, **conv)
        self.encoder2 = UnetrPrUpBlock(3, hidden_size, 2 * f, num_layer=num_upsamples - 1, **lift)
        self.encoder3 = UnetrPrUpBlock(3, hidden_size, 4 * f, num_layer=max(num_upsamples - 2, 0), **lift_middle)
        self.encoder4 = UnetrPrUpBlock(3, hidden_size, 8 * f, num_layer=0, **lift_deepest)
        self.decoder5 = UnetrUpBlock(3, hidden_size, 8 * f, upsample_kernel_size=deepest, **conv)
        self.decoder4 = UnetrUpBlock(3, 8 * f, 4 * f, upsample_kernel_size=middle, **conv)
        self.decoder3 = UnetrUpBlock(3, 4 * f, 2 * f, upsample_kernel_size=2, **conv)
        self.decoder2 = ResizeUpBlock(2 * f, f, norm_name)
        self.out = UnetOutBlock(3, f, out_channels)

    def forward(self, image: Tensor) -> Tensor:
        """Segment an image.

        Args:
            image: [B, C, H, W, D], each size a multiple of the patch size.

        Returns:
            Logits [B, out_channels, H, W, D].

        Raises:
            ValueError: if a size is not a multiple of the patch size, or the channels differ.
        """
        grid = self.vit.patch_grid(image)
        last, features = self.vit(image)
        skip4 = self.encoder4(tokens_to_volume(features[2], grid))
        x = self.decoder5(tokens_to_volume(last, grid), skip4)
        x = self.decoder4(x, self.encoder3(tokens_to_volume(features[1], grid)))
        x = self.decoder3(x, self.encoder2(tokens_to_volume(features[0], grid)))
        x = self.decoder2(x, self.encoder1(image))
        return self.out(x).contiguous()


@functools.wraps(HiEndUNETR, assigned=(), updated=())  # whose parameters are those that may be set
def strict_segmenter(**network: Any) -> HiEndUNETR:
    """Make a segmenter that loads all weights or none, for programs that do not ask to be strict.

    MONAI Label loads with `strict=False`, and would segment with half a network without a word.

    Args:
        network: arguments of :class:`HiEndUNETR`.
    """
    segmenter = HiEndUNETR(**network)
    segmenter.register_load_state_dict_post_hook(refuse_parts)
    return segmenter


def refuse_parts(network: nn.Module, keys: Any) -> None:
    """Raise if a state_dict did not have exactly the network's names: a hook of `load_state_dict`.

    Raises:
        RuntimeError: as `load_state_dict` itself if strict.
    """
    problems = {"Missing key(s)": keys.missing_keys, "Unexpected key(s)": keys.unexpected_keys}
    if found := [f"{what} in state_dict: {', '.join(names)}." for what, names in problems.items() if names]:
        raise RuntimeError(f"Error(s) in loading state_dict for {type(network).__name__}: {' '.join(found)}")
