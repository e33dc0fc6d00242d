"""Parity with the published code, on vectors that it computed.

Every `*.pt` in the folders of the environment variable HI_END_MAE_GOLDEN (separated by `:`) is checked; by default
tests/data and, where it exists, ../shared/reference. All sizes come from each file.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from shared_networks.networks.cpu import fast_cpu
from shared_networks.networks.hi_end_mae import HiEndMAE, restore_intensities
from shared_networks.networks.official import OFFICIAL_PREFIX, from_official, official_names
from shared_networks.networks.unetr import HiEndUNETR
from shared_networks.networks.vit import gather_tokens, patchify
from shared_networks.training.loss import MaskedPatchLoss

TOLERANCE = 1e-4
ROOT = Path(__file__).parents[1]
DEFAULT_FOLDERS = [ROOT / "data", ROOT.parent.parent / "shared" / "reference"]
FOLDERS = [Path(f) for f in os.environ.get("HI_END_MAE_GOLDEN", "").split(":") if f] or DEFAULT_FOLDERS
# A vector that several folders have is checked once.
FILES = list({file.read_bytes(): file for folder in FOLDERS for file in sorted(folder.glob("*.pt"))}.values())


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    """Sum in the order of the machine that made the vectors: norms over a million voxels depend on it by 1e-3."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def golden(kind: str) -> list[Any]:
    """The golden files of one kind, as test parameters."""
    files = [(file, torch.load(file, weights_only=True)) for file in FILES]
    return [
        pytest.param(vector, id=f"{file.parent.name}/{file.stem}") for file, vector in files if vector["kind"] == kind
    ]


def assert_close(ours: Tensor, published: Tensor, what: str) -> None:
    """Largest difference at most 1e-4 of the largest published value."""
    assert ours.shape == published.shape, what
    scale = published.abs().max().clamp_min(1e-12)
    error = ((ours - published).abs().max() / scale).item()
    print(f"{what}: relative error {error:.1e}")
    assert error <= TOLERANCE, f"{what}: relative error {error:.1e}"


def assert_same_gradients(network: nn.Module, published: dict[str, float], names: dict[str, str]) -> None:
    """Gradient norms of every trainable parameter, none missing on either side."""
    parameters = dict(network.named_parameters())
    norms = {name: p.grad.norm().item() for name, p in parameters.items() if p.grad is not None}
    renamed = {names.get(name, name): norm for name, norm in published.items()}
    assert norms.keys() == renamed.keys()
    # Gradients far below the largest are sums that nearly cancel: there float32 itself is only good to about 1e-3
    # (the published norms differ that much from ours, and theirs, computed in float64).
    large = 0.01 * max(published.values())
    errors = {name: abs(norms[name] - renamed[name]) for name in norms}
    worst = max(error / max(renamed[name], large) for name, error in errors.items())
    worst_small = max(error / max(renamed[name], 1e-12) for name, error in errors.items())
    print(f"gradient norms: worst relative error {worst:.1e}, of near-zero gradients {worst_small:.1e}")
    assert worst <= TOLERANCE
    assert worst_small <= 20 * TOLERANCE


@pytest.mark.parametrize("vector", golden("hi_end_mae"))
def test_pretraining_network_is_the_published_one(vector: dict[str, Any]) -> None:
    config = current_names(vector["config"])
    network = HiEndMAE(**config).train()
    network.load_state_dict(from_official(vector["state_dict"]), strict=True)
    image, ids_shuffle = vector["image"], vector["permutation"]
    size = network.vit.patch_size
    assert network.num_visible(ids_shuffle.shape[1]) == vector["num_visible"]

    latent, features = network.encode(image, ids_shuffle)
    assert_close(latent, vector["latent"], "latent")
    for index, tokens in zip(config["out_indices"], features, strict=True):
        assert_close(tokens, vector[f"hidden_{index}"], f"block {index}")
    tokens = network.decode(latent, features, ids_shuffle, network.vit.patch_grid(image))
    assert_close(tokens, vector["pred_tokens"], "predicted tokens")

    prediction = network(image, ids_shuffle)
    loss = MaskedPatchLoss(config["patch_size"])(prediction, image)
    assert_close(loss, vector["loss"], "loss")
    assert_close(patchify(image, size), vector["image_patches"], "image patches")
    restored = patchify(restore_intensities(prediction[:, :-1], image, size), size)
    assert_close(restored, vector["reconstruction_patches"], "reconstruction")
    mask = patchify(prediction[:, -1:], size)[..., 0]
    assert gather_tokens(mask[..., None], ids_shuffle)[:, : vector["num_visible"]].sum() == 0
    assert mask.sum().item() == ids_shuffle.numel() - vector["num_visible"] * len(image)

    loss.backward()
    depths = (config["num_layers"], config["decoder_self_layers"], len(config["out_indices"]))
    names = official_names(*depths)
    assert_same_gradients(network, {k.removeprefix(OFFICIAL_PREFIX): v for k, v in vector["grad_norms"].items()}, names)


def current_names(config: dict[str, Any]) -> dict[str, Any]:
    """The vectors' settings, which call `out_indices` by an earlier name."""
    return {{"tap_layers": "out_indices"}.get(name, name): value for name, value in config.items()}


def formula_image(config: dict[str, Any], coefficients: list[float]) -> Tensor:
    """The golden segmenter's input: sin(a0 i) + cos(a1 j) sin(a2 k), scaled to [0, 1], the same in every channel."""
    i, j, k = torch.meshgrid(*(torch.arange(n, dtype=torch.float32) for n in config["img_size"]), indexing="ij")
    a0, a1, a2 = coefficients
    f = torch.sin(a0 * i) + torch.cos(a1 * j) * torch.sin(a2 * k)
    f = (f - f.min()) / (f.max() - f.min())
    return f.expand(1, config["in_channels"], *f.shape)


@pytest.mark.parametrize("vector", golden("unetr"))
def test_segmentation_network_is_the_published_one(vector: dict[str, Any]) -> None:
    network = HiEndUNETR(**current_names(vector["config"])).train()
    network.load_state_dict(vector["state_dict"], strict=True)
    logits = network(formula_image(vector["config"], vector["image_coefficients"]))
    assert_close(logits[:, :, ::8, ::8, ::8], vector["logits_strided_8"], "logits")
    assert_close(logits.mean(), torch.tensor(vector["logits_mean"]), "logits mean")
    assert_close(logits.std(), torch.tensor(vector["logits_std"]), "logits standard deviation")
    logits.square().mean().backward()
    assert_same_gradients(network, vector["grad_norms"], {})


@pytest.mark.parametrize("vector", golden("unetr"))
def test_fast_inference_gives_the_published_logits(vector: dict[str, Any]) -> None:
    network = HiEndUNETR(**current_names(vector["config"])).eval()
    network.load_state_dict(vector["state_dict"], strict=True)
    image = formula_image(vector["config"], vector["image_coefficients"])
    with torch.no_grad(), fast_cpu(network, image.device):
        logits = network(image)
    assert_close(logits[:, :, ::8, ::8, ::8], vector["logits_strided_8"], "logits")
    assert_close(logits.mean(), torch.tensor(vector["logits_mean"]), "logits mean")
    assert_close(logits.std(), torch.tensor(vector["logits_std"]), "logits standard deviation")


def test_there_are_vectors() -> None:
    assert FILES, f"no golden vectors in {FOLDERS}"
