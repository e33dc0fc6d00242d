"""The memory estimate: its count, against hand, autograd's own book and a GPU; its advice."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from monai.bundle import ConfigParser
from torch import Tensor

from shared_networks.errors import InputError
from shared_networks.networks import vit
from shared_networks.networks.hi_end_mae import HiEndMAE
from shared_networks.networks.unetr import HiEndUNETR
from shared_networks.training.loss import MaskedPatchLoss
from tests.benchmarks.memory import (
    CONTEXT,
    GIB,
    StepMemory,
    advice,
    flags,
    main,
    most_crops,
    step_memory,
)
from tests.conftest import ROOT

PRETRAIN = ROOT / "hi_end_mae_pretrain" / "configs" / "train.json"
SMALL: dict[str, Any] = {
    "img_size": 24,
    "patch_size": 6,
    "hidden_size": 48,
    "num_layers": 6,
    "num_heads": 4,
    "decoder_hidden_size": 36,
    "decoder_num_heads": 4,
    "out_indices": (1, 2, 4),
}
OVERRIDES = ["--img_size", "[24,24,24]", "--patch_size", "6", "--batch_size", "2", "--num_samples", "3"]
OVERRIDES += ["--network_def#hidden_size", "48", "--network_def#num_heads", "4", "--network_def#num_layers", "3"]
OVERRIDES += ["--network_def#out_indices", "[0,1,2]"]


def small(crops: int, dtype: torch.dtype = torch.float32, **settings: Any) -> StepMemory:
    build = partial(HiEndMAE, **{**SMALL, **settings})
    return step_memory(build, MaskedPatchLoss(6), (crops, 1, 24, 24, 24), dtype=dtype)


def total(output: Tensor, _target: Tensor) -> Tensor:
    return output.sum()


def test_a_block_keeps_what_is_counted_by_hand():
    batch, tokens, size, heads, ratio = 3, 5, 16, 2, 4
    counted = step_memory(lambda: vit.TransformerBlock(size, heads, ratio, 1e-6), total, (batch, tokens, size))
    n = batch * tokens
    floats = n * size  # norm1's output, that the projection to query, key and value reads
    floats += 3 * n * size + n * size + n * heads  # query, key, value; attention's output and its log-sum-exp
    floats += 2 * n * size  # the sum that norm2 reads, and its output
    floats += 2 * n * ratio * size  # before and after GELU
    floats += 2 * 2 * n  # mean and deviation of each norm
    assert counted.activations == 4 * (floats + 1)  # and the loss
    parameters = (
        2 * 2 * size + 3 * size * (size + 1) + size * (size + 1) + size * ratio * (2 * size) + (ratio + 1) * size
    )
    assert (counted.weights, counted.gradients, counted.moments) == (4 * parameters, 4 * parameters, 8 * parameters)
    assert counted.peak > 16 * parameters + counted.activations


@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_are_those_that_autograd_saves(checkpointing):
    network, image, loss = (
        HiEndMAE(**SMALL, use_checkpoint=checkpointing),
        torch.rand(2, 1, 24, 24, 24),
        MaskedPatchLoss(6),
    )
    apart = {t.untyped_storage().data_ptr() for t in (*network.parameters(), image)}
    saved: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        value = loss(network(image), image)
    kept = sum(t.untyped_storage().nbytes() for pointer, t in saved.items() if pointer not in apart)
    assert small(2, use_checkpoint=checkpointing).activations == pytest.approx(kept + value.nbytes, abs=16)


def test_memory_grows_linearly_with_the_crops():
    one, two, three = (small(n) for n in (1, 2, 3))
    assert three.activations - two.activations == two.activations - one.activations > 0
    assert one.peak < two.peak < three.peak
    assert one.weights == three.weights and one.moments == 2 * one.gradients == 2 * three.gradients


def test_checkpointing_and_bfloat16_save_memory():
    plain, saving, reduced = small(16), small(16, use_checkpoint=True), small(16, torch.bfloat16)
    assert saving.activations < plain.activations / 2 and saving.peak < plain.peak
    assert reduced.activations < 0.8 * plain.activations and reduced.peak < plain.peak
    assert small(16, torch.float16) == reduced


def test_segmenter_is_counted_too():
    build = partial(
        HiEndUNETR, img_size=24, patch_size=6, hidden_size=48, num_heads=4, num_layers=3, out_indices=(0, 1, 2)
    )
    one, two = (step_memory(build, total, (n, 1, 24, 24, 24)) for n in (1, 2))
    assert 14 * 24**3 * 4 < one.activations < two.activations


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_peak_is_that_of_a_gpu(dtype, checkpointing):
    settings: dict[str, Any] = {"hidden_size": 768, "patch_size": 12, "use_checkpoint": checkpointing}
    loss = MaskedPatchLoss(12)
    counted = step_memory(partial(HiEndMAE, **settings), loss, (8, 1, 96, 96, 96), dtype=dtype)
    network, image = HiEndMAE(**settings).cuda(), torch.rand(8, 1, 96, 96, 96, device="cuda")
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    loss(network(image[:1]), image[:1]).backward()  # cuBLAS takes its workspace
    torch.cuda.reset_peak_memory_stats()
    with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
        prediction = network(image)
    loss(prediction.float(), image).backward()
    assert counted.peak - counted.moments == pytest.approx(torch.cuda.max_memory_allocated(), rel=0.15)


def growing(crops: int) -> StepMemory:
    return StepMemory(0, 0, 0, 0, crops * 10 * GIB // 11)  # with fragmentation, a GiB a crop


@pytest.mark.parametrize(("gib", "crops"), [(0, 0), (1, 1), (2.5, 2), (5, 4), (6, 6), (11, 6), (12, 12)])
def test_most_crops_is_the_largest_divisor_that_fits(gib, crops):
    assert most_crops(int(gib * GIB) + CONTEXT, growing, 12) == crops


@pytest.mark.parametrize(
    ("crops", "checkpointing", "expected"),
    [
        (192, False, "--batch_size 24 --num_samples 8"),
        (8, False, "--batch_size 1 --num_samples 8 --accumulation_steps 24"),
        (12, True, "--batch_size 2 --num_samples 6 --accumulation_steps 16 --network_def#use_checkpoint True"),
        (1, False, "--batch_size 1 --num_samples 1 --accumulation_steps 192"),
    ],
)
def test_flags_keep_the_crops_of_the_recipe(crops, checkpointing, expected):
    assert flags(crops, 192, checkpointing) == expected


@pytest.mark.integration
def test_command_prints_a_row_for_each_card(capsys):
    main(["--config_file", str(PRETRAIN), *OVERRIDES])  # batch 2 x 3 samples
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert [row.split(" GB")[0] for row in rows[1:]] == ["| 8", "| 16", "| 24", "| 80"]
    assert rows[1] == "| 8 GB | 6 | 6 | 6 | 6 | `--batch_size 1 --num_samples 6` |"


def test_what_does_not_fit_says_so():
    config = ConfigParser(ConfigParser.load_config_files(str(PRETRAIN)))
    config.update({"batch_size": 1, "num_samples": 1, "network_def#num_layers": 10})
    (row,) = [line for line in advice(config, cards=[2]).splitlines() if line.startswith("| 2 GB")]
    assert row.count("does not fit") == 4 and "GiB before any crop" in row


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config_file", "missing.json"], "missing.json"),
        (["--config_file", str(ROOT / "hi_end_mae_btcv_seg" / "configs" / "train.json")], "no pre-training config"),
        (
            ["--config_file", str(PRETRAIN), "--img_sise", "9"],
            "img_size",
        ),
        (["--config_file"], "give --config_file FILE"),
        (["--config_file", "a#b.json"], "a#b.json: No such file"),
        (["--config_file", __file__], "unknown file input"),
        (["--config_file", str(PRETRAIN), "--batch_size", "0"], "--batch_size 0: give a whole number of at least 1"),
        (["--config_file", str(PRETRAIN), "--network_def#hidden_size", "x"], "give a whole number of at least 1"),
        (["--config_file", str(PRETRAIN), "--batch_size", "1", "2"], "2: is no option"),
    ],
)
def test_wrong_options_are_named(arguments, message):
    with pytest.raises(InputError, match=message):
        main(arguments)
