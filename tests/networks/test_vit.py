from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from monai.networks.blocks.pos_embed_utils import build_sincos_position_embedding
from torch import Tensor, nn

from shared_networks.errors import InputError
from shared_networks.networks.vit import (
    CrossAttention,
    SelfAttention,
    TransformerBlock,
    ViTEncoder,
    attend,
    attend_to_neighbours,
    attention_maps,
    gather_tokens,
    grid_size,
    interpolate_positions,
    patchify,
    sincos_positions,
    unpatchify,
)

TINY: dict[str, Any] = {
    "in_channels": 2,
    "img_size": (4, 9, 8),
    "patch_size": (2, 3, 4),
    "hidden_size": 24,
    "num_layers": 3,
    "num_heads": 3,
    "out_indices": (0, 2),
}


def tiny(**changes: Any) -> ViTEncoder:
    torch.manual_seed(0)
    return ViTEncoder(**{**TINY, **changes})


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def explicit_attention(query: Tensor, key: Tensor, value: Tensor, num_heads: int) -> tuple[Tensor, Tensor]:
    """Attention head by head, as in the textbook: output [B, N, E] and softmax matrix [B, heads, N, M]."""
    outputs, matrices = [], []
    for q, k, v in zip(query.chunk(num_heads, 2), key.chunk(num_heads, 2), value.chunk(num_heads, 2), strict=True):
        scores = torch.einsum("bne,bme->bnm", q, k) / math.sqrt(q.shape[2])
        matrices.append(scores.exp() / scores.exp().sum(dim=2, keepdim=True))
        outputs.append(torch.einsum("bnm,bme->bne", matrices[-1], v))
    return torch.cat(outputs, dim=2), torch.stack(matrices, dim=1)


def test_grid_is_image_over_patch_axis_by_axis():
    assert grid_size((96, 48, 24), (12, 16, 8)) == (8, 3, 3)


@pytest.mark.parametrize("size", [(96, 50, 24), (0, 48, 24), (-12, 48, 24)])
def test_grid_refuses_sizes_that_do_not_divide(size):
    with pytest.raises(ValueError) as error:
        grid_size(size, (12, 16, 8))
    assert str(size) in str(error.value) and "(12, 16, 8)" in str(error.value)


def test_patches_are_row_major_with_the_channel_last():
    image = torch.arange(2 * 3 * 4 * 9 * 8).reshape(2, 3, 4, 9, 8)
    patches = patchify(image, [2, 3, 4])
    assert patches.shape == (2, 2 * 3 * 2, 2 * 3 * 4 * 3)
    for b, (token, (h, w, d)) in product(range(2), enumerate(product(range(2), range(3), range(2)))):
        voxels = [image[b, c, 2 * h + i, 3 * w + j, 4 * d + k].item() for i, j, k, c in ijkc((2, 3, 4), 3)]
        assert patches[b, token].tolist() == voxels


def ijkc(patch_size: tuple[int, int, int], channels: int) -> list[tuple[int, ...]]:
    return list(product(*map(range, patch_size), range(channels)))


@pytest.mark.parametrize("channels", [1, 3])
def test_unpatchify_is_the_inverse(channels):
    image = draw(2, channels, 4, 9, 8)
    assert torch.equal(unpatchify(patchify(image, [2, 3, 4]), [2, 3, 2], [2, 3, 4]), image)


def test_positions_follow_the_formula():
    grid, width = (2, 3, 4), 18
    table = sincos_positions(grid, width)
    assert table.shape == (1, 24, 18) and table.dtype == torch.float32
    for token, index in enumerate(product(*map(range, grid))):
        expected = []
        for coordinate in index:
            angles = [coordinate / 10000 ** (m / 3) for m in range(3)]
            expected += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
        assert table[0, token].tolist() == pytest.approx(expected, abs=1e-7)


@pytest.mark.filterwarnings("ignore:torch.meshgrid")
def test_positions_are_not_those_of_monai():
    ours, theirs = sincos_positions((2, 3, 4), 24), build_sincos_position_embedding([2, 3, 4], 24, 3)
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() > 0.5


