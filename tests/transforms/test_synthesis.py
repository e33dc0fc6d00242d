"""Crops of tissue maps: warped with their labels, and drawn as CTs that a seed repeats."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import Compose
from scipy.spatial.transform import Rotation

from shared_networks.errors import InputError
from shared_networks.training.sampler import SeededCacheDataset, SeededDataLoader
from shared_networks.transforms.synthesis import DrawCTd, RandCropWarpd, RandDrawCTd, drawing_digests

ORGAN_OF = torch.tensor([0, 0, 1, 2, 3], dtype=torch.uint8)
"""Label of each tissue: air, fat, liver, spleen, bone."""
RIGID = {"zoom": (1, 1), "stretch": 0, "deformation": (0, 0)}
STILL = {**RIGID, "rotation": (0, 0, 0)}
SPACING = (2.0, 1.5, 2.5)


def affine(spacing: tuple[float, ...] = SPACING, tilt: float = 8) -> np.ndarray:
    """Oblique, away from the origin."""
    matrix = np.eye(4)
    matrix[:3, :3] = Rotation.from_euler("zx", [tilt, 3], degrees=True).as_matrix() * spacing
    matrix[:3, 3] = (-40, 25, 300)
    return matrix


def body(shape: tuple[int, int, int] = (60, 56, 50), name: str = "a_0000.nii.gz") -> dict[str, MetaTensor]:
    """Blocks of tissues in air, and the labels that follow from them."""
    random = np.random.default_rng(0)
    blocks = random.integers(1, 5, [-(-n // 6) for n in shape]).repeat(6, 0).repeat(6, 1).repeat(6, 2)
    tissue = torch.from_numpy(blocks[tuple(map(slice, shape))].astype(np.uint8))
    tissue[:4], tissue[-4:], tissue[:, :4], tissue[:, -4:] = 0, 0, 0, 0
    meta = {"affine": torch.from_numpy(affine()), "filename_or_obj": f"/data/imagesTr/{name}"}
    return {
        key: MetaTensor(values[None].contiguous(), meta=meta)
        for key, values in (("image", tissue), ("label", ORGAN_OF[tissue.int()]))
    }


@pytest.fixture
def tissues(tmp_path: Path) -> str:
    rows = [("air", -1000), ("fat", -100), ("liver", [56, 108]), ("spleen", [48, 121]), ("bone", 300)]
    soft = {"texture": 0, "spread": 0, "variation": 0}
    file = tmp_path / "tissues.json"
    file.write_text(json.dumps({"tissues": [{"name": n, "hu": hu, **(soft if n == "air" else {})} for n, hu in rows]}))
    return str(file)


def crop(size: Any = (24, 20, 18), spacing: Any = 3.0, seed: int = 0, **more: Any) -> RandCropWarpd:
    return RandCropWarpd(["image", "label"], size, spacing, label_key="label", **more).set_random_state(seed)


def in_source(out: MetaTensor, source: MetaTensor) -> tuple[np.ndarray, np.ndarray]:
    """By the affines, the values of the source nearest to each voxel; and how far that is from a tie."""
    there = np.linalg.inv(np.asarray(source.affine)) @ np.asarray(out.affine)
    at = np.moveaxis(np.indices(out.shape[1:]), 0, -1) @ there[:3, :3].T + there[:3, 3]
    nearest = np.rint(at).astype(int)
    inside = ((nearest >= 0) & (nearest < source.shape[1:])).all(-1)
    values = np.zeros(out.shape[1:], np.uint8)
    values[inside] = source.numpy()[0][tuple(nearest[inside].T)]
    return values, (np.abs(at - nearest) < 0.499).all(-1)


def test_a_crop_without_warp_is_a_part_of_the_source() -> None:
    data = body()
    [out] = crop((20, 18, 12), SPACING, **STILL)(data)
    start = np.linalg.inv(affine()) @ np.asarray(out["image"].affine)[:, 3]
    corner = np.rint(start[:3]).astype(int)
    part = tuple(slice(a, a + n) for a, n in zip(corner, (20, 18, 12), strict=True))
    for key in ("image", "label"):
        assert out[key].dtype == torch.uint8 and torch.equal(out[key][0], data[key][0][part])


@pytest.mark.parametrize("seed", range(6))
def test_affine_leads_to_the_place_in_the_source(seed: int) -> None:
    data = body()
    [out] = crop((40, 36, 34), seed=seed, deformation=(0, 0))(data)
    for key in ("image", "label"):
        values, sure = in_source(out[key], data[key])
        assert sure.mean() > 0.9 and np.array_equal(out[key].numpy()[0][sure], values[sure])


@pytest.mark.parametrize("seed", range(4))
def test_labels_stay_with_their_tissue_under_deformation(seed: int) -> None:
    data = body()
    transform = crop((30, 30, 30), 2.5, seed, deformation=(6, 2), num_samples=2)
    for out in transform(data):
        assert torch.equal(out["label"].as_tensor(), ORGAN_OF[out["image"].as_tensor().int()])
        values, sure = in_source(out["image"], data["image"])
        assert 0.02 < (out["image"].numpy()[0] != values)[sure].mean() < 0.75


def test_bodies_are_scaled_and_turned_within_limits() -> None:
    transform = crop(spacing=(3.0, 3.0, 3.0), rotation=(0, 0, 10), zoom=(0.85, 1.18), stretch=0.05)
    steps = np.array([transform.draw_steps() for _ in range(300)])
    zoom = 3 / np.linalg.norm(steps, axis=1)
    assert 0.85 * 0.95 <= zoom.min() < 0.87 and 1.15 < zoom.max() <= 1.18 * 1.05
    stretch = zoom / zoom.mean(1, keepdims=True)
    assert 0.02 < stretch.std() < 0.05 and stretch.max() < 1.07
    angle = np.degrees(np.arctan2(steps[:, 1, 0], steps[:, 0, 0]))
    assert -10 <= angle.min() < -9 and 9 < angle.max() <= 10
    assert np.abs(steps[:, :2, 2]).max() == 0


@pytest.mark.parametrize(("weights", "key", "share"), [((1, 0, 0), "label", 0.95), ((0, 1, 0), "image", 0.95)])
def test_crops_are_centred_on_organs_or_the_body(weights: tuple[int, ...], key: str, share: float) -> None:
    data = body((90, 80, 70))
    for volume in data.values():
        volume[:, :20] = 0  # a wide margin of air
    transform = crop((9, 9, 9), SPACING, centres=weights, num_samples=60, **STILL)
    centres = [int(out[key][0, 4, 4, 4]) for out in transform(data)]
    assert np.mean(np.array(centres) > 0) >= share
    anywhere = crop((9, 9, 9), SPACING, centres=(0, 0, 1), num_samples=200, **STILL)(data)
    assert 0.5 < np.mean([int(out["image"][0, 4, 4, 4]) > 0 for out in anywhere]) < 0.85


def test_each_organ_is_met_alike_however_small() -> None:
    data = body((80, 80, 80))
    data["label"][data["label"] == 3] = 1
    data["label"][data["label"] == 2] = 0
    data["label"][0, 40:44, 40:44, 40:44] = 2
    transform = crop((5, 5, 5), SPACING, centres=(1, 0, 0), num_samples=100, **STILL)
    found = np.bincount([int(out["label"][0, 2, 2, 2]) for out in transform(data)], minlength=3)
    assert found[0] == 0 and found[2] > 10, found


def test_without_organs_crops_are_centred_on_anything() -> None:
    data = body()
    data["label"][:] = 0
    assert crop(centres=(1, 0, 0))(data)[0]["label"].sum() == 0
    alone = RandCropWarpd("image", (9, 9, 9), SPACING, centres=(5, 1, 0), **STILL).set_random_state(0)
    assert int(alone({"image": data["image"]})[0]["image"][0, 4, 4, 4]) > 0


def test_a_map_smaller_than_the_crop_lies_in_its_middle_in_air() -> None:
    data = body((20, 24, 12))
    [out] = crop((40, 40, 40), SPACING, **STILL)(data)
    assert torch.equal(out["image"][0, 10:30, 8:32, 14:26], data["image"][0])
    assert out["image"].sum() == data["image"].sum()


def test_maps_of_different_shapes_are_refused() -> None:
    data = body()
    data["label"] = data["label"][:, :-1]
    with pytest.raises(InputError, match=r"\(60, 56, 50\).*\(59, 56, 50\)"):
        crop()(data)


def test_drawing_keeps_the_grid_and_gives_hu(tissues: str) -> None:
    data = body()
    out = RandDrawCTd("image", tissues, spread=0, contrast=0, noise_hu=(3, 3)).set_random_state(0)(data)
    image = out["image"]
    assert image.dtype == torch.float32 and image.shape == data["image"].shape
    assert torch.equal(image.affine, data["image"].affine)
    assert image.meta["filename_or_obj"] == data["image"].meta["filename_or_obj"]
    for index, expected in enumerate((-1000, -100, 56, 48, 300)):
        assert float(image[data["image"] == index].median()) == pytest.approx(expected, abs=40)


def test_the_voxel_size_is_the_maps_or_as_given(tissues: str) -> None:
    """What is given counts in place of the affine: at 30 mm a slice of 7 mm is no blur, at 2.5 mm it is."""
    settings = {"slice_mm": (7, 7), "across": 0, "noise_hu": (1e-3, 1e-3), "texture": (0, 0), "shading": (0, 0)}
    edges = [
        float(DrawCTd("image", tissues, spacing, **settings)(body())["image"].diff(dim=3).square().mean())
        for spacing in (None, SPACING, 30.0)
    ]
    assert edges[0] == pytest.approx(edges[1], rel=1e-4) and edges[2] > 1.3 * edges[0]


def test_a_file_is_drawn_the_same_for_ever_and_others_differ(tissues: str) -> None:
    def drawn(name: str = "a_0000.nii.gz", **more: Any) -> torch.Tensor:
        return DrawCTd("image", tissues, **more)(body(name=name))["image"].as_tensor()

    assert torch.equal(drawn(), drawn())
    for other in (drawn("b_0000.nii.gz"), drawn(seed=1)):
        assert (drawn() - other).abs().mean() > 2


def test_training_draws_anew_and_a_seed_repeats_it(tissues: str) -> None:
    transform = RandDrawCTd("image", tissues).set_random_state(5)
    first, second = (transform(body())["image"].as_tensor() for _ in range(2))
    assert (first - second).abs().mean() > 2
    assert torch.equal(transform.set_random_state(5)(body())["image"].as_tensor(), first)


def test_labels_are_cleared_where_nothing_is_seen(tissues: str) -> None:
    data = body()
    transform = RandDrawCTd("image", tissues, label_key="label", end=1).set_random_state(0)
    out = transform(data)
    unseen = out["image"] == -1024
    assert 0.01 < unseen.float().mean() < 0.5
    assert not out["label"][unseen].any() and torch.equal(out["label"][~unseen], data["label"][~unseen])
    assert data["label"][unseen].any()  # the cached label is not touched


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_loader_repeats_draws_by_seed_and_epoch_in_any_number_of_processes(tissues: str, num_workers: int) -> None:
    def epochs(seed: int, workers: int) -> list[torch.Tensor]:
        chain = Compose([crop((12, 12, 12), num_samples=2), RandDrawCTd("image", tissues, 3.0, "label")])
        dataset = SeededCacheDataset([body(name="a"), body(name="b")], chain)
        loader = SeededDataLoader(dataset, 2, workers, seed)
        found = []
        for epoch in (1, 2):
            loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
            found += [torch.as_tensor(batch["image"]) for batch in loader]
        return found

    first, second = epochs(0, 0)
    assert first.shape == (4, 1, 12, 12, 12)
    assert len({float(item.sum()) for item in (*first, *second)}) == 8
    for ours, again in zip((first, second), epochs(0, num_workers), strict=True):
        assert torch.equal(ours, again)
    assert not torch.equal(first, epochs(1, 0)[0])


def test_wrong_maps_are_refused_by_their_file(tissues: str) -> None:
    data = body()
    data["image"][0, 30, 30, 30] = 9
    with pytest.raises(
        InputError, match=r"/data/imagesTr/a_0000.nii.gz: tissue 9 is not in .*tissues.json, which has 5"
    ):
        DrawCTd("image", tissues)(data)
    with pytest.raises(InputError, match="a tissue map has 2 channels; give one"):
        DrawCTd("image", tissues)({"image": torch.zeros(2, 4, 4, 4)})


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ({"noise_hu": [0, 40]}, "noise_hu of drawn CTs is [0, 40]; give two numbers above 0, the lower one first"),
        ({"slice_mm": [0, 5]}, "slice_mm of drawn CTs is [0, 5]; give two numbers above 0"),
        ({"variation_mm": [0, 5]}, "variation_mm of drawn CTs is [0, 5]; give two numbers above 0"),
        ({"streaks": [0, 500]}, "streaks of drawn CTs is [0, 500]; give two numbers above 0"),
        ({"noise_hu": 10}, "noise_hu of drawn CTs is 10; give two numbers above 0"),
        ({"noise_hu": [40, 5]}, "noise_hu of drawn CTs is [40, 5]"),
        ({"noise_hu": ["3", 30]}, "noise_hu of drawn CTs is ['3', 30]"),
        ({"noise_hu": [3, float("nan")]}, "noise_hu of drawn CTs is [3, nan]"),
        ({"texture": [-1, 1]}, "texture of drawn CTs is [-1, 1]; give two numbers of at least 0, the lower one first"),
        ({"shading": [0, 4, 8]}, "shading of drawn CTs is [0, 4, 8]"),
        ({"contrast": 5}, "contrast of drawn CTs is 5; give a number from 0 to 1"),
        ({"view": True}, "view of drawn CTs is True; give a number from 0 to 1"),
        ({"shift": [3, 8]}, "shift of drawn CTs is [3, 8]; give a number of at least 0"),
        ({"spread": float("inf")}, "spread of drawn CTs is inf; give a number of at least 0"),
        ({"noise_HU": [3, 30]}, "'noise_HU' is no argument of drawn CTs; give one of contrast, enhancement, spread"),
    ],
)
def test_a_range_that_cannot_be_drawn_from_is_refused_before_anything_is(
    tissues: str, setting: dict[str, Any], said: str
) -> None:
    for kind in (DrawCTd, RandDrawCTd):
        with pytest.raises(InputError, match=f"^{re.escape(said)}"):
            kind("image", tissues, **setting)


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ({"zoom": [0, 1.2]}, "zoom of drawn CTs is [0, 1.2]; give two numbers above 0, the lower one first"),
        ({"zoom": 1}, "zoom of drawn CTs is 1"),
        ({"rotation": 10}, "rotation of drawn CTs is 10; give 3 numbers of at least 0"),
        ({"stretch": 2}, "stretch of drawn CTs is 2; give a number from 0 to 1"),
        ({"deformation": [5]}, "deformation of drawn CTs is [5]; give 2 numbers of at least 0"),
        ({"centres": [1, 1]}, "centres of drawn CTs is [1, 1]; give 3 numbers"),
        (
            {"centres": [0, 0, 0]},
            "centres of drawn CTs is [0, 0, 0]; give a weight above 0 to the body or to any place",
        ),
    ],
)
def test_a_crop_that_cannot_be_warped_is_refused_before_any_is(setting: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=f"^{re.escape(said)}"):
        crop(**setting)


def test_without_labels_a_weight_of_organs_alone_is_refused() -> None:
    with pytest.raises(InputError, match=r"^centres of drawn CTs is \[1, 0, 0\]; give a weight above 0 to the body"):
        RandCropWarpd("image", (9, 9, 9), SPACING, centres=[1, 0, 0])


def test_digests_tell_tables_and_ranges_apart_wherever_the_table_lies(tissues: str, tmp_path: Path) -> None:
    def digests(table: str = tissues, train: Any = (), validation: Any = ()) -> dict[str, str]:
        chain = [crop(), RandDrawCTd("image", table, 3.0, **dict(train))]
        return drawing_digests(chain, [DrawCTd(["image", "scan"], table, **dict(validation))])

    usual = digests()
    copy, other = tmp_path / "copy.json", tmp_path / "other.json"
    copy.write_text(Path(tissues).read_text())
    content = json.loads(copy.read_text())
    content["tissues"].insert(0, content["tissues"].pop())
    other.write_text(json.dumps(content))
    assert digests(str(copy)) == usual and {len(value) for value in usual.values()} == {64}
    assert digests(str(other)).items() ^ usual.items() == {
        ("tissue_table", digests(str(other))["tissue_table"]),
        ("tissue_table", usual["tissue_table"]),
    }
    changed = [digests(train={"noise_hu": [5, 40]}), digests(validation={"noise_hu": [5, 40]})]
    changed.append(digests(validation={"seed": 1}))
    assert {found["tissue_table"] for found in changed} == {usual["tissue_table"]}
    assert len({usual["ranges"], *(found["ranges"] for found in changed)}) == 4
    assert digests(train={"noise_hu": [3, 30.0], "spread": 1}) == usual  # as is the default


def test_a_training_that_draws_nothing_is_refused(tissues: str) -> None:
    """As where another overlay with transforms of its own follows: indices are no Hounsfield units."""
    with pytest.raises(InputError, match="another overlay has train#random_transforms too, so that no CT is drawn"):
        drawing_digests([crop()], [DrawCTd("image", tissues)])


def test_maps_that_a_case_may_lack_are_drawn_where_they_are(tissues: str) -> None:
    data = body()
    alone = DrawCTd(["image", "scan"], tissues, allow_missing_keys=True)(data)
    assert alone.keys() == data.keys()
    both = DrawCTd(["image", "scan"], tissues, allow_missing_keys=True)({**data, "scan": data["image"]})
    assert torch.equal(both["scan"].as_tensor(), alone["image"].as_tensor())
    with pytest.raises(KeyError):
        DrawCTd(["image", "scan"], tissues)(data)
