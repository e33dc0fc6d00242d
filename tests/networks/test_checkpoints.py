from __future__ import annotations

import json
import re
import shutil
import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from ignite.engine import Engine
from monai.bundle import ConfigParser, ConfigWorkflow, download_large_files
from monai.networks.nets import ViT
from torch import Tensor, nn

from shared_networks.datasets.record import read_record, save_tensors, training_record, write_model
from shared_networks.errors import InputError, input_error_in
from shared_networks.networks.checkpoints import (
    LoadReport,
    WeightsLoader,
    check_weights,
    convert_weights,
    half_precision,
    load_encoder,
    load_hi_end_mae,
    load_hi_end_mae_10k,
    load_segmenter,
    load_start_weights,
    network_settings,
    read_weights,
    shorten_names,
    to_monai_vit,
)
from shared_networks.networks.hi_end_mae import HiEndMAE
from shared_networks.networks.official import PATCH_WEIGHT, count_blocks, from_official, official_names, to_official
from shared_networks.networks.positions import token_grid
from shared_networks.networks.unetr import HiEndUNETR
from shared_networks.networks.vit import ViTEncoder, patchify, sincos_positions
from tests.conftest import BUNDLES, ROOT

PUBLISHED: dict[str, list[int]] = json.loads(
    (ROOT / "tests" / "data" / "official_checkpoint_keys_vit_large_p12.json").read_text()
)
POSITIONS = "vit.patch_embedding.position_embeddings"
PATCH = (2, 3, 4)
VIT: dict[str, Any] = {
    "in_channels": 2,
    "img_size": (4, 6, 12),
    "patch_size": PATCH,  # grid (2, 2, 3)
    "hidden_size": 24,
    "num_layers": 4,
    "num_heads": 3,
    "mlp_ratio": 2.0,
    "out_indices": (0, 1, 2),
}


def tiny_mae(**changes: Any) -> HiEndMAE:
    """A network whose every weight is random: zeros and ones would hide an exchange of biases or norms."""
    torch.manual_seed(1)
    decoder = {"decoder_hidden_size": 12, "decoder_num_heads": 2, "decoder_self_layers": 2}
    network = HiEndMAE(**{**VIT, **decoder, **changes})
    for parameter in network.parameters():
        nn.init.normal_(parameter)
    return network


def tiny_segmenter(**changes: Any) -> HiEndUNETR:
    torch.manual_seed(2)
    return HiEndUNETR(**{**VIT, "out_channels": 3, "feature_size": 2, **changes})


def save(content: Any, folder: Path, name: str = "model.pt") -> Path:
    torch.save(content, folder / name)
    return folder / name


def shapes(weights: dict[str, Tensor]) -> dict[str, list[int]]:
    return {name: list(tensor.shape) for name, tensor in weights.items()}


