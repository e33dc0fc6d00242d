from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from shared_networks.networks.hi_end_mae import CrossAttentionBlock, HiEndMAE, restore_intensities, standardise_patches
from shared_networks.networks.vit import attention_maps, patchify, unpatchify

SIZE = (4, 9, 16)
TINY: dict[str, Any] = {
    "in_channels": 2,
    "img_size": SIZE,
    "patch_size": (2, 3, 4),  # 24 patches of 48 values
    "hidden_size": 24,
    "num_layers": 4,
    "num_heads": 3,
    "mlp_ratio": 2.0,
    "decoder_hidden_size": 18,
    "decoder_num_heads": 2,
    "decoder_self_layers": 1,
    "out_indices": (0, 2),
}
LENGTH = 24


def tiny(**changes: Any) -> HiEndMAE:
    torch.manual_seed(0)
    return HiEndMAE(**{**TINY, **changes})


def draw(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def million(module: nn.Module) -> float:
    return sum(p.numel() for p in module.parameters() if p.requires_grad) / 1e6


def hidden_patches(prediction: Tensor) -> Tensor:
    """Mask of the patches, [B, L, voxels of a patch]."""
    return patchify(prediction[:, -1:], [2, 3, 4])


def test_default_network_has_the_papers_size():
    with torch.device("meta"):
        network = HiEndMAE()
    assert million(network) == pytest.approx(366.9, abs=0.05)
    assert million(network.vit) == pytest.approx(342.6, abs=0.05)
    assert million(network.decoder.decoder_embeds) == pytest.approx(4 * (1536 * 528 + 528) / 1e6)
    assert million(network.decoder) - million(network.decoder.decoder_embeds) == pytest.approx(21.0, abs=0.05)


def test_tokens_start_small_linears_xavier_and_biases_zero():
    network = tiny(
        hidden_size=1536, num_layers=1, num_heads=16, mlp_ratio=0.1, decoder_hidden_size=1536, out_indices=[0]
    )
    for token in (network.vit.cls_token, network.decoder.mask_token):
        assert token.std().item() == pytest.approx(0.02, rel=0.06)
        assert abs(token.mean().item()) < 0.002
    for name, module in network.named_modules():
        if isinstance(module, nn.Linear):
            bound = math.sqrt(6 / (module.in_features + module.out_features))
            assert 0.99 * bound < module.weight.abs().max() <= bound, name
            assert not module.bias.any(), name


def test_norms_have_the_published_epsilon_and_positions_are_fixed():
    network = tiny()
    assert {m.eps for m in network.modules() if isinstance(m, nn.LayerNorm)} == {1e-6}
    frozen = {name for name, p in network.named_parameters() if not p.requires_grad}
    assert frozen == {"vit.patch_embedding.position_embeddings", "decoder.position_embeddings"}


def test_patches_are_standardised_one_by_one():
    patches = torch.tensor([[[1.0, 3.0], [5.0, 5.0]], [[0.0, 20.0], [-2.0, 2.0]]])
    scaled = [[[-1.0, 1.0], [0.0, 0.0]], [[-1.0, 1.0], [-1.0, 1.0]]]
    torch.testing.assert_close(standardise_patches(patches), torch.tensor(scaled), rtol=0, atol=1e-6)
    # The epsilon goes to the variance: a patch of standard deviation 1e-3 is shrunk by the square root of 2.
    torch.testing.assert_close(standardise_patches(torch.tensor([[[0.0, 2e-3]]]))[0, 0, 1].item(), math.sqrt(0.5))


def test_cross_block_reads_the_context_unnormalised():
    torch.manual_seed(0)
    block, y, context = CrossAttentionBlock(12, 2, mlp_ratio=2.0, norm_eps=1e-6), draw(2, 5, 12), draw(2, 3, 12)
    first = y + block.self_attn(block.norm0(y))
    second = first + block.cross_attn(block.norm1(first), context)
    torch.testing.assert_close(block(y, context), second + block.mlp(block.norm2(second)))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [SIZE, (2, 12, 24)])
