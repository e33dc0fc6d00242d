"""Hi-End-MAE: masked autoencoding with a hierarchical, encoder-driven decoder.

Tang et al., "Hi-End-MAE: Hierarchical encoder-driven masked autoencoders are stronger vision learners for medical
image segmentation", Medical Image Analysis 2025 (arXiv 2502.08347).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from monai.networks.blocks import MLPBlock
from torch import Tensor, nn

from shared_networks.errors import InputError
from shared_networks.networks.vit import (
    CrossAttention,
    SelfAttention,
    TransformerBlock,
    ViTEncoder,
    attend_to_neighbours,
    gather_tokens,
    grid_size,
    init_linear,
    interpolate_positions,
    patchify,
    recompute,
    sincos_positions,
    unpatchify,
)

PATCH_EPS = 1e-6


def standardise_patches(patches: Tensor) -> Tensor:
    """Give each patch of [B, L, P] mean 0 and (biased) variance 1: what the network learns to predict."""
    variance, mean = torch.var_mean(patches, dim=-1, keepdim=True, correction=0)
    return (patches - mean) / (variance + PATCH_EPS).sqrt()


class CrossAttentionBlock(nn.Module):
    """Decoder block that reads an encoder layer: y + SA(LN y), y + CA(LN y, context), y + MLP(LN y)."""

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float, norm_eps: float) -> None:
        super().__init__()
        self.norm0 = nn.LayerNorm(hidden_size, eps=norm_eps)
        self.self_attn = SelfAttention(hidden_size, num_heads)
        self.norm1 = nn.LayerNorm(hidden_size, eps=norm_eps)
        self.cross_attn = CrossAttention(hidden_size, num_heads)
        self.norm2 = nn.LayerNorm(hidden_size, eps=norm_eps)
        self.mlp = MLPBlock(hidden_size, int(hidden_size * mlp_ratio))

    def forward(self, y: Tensor, context: Tensor) -> Tensor:
        y = y + self.self_attn(self.norm0(y))
        y = y + self.cross_attn(self.norm1(y), context)
        return y + self.mlp(self.norm2(y))


class HierarchicalDecoder(nn.Module):
    """Hierarchical dense decoding: plain blocks on all tokens, then a cross-attention block a layer, deep to shallow.

    Args:
        encoder_size: width of the encoder's tokens, E.
        hidden_size: width of the decoder's tokens, a multiple of 6 and of `num_heads`.
        num_heads: attention heads.
        num_self_layers: plain blocks before the cross blocks.
        num_cross_blocks: cross-attention blocks, one for each encoder layer that is read.
        grid: token grid (h, w, d) of the position table.
        patch_length: P, voxels of a patch times channels.
        mlp_ratio: hidden width of the MLP over the token width.
        norm_eps: LayerNorm epsilon.
        use_checkpoint: recompute blocks in the backward pass to save memory.
    """

    def __init__(
        self,
        encoder_size: int,
        hidden_size: int,
        num_heads: int,
        num_self_layers: int,
        num_cross_blocks: int,
        grid: Sequence[int],
        patch_length: int,
        mlp_ratio: float = 4.0,
        norm_eps: float = 1e-6,
        use_checkpoint: bool = False,
    ) -> None:
        super().__init__()
        self.grid: list[int] = list(grid)
        self.use_checkpoint = use_checkpoint
        self.decoder_embeds = nn.ModuleList(nn.Linear(encoder_size, hidden_size) for _ in range(num_cross_blocks + 1))
        self.mask_token = nn.Parameter(torch.zeros(1, 1, hidden_size))
        self.position_embeddings = nn.Parameter(sincos_positions(grid, hidden_size), requires_grad=False)
        self.blocks = nn.ModuleList(
            TransformerBlock(hidden_size, num_heads, mlp_ratio, norm_eps) for _ in range(num_self_layers)
        )
        self.cross_blocks = nn.ModuleList(
            CrossAttentionBlock(hidden_size, num_heads, mlp_ratio, norm_eps) for _ in range(num_cross_blocks)
        )
        self.norm = nn.LayerNorm(hidden_size, eps=norm_eps)
        self.head = nn.Linear(hidden_size, patch_length)
        self.apply(init_linear)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, latent: Tensor, features: list[Tensor], ids_shuffle: Tensor, grid: list[int]) -> Tensor:
        """Predict every token's patch.

        Args:
            latent: normalised encoder output [B, 1 + V, E], CLS first.
            features: of encoder layers, shallow to deep, each [B, 1 + V, E].
            ids_shuffle: [B, L]; its first V entries are the visible tokens.
            grid: token grid (h, w, d).

        Returns:
            [B, 1 + L, P]: CLS first, then the tokens in shuffled order.
        """
        batch, length = ids_shuffle.shape
        layers = features + [latent]  # noqa: RUF005 (TorchScript knows no unpacking)
        embedded = [embed(layers[index]) for index, embed in enumerate(self.decoder_embeds)]
        seen = embedded[-1]
        masked = self.mask_token.to(seen.dtype).expand(batch, 1 + length - seen.shape[1], -1)
        positions = interpolate_positions(self.position_embeddings, self.grid, grid).expand(batch, -1, -1)
        positions = gather_tokens(positions, ids_shuffle)
        y = torch.cat([seen[:, :1], torch.cat([seen[:, 1:], masked], dim=1) + positions], dim=1)
        for block in self.blocks:
            y = recompute(block, y) if not torch.jit.is_scripting() and self.use_checkpoint else block(y)
        for depth, block in enumerate(self.cross_blocks):
            context = embedded[-2 - depth]
            if not torch.jit.is_scripting() and self.use_checkpoint:
                y = recompute(block, y, context)
            else:
                y = block(y, context)
        return self.head(self.norm(y))


def start_locally(network: HiEndMAE) -> None:
    """Initialise a network so that its decoder looks at the neighbours of each patch from the first step on.

    With the published start a short training predicts the same for every patch: thousands of steps pass before a head
    finds out which tokens lie beside its own. Here the decoder's first block begins there, see
    :func:`attend_to_neighbours`. So that it is not drowned, visible patches come into the decoder at a third of their
    size, and all other branches start as small as GPT-2's (Radford et al., 2019): the last layer of each branch is
    divided by the root of the number of branches.

    Args:
        network: just made; its weights are changed.
    """
    decoder: Any = network.decoder
    with torch.no_grad():
        first = decoder.blocks[0].attn if len(decoder.blocks) else decoder.cross_blocks[0].self_attn
        attend_to_neighbours(first, decoder.position_embeddings)
        for part in (network.vit, decoder):
            last: list[Any] = [m for name, m in part.named_modules() if name.endswith(("out_proj", "mlp.linear2"))]
            for layer in last:
                if layer is not first.out_proj:
                    layer.weight /= math.sqrt(len(last))
        decoder.decoder_embeds[-1].weight *= 0.3


class HiEndMAE(nn.Module):
    """The pre-training network: an image in, the reconstruction of its masked patches out.

    The defaults are the paper's vit_large_p12 (366.9 M trainable parameters).

    Args:
        in_channels: image channels C.
        img_size: image size in voxels, one number or (H, W, D); a multiple of the patch size.
        patch_size: patch size in voxels, one number or (p_h, p_w, p_d).
        hidden_size: width of the encoder's tokens, a multiple of 6 and of `num_heads`.
        num_layers: encoder blocks.
        num_heads: encoder attention heads.
        mlp_ratio: hidden width of the MLPs over the token width.
        decoder_hidden_size: width of the decoder's tokens, a multiple of 6 and of `decoder_num_heads`.
        decoder_num_heads: decoder attention heads.
        decoder_self_layers: plain decoder blocks before the cross blocks.
        out_indices: zero-based encoder blocks that the decoder reads, ascending; none makes a plain masked autoencoder.
        local_init: start by looking at the neighbours of each patch, see :func:`start_locally`.
        mask_ratio: share of the patches masked, above 0 and below 1.
        use_checkpoint: recompute blocks in the backward pass to save memory.

    Raises:
        ValueError: for sizes that do not divide, `out_indices` out of range, or a mask ratio that masks
            no patch or every patch.
    """

    def __init__(
        self,
        in_channels: int = 1,
        img_size: Sequence[int] | int = 96,
        patch_size: Sequence[int] | int = 12,
        hidden_size: int = 1536,
        num_layers: int = 12,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        decoder_hidden_size: int = 528,
        decoder_num_heads: int = 16,
        decoder_self_layers: int = 2,
        out_indices: Sequence[int] = (3, 6, 9),
        mask_ratio: float = 0.75,
        local_init: bool = False,
        use_checkpoint: bool = False,
    ) -> None:
        super().__init__()
        self.mask_ratio = mask_ratio
        self.vit = ViTEncoder(
            in_channels=in_channels,
            img_size=img_size,
            patch_size=patch_size,
            hidden_size=hidden_size,
            num_layers=num_layers,
            num_heads=num_heads,
            mlp_ratio=mlp_ratio,
            out_indices=out_indices,
            cls_token=True,
            trainable_positions=False,
            use_checkpoint=use_checkpoint,
        )
        try:
            self.num_visible(math.prod(self.vit.grid))
        except ValueError as error:  # TorchScript compiles `num_visible`, and knows no other class
            raise InputError(str(error)) from None
        self.decoder = HierarchicalDecoder(
            encoder_size=hidden_size,
            hidden_size=decoder_hidden_size,
            num_heads=decoder_num_heads,
            num_self_layers=decoder_self_layers,
            num_cross_blocks=len(self.vit.out_indices),
            grid=self.vit.grid,
            patch_length=math.prod(self.vit.patch_size) * in_channels,
            mlp_ratio=mlp_ratio,
            use_checkpoint=use_checkpoint,
        )
        if local_init:
            start_locally(self)

    def num_visible(self, length: int) -> int:
        """Return V, the number of visible patches of `length`: int(L * (1 - mask ratio)).

        Raises:
            ValueError: if no patch, or every patch, would be visible.
        """
        visible = int(length * (1 - self.mask_ratio))
        if not 0 < visible < length:
            raise ValueError(
                f"mask ratio {self.mask_ratio} leaves {visible} of {length} patches visible: "
                "at least one must be visible and one masked."
            )
        return visible

    def shuffle(self, batch: int, length: int) -> Tensor:
        """Draw a random order of the patches of each image, [B, L]; in eval mode the same at every call.

        TorchScript and ONNX know no generators, so exported networks draw a new one at each call.
        """
        if torch.jit.is_scripting():  # noqa: SIM114 - alone, as TorchScript compiles what comes after `or`
            noise = torch.rand(batch, length)
        elif self.training or torch.compiler.is_exporting():
            noise = torch.rand(batch, length)
        else:
            noise = torch.rand(batch, length, generator=torch.Generator().manual_seed(0))
        return noise.argsort(dim=1)

    def encode(self, image: Tensor, ids_shuffle: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Encode the visible patches of [B, C, H, W, D] to latent and features, each [B, 1 + V, E], CLS first."""
        visible = ids_shuffle[:, : self.num_visible(ids_shuffle.shape[1])]
        return self.vit.encode(self.vit.embed(image, visible))

    def decode(self, latent: Tensor, features: list[Tensor], ids_shuffle: Tensor, grid: list[int]) -> Tensor:
        """Predict patches [B, 1 + L, P] from latent and features, CLS first, then in shuffled order."""
        return self.decoder(latent, features, ids_shuffle, grid)

    def forward(self, image: Tensor, ids_shuffle: Tensor | None = None) -> Tensor:
        """Mask patches and reconstruct them.

        Args:
            image: [B, C, H, W, D].
            ids_shuffle: [B, L], each row a shuffle of the patch indices whose first V entries stay visible;
                drawn by :meth:`shuffle` when not given.

        Returns:
            [B, C + 1, H, W, D]: the predicted voxels, standardised patch by patch, and last the mask (1 = masked).

        Raises:
            ValueError: if the image does not divide into patches, or `ids_shuffle` is not [B, L].
        """
        grid = self.vit.patch_grid(image)
        shape = [image.shape[0], grid[0] * grid[1] * grid[2]]
        if ids_shuffle is None:
            ids_shuffle = self.shuffle(shape[0], shape[1])
            if not torch.jit.is_scripting() and image.is_cuda and not torch.compiler.is_compiling():
                ids_shuffle = ids_shuffle.pin_memory()  # else the copy waits for the GPU
            ids_shuffle = ids_shuffle.to(image.device, non_blocking=image.is_cuda)
        elif list(ids_shuffle.shape) != shape:
            raise ValueError(f"ids_shuffle of shape {list(ids_shuffle.shape)} is not [B, L] = {shape}.")
        latent, features = self.encode(image, ids_shuffle)
        tokens = self.decode(latent, features, ids_shuffle, grid)[:, 1:]

        order = ids_shuffle.argsort(dim=1)
        patches = gather_tokens(tokens, order)
        masked = (order >= self.num_visible(shape[1])).to(patches.dtype)
        size = self.vit.patch_size
        mask = masked.unsqueeze(-1).expand(-1, -1, size[0] * size[1] * size[2])
        return torch.cat([unpatchify(patches, grid, size), unpatchify(mask, grid, size)], dim=1)


def restore_intensities(prediction: Tensor, image: Tensor, patch_size: Sequence[int]) -> Tensor:
    """Put a standardised prediction back on the image's intensity scale, for viewing.

    Every patch gets the mean and (unbiased, as published) standard deviation of the TRUE patch, so a viewer must be
    told that those come from the truth and only the pattern inside a patch is predicted.

    Args:
        prediction: [B, C, H, W, D], standardised patch by patch.
        image: [B, C, H, W, D], the truth.
        patch_size: (p_h, p_w, p_d).

    Returns:
        [B, C, H, W, D].

    Raises:
        ValueError: if the image does not divide into patches.
    """
    size = list(patch_size)
    grid = list(grid_size(image.shape[2:], size))
    std, mean = torch.std_mean(patchify(image, size), dim=-1, keepdim=True)
    return unpatchify(patchify(prediction, size) * (std + PATCH_EPS) + mean, grid, size)