def assert_same_weights(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@pytest.fixture(scope="module")
def full_size() -> dict[str, Tensor]:
    """The weights of the paper's network, without values."""
    with torch.device("meta"):
        return HiEndMAE().state_dict()


def test_names_are_one_to_one_and_cover_the_published_checkpoint(full_size):
    names = official_names(12, 2, 3)
    assert {f"module.{name}" for name in names} == PUBLISHED.keys()
    assert len(set(names.values())) == len(names)
    assert set(names.values()) == full_size.keys()


def test_names_follow_the_depths():
    names = official_names(2, 0, 1)
    assert names["encoder.blocks.1.attn.proj.bias"] == "vit.blocks.1.attn.out_proj.bias"
    assert names["encoder_to_decoder.1.weight"] == "decoder.decoder_embeds.1.weight"
    assert (
        names["decoder.cross_attention_blocks.0.cross_attn.kv.weight"] == "decoder.cross_blocks.0.cross_attn.kv.weight"
    )
    top = [name.rsplit(".", 1)[0] for name in names]
    assert count_blocks(names, "encoder.blocks.") == 2 and count_blocks(names, "decoder.blocks.") == 0
    assert not {"encoder.blocks.2.norm1", "encoder_to_decoder.2", "decoder.cross_attention_blocks.1.norm0"} & set(top)


def test_published_checkpoint_has_the_shapes_of_the_full_network(full_size):
    published = {name: torch.empty(shape, device="meta") for name, shape in PUBLISHED.items()}
    assert shapes(from_official(published)) == shapes(full_size)
    assert shapes(to_official(full_size, (12, 12, 12))) == PUBLISHED


def test_conversion_to_official_names_and_back_keeps_every_value():
    weights = tiny_mae().state_dict()
    official = to_official(weights, PATCH)
    assert official["module.encoder.patch_embed.proj.weight"].shape == (24, 2, *PATCH)
    assert official.keys() == {f"module.{name}" for name in official_names(4, 2, 3)}
    assert_same_weights(from_official(official), weights)


def test_unknown_names_are_kept_one_way_and_refused_the_other():
    weights = tiny_mae().state_dict()
    extra = torch.zeros(1)
    assert from_official({**to_official(weights, PATCH), "module.momentum": extra})["momentum"] is extra
    with pytest.raises(KeyError, match="extra"):
        to_official({**weights, "extra": extra}, PATCH)


def test_patch_embedding_is_the_published_convolution():
    torch.manual_seed(0)
    convolution, image = nn.Conv3d(2, 24, kernel_size=PATCH, stride=PATCH), torch.rand(1, 2, 4, 6, 12)
    weight = convolution.weight.detach()
    expected = convolution(image).flatten(2).transpose(1, 2) - convolution.bias
    patches = patchify(image, list(PATCH))
    converted = from_official({"module.encoder.patch_embed.proj.weight": weight})[PATCH_WEIGHT]
    torch.testing.assert_close(patches @ converted.T, expected)
    naive = weight.flatten(1)  # the channel first: the published code's way, right for one channel only
    assert (patches @ naive.T - expected).abs().max() > 0.1


@pytest.mark.parametrize(
    "form", ["flat", "module prefix", "state_dict", "model", "official", "official without prefix", "with other things"]
)
def test_weights_are_read_in_every_form(form, tmp_path):
    weights = tiny_mae().state_dict()
    prefixed = {f"module.{name}": tensor for name, tensor in weights.items()}
    official = to_official(weights, PATCH)
    content = {
        "flat": weights,
        "module prefix": prefixed,
        "state_dict": {"state_dict": prefixed, "epoch": 3, "optimizer": {"state": {}}},
        "model": {"model": weights, "trainer": {"iteration": 7}},
        "official": {"state_dict": official, "epoch": 10, "scaler": {"scale": 65536.0}},
        "official without prefix": {name.removeprefix("module."): tensor for name, tensor in official.items()},
        "with other things": {**weights, "epoch": 3, "config": {"patch": 12}},
    }[form]
    assert_same_weights(read_weights(save(content, tmp_path)), weights)


def test_half_precision_is_half_the_size_and_read_as_float32(tmp_path):
    network = tiny_mae()
    weights = {**network.state_dict(), "count": torch.tensor(3)}
    halved = half_precision(weights, "model.pt")
    assert {t.dtype for name, t in halved.items() if name != "count"} == {torch.float16}
    assert halved["count"].dtype == torch.int64
    torch.save(halved, tmp_path / "small.pt")
    found = read_weights(tmp_path / "small.pt")
    assert all(t.dtype == weights[name].dtype for name, t in found.items())
    torch.testing.assert_close(found, weights, atol=1e-7, rtol=2**-11)
    del halved["count"]
    load_hi_end_mae(network, save(halved, tmp_path))
    assert {t.dtype for t in network.state_dict().values()} == {torch.float32}


@pytest.mark.parametrize("value", [7e4, float("inf"), float("nan")])
def test_weights_that_float16_cannot_hold_are_refused(value):
    with pytest.raises(InputError, match=r"^model\.pt: b has values beyond float16"):
        half_precision({"a": torch.ones(2), "b": torch.tensor([1.0, value])}, "model.pt")


def test_missing_checkpoint_is_named(tmp_path):
    with pytest.raises(InputError, match=r"nowhere\.pt: no such checkpoint\. Give the path of a model\.pt"):
        read_weights(tmp_path / "nowhere.pt")


@pytest.mark.parametrize("damage", ["empty", "garbage", "web page", "truncated"])
def test_unreadable_checkpoint_is_named(damage, tmp_path):
    file = save(tiny_mae().state_dict(), tmp_path, f"{damage}.pt")
    whole = file.read_bytes()
    file.write_bytes(
        {
            "empty": b"",
            "garbage": b"not a checkpoint\n",
            "web page": b"<!DOCTYPE html>",
            "truncated": whole[: len(whole) // 2],
        }[damage]
    )
    with pytest.raises(InputError) as error:
        read_weights(file)
    assert str(error.value).startswith(f"{file}: not a readable checkpoint (")
    assert "Download or train it again" in str(error.value)


class Intruder:
    """Touches a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.file,)


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    touched = tmp_path / "touched"
    file = save({**tiny_mae().state_dict(), "config": Intruder(touched)}, tmp_path)
    with pytest.raises(InputError) as error:
        read_weights(file)
    assert str(error.value).startswith(f"{file}: not a readable checkpoint (UnpicklingError)")
    assert not touched.exists()
    assert "weights_only" not in str(error.value)  # torch's own text advises to switch the protection off
    torch.load(file, weights_only=False)
    assert touched.exists()  # the intruder does work


@pytest.mark.parametrize(
    "content", [{"epoch": 3}, {}, {"state_dict": {"epoch": 3}}, {"model": None}, [torch.zeros(1)], torch.zeros(1), 3]
)
def test_checkpoint_without_weights_is_named(content, tmp_path):
    file = save(content, tmp_path)
    with pytest.raises(InputError) as error:
        read_weights(file)
    assert str(error.value).startswith(f"{file}: holds no state_dict of weights")


def test_weights_of_the_network_pass_the_check(tmp_path):
    network = tiny_segmenter()
    check_weights(save(network.state_dict(), tmp_path), network)
    check_weights(save({"model": network.state_dict()}, tmp_path), network)


def test_check_names_a_missing_file(tmp_path):
    with pytest.raises(InputError, match=r"model\.pt: no trained weights there\. Train first, or give --checkpoint"):
        check_weights(tmp_path / "model.pt", tiny_segmenter())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("shape", r"1 of \d+ tensors do not fit the network \(vit\.norm\.bias is \[25\] there, \[24\] here\)"),
        ("missing", r"1 of \d+ tensors do not fit the network \(vit\.norm\.bias is not there, \[24\] here\)"),
        ("unknown", r"1 of \d+ tensors do not fit the network \(vit\.cls_token is \[1, 1, 24\] there, not here\)"),
        ("several", r"2 of \d+ tensors do not fit the network \(vit\.cls_token"),
    ],
)
def test_check_quotes_what_does_not_fit(change, message, tmp_path):
    network = tiny_segmenter()
    weights = dict(network.state_dict())
    if change == "shape":
        weights["vit.norm.bias"] = torch.zeros(25)
    if change in ("missing", "several"):
        del weights["vit.norm.bias"]
    if change in ("unknown", "several"):
        weights["vit.cls_token"] = torch.zeros(1, 1, 24)
    file = save(weights, tmp_path)
    with pytest.raises(InputError, match=message) as error:
        check_weights(file, network)
    assert str(file) in str(error.value) and "tiny.json" in str(error.value)
    assert f"of {len(network.state_dict().keys() | weights.keys())} tensors" in str(error.value)


PARTS = {"train": [], "validation": [], "test": []}
PREPARED = {"modality": "CT", "spacing": [4.0, 4.0, 5.0], "intensity_range": [-160, 240], "img_size": [4, 6, 12]}


def recorded(network, folder, **preparation):
    """A model with the record of its training."""
    record = training_record("", PARTS, {**PREPARED, **preparation}, network=network_settings(network))
    write_model(network.state_dict(), folder / "model.pt", record)
    return folder / "model.pt"


def test_all_settings_of_the_training_are_named_at_once(tmp_path):
    """Also img_size, which changes the shape of the positions alone."""
    file = recorded(tiny_segmenter(), tmp_path)
    check_weights(file, tiny_segmenter(), PREPARED)
    now = {"modality": "MR", "spacing": [5.0, 5.0, 5.0], "intensity_range": [-160, 240], "img_size": [4, 6, 8]}
    with pytest.raises(InputError) as error:
        check_weights(file, tiny_segmenter(img_size=(4, 6, 8), num_heads=2), now)
    assert str(error.value) == (
        f"{file}: trained with other settings: modality was CT and is MR, spacing was [4.0, 4.0, 5.0] and is "
        "[5.0, 5.0, 5.0], img_size was [4, 6, 12] and is [4, 6, 8], network_def#num_heads was 3 and is 2. Pass "
        "--modality CT --spacing [4.0,4.0,5.0] --img_size [4,6,12] --network_def#num_heads 3"
    )


def test_other_configs_are_advised_with_the_settings_that_they_do_not_hold(tmp_path):
    file = recorded(tiny_segmenter(), tmp_path)
    with pytest.raises(InputError) as error:
        check_weights(file, tiny_segmenter(feature_size=5, img_size=(4, 6, 8)), {**PREPARED, "img_size": [4, 6, 8]})
    assert re.fullmatch(
        re.escape(f"{file}: ")
        + r"\d+ of \d+ tensors do not fit the network \(\w+\.[^)]*\); trained with other settings: "
        r"img_size was \[4, 6, 12\] and is \[4, 6, 8\]\. Give the configs that it was trained with "
        r"\(such as tiny\.json\), with --img_size \[4,6,12\], or the weights of this network\.",
        str(error.value),
    )


def test_check_says_where_weights_of_an_overlay_come_from(tmp_path):
    file = tmp_path / "weights" / "small.pt"
    with pytest.raises(InputError) as error:
        check_weights(file, tiny_segmenter())
    assert str(error.value) == (
        f"{file}: no trained weights there. Give --checkpoint a model.pt that these configs trained, or write it here "
        f"from one: python -m shared_networks.bundle.halve --checkpoint MODEL --output {file}"
    )


def test_encoder_lands_in_full_and_the_report_says_so(tmp_path, capsys):
    mae, segmenter = tiny_mae(), tiny_segmenter()
    before = {name: tensor.clone() for name, tensor in segmenter.state_dict().items()}
    file = save(mae.state_dict(), tmp_path)
    report = load_encoder(segmenter, file)

    encoder = {name for name in before if name.startswith("vit.")}
    others = mae.state_dict().keys() - encoder
    assert report == LoadReport(
        source=str(file),
        loaded=tuple(name for name in before if name in encoder),
        missing=(),
        unexpected=tuple(name for name in mae.state_dict() if name in others),
    )
    assert capsys.readouterr().out == (
        f"weights from {file}: {4 * 12 + 5} keys loaded into the encoder\n"
        "  missing keys: none\n"
        f"  unexpected keys, not used: vit.cls_token, decoder.* ({len(others) - 1})\n"
    )
    pretrained = mae.state_dict()
    after = segmenter.state_dict()
    assert_same_weights(after, {name: pretrained[name] if name in encoder else before[name] for name in before})
    assert segmenter.get_parameter(POSITIONS).requires_grad


def test_segmenter_then_computes_what_the_pretrained_encoder_does(tmp_path):
    mae, segmenter = tiny_mae(), tiny_segmenter()
    load_encoder(segmenter, save({"state_dict": to_official(mae.state_dict(), PATCH)}, tmp_path))
    encoder = ViTEncoder(**VIT, norm_eps=1e-5)
    encoder.load_state_dict({k: v for k, v in mae.vit.state_dict().items() if k != "cls_token"}, strict=True)
    image = torch.rand(1, 2, 4, 6, 12, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(segmenter.vit(image), encoder(image), rtol=0, atol=0)
    # Its tokens before the first block are those of the pre-training, patch by patch.
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))[None]
    torch.testing.assert_close(segmenter.vit.embed(image)[:, order[0]], mae.vit.embed(image, order))


def test_pretraining_may_start_from_an_encoder_too(tmp_path):
    source, network = tiny_mae(), tiny_mae(decoder_hidden_size=18)
    nn.init.zeros_(network.vit.norm.weight)
    report = load_encoder(network, save(source.state_dict(), tmp_path))
    assert "vit.cls_token" in report.loaded and not report.missing
    assert_same_weights(network.vit.state_dict(), source.vit.state_dict())


def test_another_token_grid_keeps_its_own_positions(tmp_path, capsys):
    mae, segmenter = tiny_mae(), tiny_segmenter(img_size=(8, 6, 12))
    own = segmenter.get_parameter(POSITIONS).clone()
    report = load_encoder(segmenter, save(mae.state_dict(), tmp_path))
    assert report.kept == (POSITIONS,) and POSITIONS not in report.loaded and not report.missing
    assert capsys.readouterr().out.endswith(f"\n  not loaded, as the checkpoint's does not fit: {POSITIONS}\n")
    assert torch.equal(segmenter.get_parameter(POSITIONS), own)
    assert torch.equal(segmenter.get_parameter("vit.norm.weight"), mae.get_parameter("vit.norm.weight"))


def trained(drift: float = 0.2, **changes: Any) -> HiEndUNETR:
    """A segmenter whose positions have moved from the table that they started from."""
    segmenter = tiny_segmenter(**changes)
    with torch.no_grad():
        segmenter.get_parameter(POSITIONS).add_(drift * torch.randn(segmenter.get_parameter(POSITIONS).shape))
    return segmenter


@pytest.mark.parametrize("load", [load_segmenter, load_encoder])
@pytest.mark.parametrize(
    ("there", "here", "grids"),
    [
        ((4, 6, 12), (8, 6, 16), "2 x 2 x 3 to 4 x 2 x 4"),
        ((4, 6, 8), (6, 9, 12), "2 x 2 x 2 to 3 x 3 x 3"),
        ((4, 6, 12), (6, 6, 8), "2 x 2 x 3 to 3 x 2 x 2"),  # as many tokens
        ((2, 12, 8), (4, 6, 8), "1 x 4 x 2 to 2 x 2 x 2"),  # as many tokens as a cube
    ],
)
def test_learned_positions_are_interpolated_to_another_token_grid(load, there, here, grids, tmp_path, capsys):
    source, target = trained(img_size=there), tiny_segmenter(img_size=here)
    file = save(source.state_dict(), tmp_path)
    report = load(target, file)
    assert report.interpolated == {POSITIONS: grids}
    assert not report.missing and not report.kept and POSITIONS not in report.loaded
    assert f"\n  interpolated from {grids} tokens: {POSITIONS}\n" in capsys.readouterr().out
    image = torch.rand(1, 2, *here, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(target.vit.embed(image), source.vit.embed(image))  # as the source does at that size
    assert target.get_parameter(POSITIONS).requires_grad


@pytest.mark.parametrize("source", [tiny_mae, tiny_segmenter])
def test_fixed_positions_of_another_grid_of_as_many_tokens_are_not_taken(source, tmp_path):
    checkpoint = source()
    with torch.no_grad():
        checkpoint.get_parameter(POSITIONS).copy_(sincos_positions((2, 2, 3), 24))
    target = tiny_segmenter(img_size=(6, 6, 8))
    report = load_encoder(target, save(checkpoint.state_dict(), tmp_path))
    assert report.kept == (POSITIONS,) and not report.interpolated
    assert torch.equal(target.get_parameter(POSITIONS), sincos_positions((3, 2, 2), 24))


def test_positions_whose_grid_cannot_be_told_are_refused_in_one_line(tmp_path):
    source, target = tiny_segmenter(), tiny_segmenter(img_size=(8, 6, 12))
    nn.init.normal_(source.get_parameter(POSITIONS))
    file = save(source.state_dict(), tmp_path)
    before = {name: tensor.clone() for name, tensor in target.state_dict().items()}
    with pytest.raises(InputError) as error:
        load_segmenter(target, file)
    assert str(error.value) == (
        f"{file}: the token grid of its 12 learned positions cannot be told, to interpolate them to 4 x 2 x 3 tokens. "
        "Give the img_size that it was trained with."
    )
    assert_same_weights(target.state_dict(), before)
    load_segmenter(same := tiny_segmenter(), file)  # nothing speaks against the grid that the network expects
    assert_same_weights(same.state_dict(), source.state_dict())


@pytest.mark.parametrize("drift", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("grid", [(4, 4, 4), (2, 4, 8), (8, 4, 2), (1, 1, 64), (5, 7, 1), (1, 1, 1)])
def test_the_token_grid_is_told_by_its_table(grid, drift):
    torch.manual_seed(0)
    table = sincos_positions(grid, 96)
    table += drift * torch.randn_like(table)
    for expected in ([3, 3, 3], list(grid), list(grid[::-1])):
        assert token_grid(table, expected) == list(grid)


def test_an_unknown_table_of_a_cubic_number_is_of_a_cube():
    torch.manual_seed(0)
    assert token_grid(torch.randn(1, 27, 24), [2, 2, 2]) == [3, 3, 3]
    assert token_grid(torch.randn(1, 28, 24), [2, 2, 2]) is None


@pytest.mark.parametrize(("img_size", "grid"), [((6, 6, 8), "3 x 2 x 2"), ((4, 6, 8), "2 x 2 x 2")])
def test_without_a_record_positions_of_another_grid_are_refused(img_size, grid, tmp_path):
    """Of as many tokens, or of another number of them."""
    file = save(trained().state_dict(), tmp_path)
    check_weights(file, tiny_segmenter())
    with pytest.raises(InputError) as error:
        check_weights(file, tiny_segmenter(img_size=img_size))
    assert str(error.value) == (
        f"{file}: its positions are of 2 x 2 x 3 tokens, img_size and patch_size make {grid}. "
        "Give the img_size that it was trained with."
    )


def test_no_checkpoint_means_from_scratch(capsys):
    segmenter = tiny_segmenter()
    before = {name: tensor.clone() for name, tensor in segmenter.state_dict().items()}
    assert load_encoder(segmenter, "") is None
    assert capsys.readouterr().out == "pretrained_encoder is empty: the encoder starts from scratch\n"
    assert_same_weights(segmenter.state_dict(), before)


def test_missing_encoder_names_the_three_choices(tmp_path):
    file = tmp_path / "encoder.pt"
    with pytest.raises(InputError) as error:
        load_encoder(tiny_segmenter(), file)
    assert str(error.value).startswith(f"{file}: no pre-trained encoder there.")
    for choice in ("model.pt of hi_end_mae_pretrain", "hi_end_mae_10k.pth", "''"):
        assert choice in str(error.value)


@pytest.mark.parametrize(
    ("change", "missing", "detail"),
    [
        ({"vit.blocks.2.mlp.linear1.bias": None}, 1, "vit.blocks.2.mlp.linear1.bias is not there"),
        ({POSITIONS: None}, 1, f"{POSITIONS} is not there"),
        ({"vit.norm.bias": [1, 24]}, 1, "vit.norm.bias is [1, 24] there, [24] here"),
        (
            {"vit.norm.weight": None, PATCH_WEIGHT: [24, 24]},
            2,
            f"{PATCH_WEIGHT} is [24, 24] there, [24, 48] here",
        ),
    ],
)
def test_half_an_encoder_is_refused_and_the_network_left_alone(change, missing, detail, tmp_path, capsys):
    weights = dict(tiny_mae().state_dict())
    for name, shape in change.items():
        weights.pop(name) if shape is None else weights.update({name: torch.zeros(shape)})
    segmenter, file = tiny_segmenter(), save(weights, tmp_path)
    before = {name: tensor.clone() for name, tensor in segmenter.state_dict().items()}
    with pytest.raises(InputError) as error:
        load_encoder(segmenter, file)
    assert f"{file}: does not cover the encoder, {missing} of 53 tensors are missing ({detail})." in str(error.value)
    assert "same patch size, width and depth" in str(error.value)
    printed = capsys.readouterr().out
    assert all(name in printed for name in change)  # the report comes first, with all of them
    assert_same_weights(segmenter.state_dict(), before)


def test_another_number_of_classes_drops_the_head_alone_and_says_so(tmp_path, capsys):
    source, target = tiny_segmenter(out_channels=3), tiny_segmenter(out_channels=5)
    before = {name: tensor.clone() for name, tensor in target.state_dict().items()}
    file = save(source.state_dict(), tmp_path)
    report = load_segmenter(target, file)
    assert f"{file}: has 3 classes, not 5: its head is left out and starts anew" in capsys.readouterr().out
    for name, tensor in target.state_dict().items():
        assert torch.equal(tensor, (before if name.startswith("out.") else source.state_dict())[name]), name
    assert report is not None and set(report.kept) == {name for name in before if name.startswith("out.")}


def test_a_segmenter_goes_on_from_its_like_and_refuses_others(tmp_path):
    source, target = tiny_segmenter(), tiny_segmenter()
    with torch.no_grad():
        source.out.conv.conv.weight.fill_(7)
    load_segmenter(target, save(source.state_dict(), tmp_path))
    assert_same_weights(target.state_dict(), source.state_dict())
    assert load_segmenter(target, "") is None
    with pytest.raises(InputError, match="does not cover the segmenter"):
        load_segmenter(target, save(tiny_mae().state_dict(), tmp_path))


def test_long_lists_of_names_are_shortened():
    assert shorten_names(["a.x", "b.c.d", "a.y.z", "e"]) == ["a.* (2)", "b.c.d", "e"]
    assert shorten_names([]) == []


def test_published_checkpoint_becomes_a_segmenter(tmp_path):
    mae = tiny_mae()
    file = save({"state_dict": to_official(mae.state_dict(), PATCH), "epoch": 9}, tmp_path, "hi_end_mae_10k.pth")
    segmenter = load_hi_end_mae_10k(num_classes=5, checkpoint=file, feature_size=2, **VIT)
    assert isinstance(segmenter, HiEndUNETR)
    assert segmenter(torch.zeros(1, 2, 4, 6, 12)).shape == (1, 5, 4, 6, 12)
    expected = {name: tensor for name, tensor in mae.vit.state_dict().items() if name != "cls_token"}
    assert_same_weights(segmenter.vit.state_dict(), expected)


def test_published_checkpoint_of_another_encoder_is_refused(tmp_path):
    file = save(tiny_mae().state_dict(), tmp_path)
    with pytest.raises(InputError, match=r"does not cover the encoder.*is \[24, 48\] there, \[12, 48\] here"):
        load_hi_end_mae_10k(checkpoint=file, feature_size=2, **{**VIT, "hidden_size": 12})


@pytest.mark.integration
def test_published_checkpoint_at_its_true_size(tmp_path, capsys):
    """Every tensor of the 1.37 GB file, each expanded from one value of its own, lands where it belongs."""
    values = {name: float(i) for i, name in enumerate(PUBLISHED, start=1)}
    content = {
        "state_dict": {name: torch.tensor([values[name]]).expand(shape) for name, shape in PUBLISHED.items()},
        "epoch": 1000,
        "optimizer": {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"lr": 1e-4, "betas": (0.9, 0.95)}]},
        "scaler": {"scale": 65536.0, "growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 2000},
    }
    file = save(content, tmp_path, "hi_end_mae_10k.pth")
    assert file.stat().st_size < 1e6
    segmenter = load_hi_end_mae_10k(num_classes=14, checkpoint=file)
    assert segmenter.out.conv.conv.out_channels == 14

    official = {ours: f"module.{name}" for name, ours in official_names(12, 2, 3).items()}
    encoder = {f"vit.{name}": tensor for name, tensor in segmenter.vit.state_dict().items()}
    assert len(encoder) == 12 * 12 + 5
    for name, tensor in encoder.items():
        lowest, highest = tensor.aminmax()
        assert lowest == highest == values[official[name]], name
    assert "149 keys loaded into the encoder\n  missing keys: none\n" in capsys.readouterr().out


@pytest.mark.parametrize("form", ["ours", "official"])
def test_pretraining_goes_on_from_a_whole_network(form, tmp_path, capsys):
    source, network = tiny_mae(), tiny_mae()
    for parameter in network.parameters():
        nn.init.normal_(parameter)
    weights = source.state_dict()
    file = save(weights if form == "ours" else {"state_dict": to_official(weights, PATCH), "epoch": 9}, tmp_path)
    report = load_hi_end_mae(network, file)
    assert report is not None and set(report.loaded) == weights.keys()
    assert not report.missing and not report.unexpected and not report.kept
    assert_same_weights(network.state_dict(), weights)
    assert f"weights from {file}: {len(weights)} keys loaded into the network\n  missing keys: none\n" in (
        capsys.readouterr().out
    )


def test_pretraining_from_scratch_and_on_another_grid(tmp_path):
    network = tiny_mae()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    assert load_hi_end_mae(network, "") is None
    assert_same_weights(network.state_dict(), before)
    file = save(before, tmp_path)
    larger = HiEndMAE(**{**VIT, "img_size": (8, 6, 12)}, decoder_hidden_size=12, decoder_num_heads=2)
    tables = {name: t.clone() for name, t in larger.state_dict().items() if name.endswith("position_embeddings")}
    report = load_hi_end_mae(larger, file)
    assert report is not None and set(report.kept) == tables.keys()
    assert len(tables) == 2
    assert_same_weights(larger.state_dict(), {**before, **tables})


@pytest.mark.parametrize("change", ["segmenter", "deeper", "shape", "missing file"])
def test_half_a_network_is_refused_and_left_alone(change, tmp_path):
    network = tiny_mae()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    weights, message = {
        "segmenter": (
            tiny_segmenter().state_dict(),
            r"does not cover the network, \d+ of \d+ .*\(vit.cls_token is not",
        ),
        "deeper": (tiny_mae(num_layers=5).state_dict(), r"12 tensors have no place in the network \(such as vit\.bl"),
        "shape": (
            {**before, "decoder.norm.bias": torch.zeros(3)},
            r"\(decoder\.norm\.bias is \[3\] there, \[12\] here\)",
        ),
        "missing file": (None, r"model\.pt: no such checkpoint"),
    }[change]
    file = tmp_path / "model.pt" if weights is None else save(weights, tmp_path)
    with pytest.raises(InputError, match=message) as error:
        load_hi_end_mae(network, file)
    assert str(error.value).startswith(f"{file}: ")
    assert_same_weights(network.state_dict(), before)


@pytest.mark.parametrize("channels", [1, 2])
def test_exported_encoder_is_monais_vit(channels, tmp_path):
    mae, segmenter = tiny_mae(in_channels=channels), tiny_segmenter(in_channels=channels)
    file = tmp_path / "encoder.pt"
    convert_weights(tiny_mae(in_channels=channels), save(mae.state_dict(), tmp_path), file, "monai_vit")
    vit = ViT(
        in_channels=channels,
        img_size=(4, 6, 12),
        patch_size=PATCH,
        hidden_size=24,
        mlp_dim=48,
        num_layers=4,
        num_heads=3,
        proj_type="perceptron",
        qkv_bias=True,
    )
    vit.load_state_dict(torch.load(file, weights_only=True), strict=True)
    load_encoder(segmenter, tmp_path / "model.pt")
    image = torch.rand(2, channels, 4, 6, 12, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():  # in double precision, as weights of variance 1 amplify rounding
        tokens, layers = vit.double()(image.double())
        latent, features = segmenter.double().vit(image.double())
        with_cls, _ = mae.double().vit(image.double())
    torch.testing.assert_close(tokens, latent, rtol=1e-9, atol=1e-9)
    for n, feature in zip(VIT["out_indices"], features, strict=True):
        torch.testing.assert_close(layers[n], feature, rtol=1e-9, atol=1e-9)
    assert (with_cls[:, 1:] - tokens).abs().max() > 1e-3  # the difference that the docstring tells
    assert_same_weights(to_monai_vit(segmenter.float().state_dict()), torch.load(file, weights_only=True))


@pytest.mark.parametrize("form", ["model", "official", "monai_vit"])
def test_safetensors_hold_the_same_weights(form: str, tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    source = tiny_mae().state_dict()
    file = tmp_path / f"{form}.safetensors"
    convert_weights(tiny_mae(), save(source, tmp_path), file, form)
    official, encoder = to_official(source, PATCH), to_monai_vit(source)
    written = {"model": source, "official": official, "monai_vit": encoder}[form]
    assert_same_weights(safetensors.load_file(file), written)
    assert_same_weights(read_weights(file), encoder if form == "monai_vit" else source)


NO_CASES: dict[str, list[Any]] = {"train": [], "validation": [], "test": []}
HEADS = {"num_heads": 3, "out_indices": [0, 1, 2]}


@pytest.mark.parametrize(
    ("load", "make", "changed", "kept"),
    [
        (check_weights, tiny_segmenter, {"num_heads": 2}, {}),
        (check_weights, tiny_segmenter, {"out_indices": (1, 2, 3)}, {}),
        (check_weights, tiny_mae, {"decoder_num_heads": 1}, {}),
        (load_segmenter, tiny_segmenter, {"num_heads": 2}, {}),
        (load_segmenter, tiny_segmenter, {"out_indices": (1, 2, 3)}, {}),
        (load_hi_end_mae, tiny_mae, {"decoder_num_heads": 1}, {}),
        (load_encoder, tiny_segmenter, {"num_heads": 2}, {"out_indices": (1, 2, 3)}),
    ],
)
def test_settings_that_no_shape_tells_are_compared_with_the_record(load, make, changed, kept, tmp_path):
    source = tiny_mae() if load is load_encoder else make()
    settings = {**HEADS, **({"decoder_num_heads": 2} if isinstance(source, HiEndMAE) else {})}
    assert network_settings(source) == settings
    parts = {"train": [], "validation": [], "test": []}
    for name, record in (("new", training_record("", parts, {}, network=settings)), ("old", {})):
        file = tmp_path / name / "model.pt"
        write_model(source.state_dict(), file, training_record("", parts, {}) | record)
    arguments = (
        (lambda file, network: (file, network)) if load is check_weights else lambda file, network: (network, file)
    )
    load(*arguments(tmp_path / "new/model.pt", make(**kept)))
    load(*arguments(tmp_path / "old/model.pt", make(**changed)))
    (setting, value), before = changed.popitem(), make().state_dict()
    network = make(**{setting: value})
    with pytest.raises(InputError) as error:
        load(*arguments(tmp_path / "new/model.pt", network))
    there = str(settings[setting])
    said = (
        "trained with other settings: network_def#" if load is check_weights else "of a network with other settings: "
    )
    assert str(error.value) == (
        f"{tmp_path}/new/model.pt: {said}{setting} was {there} and is "
        f"{list(value) if setting == 'out_indices' else value}. Pass --network_def#{setting} {there.replace(', ', ',')}"
    )
    if load is not check_weights and make is tiny_segmenter:
        assert_same_weights(network.state_dict(), before)


CT = {"modality": "CT", "spacing": (6, 6, 7.5), "intensity_range": (-1000, 1000), "img_size": [4, 6, 12]}


def start_encoder(network: HiEndUNETR, file: Path, preparation: dict[str, Any]) -> None:
    load_start_weights(network, "", file, training_record("", NO_CASES, preparation))


def start_segmenter(network: HiEndUNETR, file: Path, preparation: dict[str, Any]) -> None:
    load_start_weights(network, file, "", training_record("", NO_CASES, preparation))


@pytest.mark.parametrize(
    ("load", "make"),
    [(start_encoder, tiny_segmenter), (start_segmenter, tiny_segmenter), (load_hi_end_mae, tiny_mae)],
)
def test_weights_to_start_from_are_compared_with_the_scans(load, make, tmp_path, caplog):
    source, file = tiny_mae() if load is start_encoder else make(), tmp_path / "model.pt"
    write_model(source.state_dict(), file, training_record("", NO_CASES, CT))
    load(make(), file, {**CT, "spacing": [6.0, 6.0, 7.5], "img_size": [8, 6, 12]})
    assert caplog.messages == []
    load(make(), file, {**CT, "spacing": [4, 4, 4], "intensity_range": [-175, 250]})
    assert caplog.messages == [
        f"{file}: trained on scans prepared otherwise: spacing was [6, 6, 7.5] and is [4, 4, 4], intensity_range was "
        "[-1000, 1000] and is [-175, 250]. Pass --spacing [6,6,7.5] --intensity_range [-1000,1000] to go on with the "
        "same"
    ]
    network = make()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    with pytest.raises(InputError, match=r"trained on CT, and modality is MR; pass --modality CT if that is what"):
        load(network, file, {**CT, "modality": "MR"})
    assert_same_weights(network.state_dict(), before)
    caplog.clear()
    write_model(source.state_dict(), file, training_record("", NO_CASES, {**CT, "modality": "MR"}))
    load(make(), file, {**CT, "modality": "MR", "intensity_range": [0, 1]})  # which MR does not use
    file.with_suffix(".json").unlink()
    load(make(), file, {**CT, "spacing": [1, 1, 1]})
    assert not any("prepared otherwise" in message for message in caplog.messages)


def test_bundles_compare_the_weights_that_they_start_from(tmp_path, caplog):
    for bundle, key in ((BUNDLES[0], "init_weights"), (BUNDLES[1], "pretrained_encoder")):
        parser = ConfigParser()
        parser.read_config([ROOT / bundle / "configs" / f"{name}.json" for name in ("train", "small")])
        shipped = str(ROOT / BUNDLES[0] / "weights" / "small.pt")
        parser.update({"bundle_root": str(ROOT / bundle), key: shipped, "ckpt_dir": str(tmp_path)})
        parser.update({"record": {**parser["record"], "split": NO_CASES, "train": None, "validation": None}})
        place = next(i for i, item in enumerate(parser["initialize"]) if "checkpoints.load_" in str(item))
        for spacing, told in (([3.0, 3.0, 3.0], 0), ([3.0, 3.0, 5.0], 1)):
            parser["spacing"] = spacing
            parser.parse(reset=True)
            caplog.clear()
            parser.get_parsed_content(f"initialize#{place}")
            assert len([text for text in caplog.messages if "Pass --spacing [3.0,3.0,3.0]" in text]) == told


@pytest.mark.parametrize("bundle", BUNDLES)
def test_a_training_records_the_settings_of_its_network(bundle):
    parser = ConfigParser()
    parser.read_config([ROOT / bundle / "configs" / f"{name}.json" for name in ("train", "small")])
    recorded = parser.get_parsed_content("record#network")
    assert recorded == network_settings(parser.get_parsed_content("network_def"))
    assert read_record(ROOT / bundle / "weights" / "small.pt")["network"] == recorded


def test_weights_that_ship_are_not_used_with_other_heads():
    parser = ConfigParser()
    parser.read_config([ROOT / BUNDLES[1] / "configs" / f"{name}.json" for name in ("inference", "small")])
    parser.update({"bundle_root": str(ROOT / BUNDLES[1]), "network_def#num_heads": 3})
    place = next(i for i, item in enumerate(parser["initialize"]) if "check_weights" in str(item))
    with pytest.raises(RuntimeError) as error:
        parser.get_parsed_content(f"initialize#{place}")
    assert "num_heads was 6 and is 3. Pass --network_def#num_heads 6" in str(input_error_in(error.value))


def test_a_head_of_other_labels_is_left_out(tmp_path, capsys):
    source, parts = tiny_segmenter(), {"train": [], "validation": [], "test": []}
    with torch.no_grad():
        source.out.conv.conv.weight.fill_(7)
    write_model(
        source.state_dict(),
        tmp_path / "model.pt",
        training_record("", parts, {}, label_names=("air", "liver", "spleen")),
    )
    for names, same in ((("air", "liver", "spleen"), True), (("air", "spleen", "liver"), False)):
        target = tiny_segmenter()
        own = target.state_dict()["out.conv.conv.weight"].clone()
        load_start_weights(target, tmp_path / "model.pt", "", training_record("", parts, {}, label_names=names))
        expected = source.state_dict()["out.conv.conv.weight"] if same else own
        assert torch.equal(target.state_dict()["out.conv.conv.weight"], expected)
        said = f"{tmp_path}/model.pt: was trained on other labels: its head is left out and starts anew"
        assert (said in capsys.readouterr().out) == (not same)


def test_evaluator_loads_the_published_form(tmp_path: Path) -> None:
    source, network = tiny_segmenter(), tiny_segmenter()
    for parameter in source.parameters():
        nn.init.normal_(parameter)
    file = save({"state_dict": {f"module.{name}": tensor for name, tensor in source.state_dict().items()}}, tmp_path)
    check_weights(file, network)
    engine = Engine(lambda engine, batch: None)
    WeightsLoader(load_path=str(file), load_dict={"model": network}, map_location="cpu").attach(engine)
    engine.run([0])
    assert_same_weights(network.state_dict(), source.state_dict())


@pytest.mark.parametrize("name", ["model.pt", "model.safetensors"])
def test_evaluator_loads_weights_of_either_form(name: str, tmp_path: Path) -> None:
    source, network = tiny_segmenter(), tiny_segmenter()
    for parameter in source.parameters():
        nn.init.normal_(parameter)
    file = tmp_path / name
    save_tensors(half_precision(source.state_dict(), file), file)
    engine = Engine(lambda engine, batch: None)
    WeightsLoader(load_path=str(file), load_dict={"model": network}, map_location="cpu").attach(engine)
    engine.run([0])
    expected = {name: tensor.half().float() for name, tensor in source.state_dict().items()}
    assert_same_weights(network.state_dict(), expected)
    assert {tensor.dtype for tensor in network.state_dict().values()} == {torch.float32}


def test_safetensors_that_are_damaged_or_cannot_be_read_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"nonsense")
    with pytest.raises(InputError, match=r"model\.safetensors: not a readable checkpoint \("):
        read_weights(file)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(
        InputError, match=r"model\.safetensors: needs a package that is missing: pip install safetensors"
    ):
        read_weights(file)


def test_conversions_come_back_to_the_same_weights(tmp_path, capsys):
    source = tiny_mae().state_dict()
    file = save(source, tmp_path)
    official, back = tmp_path / "new" / "official.pth", tmp_path / "back.pt"
    convert_weights(tiny_mae(), file, official, "official")
    content = torch.load(official, weights_only=True)
    assert_same_weights(content["state_dict"], to_official(source, PATCH))
    blank = tiny_mae()
    nn.init.zeros_(blank.decoder.head.weight)
    convert_weights(blank, official, back, "model")
    assert_same_weights(torch.load(back, weights_only=True), source)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["back.pt", "model.pt", "new", "official.pth"]
    assert f"{back}: {len(source)} tensors written as model\n" in capsys.readouterr().out


def test_conversion_refuses_what_would_be_lost_or_guessed(tmp_path):
    file = save(tiny_mae().state_dict(), tmp_path)
    before = file.read_bytes()
    for arguments, message in {
        (file, file, "model"): f"{file}: exists and is not overwritten",
        (file, "", "model"): "output is not set; pass --output FILE",
        ("", tmp_path / "new.pt", "model"): "checkpoint is not set; pass --checkpoint FILE",
        (file, tmp_path / "new.pt", "onnx"): "format is 'onnx': give --format model, official or monai_vit",
        (tmp_path / "none.pt", tmp_path / "new.pt", "model"): f"{tmp_path}/none.pt: no such checkpoint",
    }.items():
        with pytest.raises(InputError) as error:
            convert_weights(tiny_mae(), *arguments)
        assert str(error.value).startswith(message)
    assert file.read_bytes() == before and [path.name for path in tmp_path.iterdir()] == ["model.pt"]
    (tmp_path / "model.json").write_text("{}")
    for form in ("model", "official", "monai_vit"):  # weights beside another record cannot be loaded
        with pytest.raises(InputError, match=r"model\.safetensors: .*/model\.json there would be taken for its record"):
            convert_weights(tiny_mae(), file, tmp_path / "model.safetensors", form)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.json", "model.pt"]


class SilentHandler(SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def bundle_with_server(tmp_path: Path) -> Iterator[Path]:
    """A folder with the bundle's large_files.yml, whose address is replaced by that of a local server."""
    bundle, served = tmp_path / "bundle", tmp_path / "served"
    bundle.mkdir()
    served.mkdir()
    content = yaml.safe_load((ROOT / "hi_end_mae_pretrain" / "large_files.yml").read_text())
    (entry,) = content["large_files"]
    assert entry["url"] == "https://drive.google.com/uc?id=1pjQVAhW0S5d_zD-X99aBq4WvlpDFcjGQ"
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(SilentHandler, directory=str(served))) as server:
        entry["url"] = f"http://127.0.0.1:{server.server_port}/hi_end_mae_10k.pth"
        (bundle / "large_files.yml").write_text(yaml.safe_dump(content))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield bundle
        server.shutdown()


def convert(*overlays: str, **settings: Any) -> None:
    folder = ROOT / "hi_end_mae_pretrain"
    files = [str(folder / "configs" / f"{name}.json") for name in ("inference", "convert", *overlays)]
    flow = ConfigWorkflow(files, workflow_type="infer", logging_file=False, bundle_root=str(folder), **settings)
    flow.initialize()
    flow.run()


def fetch_and_convert(bundle: Path, shapes: dict[str, list[int]], network: HiEndMAE, *overlays: str) -> None:
    """Serve a file of the published names, download it as users do, convert it and load it strictly."""
    values = {name: float(i) for i, name in enumerate(shapes, start=1)}
    tensors = {name: torch.tensor([values[name]]).expand(shape) for name, shape in shapes.items()}
    save({"state_dict": tensors, "epoch": 1000}, bundle.parent / "served", "hi_end_mae_10k.pth")
    download_large_files(bundle_path=str(bundle))
    (file,) = (bundle / "models").iterdir()
    assert file.name == "hi_end_mae_10k.pth"  # no .pt, which MONAI Label would take for the bundle's own
    convert(*overlays, checkpoint=str(file), output=str(bundle / "models" / "model.pt"), format="model")
    network.load_state_dict(torch.load(bundle / "models" / "model.pt", weights_only=True), strict=True, assign=True)
    official = {ours: f"module.{name}" for name, ours in official_names(12, 2, 3).items()}
    for name, tensor in network.state_dict().items():
        lowest, highest = tensor.aminmax()
        assert lowest == highest == values[official[name]], name


def test_official_file_is_fetched_converted_and_loaded(bundle_with_server: Path):
    """By its true names; the sizes are those of tiny.json."""
    settings = {"hidden_size": 192, "num_heads": 6, "decoder_hidden_size": 96, "decoder_num_heads": 6}
    network = HiEndMAE(img_size=48, **settings)
    shapes_of = shapes(to_official(network.state_dict(), (12, 12, 12)))
    assert shapes_of.keys() == PUBLISHED.keys()
    fetch_and_convert(bundle_with_server, shapes_of, network, "tiny")


@pytest.mark.integration
def test_official_file_is_fetched_converted_and_loaded_at_its_true_size(bundle_with_server: Path):
    with torch.device("meta"):
        network = HiEndMAE()
    fetch_and_convert(bundle_with_server, PUBLISHED, network)
    shutil.rmtree(bundle_with_server)  # 1.5 GB


def test_convert_command_names_what_is_missing(tmp_path: Path):
    file = save(tiny_mae().state_dict(), tmp_path)
    for settings, message in (
        ({}, "output is not set"),
        ({"output": str(tmp_path / "x.pt")}, "does not cover the net"),
    ):
        with pytest.raises(RuntimeError) as error:
            convert("tiny", checkpoint=str(file), **settings)
        assert message in str(input_error_in(error.value))
