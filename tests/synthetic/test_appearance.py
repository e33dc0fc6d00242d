"""Scans drawn of tissue maps: Hounsfield units, thickness, kernel, noise, streaks and field of view as asked for."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from shared_networks.errors import InputError
from shared_networks.synthetic.appearance import (
    Variety,
    draw_scan,
    gaussian,
    mean_hu,
    out_of_view,
    slices,
    streaks,
)
from shared_networks.synthetic.tissue_table import TissueTable

PLAIN = Variety(
    contrast=0, spread=0, texture=(0, 0), kernel_mm=(0.01, 0.01), sharpening=(0, 0), slice_mm=(0.1, 0.1), across=0,
    noise_hu=(1e-6, 1e-6), shading=(0, 0), shift=0, scale=0,
)  # fmt: skip
ONES = np.ones(3)
AIR, LIVER, METAL = range(3)


def table(**more: Any) -> TissueTable:
    """Air, liver and a metal, without texture, spread and variation unless given."""
    hu = np.array([[-1000, -1000], [50, 110], [3000, 3000]], np.float32)
    nothing = np.zeros(3, np.float32)
    return TissueTable(
        ("air", "liver", "metal"), hu, **{"texture": nothing, "spread": nothing, "variation": nothing, **more}
    )


def draw(tissue: Tensor, seed: int = 0, spacing: Any = ONES, of: TissueTable | None = None, **variety: Any) -> Tensor:
    return draw_scan(np.random.default_rng(seed), tissue, spacing, of or table(), PLAIN._replace(**variety)).hu


def slab(thickness: int = 1, shape: tuple[int, int, int] = (12, 14, 41)) -> Tensor:
    """Liver of some voxels' thickness across the middle of the last axis, in air."""
    tissue = torch.zeros(shape, dtype=torch.uint8)
    middle = shape[2] // 2
    tissue[:, :, middle : middle + thickness] = LIVER
    return tissue


def test_without_variety_a_scan_shows_the_table() -> None:
    image = draw(slab(3))
    assert image.dtype == torch.float32 and image.shape == (12, 14, 41)
    torch.testing.assert_close(image, torch.where(slab(3) == LIVER, 50.0, -1000.0), atol=0.01, rtol=0)


def test_contrast_lies_between_the_phases_and_every_draw_differs() -> None:
    means = [
        mean_hu(np.random.default_rng(seed), table(), PLAIN._replace(contrast=1, enhancement=(1, 1)))
        for seed in range(60)
    ]
    liver = np.array(means)[:, LIVER]
    assert np.array_equal(np.array(means)[:, AIR], np.full(60, -1000))
    assert 50 <= liver.min() < 60 and 100 < liver.max() <= 50 + 60 * 1.3 and len(set(liver)) > 40


def test_tissues_spread_between_patients_as_the_table_says_each_by_itself() -> None:
    spread = table(spread=np.array([0, 12, 100], np.float32))
    means = np.array([mean_hu(np.random.default_rng(seed), spread, PLAIN._replace(spread=1)) for seed in range(400)])
    np.testing.assert_allclose(means.std(0), [0, 12, 100], rtol=0.1)
    assert abs(np.corrcoef(means[:, LIVER], means[:, METAL])[0, 1]) < 0.15


def test_texture_and_variation_have_their_standard_deviation() -> None:
    liver = torch.full((48, 48, 48), LIVER, dtype=torch.uint8)
    fine = draw(liver, of=table(texture=np.array([0, 9, 0], np.float32)), texture=(1, 1), texture_mm=(1, 1))
    assert fine.std() == pytest.approx(9, rel=0.1) and fine.mean() == pytest.approx(50, abs=1)
    varied = table(variation=np.array([0, 8, 0], np.float32))
    fields = torch.stack([draw(liver, seed, of=varied, variation_mm=(10, 10)) for seed in range(8)])
    assert fields.std() == pytest.approx(8, rel=0.25)
    assert (fields[:, 1:] - fields[:, :-1]).std() < 2  # smooth over 1 mm


