"""The golden vectors of the published code, on the device, in every precision that training takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from shared_networks.networks.hi_end_mae import HiEndMAE
from shared_networks.networks.official import OFFICIAL_PREFIX, from_official, official_names
from shared_networks.networks.unetr import HiEndUNETR
from shared_networks.training.loss import MaskedPatchLoss
from tests.networks.test_golden import current_names, formula_image, golden


class Tolerance(NamedTuple):
    """Largest errors, over the largest value of an output, and over a gradient's norm."""

    output: float
    gradient: float


# The published norms over a million voxels are sums of float32 in the order of a CPU, good to 1e-3.
PRECISIONS = {
    torch.float32: (Tolerance(1e-4, 1e-3), Tolerance(2e-3, 5e-3)),
    torch.bfloat16: (Tolerance(5e-2, 5e-2), Tolerance(1e-1, 2e-1)),
    torch.float16: (Tolerance(1e-2, 1e-2), Tolerance(2e-2, 5e-2)),
}
SCALINGS = 20  # steps that the scaler may leave out until it has found its scale


def backward(network: nn.Module, loss: Callable[[], Tensor], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Loss, and gradients in the parameters, by a gradient scaler if they are computed in float16."""
    optimizer = torch.optim.SGD(network.parameters(), lr=0.0)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    for _ in range(SCALINGS):
        optimizer.zero_grad()
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            value = loss()
        scaler.scale(value).backward()
        scaler.unscale_(optimizer)
        if all(p.grad.isfinite().all() for p in network.parameters() if p.grad is not None):
            return value.detach()
        scaler.step(optimizer)
        scaler.update()
    raise AssertionError(f"no finite gradients after {SCALINGS} steps")


def assert_close(ours: Tensor, published: Tensor, what: str, tolerance: float) -> None:
    """Largest difference within the tolerance, as a share of the largest published value."""
    error = float((ours.detach().float().cpu() - published).abs().max() / published.abs().max().clamp_min(1e-12))
    print(f"{what}: relative error {error:.1e}")
    assert error <= tolerance, f"{what}: relative error {error:.1e}"


def assert_same_gradients(network: nn.Module, published: dict[str, float], tolerance: float) -> None:
    """Norms of all gradients; those far below the largest nearly cancel, and are held to its hundredth."""
    norms = {name: float(p.grad.norm()) for name, p in network.named_parameters() if p.grad is not None}
    assert norms.keys() == published.keys()
    large = 0.01 * max(published.values())
    worst = max(abs(norms[name] - norm) / max(norm, large) for name, norm in published.items())
    print(f"gradient norms: worst relative error {worst:.1e}")
    assert worst <= tolerance


@pytest.fixture(params=PRECISIONS, ids=lambda dtype: str(dtype).removeprefix("torch."))
def dtype(request: pytest.FixtureRequest, device: torch.device) -> torch.dtype:
    if device.type == "cuda" and request.param is torch.bfloat16 and not torch.cuda.is_bf16_supported(False):
        pytest.skip("this GPU has no bfloat16")
    return request.param


@pytest.mark.parametrize("vector", golden("hi_end_mae"))
def test_pretraining_network(vector: dict[str, Any], device: torch.device, dtype: torch.dtype) -> None:
    config, tolerance = current_names(vector["config"]), PRECISIONS[dtype][0]
    network = HiEndMAE(**config).train()
    network.load_state_dict(from_official(vector["state_dict"]), strict=True)
    network.to(device)
    image, ids_shuffle = vector["image"].to(device), vector["permutation"].to(device)
    masked_loss = MaskedPatchLoss(config["patch_size"])
    loss = backward(network, lambda: masked_loss(network(image, ids_shuffle), image), device, dtype)
    assert_close(loss, vector["loss"], "loss", tolerance.output)
    with torch.no_grad(), torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        latent, features = network.encode(image, ids_shuffle)
        tokens = network.decode(latent, features, ids_shuffle, network.vit.patch_grid(image))
    assert_close(latent, vector["latent"], "latent", tolerance.output)
    assert_close(tokens, vector["pred_tokens"], "predicted tokens", tolerance.output)
    names = official_names(config["num_layers"], config["decoder_self_layers"], len(config["out_indices"]))
    published = {name.removeprefix(OFFICIAL_PREFIX): norm for name, norm in vector["grad_norms"].items()}
    assert_same_gradients(network, {names.get(n, n): norm for n, norm in published.items()}, tolerance.gradient)


@pytest.mark.parametrize("vector", golden("unetr"))
def test_segmentation_network(vector: dict[str, Any], device: torch.device, dtype: torch.dtype) -> None:
    tolerance = PRECISIONS[dtype][1]
    network = HiEndUNETR(**current_names(vector["config"])).train()
    network.load_state_dict(vector["state_dict"], strict=True)
    network.to(device)
    image = formula_image(vector["config"], vector["image_coefficients"]).to(device)
    logits: list[Tensor] = []

    def loss() -> Tensor:
        logits[:] = [network(image).float()]
        return logits[0].square().mean()

    backward(network, loss, device, dtype)
    assert_close(logits[0][:, :, ::8, ::8, ::8], vector["logits_strided_8"], "logits", tolerance.output)
    scale = float(vector["logits_std"])
    assert float(logits[0].detach().mean()) == pytest.approx(vector["logits_mean"], abs=tolerance.output * scale)
    assert float(logits[0].detach().std()) == pytest.approx(vector["logits_std"], rel=tolerance.output)
    assert_same_gradients(network, vector["grad_norms"], tolerance.gradient)
