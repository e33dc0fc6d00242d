"""Define the 3D vision transformer that pre-training and segmentation share."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from monai.networks.blocks import MLPBlock
from monai.utils import ensure_tuple_rep
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from shared_networks.errors import InputError

_SHARPNESS = 12.0  # logit of a neighbour, without the norm: it gets some 0.8 of the attention


def grid_size(img_size: Sequence[int], patch_size: Sequence[int]) -> tuple[int, ...]:
    """Return the number of patches along each axis.

    Args:
        img_size: image size in voxels, (H, W, D).
        patch_size: patch size in voxels, (p_h, p_w, p_d).

    Returns:
        (H / p_h, W / p_w, D / p_d).

    Raises:
        ValueError: if a size is not a positive multiple of its patch size.
    """
    if any(n < 1 or n % p for n, p in zip(img_size, patch_size, strict=True)):
        raise InputError(
            f"image size {tuple(img_size)} is not divisible by patch size {tuple(patch_size)}: "
            "crop or pad the image to a multiple of the patch."
        )
    return tuple(n // p for n, p in zip(img_size, patch_size, strict=True))


def patchify(image: Tensor, patch_size: list[int]) -> Tensor:
    """Cut an image into patch vectors.

    Args:
        image: [B, C, H, W, D].
        patch_size: (p_h, p_w, p_d).

    Returns:
        [B, L, P]: the L patches in row-major (h, w, d) order; P = p_h * p_w * p_d * C with the channel last.
    """
    b, c, h, w, d = image.shape
    i, j, k = patch_size[0], patch_size[1], patch_size[2]
    x = image.reshape(b, c, h // i, i, w // j, j, d // k, k)
    return x.permute(0, 2, 4, 6, 3, 5, 7, 1).reshape(b, (h // i) * (w // j) * (d // k), i * j * k * c)


def unpatchify(patches: Tensor, grid: list[int], patch_size: list[int]) -> Tensor:
    """Put patches [B, L, P] of a token grid (h, w, d) together to [B, C, H, W, D], the inverse of :func:`patchify`."""
    b = patches.shape[0]
    h, w, d = grid[0], grid[1], grid[2]
    i, j, k = patch_size[0], patch_size[1], patch_size[2]
    x = patches.reshape(b, h, w, d, i, j, k, -1)
    return x.permute(0, 7, 1, 4, 2, 5, 3, 6).reshape(b, -1, h * i, w * j, d * k)


def position_frequencies(hidden_size: int) -> Tensor:
    """Return the radians a token of an axis's sines and cosines, 10000^(-m / (E / 6)): `[E / 6]` float64."""
    width = hidden_size // 6
    return 10000.0 ** (-torch.arange(width, dtype=torch.float64) / width)


def sincos_positions(grid: Sequence[int], hidden_size: int) -> Tensor:
    """Compute the fixed 3D sine-cosine position table.

    For a token at (h, w, d) the vector is [sin(h f), cos(h f), sin(w f), cos(w f), sin(d f), cos(d f)] with
    f_m = 10000^(-m / (E / 6)). MONAI's helper orders the axes differently, so its table is not this one.

    Args:
        grid: tokens along (h, w, d).
        hidden_size: E, a multiple of 6.

    Returns:
        [1, L, E], tokens in row-major order.

    Raises:
        ValueError: if E is not a multiple of 6.
    """
    if hidden_size % 6:
        raise InputError(
            f"hidden size {hidden_size} is not divisible by 6, as sine-cosine positions in 3D need; give a multiple."
        )
    frequencies = position_frequencies(hidden_size)
    axes = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in grid), indexing="ij")
    angles = [axis.reshape(-1, 1) * frequencies for axis in axes]
    return torch.cat([f(angle) for angle in angles for f in (torch.sin, torch.cos)], dim=1).float()[None]


def interpolate_positions(positions: Tensor, source: list[int], target: list[int]) -> Tensor:
    """Resample a position table [1, L, E] from one token grid to another (trilinear)."""
    if source == target:
        return positions
    table = positions.transpose(1, 2).reshape(1, positions.shape[2], source[0], source[1], source[2])
    table = F.interpolate(table, size=target, mode="trilinear", align_corners=False)
    return table.flatten(2).transpose(1, 2)


