from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from shared_networks.networks.unetr import (
    HiEndUNETR,
    ResizeUpBlock,
    strict_segmenter,
    tokens_to_volume,
)
from shared_networks.networks.vit import attention_maps, interpolate_positions
from tests.benchmarks.window import PublishedUNETR

TINY: dict[str, Any] = {
    "in_channels": 2,
    "out_channels": 5,
    "img_size": (12, 18, 8),
    "patch_size": (6, 6, 4),  # grid (2, 3, 2)
    "feature_size": 4,
    "hidden_size": 24,
    "num_layers": 4,
    "num_heads": 3,
    "mlp_ratio": 2.0,
    "out_indices": (0, 1, 2),
}
POSITIONS = "vit.patch_embedding.position_embeddings"


def tiny(**changes: Any) -> HiEndUNETR:
    torch.manual_seed(0)
    return HiEndUNETR(**{**TINY, **changes})


def draw(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def test_tokens_become_a_volume_in_row_major_order():
    tokens = torch.tensor([[[100.0 * h + 10 * w + d, -1.0] for h in range(2) for w in range(3) for d in range(4)]])
    volume = tokens_to_volume(tokens, [2, 3, 4])
    assert volume.shape == (1, 2, 2, 3, 4)
    assert volume[0, 0, 1, 2, 3] == 123 and volume[0, 0, 0, 1, 2] == 12
    assert (volume[:, 1] == -1).all()


def test_last_step_resizes_trilinearly_to_the_skip():
    torch.manual_seed(0)
    block, x, skip = ResizeUpBlock(3, 2, "instance"), draw(1, 3, 8, 16, 8), draw(1, 2, 12, 24, 6)
    resized = nn.functional.interpolate(x, size=(12, 24, 6), mode="trilinear", align_corners=False)
    torch.testing.assert_close(block(x, skip), block.conv_block(torch.cat([block.conv3d(resized), skip], dim=1)))


def test_decoder_climbs_from_the_last_tokens_past_the_intermediate_features():
    network, image = tiny().eval(), draw(1, 2, 12, 18, 8)
    last, features = network.vit(image)
    deep, middle, shallow = (tokens_to_volume(feature, [2, 3, 2]) for feature in reversed(features))
    skips = network.encoder4(deep), network.encoder3(middle), network.encoder2(shallow), network.encoder1(image)
    assert [tuple(skip.shape[1:]) for skip in skips] == [(32, 4, 6, 4), (16, 8, 12, 8), (8, 16, 24, 16), (4, 12, 18, 8)]
    x = tokens_to_volume(last, [2, 3, 2])
    for stage, skip in zip(
        (network.decoder5, network.decoder4, network.decoder3, network.decoder2), skips, strict=True
    ):
        x = stage(x, skip)
        assert x.shape == skip.shape
    torch.testing.assert_close(network(image), network.out(x))


@pytest.mark.parametrize(
    ("img_size", "patch_size", "channels"), [(24, 12, 1), ((16, 8, 24), 8, 3), ((12, 18, 8), (6, 6, 4), 2)]
)
def test_logits_have_the_size_of_the_image(img_size, patch_size, channels):
    network = tiny(img_size=img_size, patch_size=patch_size, in_channels=channels)
    size = (img_size,) * 3 if isinstance(img_size, int) else img_size
    assert network(draw(1, channels, *size)).shape == (1, 5, *size)


@pytest.mark.parametrize(
    ("num_upsamples", "sizes"),
    [
        (2, [(32, 2, 3, 2), (16, 4, 6, 4), (8, 8, 12, 8)]),
        (1, [(32, 2, 3, 2), (16, 2, 3, 2), (8, 4, 6, 4)]),
    ],
)
def test_fewer_upsamplings_leave_deep_features_on_the_token_grid(num_upsamples, sizes):
    network, image = tiny(num_upsamples=num_upsamples).eval(), draw(1, 2, 12, 18, 8)
    _, features = network.vit(image)
    deep, middle, shallow = (tokens_to_volume(feature, [2, 3, 2]) for feature in reversed(features))
    skips = network.encoder4(deep), network.encoder3(middle), network.encoder2(shallow)
    assert [tuple(skip.shape[1:]) for skip in skips] == sizes
    with torch.no_grad():
        logits = network(image)
        assert logits.shape == (1, 5, 12, 18, 8)
        torch.testing.assert_close(torch.jit.script(network)(image), logits)
    network(image).square().mean().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


@pytest.mark.parametrize("size", [(6, 24, 12), (18, 12, 4)])
def test_other_image_sizes_use_interpolated_positions(size):
    network, same, image = tiny(), tiny(img_size=size), draw(1, 2, *size)
    same.load_state_dict({**network.state_dict(), POSITIONS: same.get_parameter(POSITIONS)})
    logits = network(image)
    assert logits.shape == (1, 5, *size)
    assert (same(image) - logits).abs().max() > 1e-3  # its own table is another one
    same.get_parameter(POSITIONS).data = interpolate_positions(
        network.get_parameter(POSITIONS), [2, 3, 2], same.vit.grid
    )
    torch.testing.assert_close(same(image), logits)


@pytest.mark.parametrize("batch", [1, 2])
def test_inference_order_changes_neither_logits_nor_the_published_network(batch):
    network, image = tiny(in_channels=1), draw(batch, 1, 12, 18, 8)
    published = PublishedUNETR(network)
    assert list(network.state_dict()) == list(published.state_dict())
    trained = network(image)
    torch.testing.assert_close(trained, published(image))
    with torch.no_grad():
        logits = network(image)
    assert logits.is_contiguous()
    torch.testing.assert_close(logits, trained, atol=1e-4, rtol=0)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert (network(image) - logits).abs().mean() < 0.05 * logits.std()


def test_gradients_are_those_of_the_published_network():
    network, image = tiny(), draw(1, 2, 12, 18, 8)
    published = PublishedUNETR(network)
    gradients = [torch.autograd.grad(n(image).square().mean(), list(n.parameters())) for n in (network, published)]
    torch.testing.assert_close(*gradients)


def test_encoder_is_the_fine_tuning_one():
    network = tiny()
    assert network.vit.cls_token is None
    assert network.get_parameter(POSITIONS).requires_grad
    assert {module.eps for module in network.vit.modules() if isinstance(module, nn.LayerNorm)} == {1e-5}


def test_every_parameter_is_trained():
    network = tiny()
    network(draw(1, 2, 12, 18, 8)).square().mean().backward()
    assert [name for name, p in network.named_parameters() if p.grad is None] == []


def test_dropout_acts_in_training_only():
    network, plain, image = tiny(dropout=0.3), tiny(), draw(1, 2, 12, 18, 8)
    plain.load_state_dict(network.state_dict())
    assert not torch.equal(network.train()(image), network(image))
    assert torch.equal(plain.train()(image), plain(image))
    assert torch.equal(network.eval()(image), plain.eval()(image))


def test_attention_maps_of_the_encoder():
    network, image = tiny().eval(), draw(1, 2, 12, 18, 8)
    with torch.no_grad(), attention_maps(network) as maps:
        watched = network(image)
    with torch.no_grad():
        assert torch.equal(watched, network(image))
    assert {name: tuple(m.shape) for name, m in maps.items()} == {
        f"vit.blocks.{i}.attn": (1, 3, 12, 12) for i in range(4)
    }


def test_checkpointing_changes_neither_logits_nor_gradients():
    plain, recomputing, image = tiny(), tiny(use_checkpoint=True), draw(1, 2, 12, 18, 8)
    calls: list[nn.Module] = []
    for block in recomputing.vit.blocks:
        block.register_forward_pre_hook(lambda module, inputs: calls.append(module))
    logits = [network(image) for network in (plain, recomputing)]
    assert torch.equal(*logits)
    for output in logits:
        output.square().mean().backward()
    assert len(calls) == 2 * 4  # each block once forward and once more backward
    for (name, p), q in zip(plain.named_parameters(), recomputing.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad), name


def test_checkpointing_repeats_the_same_dropout():
    plain, recomputing = tiny(dropout=0.3), tiny(dropout=0.3, use_checkpoint=True)
    gradients = []
    for network in (plain, recomputing):
        torch.manual_seed(7)
        network(draw(1, 2, 12, 18, 8)).square().mean().backward()
        gradients.append(network.vit.blocks[0].mlp.linear1.weight.grad)
    assert torch.equal(*gradients)


def test_torchscript_gives_the_same_logits():
    network = tiny().eval()
    scripted = torch.jit.script(network)
    for size in ((12, 18, 8), (6, 24, 12)):
        image = draw(1, 2, *size)
        torch.testing.assert_close(scripted(image), network(image))


def test_loading_is_as_strict_as_asked():
    network, other = tiny(), tiny()
    weights = network.state_dict()
    half = {name: tensor + 1 for name, tensor in list(weights.items())[::2]} | {"extra": torch.zeros(1)}
    keys = other.load_state_dict(half, strict=False)
    assert keys.missing_keys == list(weights)[1::2] and keys.unexpected_keys == ["extra"]
    for number, (name, tensor) in enumerate(other.state_dict().items()):
        torch.testing.assert_close(tensor, weights[name] + (number + 1) % 2)
    with pytest.raises(RuntimeError, match="Missing key"):
        other.load_state_dict(half)


@pytest.mark.parametrize(("change", "message"), [({}, "Missing key"), ({"extra": torch.zeros(1)}, "Unexpected key")])
def test_a_served_network_is_never_loaded_in_part(change, message):
    network = strict_segmenter(**TINY)
    weights = network.state_dict()
    part = {**weights, **change} if change else dict(list(weights.items())[::2])
    with pytest.raises(RuntimeError, match=message):
        copy.deepcopy(network).load_state_dict(part, strict=False)
    copy.deepcopy(network).load_state_dict(weights, strict=False)
    image = draw(1, 2, 12, 18, 8)
    with torch.no_grad():
        torch.testing.assert_close(torch.jit.script(network)(image), network(image))


@pytest.mark.parametrize("out_indices", [(0, 1), (0, 1, 2, 3), ()])
def test_network_needs_three_out_indices(out_indices):
    with pytest.raises(ValueError, match="must be three") as error:
        tiny(out_indices=out_indices)
    assert str(list(out_indices)) in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"out_indices": (0, 1, 4)}, r"out_indices \[0, 1, 4\] must be ascending block indices from 0 to 3"),
        ({"img_size": (12, 20, 8)}, r"image size \(12, 20, 8\) is not divisible by patch size \(6, 6, 4\)"),
        ({"hidden_size": 20}, "hidden size 20 is not divisible by 6"),
        ({"num_heads": 5}, "hidden size 24 is not divisible by 5 heads"),
        ({"num_upsamples": 0}, "num_upsamples is 0; give 3, 2 for patches below 8 voxels, or 1 below 4"),
    ],
)
def test_network_refuses_sizes_and_out_indices_that_do_not_fit(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny(**changes)


def test_network_refuses_images_of_other_channels_or_sizes():
    with pytest.raises(ValueError, match=r"\[1, 1, 12, 18, 8\] is not \[B, 2, H, W, D\]"):
        tiny()(torch.zeros(1, 1, 12, 18, 8))
    with pytest.raises(ValueError, match=r"image size \[12, 18, 9\] is not divisible by patch size \[6, 6, 4\]"):
        tiny()(torch.zeros(1, 2, 12, 18, 9))