@pytest.mark.parametrize("sigma", [0.0, 0.6, 1.5])
def test_the_kernel_is_a_gaussian_over_voxels(sigma: float) -> None:
    matrix, at = gaussian(31, sigma).double(), torch.arange(31.0, dtype=torch.float64)
    torch.testing.assert_close(matrix.sum(1), torch.ones(31, dtype=torch.float64), atol=1e-6, rtol=0)
    variance = (matrix[15] * (at - 15) ** 2).sum()
    assert variance == pytest.approx(sigma**2 + 1 / 12 if sigma > 0.2 else 0, rel=0.02, abs=1e-6)


def test_the_kernel_blurs_in_plane_alone() -> None:
    sharp, soft = (draw(slab(20).permute(2, 1, 0), kernel_mm=(k, k)) for k in (0.01, 2.0))
    inside = (soft[:, 7, 6] > -900) & (soft[:, 7, 6] < -50)
    assert inside.sum() >= 4 and not ((sharp[:, 7, 6] > -900) & (sharp[:, 7, 6] < -50)).any()
    across = draw(slab(20), kernel_mm=(2, 2))
    torch.testing.assert_close(across, draw(slab(20)), atol=0.01, rtol=0)


@pytest.mark.parametrize(("spacing", "voxels"), [(1.0, 1), (0.5, 2)])
@pytest.mark.parametrize("thickness", [0.7, 3.0, 7.0])
def test_slices_have_their_thickness(thickness: float, spacing: float, voxels: int) -> None:
    """A layer of 1 mm shows in a slice as its share of the thickness, and in as many mm as the slice has."""
    profiles = [
        (draw(slab(voxels), seed, (1, 1, spacing), slice_mm=(thickness, thickness)) + 1000) / 1050 for seed in range(20)
    ]
    for profile in profiles:
        torch.testing.assert_close(profile, profile[:1, :1].expand_as(profile), atol=1e-5, rtol=0)  # in plane as sharp
    peaks = np.array([profile.max() for profile in profiles])
    assert peaks.max() == pytest.approx(min(1, 1 / thickness), rel=0.02 if thickness > 1 else 0.2)
    assert np.mean([profile[0, 0].sum() * spacing for profile in profiles]) == pytest.approx(1, rel=0.1)


def test_slices_interpolate_what_lies_between_them() -> None:
    between, mean = slices(20, thickness=4, distance=4, first=-1)
    assert between.shape == (20, 6) and mean.shape == (6, 20)
    for matrix in (between, mean):
        torch.testing.assert_close(matrix.sum(1), torch.ones(len(matrix)), atol=1e-6, rtol=0)
    torch.testing.assert_close(between[5], torch.tensor([0, 0.5, 0.5, 0, 0, 0]))  # 5 lies between slices at 3 and 7
    torch.testing.assert_close(mean[1, :7], torch.tensor([0, 0.5, 1, 1, 1, 0.5, 0]) / 4)


def test_slices_lie_across_another_axis_at_times() -> None:
    block = torch.zeros(24, 24, 24, dtype=torch.uint8)
    block[12, 12, 12] = LIVER
    widths = set()
    for seed in range(30):
        image = draw(block, seed, slice_mm=(7, 7), across=1)
        widths.add(tuple(int((image > -999).any(axis).any(axis).sum() > 1) for axis in (1, 0, 0)))
        thick = [(image > -999).any([a for a in range(3) if a != axis]).sum() > 1 for axis in range(3)]
        widths.add(tuple(map(bool, thick)))
        assert sum(map(bool, thick)) == 1 and not thick[2]
    assert {(True, False, False), (False, True, False)} <= widths


@pytest.mark.parametrize(("thickness", "kernel"), [(0.7, 0.3), (7.0, 0.3), (7.0, 1.2)])
def test_noise_has_its_standard_deviation_after_resampling(thickness: float, kernel: float) -> None:
    liver = torch.full((48, 48, 48), LIVER, dtype=torch.uint8)
    settings = {"slice_mm": (thickness, thickness), "noise_mm": (kernel, kernel), "noise_hu": (15, 15)}
    images = [draw(liver, seed, 3 * ONES, **settings) for seed in range(4)]
    assert np.mean([image.std() for image in images]) == pytest.approx(15, rel=0.03)
    steps = [[float(image.diff(dim=axis).std()) for axis in range(3)] for image in images]
    smooth = np.mean(steps, 0)
    assert (smooth[2] < 0.8 * smooth[0]) == (thickness == 7.0)  # between thick slices noise is interpolated


