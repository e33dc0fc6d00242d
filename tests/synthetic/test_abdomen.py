"""The organs of the belly differ between patients as widely as in clinics, with the rare findings among them."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pytest
from numpy.typing import NDArray

from shared_networks.synthetic import abdomen, bowel, kidneys
from shared_networks.synthetic.canvas import Canvas
from shared_networks.synthetic.patient import bend, place, turn_table, varied
from shared_networks.synthetic.shapes import Structure, ball
from shared_networks.synthetic.tissues import ABSENT, ORGANS, TISSUE_ID, TISSUES
from shared_networks.synthetic.trunk import Habitus

STEP = 4.0  # mm
ORAL_CONTRAST = [name for name in TISSUES if name.endswith("oral contrast")]


def open_canvas(up: int = 1, step: float = STEP) -> Canvas:
    """Make a canvas without walls over the belly, of cubic voxels."""
    low, high = (-150, -70, -270), (150, 150, 140)
    axes = np.meshgrid(*(np.arange(a, b, step) for a, b in zip(low, high, strict=True)), indexing="ij")
    canvas = Canvas(np.stack(axes).astype(np.float32), Habitus(20, 12, 10, prone=up < 0))
    canvas.roof[:] = -1000
    canvas.tissue[:] = TISSUE_ID["fat"]
    return canvas


def painted(structures: Iterable[Structure], up: int = 1) -> Canvas:
    canvas = open_canvas(up)
    for structure in structures:
        if structure.shapes:
            canvas.paint(structure)
    return canvas


def ml(mask: NDArray[np.bool_]) -> float:
    return mask.sum() * STEP**3 / 1000


def ends(canvas: Canvas, mask: NDArray[np.bool_], axis: int) -> NDArray[np.float32]:
    """Lowest and highest coordinate of a mask along an axis, in mm."""
    return np.quantile(canvas.points[axis][mask], (0, 1))


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng([14, seed])


def test_small_bowel_reaches_from_the_upper_belly_to_the_pelvis() -> None:
    packed, loose = (painted(bowel.small_bowel(rng(1), lean)) for lean in (1, 0))
    wall = [canvas.tissue != TISSUE_ID["fat"] for canvas in (packed, loose)]
    low, high = ends(packed, wall[0], 2)
    assert low < -215 and high > -10
    assert wall[0].mean() > 1.25 * wall[1].mean()


@pytest.mark.parametrize("kind", bowel.SMALL)
def test_small_bowel_of_one_filling(kind: str) -> None:
    tissue = painted(bowel.small_bowel(rng(2), 0.5, kind)).tissue
    filling = bowel.SMALL[kind][1].tissue
    shares = {name: (tissue == TISSUE_ID[name]).sum() for name in ("gut wall", "chyme", "water", *ORAL_CONTRAST)}
    if not filling:
        assert max(shares, key=lambda name: shares[name]) == "gut wall"
    elif kind == "gas":
        assert (tissue == TISSUE_ID["gas"]).sum() > shares["chyme"]
    else:
        assert (tissue == TISSUE_ID[filling]).sum() > 0.3 * (tissue != TISSUE_ID["fat"]).sum()


def test_wide_right_colon_of_even_contents_lies_beside_the_liver() -> None:
    canvas = painted(bowel.colon(rng(3), "soft stool", 35))
    soft = canvas.tissue == TISSUE_ID["soft stool"]
    right = soft & (canvas.points[0] > 40) & (np.abs(canvas.points[2] + 100) < STEP)
    low, high = ends(canvas, right, 0)
    assert 48 < high - low < 90
    assert right.sum() > 4 * ((canvas.tissue == TISSUE_ID["gas"]) & right).sum()


def test_course_of_the_colon_varies() -> None:
    lows, lefts = [], []
    for seed in range(12):
        canvas = painted(bowel.colon(rng(seed)))
        gut, (x, _, z) = canvas.tissue != TISSUE_ID["fat"], canvas.points
        lows.append(ends(canvas, gut & (np.abs(x) < 30) & (canvas.points[1] > 92), 2)[0])
        lefts.append(ends(canvas, gut & (x < -80), 2)[1])
        assert z[gut].min() < -190
    assert min(lows) < -140 and max(lows) > -90, "the transverse colon is short or sags to the pelvis"
    assert max(lefts) - min(lefts) > 25, "the splenic flexure is high or low"


@pytest.mark.parametrize("kind", bowel.STOMACH)
def test_stomach_of_each_kind(kind: str) -> None:
    sizes = []
    for seed in range(4):
        canvas = painted(bowel.stomach(rng(seed), kind))
        inside = canvas.organ == ORGANS.index("stomach")
        sizes.append(ml(inside))
        filling = bowel.STOMACH[kind][1]
        held = canvas.tissue[inside & (canvas.tissue != TISSUE_ID["gut wall"])]
        assert set(held) <= {TISSUE_ID[n] for n in (filling.tissue, "gas", filling.mottle[0], filling.sediment[0]) if n}
        if kind == "gas":
            assert (held == TISSUE_ID["gas"]).mean() > 0.4
    assert max(sizes) < 260 if kind == "collapsed" else min(sizes) > 90


def test_kinds_of_liver() -> None:
    reach, low, volume = {}, {}, {}
    for kind in abdomen.LIVERS:
        canvases = [painted(abdomen.liver(rng(seed), kind)) for seed in range(4)]
        masks = [c.organ == ORGANS.index("liver") for c in canvases]
        reach[kind] = np.mean([ends(c, m, 0)[0] for c, m in zip(canvases, masks, strict=True)])
        low[kind] = np.mean([ends(c, m, 2)[0] for c, m in zip(canvases, masks, strict=True)])
        volume[kind] = np.mean([ml(m) for m in masks])
    assert reach["long left lobe"] < reach["usual"] - 15 < reach["short left lobe"] - 30
    assert low["Riedel"] < low["usual"] - 20
    assert volume["right resected"] < 0.6 * volume["usual"] and volume["cirrhotic"] < 0.9 * volume["usual"]


def test_spleens_small_and_large() -> None:
    small, large = (ml(painted(abdomen.spleen(rng(5), size)).organ == ORGANS.index("spleen")) for size in (0.8, 1.6))
    assert 60 < small < 250 and 500 < large < 2000, "the large one is not yet cut by the wall"


def test_kinds_of_kidney() -> None:
    volume, urine, cyst, height = {}, {}, {}, {}
    for kind in kidneys.KINDS:
        canvas = painted(kidneys.kidney(-1, 8, rng(6), kind))
        mask = canvas.organ == ORGANS.index("left kidney")
        volume[kind], height[kind] = ml(mask), canvas.points[2][mask].mean()
        urine[kind] = ml((canvas.tissue == TISSUE_ID["urine"]) & (canvas.points[2] > height[kind] - 40))
        cyst[kind] = ml(canvas.tissue == TISSUE_ID["cyst"])
        ureter = canvas.tissue == TISSUE_ID["urine"]
        assert ends(canvas, ureter, 2)[0] < -225, "the ureter runs down to the bladder"
        assert (canvas.points[0][mask].mean() < 0) and mask.any()
    assert 120 < volume["usual"] < 240 and volume["atrophic"] < 0.5 * volume["usual"]
    assert urine["hydronephrotic"] > 3 * urine["usual"]
    assert cyst["polycystic"] > 20 and volume["polycystic"] > volume["usual"]
    assert height["pelvic"] < -120 < height["low"] < -50 < height["usual"]


def test_fat_parts_the_kidney_from_the_bowel() -> None:
    thin, thick = (kidneys.kidney(1, fat, rng(7), "usual")[0].shapes[0].flat for fat in (1, 15))
    assert min(np.subtract(thick, thin)) > 10


def test_aneurysm_and_calcified_wall() -> None:
    canvas = painted(abdomen.great_vessels(rng(8), aneurysm=28))
    aorta = canvas.organ == ORGANS.index("aorta")
    low, high = ends(canvas, aorta, 0)
    assert 45 < high - low < 75
    assert ml(aorta & (canvas.tissue == TISSUE_ID["thrombus"])) > 10
    assert any(
        structure.tissue == "calcification" and structure.shapes
        for seed in range(8)
        for structure in abdomen.great_vessels(rng(seed))
    )


def test_vena_cava_is_flat_to_round() -> None:
    flats = [abdomen.great_vessels(rng(seed))[0].shapes[0].flat for seed in range(12)]
    ratios = [x / y for x, y, _ in flats]
    assert min(ratios) < 1.2 and max(ratios) > 2


def test_adrenal_nodules() -> None:
    with_, without = (painted(abdomen.adrenals(rng(9), chance)) for chance in (1, 0))
    nodule = TISSUE_ID["adrenal nodule"]
    assert (with_.organ[with_.tissue == nodule] > 0).all() and (with_.tissue == nodule).any()
    assert not (without.tissue == nodule).any()


def test_ascites_from_none_to_much() -> None:
    amounts = [
        ml(painted(abdomen.fluid(amount, rng(10))).tissue == TISSUE_ID["ascites"]) for amount in (0, 0.1, 0.4, 0.9)
    ]
    assert amounts[0] == 0 and (np.diff(amounts) > 0).all()


def test_clips_and_stents_are_of_metal() -> None:
    found = {}
    for kind in ("none", "clips", "stent"):
        canvas = open_canvas(step=2)
        for structure in abdomen.metal(rng(11), kind):
            if structure.shapes:
                canvas.paint(structure)
        found[kind] = (canvas.tissue == TISSUE_ID["metal"]).sum()
    assert found["none"] == 0 and found["clips"] > 2 and found["stent"] > 20
    assert TISSUES["metal"][0] > 2500


def test_muscles_from_wasted_to_athletic() -> None:
    sizes, lean = [], []
    for seed in range(10):
        canvas = painted(abdomen.muscles(rng(seed)))
        psoas = (canvas.points[1] > -14) & (np.abs(canvas.points[2] + 60) < STEP) & (canvas.points[0] > 0)
        sizes.append(ml(psoas & (canvas.tissue == TISSUE_ID["muscle"])))
        lean.append(abdomen.muscles(rng(seed))[1].mottle[1])
    assert max(sizes) > 1.4 * min(sizes)
    assert min(lean) < 0.03 and max(lean) > 0.06


@pytest.mark.parametrize("up", [1, -1])
def test_gas_rises_and_sediment_sinks(up: int) -> None:
    structure = Structure("chyme", (ball(0, 40, -60, 50),), gas=0.3, sediment=("oral contrast", 0.2))
    canvas = painted([structure], up)
    y = canvas.points[1]
    gas, ground = (canvas.tissue == TISSUE_ID[name] for name in ("gas", "oral contrast"))
    assert (up * (y[gas] - 40)).min() > 50 - 30 - STEP and (up * (y[ground] - 40)).max() < -50 + 20 + STEP
    np.testing.assert_allclose(ml(ground), 4 / 3 * np.pi * 50**3 / 1000 * 0.104, rtol=0.25)


@pytest.mark.parametrize("share", [0.1, 0.35])
def test_patches_take_their_share_of_the_innermost_layer(share: float) -> None:
    structure = Structure("gut wall", (ball(0, 40, -60, 60),), layers=((4, "stool"),), mottle=("gas", share))
    canvas = painted([structure])
    inner = np.isin(canvas.tissue, [TISSUE_ID["gas"], TISSUE_ID["stool"]])
    assert abs((canvas.tissue[inner] == TISSUE_ID["gas"]).mean() - share) < 0.05
    away = np.linalg.norm(canvas.points - np.array([0, 40, -60]).reshape(3, 1, 1, 1), axis=0)
    assert away[inner].max() < 57


def test_parts_go_with_their_organ() -> None:
    """After nephrectomy the kidney's vessels, ureter and fat are gone; other organs stay."""
    gone = 0
    structures = (*kidneys.kidney(1, 6, rng(12), "usual"), *kidneys.kidney(-1, 6, rng(13), "usual"))
    usual = sum(bool(s.shapes) for s in structures)
    for seed in range(120):
        left = varied(structures, rng(seed))
        if len(left) < usual:
            gone += 1
            sides = {structure.part or structure.organ or structure.within for structure in left} - {"background"}
            assert len(sides) <= 1
    assert 0 < gone < 120 * 4 * ABSENT["left kidney"]


