"""Tell the token grid of a position table."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from shared_networks.errors import InputError
from shared_networks.networks.vit import sincos_positions

POSITIONS = "position_embeddings"
"""What names of position tables end with."""


def check_grids(checkpoint: str | Path, weights: Mapping[str, Tensor], expected: Sequence[int]) -> None:
    """Refuse positions of another token grid than the network's.

    Args:
        checkpoint: file of the weights, for the message.
        weights: flat state_dict.
        expected: (h, w, d), the network's own grid.

    Raises:
        InputError: a position table is of another grid.
    """
    for name, tensor in weights.items():
        if name.endswith(POSITIONS) and (grid := token_grid(tensor, expected)) != list(expected):
            raise InputError(
                f"{checkpoint}: its positions are of {grid_text(grid)} tokens, img_size and patch_size make "
                f"{grid_text(expected)}. Give the img_size that it was trained with."
            )


def token_grid(positions: Tensor, expected: Sequence[int]) -> list[int] | None:
    """Tell the token grid of a position table, which a checkpoint does not hold.

    Fixed tables are the sine-cosine table of their grid, and learned ones start there and stay near it. So a table is
    of the expected grid unless another grid's is clearly nearer (three quarters of the squared distance), and else
    of the grid whose table is clearly nearer than all others. Where neither tells, a cubic number of tokens is a cube.

    Args:
        positions: [1, L, E].
        expected: (h, w, d), the network's own grid.

    Returns:
        (h, w, d), or none where it cannot be told.
    """
    length, hidden_size = positions.shape[1:]
    table = positions[0].detach().float()
    if length == math.prod(expected) and is_sincos(positions, expected):
        return list(expected)
    divisors = [n for n in range(1, length + 1) if length % n == 0]
    fast = max(hidden_size // 24, 4)  # of slow frequencies the tables of all grids are alike
    lines = {n: sincos_positions((n, 1, 1), hidden_size)[0].unflatten(1, (6, -1))[:, :2, :fast] for n in divisors}
    table = table.unflatten(1, (6, -1))[..., :fast]
    distances = {}
    for h in divisors:
        for w in (n for n in divisors if length // h % n == 0):
            grid = (h, w, length // h // w)
            axes = table.reshape(*grid, 3, 2, -1).unbind(3)
            views = (lines[n].reshape(*(n if a == axis else 1 for a in range(3)), 2, -1) for axis, n in enumerate(grid))
            distances[grid] = sum(float((a - v).square().sum()) for a, v in zip(axes, views, strict=True))
    nearest, *others = sorted(distances, key=lambda grid: distances[grid])
    own = tuple(expected)
    if own in distances and distances[nearest] >= 0.75 * distances[own]:
        return list(expected)
    if not others or distances[nearest] < 0.75 * distances[others[0]]:
        return list(nearest)
    cube = (round(length ** (1 / 3)),) * 3
    return list(cube) if cube in distances and distances[nearest] >= 0.75 * distances[cube] else None


def is_sincos(positions: Tensor, grid: Sequence[int]) -> bool:
    """Return whether a table [1, L, E] is the fixed one of its grid."""
    return torch.allclose(positions.float(), sincos_positions(grid, positions.shape[2]), rtol=0, atol=1e-5)


def grid_text(grid: Sequence[int] | None) -> str:
    """Return a token grid as text."""
    return " x ".join(map(str, grid)) if grid else "an unknown grid of"
