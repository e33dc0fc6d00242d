"""The synthetic body below the navel: bones, thighs, cavity, bladder, and no organ where none belongs."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.ndimage import label

from shared_networks.synthetic import pelvis
from shared_networks.synthetic.body import anatomy
from shared_networks.synthetic.canvas import FAR, Canvas
from shared_networks.synthetic.patient import place, varied
from shared_networks.synthetic.shapes import ball
from shared_networks.synthetic.tissues import TISSUE_ID

SEEDS = range(8)
BONE = "cortical bone", "trabecular bone", "metal"

Body = tuple[Canvas, float]
"""A painted body and the volume of a voxel in ml."""


@pytest.fixture(scope="module")
def bodies() -> list[Body]:
    """Eight patients from iliac crest to mid-thigh."""
    result = []
    for seed in SEEDS:
        rng = np.random.default_rng([14, seed])
        canvas, spacing, _ = place(rng, 5, (-475, -100))
        for structure in varied(anatomy(rng, canvas.female), rng):
            canvas.paint(structure)
        result.append((canvas, float(spacing.prod()) / 1000))
    return result


def grid(low: tuple[float, ...], high: tuple[float, ...], step: float) -> Canvas:
    """An empty grid between two corners in mm, all of it inside the belly."""
    axes = (np.arange(a, b, step, dtype=np.float32) for a, b in zip(low, high, strict=True))
    canvas = Canvas(np.stack(np.meshgrid(*axes, indexing="ij")))
    canvas.roof[...] = -FAR
    return canvas


def of(canvas: Canvas, *tissues: str) -> NDArray[np.bool_]:
    return np.isin(canvas.tissue, [TISSUE_ID[tissue] for tissue in tissues])


def test_both_sexes(bodies: list[Body]) -> None:
    """Only men have testes: gut wall, as glands look, below the perineum."""
    assert {canvas.female for canvas, _ in bodies} == {True, False}
    for canvas, _ in bodies:
        assert (of(canvas, "gut wall") & (canvas.points[2] < -330)).any() != canvas.female


def test_two_femoral_heads(bodies: list[Body]) -> None:
    for canvas, _ in bodies:
        shares = []
        for side in (-1, 1):
            centre = np.reshape((side * 89, 28, -236), (3, 1, 1, 1))
            head = np.linalg.norm(canvas.points - centre, axis=0) < 18
            shares.append(of(canvas, *BONE)[head].mean())
        assert min(shares) > 0.9 and abs(shares[0] - shares[1]) < 0.1


def test_two_femoral_shafts_of_cortex_round_marrow(bodies: list[Body]) -> None:
    for canvas, voxel in bodies:
        x, y, z = canvas.points
        slab = (z > -440) & (z < -380)
        bone = of(canvas, "cortical bone") & slab
        places, volumes = [], []
        for side in (-1, 1):
            shaft = bone & (side * x > 0)
            place = np.array([abs(x[shaft].mean()), y[shaft].mean()])
            places.append(place)
            volumes.append(shaft.sum() * voxel)
            marrow = slab & (np.hypot(side * x - place[0], y - place[1]) < 4)
            assert of(canvas, "fat")[marrow].mean() > 0.4
        np.testing.assert_allclose(*places, atol=4)
        assert min(volumes) > 12 and max(volumes) < 45 and max(volumes) < 1.3 * min(volumes)


def test_thighs_are_apart_and_trunk_is_whole(bodies: list[Body]) -> None:
    for canvas, voxel in bodies:
        z = canvas.points[2]
        solid = ~of(canvas, "air", "table")
        parts, _ = label(solid & (z > -460) & (z < -440))
        sizes = np.bincount(parts.ravel())[1:] * voxel
        thighs = np.flatnonzero(sizes > 100) + 1
        sides = [np.sign(canvas.points[0][parts == thigh].mean()) for thigh in thighs]
        assert sorted(sides) == [-1, 1], sizes
        parts, _ = label(solid & (z > -290) & (z < -110))
        assert (np.bincount(parts.ravel())[1:] * voxel > 100).sum() == 1


def test_sizes_of_hips_and_thighs(bodies: list[Body]) -> None:
    """Width in mm at the hip joints and cross-section in cm2 of the muscle of a thigh."""
    for canvas, voxel in bodies:
        x, _, z = canvas.points
        hips = x[~of(canvas, "air", "table") & (np.abs(z + 240) < 6)]
        assert 320 < hips.max() - hips.min() < 480
        muscle = of(canvas, "muscle") & (z > -460) & (z < -430)
        assert 60 < muscle.sum() * voxel / 3 / 2 < 150


def test_share_of_bone(bodies: list[Body]) -> None:
    for canvas, _ in bodies:
        share = of(canvas, *BONE).sum() / (~of(canvas, "air", "table")).sum()
        assert 0.03 < share < 0.12


def test_cavity_lies_within_the_bones(bodies: list[Body]) -> None:
    for canvas, _ in bodies:
        x, y, z = canvas.points
        cavity = canvas.roof < 0
        assert (cavity & (z > -110)).any() and not (cavity & (z < -295)).any()
        assert np.abs(x[cavity & (z < -230)]).max() < 65
        assert y[cavity & (z < -255)].max() < 65, "behind the symphysis"
        hips = of(canvas, *BONE) & (np.abs(x) > 55) & (z > -320)
        assert (canvas.roof[hips] < -6).mean() < 0.02


def test_muscles_lie_beneath_the_fat(bodies: list[Body]) -> None:
    """Beside the spine and the spermatic cords, no muscle reaches into the fat under the skin, nor into the belly."""
    for canvas, _ in bodies:
        x, _, z = canvas.points
        muscle = of(canvas, "muscle") & (np.abs(x) > 70) & (z < -130)
        assert canvas.core[muscle].max() <= 0
        assert (canvas.roof[muscle & (z < -200)] < -10).mean() < 0.01


def test_no_organ_in_pelvis_and_thighs(bodies: list[Body]) -> None:
    for canvas, _ in bodies:
        assert not canvas.organ[canvas.points[2] < -200].any()


def test_bladder_is_full_or_empty() -> None:
    """Volume of what it holds, over many patients, in ml; sometimes layered contrast or a catheter."""
    volumes, layered, catheters = [], 0, 0
    for seed in range(60):
        canvas = grid((-90, -80, -290), (90, 110, -120), 5)
        for structure in pelvis.bladder(np.random.default_rng(seed)):
            if structure.shapes:
                canvas.paint(structure)
        volumes.append(of(canvas, "urine", "cyst").sum() * 0.125)
        layered += int((of(canvas, "cyst").sum() > 10) and of(canvas, "urine").any())
        catheters += int(of(canvas, "cartilage").any())
    assert 3 < min(volumes) < 30 and 400 < max(volumes) < 800 and 60 < np.median(volumes) < 220
    assert 8 < layered < 35 and 1 <= catheters < 15


def test_bladder_of_each_patient(bodies: list[Body]) -> None:
    for canvas, voxel in bodies:
        x, _, z = canvas.points
        urine = of(canvas, "urine", "cyst") & (np.abs(x) < 60) & (z < -190)
        assert 2 < urine.sum() * voxel < 800


def test_replaced_hips() -> None:
    """Some have metal in one hip, from the socket down the shaft."""
    replaced = []
    for seed in range(200):
        structures = [s for s in pelvis.bones(np.random.default_rng(seed)) if s.tissue == "metal"]
        replaced += [structures] * bool(structures)
    assert 4 < len(replaced) < 25
    sides = set()
    for structures in replaced:
        canvas = grid((-160, -30, -400), (160, 80, -190), 6)
        for structure in structures:
            canvas.paint(structure._replace(inside=False))
        x, _, z = (p[of(canvas, "metal")] for p in canvas.points)
        assert np.ptp(np.sign(x)) == 0 and z.min() < -370 and z.max() > -225
        sides.add(np.sign(x[0]))
    assert sides == {-1, 1}


@pytest.mark.parametrize("apart", [4.0, 10.0])
def test_shapes_that_stay_apart(apart: float) -> None:
    """A negative blend leaves a gap as wide between overlapping shapes and none elsewhere."""
    canvas = grid((-40, -2, -2), (40, 3, 3), 1)
    shapes = ball(-14, 0, 0, 20), ball(14, 0, 0, 20)
    canvas.paint(pelvis.Structure("muscle", shapes, blend=-apart))
    line = of(canvas, "muscle")[:, 2, 2]
    x = canvas.points[0][:, 2, 2]
    np.testing.assert_array_equal(line, (np.abs(x) > apart / 2) & (np.abs(x) < 34))