def test_output_is_the_prediction_and_the_mask(channels, size):
    network = tiny(in_channels=channels)
    output = network(draw(2, channels, *size))
    assert output.shape == (2, channels + 1, *size)
    mask = hidden_patches(output)
    assert torch.equal(mask, mask[..., :1].expand_as(mask))  # whole patches
    assert set(mask.unique().tolist()) == {0.0, 1.0}
    length = mask.shape[1]
    assert mask[..., 0].sum(dim=1).tolist() == [length - length // 4] * 2


@pytest.mark.parametrize(("mask_ratio", "visible"), [(0.75, 6), (0.5, 12), (0.9, 2), (0.3, 16)])
def test_mask_ratio_leaves_its_share_visible(mask_ratio, visible):
    network = tiny(mask_ratio=mask_ratio)
    assert network.num_visible(LENGTH) == visible
    assert network(draw(1, 2, *SIZE))[:, -1].mean().item() == pytest.approx((LENGTH - visible) / LENGTH)


def test_mask_and_prediction_lie_where_ids_shuffle_says():
    network, image = tiny(), draw(2, 2, *SIZE)
    ids_shuffle = torch.stack([torch.arange(LENGTH).flip(0), torch.arange(LENGTH).roll(5)])
    output = network(image, ids_shuffle)
    tokens = network.decode(*network.encode(image, ids_shuffle), ids_shuffle, [2, 3, 4])
    assert tokens.shape == (2, 1 + LENGTH, 48)
    for b in range(2):
        seen = ids_shuffle[b, :6]
        assert hidden_patches(output)[b, :, 0].nonzero().flatten().tolist() == sorted(
            set(range(24)) - set(seen.tolist())
        )
        predicted = patchify(output[:, :-1], [2, 3, 4])[b]
        assert torch.equal(predicted[ids_shuffle[b]], tokens[b, 1:])


def test_hidden_voxels_do_not_influence_the_prediction():
    network, image = tiny().eval(), draw(2, 2, *SIZE)
    output = network(image)
    masked = output[:, -1:]
    assert torch.equal(network(image + 100 * masked), output)
    assert not torch.equal(network(image + 100 * (1 - masked)), output)


@pytest.mark.parametrize("out_indices", [(), (3,), (0, 2), (0, 1, 2, 3)])
def test_decoder_reads_the_features_deep_to_shallow(out_indices):
    network, image = tiny(out_indices=out_indices).eval(), draw(2, 2, *SIZE)
    decoder, ids_shuffle = network.decoder, network.shuffle(2, LENGTH)
    latent, features = network.encode(image, ids_shuffle)
    assert len(features) == len(out_indices) == len(decoder.cross_blocks) == len(decoder.decoder_embeds) - 1

    seen, positions = decoder.decoder_embeds[-1](latent), decoder.position_embeddings[0][ids_shuffle]
    tokens = torch.cat([seen[:, 1:], decoder.mask_token.expand(2, LENGTH - 6, -1)], dim=1) + positions
    y = decoder.blocks[0](torch.cat([seen[:, :1], tokens], dim=1))
    for block, embed, feature in zip(decoder.cross_blocks, decoder.decoder_embeds[-2::-1], features[::-1], strict=True):
        y = block(y, embed(feature))
    torch.testing.assert_close(network.decode(latent, features, ids_shuffle, [2, 3, 4]), decoder.head(decoder.norm(y)))


def test_every_trainable_parameter_gets_a_gradient():
    network = tiny()
    network(draw(2, 2, *SIZE)).square().mean().backward()
    without = {name for name, p in network.named_parameters() if p.grad is None}
    assert without == {"vit.patch_embedding.position_embeddings", "decoder.position_embeddings"}


def test_evaluation_hides_the_same_patches_and_training_others():
    network, image = tiny(), draw(2, 2, *SIZE)
    network.eval()
    first, second = network(image), network(image)
    assert torch.equal(first, second)
    assert torch.equal(network(image[:1])[:, -1], first[:1, -1])  # whatever the batch
    assert not torch.equal(first[0, -1], first[1, -1])
    network.train()
    assert not torch.equal(network(image)[:, -1], network(image)[:, -1])


@pytest.mark.parametrize("training", [True, False])
def test_shuffles_are_permutations(training):
    shuffled = tiny().train(training).shuffle(5, LENGTH)
    assert torch.equal(shuffled.sort(dim=1).values, torch.arange(LENGTH).expand(5, -1))
    assert len(shuffled.unique(dim=0)) == 5


def test_evaluation_does_not_disturb_the_random_state():
    network = tiny().eval()
    state = torch.get_rng_state()
    network(draw(1, 2, *SIZE))
    assert torch.equal(torch.get_rng_state(), state)


def test_other_image_sizes_interpolate_both_position_tables():
    network, larger = tiny(), tiny(img_size=(6, 6, 24))
    image, ids_shuffle = draw(1, 2, 6, 6, 24), network.shuffle(1, 36)
    positions = {"vit.patch_embedding.position_embeddings", "decoder.position_embeddings"}
    weights = {name: tensor for name, tensor in network.state_dict().items() if name not in positions}
    larger.load_state_dict(weights, strict=False)
    assert (larger(image, ids_shuffle) - network(image, ids_shuffle)).abs().max() > 1e-3
    for name in positions:
        table = network.state_dict()[name].transpose(1, 2).unflatten(2, (2, 3, 4))
        resized = nn.functional.interpolate(table, size=(3, 2, 6), mode="trilinear").flatten(2).transpose(1, 2)
        larger.get_parameter(name).data = resized
    torch.testing.assert_close(larger(image, ids_shuffle), network(image, ids_shuffle))


def test_attention_maps_name_self_and_cross_attention():
    network, image = tiny().eval(), draw(2, 2, *SIZE)
    with torch.no_grad(), attention_maps(network) as maps:
        watched = network(image)
    assert torch.equal(watched, network(image))
    encoder = {f"vit.blocks.{i}.attn" for i in range(4)}
    cross = {f"decoder.cross_blocks.{i}.{kind}_attn" for i in range(2) for kind in ("self", "cross")}
    assert maps.keys() == encoder | cross | {"decoder.blocks.0.attn"}
    assert maps["vit.blocks.0.attn"].shape == (2, 3, 7, 7)
    assert maps["decoder.cross_blocks.0.self_attn"].shape == (2, 2, 25, 25)
    assert maps["decoder.cross_blocks.0.cross_attn"].shape == (2, 2, 25, 7)
    for found in maps.values():
        torch.testing.assert_close(found.sum(dim=-1), torch.ones(found.shape[:-1]))


def test_cross_attention_map_is_softmax_of_queries_and_context():
    torch.manual_seed(0)
    block, y, context = CrossAttentionBlock(12, 2, mlp_ratio=2.0, norm_eps=1e-6), draw(1, 5, 12), draw(1, 3, 12)
    with torch.no_grad(), attention_maps(block) as maps:
        block(y, context)
    query = block.cross_attn.q(block.norm1(y + block.self_attn(block.norm0(y))))
    key = block.cross_attn.kv(context)[..., :12]
    for head in range(2):
        of_head = slice(6 * head, 6 * head + 6)
        scores = query[0, :, of_head] @ key[0, :, of_head].T / math.sqrt(6)
        torch.testing.assert_close(maps["cross_attn"][0, head], scores.softmax(dim=1))


def test_checkpointing_changes_neither_output_nor_gradients():
    plain, recomputing = tiny(), tiny(use_checkpoint=True)
    image, ids_shuffle = draw(2, 2, *SIZE), plain.shuffle(2, LENGTH)
    calls: list[nn.Module] = []
    for block in (*recomputing.vit.blocks, *recomputing.decoder.blocks, *recomputing.decoder.cross_blocks):
        block.register_forward_pre_hook(lambda module, inputs: calls.append(module))
    outputs = [network(image, ids_shuffle) for network in (plain, recomputing)]
    assert torch.equal(*outputs)
    for output in outputs:
        output.square().mean().backward()
    assert len(calls) == 2 * (4 + 1 + 2)  # each block once forward and once more backward
    for (name, p), q in zip(plain.named_parameters(), recomputing.parameters(), strict=True):
        assert p.grad is None if q.grad is None else torch.equal(p.grad, q.grad), name


@pytest.mark.parametrize("out_indices", [(0, 2), ()])
def test_torchscript_gives_the_same_output(out_indices):
    network, image = tiny(out_indices=out_indices), draw(2, 2, *SIZE)
    ids_shuffle = network.shuffle(2, LENGTH)
    scripted = torch.jit.script(network)
    torch.testing.assert_close(scripted(image, ids_shuffle), network(image, ids_shuffle))
    assert hidden_patches(scripted(image))[..., 0].sum(dim=1).tolist() == [18.0, 18.0]


@pytest.mark.parametrize(("mask_ratio", "visible"), [(0.0, 24), (1.0, 0), (0.97, 0), (-0.5, 36)])
def test_mask_ratio_must_leave_patches_to_see_and_to_predict(mask_ratio, visible):
    with pytest.raises(ValueError, match=rf"mask ratio {mask_ratio} leaves {visible} of 24 patches visible"):
        tiny(mask_ratio=mask_ratio)


def test_mask_ratio_is_checked_for_the_image_at_hand():
    with pytest.raises(ValueError, match=r"mask ratio 0\.75 leaves 0 of 3 patches visible"):
        tiny()(torch.zeros(1, 2, 2, 3, 12))


@pytest.mark.parametrize("shape", [(1, LENGTH), (2, LENGTH - 1), (2, LENGTH, 1)])
def test_ids_shuffle_must_be_of_the_batch_and_length(shape):
    with pytest.raises(ValueError) as error:
        tiny()(torch.zeros(2, 2, *SIZE), torch.zeros(shape, dtype=torch.long))
    assert str(list(shape)) in str(error.value) and "[2, 24]" in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"img_size": (4, 9, 18)}, r"image size \(4, 9, 18\) is not divisible by patch size \(2, 3, 4\)"),
        ({"hidden_size": 21}, "hidden size 21 is not divisible by 6"),
        ({"num_heads": 7}, "hidden size 24 is not divisible by 7 heads"),
        ({"decoder_hidden_size": 20}, "hidden size 20 is not divisible by 6"),
        ({"decoder_num_heads": 4}, "hidden size 18 is not divisible by 4 heads"),
        ({"out_indices": (0, 4)}, r"out_indices \[0, 4\] must be ascending block indices from 0 to 3"),
    ],
)
def test_network_refuses_sizes_and_out_indices_that_do_not_fit(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny(**changes)


def test_network_refuses_images_of_other_channels_or_sizes():
    with pytest.raises(ValueError, match=r"\[1, 1, 4, 9, 16\] is not \[B, 2, H, W, D\]"):
        tiny()(torch.zeros(1, 1, *SIZE))
    with pytest.raises(ValueError, match=r"image size \[4, 9, 15\] is not divisible by patch size \[2, 3, 4\]"):
        tiny()(torch.zeros(1, 2, 4, 9, 15))


def test_restored_patches_have_the_true_mean_and_deviation():
    image = 40 + 100 * draw(2, 2, *SIZE)
    noise = standardise_patches(draw(2, LENGTH, 48))
    restored = patchify(restore_intensities(unpatchify(noise, [2, 3, 4], [2, 3, 4]), image, (2, 3, 4)), [2, 3, 4])
    true = patchify(image, [2, 3, 4])
    torch.testing.assert_close(restored.mean(dim=-1), true.mean(dim=-1))
    # The deviation given back is the unbiased one: nearly the true one.
    torch.testing.assert_close(restored.std(dim=-1, correction=0), true.std(dim=-1), rtol=1e-4, atol=0)
    torch.testing.assert_close(restored, noise * (true.std(dim=-1) + 1e-6)[..., None] + true.mean(dim=-1)[..., None])


def test_restoring_refuses_sizes_that_do_not_divide():
    with pytest.raises(ValueError, match=r"image size \(4, 9, 16\) is not divisible by patch size \(2, 3, 5\)"):
        restore_intensities(torch.zeros(1, 1, *SIZE), torch.zeros(1, 1, *SIZE), (2, 3, 5))


@pytest.mark.parametrize(
    ("self_layers", "first"), [(1, "decoder.blocks.0.attn"), (0, "decoder.cross_blocks.0.self_attn")]
)
def test_local_init_starts_with_small_branches_but_for_the_first_block(self_layers: int, first: str) -> None:
    usual, local = (tiny(decoder_self_layers=self_layers, local_init=flag).state_dict() for flag in (False, True))
    branches = {"vit": 8, "decoder": 2 * self_layers + 6}  # each block's attentions and MLP
    assert usual.keys() == local.keys()
    for name, weight in usual.items():
        if name.startswith(first):
            assert torch.equal(weight, local[name]) == ("out_proj" in name), name
        elif name.endswith(("out_proj.weight", "linear2.weight")):
            torch.testing.assert_close(local[name], weight / branches[name.split(".")[0]] ** 0.5)
        elif name == "decoder.decoder_embeds.2.weight":
            torch.testing.assert_close(local[name], 0.3 * weight)
        else:
            assert torch.equal(weight, local[name]), name
