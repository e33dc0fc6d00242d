from __future__ import annotations

import math
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser
from monai.data import MetaTensor
from monai.losses import DiceCELoss
from torch import Tensor

from shared_networks.networks.hi_end_mae import HiEndMAE
from shared_networks.networks.unetr import HiEndUNETR
from shared_networks.training.handlers import PrepareBatchSelfSupervised
from shared_networks.training.loss import MaskedPatchLoss
from shared_networks.training.optim import layerwise_groups, parameter_groups
from tests.conftest import ROOT

PRETRAIN = ROOT / "hi_end_mae_pretrain" / "configs" / "train.json"
VIT = {"img_size": 12, "patch_size": 6, "hidden_size": 12, "num_heads": 2}


def tiny_mae() -> HiEndMAE:
    torch.manual_seed(0)
    decoder = {"decoder_hidden_size": 12, "decoder_num_heads": 2, "decoder_self_layers": 1}
    return HiEndMAE(**VIT, **decoder, num_layers=2, out_indices=(1,))


def two_voxel_patches(*patches: list[float]) -> Tensor:
    """A volume of a column of patches of 1 x 1 x 2 voxels."""
    return torch.tensor(patches).reshape(1, 1, 1, len(patches), 2)


def test_loss_is_the_mean_over_hidden_patches():
    image = two_voxel_patches([3, 5], [0, 20], [10, 4])  # masked ones standardise to (-1, 1) and (1, -1)
    predicted = two_voxel_patches([700, -900], [0.5, 0.0], [1.0, 1.0])
    mask = two_voxel_patches([0, 0], [1, 1], [1, 1])
    loss = MaskedPatchLoss((1, 1, 2))(torch.cat([predicted, mask], dim=1), image)
    # ((1.5^2 + 1^2) / 2 + (0 + 2^2) / 2) / 2
    assert loss.item() == pytest.approx(1.8125, abs=1e-5)


def test_loss_standardises_all_channels_of_a_patch_together():
    image = torch.tensor([0.0, 2.0, 4.0, 6.0]).reshape(1, 2, 1, 1, 2)  # mean 3, variance 5
    prediction = torch.tensor([1.0, 0.0, 0.0, 0.0, 1.0, 1.0]).reshape(1, 3, 1, 1, 2)
    # ((1 + 3 / sqrt 5)^2 + (1 + 1 + 9) / 5) / 4; channel by channel it would be 1.75
    assert MaskedPatchLoss((1, 1, 2))(prediction, image).item() == pytest.approx((5 + 6 / math.sqrt(5)) / 4, abs=1e-5)


def test_loss_of_an_even_patch_is_finite():
    prediction = torch.cat([two_voxel_patches([1, 3]), two_voxel_patches([1, 1])], dim=1)
    assert MaskedPatchLoss((1, 1, 2))(prediction, two_voxel_patches([7, 7])).item() == pytest.approx(5.0)


def test_only_hidden_patches_get_a_gradient():
    predicted = torch.rand(1, 1, 1, 3, 2, requires_grad=True)
    mask = two_voxel_patches([1, 1], [0, 0], [1, 1])
    MaskedPatchLoss((1, 1, 2))(torch.cat([predicted, mask], dim=1), torch.rand(1, 1, 1, 3, 2)).backward()
    assert torch.equal(predicted.grad != 0, mask == 1)


def test_loss_of_the_target_itself_is_zero():
    torch.manual_seed(0)
    image = torch.rand(2, 2, 4, 6, 4)
    prediction = torch.ones(2, 3, 4, 6, 4)
    for b, h, w in product(range(2), (0, 2), (0, 3)):
        patch = image[b, :, h : h + 2, w : w + 3]
        prediction[b, :2, h : h + 2, w : w + 3] = (patch - patch.mean()) / (patch.var(correction=0) + 1e-6).sqrt()
    assert MaskedPatchLoss((2, 3, 4))(prediction, image).item() == pytest.approx(0, abs=1e-10)
    assert MaskedPatchLoss((2, 3, 2))(prediction, image).item() > 1e-3


def test_loss_is_computed_in_float32():
    torch.manual_seed(0)
    image = 1000 + torch.rand(1, 1, 4, 4, 4)  # bfloat16 cannot tell these values apart
    prediction = torch.cat([torch.rand(1, 1, 4, 4, 4), torch.ones(1, 1, 4, 4, 4)], dim=1).bfloat16()
    loss = MaskedPatchLoss(2)(prediction, image)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, MaskedPatchLoss(2)(prediction.float(), image))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(MaskedPatchLoss(2)(prediction, image), loss)
    assert MaskedPatchLoss(2)(prediction, image.bfloat16()).dtype == torch.float32