def attend(query: Tensor, key: Tensor, value: Tensor, num_heads: int) -> Tensor:
    """Compute multi-head attention by the fused kernel, which never forms the softmax matrix.

    Args:
        query: [B, N, E].
        key: [B, M, E].
        value: [B, M, E].
        num_heads: number of heads; E is a multiple of it.

    Returns:
        [B, N, E], heads concatenated.
    """
    q, k, v = split_heads(query, num_heads), split_heads(key, num_heads), split_heads(value, num_heads)
    size = q.shape[-1]
    # Fused kernels refuse head sizes that are not a multiple of 8 (the paper's decoder has 33): zeros change nothing.
    padding = -size % 8
    if padding > 0:
        q, k, v = F.pad(q, (0, padding)), F.pad(k, (0, padding)), F.pad(v, (0, padding))
    out = F.scaled_dot_product_attention(q, k, v, scale=1.0 / math.sqrt(size))
    return out[..., :size].transpose(1, 2).flatten(2)


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """Reshape [B, N, E] to [B, heads, N, E / heads]."""
    return x.unflatten(2, (num_heads, x.shape[2] // num_heads)).transpose(1, 2)


def attention_weights(query: Tensor, key: Tensor, num_heads: int) -> Tensor:
    """Compute the softmax matrix [B, heads, N, M] of :func:`attend`, float32."""
    with torch.autocast(query.device.type, enabled=False):  # bfloat16 scores would be the largest error of a network
        q, k = split_heads(query.float(), num_heads), split_heads(key.float(), num_heads)
        return torch.softmax(q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1]), dim=-1)


