"""The chest of the synthetic bodies: what a network must not take for an organ of the belly is where it belongs."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.ndimage import label as components

from shared_networks.synthetic.appearance import scan
from shared_networks.synthetic.body import anatomy
from shared_networks.synthetic.canvas import Canvas
from shared_networks.synthetic.patient import place, varied
from shared_networks.synthetic.spine import THORACIC
from shared_networks.synthetic.tissues import ORGANS, TISSUE_ID
from shared_networks.synthetic.trunk import Habitus, paint_trunk

SEEDS = (0, 1, 4, 12, 27, 76)  # breath out (4), arms down (12), a deep breath (27), fluid on both sides (76)


class Body(NamedTuple):
    canvas: Canvas
    image: NDArray[np.int16]
    ml: float  # of a voxel

    def tissue(self, *names: str) -> NDArray[np.bool_]:
        return np.isin(self.canvas.tissue, [TISSUE_ID[name] for name in names])

    def organ(self, name: str) -> NDArray[np.bool_]:
        return self.canvas.organ == ORGANS.index(name)


@pytest.fixture(scope="module")
def bodies() -> list[Body]:
    result = []
    for seed in SEEDS:
        rng = np.random.default_rng(seed)
        canvas, spacing, affine = place(rng, 5, (60, 320))
        for structure in varied(anatomy(rng, canvas.habitus), rng):
            canvas.paint(structure)
        image = scan(rng, canvas.tissue, spacing)
        result.append(Body(canvas, image, abs(np.linalg.det(affine[:3, :3])) / 1000))
    return result


def largest(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    parts, _ = components(mask)
    return parts == 1 + np.bincount(parts.ravel())[1:].argmax()


def test_patients_differ(bodies: list[Body]) -> None:
    builds = [body.canvas.habitus for body in bodies]
    assert {build.female for build in builds} == {build.arms_down for build in builds} == {True, False}
    breaths = [build.breath for build in builds]
    assert min(breaths) < -20 and max(breaths) > 10
    assert any(all(build.effusion) for build in builds) and not all(any(build.effusion) for build in builds)


def test_two_lungs_apart_from_apex_to_diaphragm(bodies: list[Body]) -> None:
    for body in bodies:
        parts, _ = components(body.tissue("lung"))
        sizes = np.sort(np.bincount(parts.ravel())[1:])[::-1] * body.ml
        assert sizes[0] < 2.2 * sizes[1] and sizes[2:].sum() < 0.03 * sizes[0], np.round(sizes[:4])
        assert 2000 < sizes[:2].sum() < 8000, np.round(sizes[:4])
        for side in (1, -1):
            height = body.canvas.points[2][body.tissue("lung") & (side * body.canvas.points[0] > 0)]
            assert 275 < height.max() < 312 and height.min() < 80


def test_air_in_the_windpipe_reaches_both_lungs(bodies: list[Body]) -> None:
    for body in bodies:
        x, _, z = body.canvas.points
        trachea = body.tissue("gas") & (z > 240) & (np.abs(x) < 15)
        assert 4 < trachea.sum() * body.ml < 40
        assert np.median(body.image[trachea]) < -600
        bronchi = body.tissue("gas") & (z > 150) & (z < 240)
        assert (bronchi & (x > 25)).any() and (bronchi & (x < -25)).any()


def test_heart_has_walls_and_chambers_on_the_left(bodies: list[Body]) -> None:
    for body in bodies:
        x, _, z = body.canvas.points
        near = (np.abs(x + 10) < 90) & (z < 210) & ~body.organ("aorta") & ~body.organ("inferior vena cava")
        heart = largest(body.tissue("myocardium", "arterial blood", "pulmonary blood") & near)
        assert 400 < heart.sum() * body.ml < 1100
        assert 80 < (heart & body.tissue("myocardium")).sum() * body.ml < 450
        assert x[heart].mean() < 0
        for cavity in ("arterial blood", "pulmonary blood"):
            assert (largest(heart & body.tissue(cavity))).sum() * body.ml > 40
        assert body.canvas.points[1][heart & body.tissue("pulmonary blood")].mean() > (
            body.canvas.points[1][heart & body.tissue("arterial blood")].mean()
        ), "the right ventricle lies in front"


def test_aorta_is_whole_with_its_arch(bodies: list[Body]) -> None:
    for body in bodies:
        aorta = body.organ("aorta")
        assert largest(aorta).sum() > 0.98 * aorta.sum()
        y, z = body.canvas.points[1:]
        level = (z > 195) & (z < 205)
        assert (aorta & level & (y > 40)).any() and (aorta & level & (y < 30)).any(), "up in front, down behind"
        assert 220 < z[aorta].max() < 285
        wall = [TISSUE_ID[name] for name in ("arterial blood", "calcification", "thrombus")]
        assert np.isin(body.canvas.tissue[aorta], wall).all()


def test_vena_cava_ends_at_the_heart(bodies: list[Body]) -> None:
    for body in bodies:
        cava = body.organ("inferior vena cava")
        assert cava.any() and body.canvas.points[2][cava].max() < 170 + body.canvas.habitus.breath


def test_esophagus_runs_from_neck_to_stomach(bodies: list[Body]) -> None:
    for body in bodies:
        esophagus = body.organ("esophagus")
        assert largest(esophagus).sum() > 0.95 * esophagus.sum()
        height = body.canvas.points[2]
        assert height[esophagus].max() > 300
        assert 35 < height[esophagus].min() < 115
        assert 15 < esophagus.sum() * body.ml < 90


def test_ribs_on_both_sides_and_twelve_vertebrae(bodies: list[Body]) -> None:
    assert len(THORACIC[:12]) == 12 and 300 < THORACIC[11] < 320, "T1 lies at the apices"
    for body in bodies:
        x, _, z = body.canvas.points
        bone = body.tissue("cortical bone", "trabecular bone", "cartilage") & (z > 90) & (z < 260)
        left, right = ((bone & (side * x > 60) & (np.abs(x) < 155)).sum() for side in (-1, 1))
        assert 0.75 < left / right < 1.33
        assert 0.02 < bone.sum() / (body.canvas.tissue > TISSUE_ID["table"])[(z > 90) & (z < 260)].sum() < 0.12


def ribs_at_the_flank() -> int:
    z = np.arange(-60, 330, 1, np.float32)
    points = np.zeros((3, 101, 3, len(z)), np.float32)
    points[0] = np.linspace(60, 160, 101)[:, None, None]
    points[1] = 20
    points[2] = z
    canvas = Canvas(points, Habitus(10, 12, 5))
    paint_trunk(canvas, canvas.habitus, np.random.default_rng(0))
    bone = np.isin(canvas.tissue[:, 1], [TISSUE_ID["cortical bone"], TISSUE_ID["trabecular bone"]])
    lung = canvas.tissue[:, 1] == TISSUE_ID["lung"]
    beside = (bone & (np.cumsum(lung, 0) > 0)).any(0) if lung.any() else bone.any(0)
    return int(components(beside)[1])


def test_ribs_follow_each_other_down_the_flank() -> None:
    assert 6 <= ribs_at_the_flank() <= 10


def test_organs_of_the_belly_stay_below_the_domes(bodies: list[Body]) -> None:
    for body in bodies:
        for organ in ("liver", "spleen", "stomach"):
            where = body.organ(organ)
            assert (body.canvas.roof[where] < 1).all(), organ
            if where.any():
                assert body.canvas.points[2][where].max() < 125 + body.canvas.habitus.breath
        labels = set(np.unique(body.canvas.organ[body.canvas.points[2] > 160]))
        assert labels == {0, ORGANS.index("aorta"), ORGANS.index("esophagus")}


def test_breath_moves_the_liver() -> None:
    tops = []
    for breath in (-30.0, 15.0):
        rng = np.random.default_rng(5)
        canvas, _, _ = place(rng, 5, (40, 200))
        fresh = Canvas(canvas.points, canvas.habitus._replace(breath=breath))
        paint_trunk(fresh, fresh.habitus, rng)
        for structure in varied(anatomy(np.random.default_rng(7), fresh.habitus), np.random.default_rng(8)):
            fresh.paint(structure)
        tops.append(fresh.points[2][fresh.organ == ORGANS.index("liver")].max())
    assert 30 < tops[1] - tops[0] < 55


def test_arms_and_breasts_where_the_habitus_says() -> None:
    def painted(**changes: Any) -> NDArray[np.uint8]:
        axis = [np.arange(low, high, 6, dtype=np.float32) for low, high in ((-280, 281), (-120, 200), (-60, 321))]
        canvas = Canvas(np.stack(np.meshgrid(*axis, indexing="ij")), Habitus(15, 12, 5, **changes))
        paint_trunk(canvas, canvas.habitus, np.random.default_rng(0))
        return canvas.tissue > TISSUE_ID["table"]

    male, female, down = painted(), painted(female=True), painted(arms_down=True)
    apart = components(down[:, :, 15])[1]
    assert apart == 3 and components(male[:, :, 15])[1] == 1, "two arms beside the trunk at z = 30"
    assert 300 < (female & ~male).sum() * 0.216 < 3000 and not (male & ~female).any()


def test_fluid_lies_behind_where_the_habitus_says(bodies: list[Body]) -> None:
    for body in bodies:
        x, y, _ = body.canvas.points
        for side, height in zip((1, -1), body.canvas.habitus.effusion, strict=True):
            fluid = body.tissue("effusion") & (side * x > 0)
            assert fluid.any() == (height > 15) or 0 < height <= 15
            if fluid.any():
                lung = body.tissue("lung") & (side * x > 0)
                assert y[fluid].mean() < y[lung].mean() - 30
                assert -5 < np.median(body.image[fluid]) < 30