def test_neighbours_move_together() -> None:
    at = {"a": (60, 60, 0), "b": (70, 66, 8), "far": (-70, 60, -100)}
    structures = [Structure("lymph node", (ball(*place_, 5),)) for place_ in at.values()]
    moves = np.array([[s.shapes[0].path[0, :3] for s in varied(structures, rng(seed))] for seed in range(60)])
    moves -= np.array(list(at.values()))
    assert (moves[:, 0].std(0) > (2, 4, 6)).all() and (moves[:, 0].std(0) < 18).all()
    near, far = (np.corrcoef(moves[:, 0, 2], moves[:, i, 2])[0, 1] for i in (1, 2))
    assert near > 0.8 > abs(far)


def test_scoliosis_bends_the_spine_and_leaves_the_flanks() -> None:
    axes = np.meshgrid([-250, 0, 250], [0], np.arange(-250, 250, 10), indexing="ij")
    points = np.stack(axes).astype(np.float32)
    bent = points.copy()
    bend(bent, 45, rng(1))
    shift = bent[0] - points[0]
    assert 20 < np.ptp(shift[1]) <= 60 and np.abs(shift[1]).max() <= 30
    assert np.abs(shift[[0, 2]]).max() < 0.3
    np.testing.assert_array_equal(bent[1:], points[1:])


def test_prone_patients_lie_on_their_belly() -> None:
    canvas, _, _ = place(rng(2), 5, (-100, 50))
    y, table = canvas.points[1], TISSUE_ID["table"]
    body = canvas.tissue > TISSUE_ID["gas"]
    supine = canvas.up == 1
    assert supine and y[canvas.tissue == table].mean() < y[body].mean() - 80
    turn_table(canvas)
    assert y[canvas.tissue == table].min() > y[body].max()
    np.testing.assert_array_equal(canvas.tissue > TISSUE_ID["gas"], body)
    ups = [place(rng(seed), 6, (-60, 0))[0].up for seed in range(60)]
    assert 0 < ups.count(-1) < 15