def test_positions_refuse_widths_that_are_not_a_multiple_of_6():
    with pytest.raises(ValueError, match="hidden size 20 is not divisible by 6"):
        sincos_positions((2, 2, 2), 20)


def test_positions_of_the_same_grid_stay_as_they_are():
    table = draw(1, 24, 6)
    assert interpolate_positions(table, [2, 3, 4], [2, 3, 4]) is table


def test_positions_are_interpolated_between_voxel_centres():
    # Along the second axis 0 and 4 become 0, 1, 3, 4: centres at -0.25, 0.25, 0.75, 1.25, held at the ends.
    table = torch.tensor([[[0.0, 10.0], [4.0, 30.0]]])
    resized = interpolate_positions(table, [1, 2, 1], [1, 4, 1])
    torch.testing.assert_close(resized, torch.tensor([[[0.0, 10.0], [1.0, 15.0], [3.0, 25.0], [4.0, 30.0]]]))


def test_interpolated_positions_keep_row_major_order():
    steps = torch.tensor([[[100.0 * h + 10 * w + d] for h, w, d in product(range(2), range(3), range(2))]])
    halved = interpolate_positions(steps, [2, 3, 2], [1, 3, 1])
    torch.testing.assert_close(halved, torch.tensor([[[50.5], [60.5], [70.5]]]))


@pytest.mark.parametrize("head_size", [8, 33, 5])
def test_attention_is_softmax_attention_and_so_are_its_gradients(head_size):
    query, key, value = (
        draw(2, n, 3 * head_size, seed=seed, dtype=torch.float64).requires_grad_() for seed, n in enumerate((7, 4, 4))
    )
    fused = attend(query, key, value, 3)
    explicit, _ = explicit_attention(query, key, value, 3)
    torch.testing.assert_close(fused, explicit, rtol=0, atol=1e-12)
    weights = draw(*fused.shape, dtype=torch.float64)
    for ours, theirs in zip(
        torch.autograd.grad((fused * weights).sum(), (query, key, value)),
        torch.autograd.grad((explicit * weights).sum(), (query, key, value)),
        strict=True,
    ):
        assert theirs.abs().max() > 0.01
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_self_attention_splits_query_key_value_in_that_order():
    attention, x = SelfAttention(12, 2), draw(2, 5, 12)
    q, k, v = (x @ w.T + b for w, b in zip(attention.qkv.weight.chunk(3), attention.qkv.bias.chunk(3), strict=True))
    mixed, _ = explicit_attention(q, k, v, 2)
    torch.testing.assert_close(attention(x), attention.out_proj(mixed))


def test_cross_attention_takes_keys_and_values_from_the_context():
    attention, x, context = CrossAttention(12, 2), draw(2, 5, 12), draw(2, 3, 12)
    k, v = (context @ w.T + b for w, b in zip(attention.kv.weight.chunk(2), attention.kv.bias.chunk(2), strict=True))
    mixed, _ = explicit_attention(attention.q(x), k, v, 2)
    torch.testing.assert_close(attention(x, context), attention.out_proj(mixed))


@pytest.mark.parametrize("attention", [SelfAttention, CrossAttention])
def test_attention_refuses_widths_that_heads_do_not_divide(attention: Callable[..., object]):
    with pytest.raises(ValueError, match="hidden size 24 is not divisible by 5 heads"):
        attention(24, 5)


def test_block_is_pre_norm():
    block, x = TransformerBlock(12, 2, mlp_ratio=3.0, norm_eps=1e-6), draw(2, 5, 12)
    middle = x + block.attn(block.norm1(x))
    torch.testing.assert_close(block(x), middle + block.mlp(block.norm2(middle)))
    assert block.mlp.linear1.out_features == 36