def test_loss_of_a_network_in_bfloat16_is_close_to_that_in_float32():
    network, image = tiny_mae().eval(), torch.rand(2, 1, 12, 12, 12, generator=torch.Generator().manual_seed(0))
    loss = MaskedPatchLoss(6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        reduced = loss(network(image), image)
    assert reduced.item() == pytest.approx(loss(network(image), image).item(), rel=0.02)


@pytest.mark.parametrize("shape", [(1, 1, 4, 4, 4), (1, 3, 4, 4, 4), (1, 2, 4, 4, 2)])
def test_loss_refuses_predictions_of_another_shape(shape):
    with pytest.raises(ValueError) as error:
        MaskedPatchLoss(2)(torch.zeros(shape), torch.zeros(1, 1, 4, 4, 4))
    assert str(list(shape)) in str(error.value) and "[1, 1, 4, 4, 4]" in str(error.value)


def grouped_names(network: torch.nn.Module) -> tuple[set[str], set[str]]:
    names = {id(p): name for name, p in network.named_parameters()}
    groups = parameter_groups(network, 0.05)
    assert [group["weight_decay"] for group in groups] == [0.05, 0.0]
    decayed, undecayed = ([names[id(p)] for p in group["params"]] for group in groups)
    trainable = [name for name, p in network.named_parameters() if p.requires_grad]
    assert sorted(decayed + undecayed) == sorted(trainable)  # each exactly once
    return set(decayed), set(undecayed)


def test_pretraining_decays_weight_matrices_alone():
    decayed, undecayed = grouped_names(tiny_mae())
    block = ("attn.qkv", "attn.out_proj", "mlp.linear1", "mlp.linear2")
    cross = ("self_attn.qkv", "self_attn.out_proj", "cross_attn.q", "cross_attn.kv", "cross_attn.out_proj")
    linears = {
        "vit.patch_embedding.patch_embeddings.1",
        *(f"vit.blocks.{i}.{name}" for i in range(2) for name in block),
        "decoder.decoder_embeds.0",
        "decoder.decoder_embeds.1",
        *(f"decoder.blocks.0.{name}" for name in block),
        *(f"decoder.cross_blocks.0.{name}" for name in (*cross, *block[2:])),
        "decoder.head",
    }
    norms = {
        *(f"vit.blocks.{i}.norm{j}" for i in range(2) for j in (1, 2)),
        "vit.norm",
        *(f"decoder.blocks.0.norm{j}" for j in (1, 2)),
        *(f"decoder.cross_blocks.0.norm{j}" for j in (0, 1, 2)),
        "decoder.norm",
    }
    assert decayed == {f"{name}.weight" for name in linears}
    assert undecayed == {
        *(f"{name}.bias" for name in linears),
        *(f"{name}.{kind}" for name in norms for kind in ("weight", "bias")),
        "vit.cls_token",
        "decoder.mask_token",
    }


def test_fine_tuning_spares_its_trainable_positions():
    network = HiEndUNETR(**VIT, out_channels=3, feature_size=2, num_layers=3, out_indices=(0, 1, 2))
    network.vit.norm.requires_grad_(False)
    decayed, undecayed = grouped_names(network)
    assert undecayed == {
        "vit.patch_embedding.position_embeddings",
        "vit.patch_embedding.patch_embeddings.1.bias",
        *(f"vit.blocks.{i}.norm{j}.{kind}" for i in range(3) for j in (1, 2) for kind in ("weight", "bias")),
        *(f"vit.blocks.{i}.{name}.bias" for i in range(3) for name in ("attn.qkv", "attn.out_proj")),
        *(f"vit.blocks.{i}.mlp.linear{j}.bias" for i in range(3) for j in (1, 2)),
        "decoder2.conv3d.bias",
        "out.conv.conv.bias",
    }
    assert {"encoder1.layer.conv1.conv.weight", "decoder5.transp_conv.conv.weight", "out.conv.conv.weight"} <= decayed


def test_adamw_takes_the_groups_and_decays_only_the_first():
    network = tiny_mae()
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    optimizer = torch.optim.AdamW(parameter_groups(network, 0.5), lr=0.1)
    for p in network.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    after = dict(network.named_parameters())
    weight, token = "decoder.head.weight", "vit.cls_token"
    torch.testing.assert_close(after[weight], before[weight] * (1 - 0.1 * 0.5))
    assert before[token].any() and torch.equal(after[token], before[token])


def test_published_schedule_warms_up_linearly_and_ends_at_zero():
    parser = ConfigParser()
    parser.read_config(PRETRAIN)
    steps_an_epoch = 4
    parser["parameter_groups"] = [{"params": [torch.nn.Parameter(torch.zeros(1))]}]
    parser["train"]["dataloader"] = [None] * steps_an_epoch
    schedule = parser.get_parsed_content("lr_scheduler")
    warm_up, total = 10 * steps_an_epoch, 1000 * steps_an_epoch
    rates = [schedule.get_last_lr()[0]]
    for _ in range(total):
        schedule.optimizer.step()
        schedule.step()
        rates.append(schedule.get_last_lr()[0])
    assert rates[0] == pytest.approx(1e-4 / warm_up)  # the first step trains
    assert rates[: warm_up + 1] == pytest.approx(np.linspace(rates[0], 1e-4, warm_up + 1))
    assert rates[warm_up] == pytest.approx(1e-4) == max(rates)
    assert rates[(warm_up + total) // 2] == pytest.approx(0.5e-4)
    assert rates[warm_up + (total - warm_up) // 4] == pytest.approx(1e-4 * (1 + math.cos(math.pi / 4)) / 2)
    assert rates[total] == pytest.approx(0, abs=1e-12)
    assert schedule.optimizer.defaults["betas"] == (0.9, 0.95)


def test_the_image_is_its_own_target():
    image = MetaTensor(torch.rand(2, 1, 4, 4, 4))
    inputs, targets = PrepareBatchSelfSupervised()({"image": image, "label": torch.zeros(2)}, "cpu")
    assert inputs is targets and torch.equal(inputs, image)


def test_batches_are_moved_and_converted():
    inputs, targets = PrepareBatchSelfSupervised()({"image": torch.rand(2, 1, 4, 4, 4)}, "meta", True, dtype=torch.half)
    assert inputs is targets
    assert inputs.device.type == "meta" and inputs.dtype == torch.half


def test_background_weight_of_one_is_the_published_loss():
    """The segmenters' configs pass class weights always; at their default of 1 they must change nothing."""
    torch.manual_seed(0)
    logits, labels = torch.randn(2, 5, 4, 3, 2), torch.randint(0, 5, (2, 1, 4, 3, 2))
    settings: dict[str, Any] = {"to_onehot_y": True, "softmax": True, "squared_pred": True}
    plain = DiceCELoss(**settings)(logits, labels)
    torch.testing.assert_close(DiceCELoss(**settings, weight=torch.ones(5))(logits, labels), plain)
    assert DiceCELoss(**settings, weight=torch.tensor([0.05, 1, 1, 1, 1]))(logits, labels) != plain


def segmenter() -> HiEndUNETR:
    return HiEndUNETR(**VIT, out_channels=3, feature_size=2, num_layers=3, out_indices=(0, 1, 2))


def test_layers_nearer_the_input_learn_more_slowly() -> None:
    network = segmenter()
    names = {id(p): name for name, p in network.named_parameters()}
    groups = {g["lr"]: {names[id(p)] for p in g["params"]} for g in layerwise_groups(network, 0.1, 0.5)}
    assert [pytest.approx(rate) for rate in groups] == [0.1, 0.05, 0.025, 0.0125, 0.00625]
    behind, *blocks, patches = groups.values()
    assert all(name.startswith(f"vit.blocks.{2 - i}.") for i, block in enumerate(blocks) for name in block)
    assert patches == {name for name in names.values() if name.startswith("vit.patch_embedding.")}
    assert "vit.norm.weight" in behind and "out.conv.conv.weight" in behind
    assert sum(map(len, groups.values())) == len(names)


def test_without_decay_all_learn_alike_and_a_frozen_encoder_not_at_all() -> None:
    network = segmenter()
    (group,) = layerwise_groups(network, 0.1)
    assert len(group["params"]) == len(list(network.parameters()))
    (group,) = layerwise_groups(network, 0.1, freeze_encoder=True)
    frozen = {name for name, p in network.named_parameters() if not p.requires_grad}
    assert frozen == {name for name, _ in network.named_parameters() if name.startswith("vit.")}
    assert len(group["params"]) == len(list(network.parameters())) - len(frozen)


@pytest.mark.parametrize("decay", [0, 1.5])
def test_a_layer_decay_out_of_range_is_refused(decay: float) -> None:
    with pytest.raises(ValueError, match=f"layer_decay is {decay}; it must be above 0"):
        layerwise_groups(segmenter(), 0.1, decay)