class SelfAttention(nn.Module):
    """Multi-head self-attention, [B, N, E] to [B, N, E].

    Args:
        hidden_size: E.
        num_heads: number of heads.
        dropout: dropout after the output projection.

    Raises:
        ValueError: if E is not a multiple of the number of heads.
    """

    def __init__(self, hidden_size: int, num_heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        if hidden_size % num_heads:
            raise InputError(f"hidden size {hidden_size} is not divisible by {num_heads} heads; change one of them.")
        self.num_heads = num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.out_proj = nn.Linear(hidden_size, hidden_size)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return self.dropout(self.out_proj(attend(q, k, v, self.num_heads)))

    @torch.jit.unused
    def weights(self, x: Tensor) -> Tensor:
        """Compute the attention of every token (dim 2) to every token (dim 3), [B, heads, N, N]."""
        q, k, _ = self.qkv(x).chunk(3, dim=-1)
        return attention_weights(q, k, self.num_heads)


class CrossAttention(nn.Module):
    """Multi-head attention of queries [B, N, E] to a context [B, M, E]; arguments as :class:`SelfAttention`."""

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        if hidden_size % num_heads:
            raise InputError(f"hidden size {hidden_size} is not divisible by {num_heads} heads; change one of them.")
        self.num_heads = num_heads
        self.q = nn.Linear(hidden_size, hidden_size)
        self.kv = nn.Linear(hidden_size, 2 * hidden_size)
        self.out_proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        k, v = self.kv(context).chunk(2, dim=-1)
        return self.out_proj(attend(self.q(x), k, v, self.num_heads))

    @torch.jit.unused
    def weights(self, x: Tensor, context: Tensor) -> Tensor:
        """Compute the attention of every query (dim 2) to every context token (dim 3), [B, heads, N, M]."""
        k, _ = self.kv(context).chunk(2, dim=-1)
        return attention_weights(self.q(x), k, self.num_heads)


@contextmanager
def attention_maps(network: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Collect the attention matrices of every forward pass made inside the block.

    They are computed beside the network's own, so a network that is not watched pays nothing.

    Args:
        network: any module that holds :class:`SelfAttention` or :class:`CrossAttention`.

    Yields:
        A dict that fills as the network runs: module name to [B, heads, N, M], each row summing to 1.

    Example:
        >>> with torch.no_grad(), attention_maps(network) as maps:
        ...     network(image)
        >>> maps["vit.blocks.9.attn"].shape
    """
    maps: dict[str, Tensor] = {}

    def watch(name: str, module: SelfAttention | CrossAttention) -> torch.utils.hooks.RemovableHandle:
        def hook(_module: nn.Module, inputs: tuple[Tensor, ...], _output: Tensor) -> None:
            maps[name] = module.weights(*inputs)

        return module.register_forward_hook(hook)

    modules = network.named_modules()
    handles = [watch(name, m) for name, m in modules if isinstance(m, SelfAttention | CrossAttention)]
    try:
        yield maps
    finally:
        for handle in handles:
            handle.remove()


class TransformerBlock(nn.Module):
    """Pre-norm block: x + SA(LN x), then x + MLP(LN x). [B, N, E] to [B, N, E]."""

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float, norm_eps: float, dropout: float = 0.0):
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_size, eps=norm_eps)
        self.attn = SelfAttention(hidden_size, num_heads, dropout)
        self.norm2 = nn.LayerNorm(hidden_size, eps=norm_eps)
        self.mlp = MLPBlock(hidden_size, int(hidden_size * mlp_ratio), dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Patchify(nn.Module):
    """:func:`patchify` as a layer."""

    def __init__(self, patch_size: Sequence[int]) -> None:
        super().__init__()
        self.patch_size: list[int] = list(patch_size)

    def forward(self, image: Tensor) -> Tensor:
        return patchify(image, self.patch_size)


class PatchEmbedding(nn.Module):
    """Linear map of patches and the position table, under MONAI's parameter names."""

    def __init__(
        self,
        in_channels: int,
        grid: Sequence[int],
        patch_size: Sequence[int],
        hidden_size: int,
        trainable_positions: bool,
    ) -> None:
        super().__init__()
        length = math.prod(patch_size) * in_channels
        self.patch_embeddings = nn.Sequential(Patchify(patch_size), nn.Linear(length, hidden_size))
        self.position_embeddings = nn.Parameter(sincos_positions(grid, hidden_size), requires_grad=trainable_positions)


class ViTEncoder(nn.Module):
    """Vision transformer that also returns the intermediate features: the tokens after chosen blocks.

    Parameters have the names of :class:`monai.networks.nets.ViT`.

    Args:
        in_channels: image channels C.
        img_size: image size in voxels, one number or (H, W, D); a multiple of the patch size.
        patch_size: patch size in voxels, one number or (p_h, p_w, p_d).
        hidden_size: token width E, a multiple of 6 and of `num_heads`.
        num_layers: number of blocks.
        num_heads: attention heads.
        mlp_ratio: hidden width of the MLP over E.
        out_indices: zero-based indices, ascending, of the blocks whose features are returned; none is allowed.
        norm_eps: LayerNorm epsilon (published: 1e-6 in pre-training, 1e-5 in fine-tuning).
        cls_token: put a learned token before the others (pre-training).
        trainable_positions: train the position table (fine-tuning) or keep it fixed (pre-training).
        dropout: dropout in attention output and MLP.
        use_checkpoint: recompute blocks in the backward pass to save memory.

    Raises:
        ValueError: for sizes that do not divide, or `out_indices` out of range or order.
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
        out_indices: Sequence[int] = (3, 6, 9),
        norm_eps: float = 1e-6,
        cls_token: bool = False,
        trainable_positions: bool = True,
        dropout: float = 0.0,
        use_checkpoint: bool = False,
    ) -> None:
        super().__init__()
        indices = list(out_indices)
        if indices != sorted(set(indices)) or not set(indices) <= set(range(num_layers)):
            raise InputError(f"out_indices {indices} must be ascending block indices from 0 to {num_layers - 1}.")
        self.in_channels = in_channels
        self.patch_size: list[int] = list(ensure_tuple_rep(patch_size, 3))
        self.grid: list[int] = list(grid_size(ensure_tuple_rep(img_size, 3), self.patch_size))
        self.hidden_size = hidden_size
        self.out_indices: list[int] = indices
        self.is_output = [i in indices for i in range(num_layers)]  # TorchScript cannot type an empty list
        self.use_checkpoint = use_checkpoint
        self.patch_embedding = PatchEmbedding(in_channels, self.grid, self.patch_size, hidden_size, trainable_positions)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, hidden_size)) if cls_token else None
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(
            TransformerBlock(hidden_size, num_heads, mlp_ratio, norm_eps, dropout) for _ in range(num_layers)
        )
        self.norm = nn.LayerNorm(hidden_size, eps=norm_eps)
        self.apply(init_linear)
        if self.cls_token is not None:
            nn.init.normal_(self.cls_token, std=0.02)

    def patch_grid(self, image: Tensor) -> list[int]:
        """Return the token grid (h, w, d) of an image [B, C, H, W, D].

        Raises:
            ValueError: if the image has other channels than the encoder or a size is no multiple of the patch size.
        """
        if image.dim() != 5 or image.shape[1] != self.in_channels:
            raise ValueError(f"image of shape {list(image.shape)} is not [B, {self.in_channels}, H, W, D].")
        size = image.shape[2:]
        for n, p in zip(size, self.patch_size):  # noqa: B905 (TorchScript knows no `strict`)
            if n % p != 0:
                raise ValueError(f"image size {list(size)} is not divisible by patch size {self.patch_size}.")
        return [size[0] // self.patch_size[0], size[1] // self.patch_size[1], size[2] // self.patch_size[2]]

    def embed(self, image: Tensor, visible: Tensor | None = None) -> Tensor:
        """Embed an image [B, C, H, W, D] with positions: all tokens [B, L, E], or [B, V, E] at `visible` [B, V]."""
        grid = self.patch_grid(image)
        patches = self.patch_embedding.patch_embeddings[0](image)
        positions = interpolate_positions(self.patch_embedding.position_embeddings, self.grid, grid)
        if visible is not None:
            patches = gather_tokens(patches, visible)
            positions = gather_tokens(positions.expand(image.shape[0], -1, -1), visible)
        return self.dropout(self.patch_embedding.patch_embeddings[1](patches) + positions)

    def encode(self, tokens: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Run the blocks on [B, N, E] (the CLS token, if any, goes first).

        Returns:
            The normalised last tokens, and the intermediate features before any final norm, each [B, (1 +) N, E].
        """
        if self.cls_token is not None:
            tokens = torch.cat([self.cls_token.expand(tokens.shape[0], -1, -1), tokens], dim=1)
        features: list[Tensor] = []
        for index, block in enumerate(self.blocks):
            tokens = recompute(block, tokens) if not torch.jit.is_scripting() and self.use_checkpoint else block(tokens)
            if self.is_output[index]:
                features.append(tokens)
        return self.norm(tokens), features

    def forward(self, image: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Encode all patches of [B, C, H, W, D]; see :meth:`encode`."""
        return self.encode(self.embed(image))


def gather_tokens(tokens: Tensor, index: Tensor) -> Tensor:
    """Pick tokens [B, N, E] at index [B, K]: [B, K, E]."""
    return tokens.gather(1, index.unsqueeze(-1).expand(-1, -1, tokens.shape[2]))


def init_linear(module: nn.Module) -> None:
    """Initialise a linear layer with Xavier-uniform weights and zero biases, as masked autoencoders do."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)


def attend_to_neighbours(attention: SelfAttention, positions: Tensor) -> None:
    """Initialise queries and keys so that each head looks at the token next to its own along one axis.

    The six heads of a token look at its six neighbours, further ones at the same again: what a convolution of 3^3 does
    (S. d'Ascoli et al., "ConViT: Improving vision transformers with soft convolutional inductive biases", ICML 2021).
    Keys are positions, and queries positions moved by one token: as sines and cosines, a rotation. Their product falls
    with the distance to the neighbour.

    Args:
        attention: of normalised tokens that are E wide; E is a multiple of 6.
        positions: their :func:`sincos_positions`, `[1, L, E]`.

    Raises:
        InputError: a head is narrower than the six numbers that tell a place.
    """
    width = attention.qkv.weight.shape[1]
    size, axis_width = width // attention.num_heads, width // 6
    if size < 6:
        raise InputError(f"a head of {size} channels cannot look at a neighbour; give {axis_width} heads or fewer.")
    pairs = [min((size // 2 + 2 - turn) // 3, axis_width) for turn in range(3)]  # of sine and cosine
    angles = position_frequencies(width).tolist()
    query, key = torch.zeros(width, width), torch.zeros(width, width)
    for head in range(attention.num_heads):
        row = head * size
        for turn, count in enumerate(pairs):  # the first axis is the head's own
            for index in range(count):
                sine = 2 * ((head // 2 + turn) % 3) * axis_width + index
                cosine = sine + axis_width
                angle = angles[index] * (1 - 2 * (head % 2)) if turn == 0 else 0.0
                query[row, sine], query[row, cosine] = math.cos(angle), math.sin(angle)
                query[row + 1, cosine], query[row + 1, sine] = math.cos(angle), -math.sin(angle)
                key[row, sine] = key[row + 1, cosine] = 1.0
                row += 2
    weight = math.sqrt(_SHARPNESS / sum(pairs) * math.sqrt(size)) * torch.cat([query, key])
    deviation, mean = torch.std_mean(positions, dim=-1, correction=0)
    with torch.no_grad():
        attention.qkv.weight[: 2 * width] = weight
        attention.qkv.bias[: 2 * width] = weight.sum(dim=1) * (mean / deviation).mean()  # which the norm took off


def recompute(block: nn.Module, *inputs: Tensor) -> Tensor:
    """Run a block, keeping only its inputs for the backward pass (gradient checkpointing)."""
    return checkpoint(block, *inputs, use_reentrant=False)