def test_attention_maps_are_the_explicit_matrices_and_leave_no_trace():
    network, image = tiny().eval(), draw(2, 2, 4, 9, 8)
    before, _ = network(image)
    with torch.no_grad(), attention_maps(network) as maps:
        watched, _ = network(image)
    after, _ = network(image)
    assert torch.equal(before, watched) and torch.equal(before, after)
    assert not any(module._forward_hooks for module in network.modules())

    assert maps.keys() == {"blocks.0.attn", "blocks.1.attn", "blocks.2.attn"}
    tokens = network.embed(image)
    for index, block in enumerate(network.blocks):
        q, k, v = block.attn.qkv(block.norm1(tokens)).chunk(3, dim=-1)
        found = maps[f"blocks.{index}.attn"]
        torch.testing.assert_close(found, explicit_attention(q, k, v, 3)[1])
        torch.testing.assert_close(found.sum(dim=-1), torch.ones(2, 3, 12))
        tokens = block(tokens)


def test_attention_maps_are_no_longer_collected_after_an_error():
    network = tiny()
    with pytest.raises(ValueError, match="is not"), attention_maps(network):
        network(torch.zeros(1, 5, 4, 9, 8))
    assert not any(module._forward_hooks for module in network.modules())


def test_encoder_runs_on_all_patches_and_returns_intermediate_features():
    network, image = tiny().eval(), draw(2, 2, 4, 9, 8)
    latent, features = network(image)
    embedding = network.patch_embedding
    x = patchify(image, [2, 3, 4]) @ embedding.patch_embeddings[1].weight.T + embedding.patch_embeddings[1].bias
    outputs = [x + sincos_positions((2, 3, 2), 24)]
    for block in network.blocks:
        outputs.append(block(outputs[-1]))
    torch.testing.assert_close(features, [outputs[1], outputs[3]])
    torch.testing.assert_close(latent, network.norm(outputs[3]))


def test_encoder_embeds_only_the_visible_patches():
    network, image = tiny(), draw(2, 2, 4, 9, 8)
    visible = torch.tensor([[3, 0, 11], [5, 6, 7]])
    chosen = network.embed(image, visible)
    torch.testing.assert_close(chosen, torch.stack([network.embed(image)[b, visible[b]] for b in range(2)]))
    assert torch.equal(gather_tokens(chosen, torch.tensor([[2], [0]]))[1, 0], chosen[1, 0])


def test_class_token_goes_first():
    network = tiny(cls_token=True, num_layers=1, out_indices=(0,))
    tokens = draw(2, 12, 24)
    _, features = network.encode(tokens)
    with_class = torch.cat([network.cls_token, network.cls_token]), tokens
    torch.testing.assert_close(features[0], network.blocks[0](torch.cat(with_class, dim=1)))