def test_calibration_is_slightly_off() -> None:
    liver = torch.full((4, 4, 4), LIVER, dtype=torch.uint8)
    values = np.array([float(draw(liver, seed, shift=8, scale=0.02).mean()) for seed in range(200)])
    assert values.min() > 50 - 9.1 and values.max() < 50 + 9.1 and values.std() > 3


def test_values_stay_within_those_of_a_scanner() -> None:
    metal = torch.full((6, 6, 6), METAL, dtype=torch.uint8)
    image = draw(metal, noise_hu=(500, 500))
    assert image.max() == 3071 and draw(metal * 0, noise_hu=(500, 500)).min() == -1024


def test_metal_throws_streaks_in_its_slices_which_fade_with_distance() -> None:
    metal = np.zeros((60, 64, 20), bool)
    metal[28:33, 30:35, 6:12] = True
    added = streaks(np.random.default_rng(0), metal, np.array([1.5, 1.5, 3]), [0, 1], (400, 400)).numpy()
    assert not added[:, :, [0, 5, 12, 19]].any() and not added[metal].any()
    distance = np.hypot(*np.meshgrid(np.arange(60) - 30, np.arange(64) - 32, indexing="ij"))
    near, far = (
        (np.abs(added[:, :, 8])[(distance > low) & (distance < high)]).mean() for low, high in ((4, 8), (25, 30))
    )
    assert 50 < near < 800 and far < near / 3
    assert added[:, :, 8].min() < -50 and added[:, :, 8].max() > 50
    tissue = torch.from_numpy(np.where(metal, METAL, LIVER).astype(np.uint8))
    assert (draw(tissue, streaks=(400, 400))[20:27, 32, 8] - 50).abs().mean() > 20
    liver = torch.full(metal.shape, LIVER, dtype=torch.uint8)
    torch.testing.assert_close(draw(liver, streaks=(400, 400)), torch.full(metal.shape, 50.0))


@pytest.mark.parametrize("normal", [0, 2])
def test_a_round_field_of_view_ends_in_the_volume(normal: int) -> None:
    shape, spacing = (60, 70, 50), np.array([3.0, 3.0, 4.0])
    shares = []
    for seed in range(40):
        unseen = out_of_view(np.random.default_rng(seed), shape, spacing, normal, PLAIN._replace(view=1))
        if unseen is None:
            continue
        flat = unseen.select(normal, 0)
        assert torch.equal(unseen, flat.unsqueeze(normal).expand(shape))
        seen = ~flat
        for plane in (seen, seen.T):  # a circle is convex: what is seen of a row is one piece
            edges = torch.nn.functional.pad(plane.int(), (1, 1)).diff(dim=1)
            assert ((edges == 1).sum(1) <= 1).all()
        shares.append(float(flat.float().mean()))
    assert len(shares) > 25 and 0.02 < np.mean(shares) < 0.4 and max(shares) < 0.8


def test_a_scan_ends_in_the_volume() -> None:
    drawn = draw_scan(np.random.default_rng(3), slab(20), ONES, table(), PLAIN._replace(end=1))
    assert drawn.unseen is not None and 0 < drawn.unseen.float().mean() <= 0.5
    assert (drawn.hu[drawn.unseen] == -1024).all() and (drawn.hu[~drawn.unseen] >= -1001).all()
    levels = drawn.unseen[0, 0]
    assert torch.equal(drawn.unseen, levels.expand(drawn.unseen.shape)) and levels[0] != levels[-1]
    assert draw_scan(np.random.default_rng(3), slab(20), ONES, table(), PLAIN).unseen is None


def test_a_seed_repeats_a_scan_and_another_does_not() -> None:
    usual = Variety()
    first, again, other = (
        draw_scan(np.random.default_rng(seed), slab(20), 3 * ONES, table(), usual).hu for seed in (0, 0, 1)
    )
    assert torch.equal(first, again) and (first - other).abs().mean() > 2


def test_a_tissue_outside_the_table_is_refused() -> None:
    with pytest.raises(InputError, match=r"tissue 7 is not in .*, which has 3, 0 to 2"):
        draw(torch.full((4, 4, 4), 7, dtype=torch.uint8))
