"""Mirroring along several axes at random."""

from __future__ import annotations

import pytest
import torch

from shared_networks.transforms.flips import RandFlipAxesd


def volume() -> dict[str, torch.Tensor]:
    image = torch.arange(24.0).reshape(1, 2, 3, 4)
    return {"image": image, "label": -image}


@pytest.mark.parametrize("axes", [[], [1], [2, 0], [0, 1, 2]])
def test_certain_flips_mirror_exactly_these_axes(axes: list[int]) -> None:
    data = volume()
    out = RandFlipAxesd(["image", "label"], axes, prob=1.0)(data)
    expected = data["image"].flip([axis + 1 for axis in axes])
    assert torch.equal(torch.as_tensor(out["image"]), expected) and torch.equal(
        torch.as_tensor(out["label"]), -expected
    )


def test_axes_are_drawn_each_by_itself_and_a_seed_decides() -> None:
    flips = RandFlipAxesd("image", [0, 1, 2], prob=0.5)
    seen = []
    for seed in range(60):
        flips.set_random_state(seed)
        seen.append(tuple(torch.as_tensor(flips(volume())["image"]).flatten().tolist()))
    assert len(set(seen)) == 8
    flips.set_random_state(7)
    assert tuple(torch.as_tensor(flips(volume())["image"]).flatten().tolist()) == seen[7]
