"""Muon: matrices along their orthogonalised momentum, the rest by AdamW."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from shared_networks.training.muon import Muon, is_matrix, orthogonalise

SETTINGS: dict[str, Any] = {"lr": 0.01, "betas": (0.9, 0.95), "weight_decay": 0.1}


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv3d(2, 16, 3), nn.Flatten(), nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 3))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for step in range(steps):
        image = torch.randn(4, 2, 3, 3, 3, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        model(image).square().sum().backward()
        optimizer.step()


@pytest.mark.parametrize("shape", [(16, 16), (20, 70), (70, 20)])
def test_singular_values_become_one(shape: tuple[int, int]) -> None:
    _, columns = shape
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * torch.linspace(1, 30, columns)
    found = orthogonalise(matrix)
    assert found.dtype == torch.float32 and found.shape == shape
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    inner = (left.T @ found @ right.T).diagonal()
    assert inner[values > 0.1 * values[0]].min() > 0.6 and inner.max() < 1.3
    assert orthogonalise(torch.zeros(16, 16)).abs().max() == 0


def test_matrices_are_kernels_and_weights_of_16_rows_and_columns() -> None:
    names = [name for name, parameter in network().named_parameters() if is_matrix(parameter)]
    assert names == ["0.weight", "2.weight"]  # not the last, of 3 rows
    assert not is_matrix(torch.zeros(1, 100, 48))  # positions and tokens have a first axis of one


def test_matrices_step_by_a_fifth_of_the_rate_whatever_the_gradient() -> None:
    for scale in (1e-6, 1e3):
        weight = nn.Parameter(torch.zeros(32, 4, 3, 3, 3))
        optimizer = Muon([weight], lr=0.01, weight_decay=0.5)
        weight.grad = scale * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
        gradient = weight.grad.clone()
        optimizer.step()
        assert weight.square().mean().sqrt().item() == pytest.approx(0.002, rel=0.2)
        assert (weight * gradient).sum() < 0
        assert torch.equal(weight.grad, gradient)


def test_weights_decay_as_adamw_decays_them() -> None:
    weight = nn.Parameter(torch.ones(16, 16))
    optimizer = Muon([weight], lr=0.01, weight_decay=0.5)
    weight.grad = torch.zeros(16, 16)
    optimizer.step()
    torch.testing.assert_close(weight.data, torch.full((16, 16), 0.995))


def test_all_else_steps_as_adamw_steps_it() -> None:
    mine, theirs = network(), network()
    optimizers = Muon(mine.parameters(), **SETTINGS), torch.optim.AdamW(theirs.parameters(), **SETTINGS)
    train(mine, optimizers[0], 1)
    train(theirs, optimizers[1], 1)
    for (name, found), expected in zip(mine.named_parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(found, expected, atol=1e-7) != is_matrix(found), name


def test_training_goes_on_from_a_saved_state_as_without_a_break() -> None:
    whole, broken = network(), network()
    train(whole, Muon(whole.parameters(), **SETTINGS), 3)
    first = Muon(broken.parameters(), **SETTINGS)
    train(broken, first, 3)
    state = copy.deepcopy(first.state_dict())
    second = Muon(broken.parameters(), lr=1.0)
    second.load_state_dict(state)
    assert second.param_groups[0]["lr"] == 0.01 and second.param_groups[0]["momentum"] == 0.95
    train(broken, first, 2)
    resumed = network()
    resumed.load_state_dict(whole.state_dict())
    other = Muon(resumed.parameters(), **SETTINGS)
    other.load_state_dict(state)
    train(resumed, other, 2)
    for found, expected in zip(resumed.parameters(), broken.parameters(), strict=True):
        assert torch.equal(found, expected)


def test_a_closure_is_called_and_its_loss_returned() -> None:
    weight = nn.Parameter(torch.ones(16, 16))
    optimizer = Muon([weight], lr=0.01)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = weight.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 256
    assert weight.max() < 1


def test_parameters_without_a_gradient_stay() -> None:
    weight, other = nn.Parameter(torch.ones(16, 16)), nn.Parameter(torch.ones(3))
    Muon([{"params": [weight]}, {"params": [other], "lr": 0.1}], lr=0.01).step()
    assert torch.equal(weight.data, torch.ones(16, 16)) and torch.equal(other.data, torch.ones(3))