@pytest.mark.parametrize("size", [(8, 9, 4), (2, 3, 4), (6, 12, 16)])
def test_other_image_sizes_use_interpolated_positions(size):
    network, image = tiny(), draw(1, 2, *size)
    grid = [size[0] // 2, size[1] // 3, size[2] // 4]
    same = tiny(img_size=size)
    same.load_state_dict({k: v for k, v in network.state_dict().items() if "position" not in k}, strict=False)
    assert (same(image)[0] - network(image)[0]).abs().max() > 1e-3  # its own table is another one
    table = interpolate_positions(network.patch_embedding.position_embeddings, [2, 3, 2], grid)
    same.patch_embedding.position_embeddings.data = table
    torch.testing.assert_close(same(image)[0], network(image)[0])


def test_positions_are_trainable_only_when_asked():
    assert tiny().patch_embedding.position_embeddings.requires_grad
    assert not tiny(trainable_positions=False).patch_embedding.position_embeddings.requires_grad


def test_linears_start_xavier_uniform_with_zero_biases():
    network = tiny()
    for name, parameter in network.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif "norm" in name:
            assert torch.equal(parameter, torch.ones_like(parameter)), name
        elif "position" not in name:
            bound = math.sqrt(6 / sum(parameter.shape))
            assert 0.95 * bound < parameter.abs().max() <= bound, name


@pytest.mark.parametrize(("width", "heads"), [(528, 16), (96, 6), (192, 6)])
def test_heads_start_at_the_neighbours_of_a_token(width: int, heads: int) -> None:
    grid, positions = (7, 8, 9), sincos_positions((7, 8, 9), width)
    attention = SelfAttention(width, heads)
    values = attention.qkv.weight[2 * width :].clone()
    attend_to_neighbours(attention, positions)
    weights = attention.weights(nn.functional.layer_norm(positions, [width]))[0]
    steps = [(1, 0, 0), (-1, 0, 0), (0, 1, 0), (0, -1, 0), (0, 0, 1), (0, 0, -1)]
    for head, place in product(range(heads), product(*(range(1, n - 1) for n in grid))):
        token, neighbour = (int(np.ravel_multi_index(p, grid)) for p in (place, np.add(place, steps[head % 6])))
        assert weights[head, token].argmax() == neighbour and weights[head, token, neighbour] > 0.5
    assert torch.equal(attention.qkv.weight[2 * width :], values)


@pytest.mark.parametrize(("width", "heads"), [(24, 2), (18, 3), (48, 8)])
def test_neighbours_start_for_narrow_heads(width: int, heads: int) -> None:
    attention = SelfAttention(width, heads)
    attend_to_neighbours(attention, sincos_positions((2, 3, 4), width))
    queries, keys = attention.qkv.weight.detach()[: 2 * width].chunk(2)
    torch.testing.assert_close(queries.norm(dim=1), keys.norm(dim=1))  # queries are rotated keys
    assert (queries.norm(dim=1) > 0).sum() == heads * (width // heads // 2 * 2)


def test_neighbours_need_heads_of_three_axes() -> None:
    with pytest.raises(InputError, match="a head of 4 channels cannot look at a neighbour; give 4 heads or fewer"):
        attend_to_neighbours(SelfAttention(24, 6), sincos_positions((2, 2, 2), 24))


def test_dropout_acts_in_training_only():
    network, plain, image = tiny(dropout=0.3), tiny(), draw(1, 2, 4, 9, 8)
    plain.load_state_dict(network.state_dict())
    assert not torch.equal(network.train()(image)[0], network(image)[0])
    assert torch.equal(plain.train()(image)[0], plain(image)[0])
    assert torch.equal(network.eval()(image)[0], plain(image)[0])


def test_dropout_acts_on_embedding_attention_and_mlp():
    network, image, tokens = tiny(dropout=0.3), draw(1, 2, 4, 9, 8), draw(1, 12, 24)
    block = network.blocks[0]
    for part, x in ((network.embed, image), (block.attn, tokens), (block.mlp, tokens)):
        assert not torch.equal(part(x), part(x)), part


@pytest.mark.parametrize("out_indices", [(2, 0), (0, 0), (0, 3), (-1, 2)])
def test_encoder_refuses_out_indices_out_of_range_or_order(out_indices):
    with pytest.raises(ValueError) as error:
        tiny(out_indices=out_indices)
    assert str(list(out_indices)) in str(error.value) and "from 0 to 2" in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"img_size": (4, 9, 10)}, r"image size \(4, 9, 10\) is not divisible by patch size \(2, 3, 4\)"),
        ({"img_size": 96, "patch_size": 10}, r"image size \(96, 96, 96\) .* patch size \(10, 10, 10\)"),
        ({"hidden_size": 20, "num_heads": 4}, "hidden size 20 is not divisible by 6"),
        ({"num_heads": 5}, "hidden size 24 is not divisible by 5 heads"),
    ],
)
def test_encoder_refuses_sizes_that_do_not_divide(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny(**changes)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 1, 4, 9, 8), r"\[1, 1, 4, 9, 8\] is not \[B, 2, H, W, D\]"),
        ((2, 4, 9, 8), r"\[2, 4, 9, 8\] is not \[B, 2, H, W, D\]"),
        ((1, 2, 4, 10, 8), r"image size \[4, 10, 8\] is not divisible by patch size \[2, 3, 4\]"),
    ],
)
def test_encoder_refuses_images_of_other_channels_or_sizes(shape, message):
    with pytest.raises(ValueError, match=message):
        tiny()(torch.zeros(shape))
