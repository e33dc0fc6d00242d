from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.metrics import EmbeddingCollapseMetric
from monai.transforms import Compose, RandSpatialCropSamplesd
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from shared_networks.datasets.probe_set import MOST_CASES, probe_cases, probe_names
from shared_networks.errors import InputError
from shared_networks.networks.hi_end_mae import HiEndMAE
from shared_networks.training.monitors import FeatureSpread
from shared_networks.training.probe import (
    EffectiveRank,
    OrganProbe,
    effective_rank,
    fit_linear,
    patch_tokens,
    read_crops,
    token_labels,
)
from shared_networks.training.sampler import SeededCacheDataset
from tests.training.test_monitors import evaluate, network
from tests.training.test_resume import train

PATCH = (6, 6, 6)


def case(seed: int, organs: tuple[float, ...] = (0.0, 0.5, 1.0), noise: float = 0.05) -> dict[str, Tensor]:
    """A [1, 24, 24, 24] image of patches that are each of one label, which has its own intensity."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, len(organs), (1, 4, 4, 4), generator=generator)
    for axis in (1, 2, 3):
        labels = labels.repeat_interleave(6, dim=axis)
    image = torch.tensor(organs)[labels] + noise * torch.randn(labels.shape, generator=generator)
    return {"image": MetaTensor(image), "label": MetaTensor(labels.float())}


def dataset(cases: list[dict[str, Tensor]]) -> SeededCacheDataset:
    """Three crops a case, which begin anywhere along the first axis, so that some of their patches are mixed."""
    crop = RandSpatialCropSamplesd(["image", "label"], (12, 24, 24), num_samples=3, random_size=False)
    return SeededCacheDataset(cases, Compose([crop]), cache_rate=0.0)


def probed(net: HiEndMAE, cases: list[dict[str, Tensor]], **settings: Any) -> dict[str, float]:
    metrics: dict[str, float] = evaluate(net, OrganProbe(net, dataset(cases), **settings)).state.metrics
    return metrics


def test_token_labels_are_those_of_most_voxels() -> None:
    label = torch.zeros(1, 4, 2, 2)
    label[0, :2, :, 0], label[0, 0, 0, 1] = 3, 3  # five of eight voxels of the first patch
    label[0, 2:, 0, 0], label[0, 2, 1, 1] = 2, -1  # two and one of the second
    assert token_labels(label, (2, 2, 2)).tolist() == [3, 0]
    assert token_labels(torch.full((1, 2, 2, 2), -5.0), (2, 2, 2)).tolist() == [0]


def test_the_linear_classifier_is_ridge_regression() -> None:
    """Of two labels: the sign of the weighted regression, here by scipy's least squares on stacked rows."""
    generator = np.random.default_rng(0)
    x, t = generator.normal(size=(60, 3)) * [1, 10, 0.1] + [0, 5, 1], generator.normal(size=(40, 3)) * [1, 10, 0.1] + 1
    y = (x[:, 0] + 0.3 * generator.normal(size=60) > 0.8).astype(int)
    found = fit_linear(torch.tensor(x), torch.tensor(7 * y), torch.tensor(t))
    weights = np.where(y == 1, y.sum() ** -0.5, (1 - y).sum() ** -0.5)
    weights /= weights.sum()
    scaled, others = (x - x.mean(0)) / x.std(0), (t - x.mean(0)) / x.std(0)
    rows = np.sqrt(weights)[:, None] * np.c_[scaled, np.ones(60)]
    penalty = np.c_[np.sqrt(0.01) * np.eye(3), np.zeros(3)]
    solution = np.linalg.lstsq(np.r_[rows, penalty], np.r_[np.sqrt(weights) * y, np.zeros(3)], rcond=None)[0]
    expected = np.c_[others, np.ones(40)] @ solution > 0.5
    assert 0 < expected.sum() < 40
    np.testing.assert_array_equal(found.numpy(), 7 * expected)


def test_organs_are_found_where_tokens_carry_intensity() -> None:
    cases = [case(seed) for seed in range(6)]
    metrics = probed(network(), cases, organ_names=["background", "left kidney/ureter"])
    assert set(metrics) == {"probe_dice", "probe_dice_left_kidney_ureter", "probe_dice_2"}
    assert metrics["probe_dice"] == pytest.approx(
        (metrics["probe_dice_left_kidney_ureter"] + metrics["probe_dice_2"]) / 2
    )
    assert metrics["probe_dice"] > 0.6
    alike = [case(seed, (0.5, 0.5, 0.5)) for seed in range(6)]  # intensities tell nothing
    assert probed(network(), alike)["probe_dice"] < 0.45
    assert metrics["probe_dice"] == probed(network(), cases)["probe_dice"]


def test_a_constant_encoder_finds_nothing_beyond_the_commonest_label() -> None:
    net = network()
    torch.nn.init.zeros_(net.vit.norm.weight)
    cases = [case(seed, (0.0, 0.0, 1.0, 0.0)) for seed in range(4)]
    for item in cases:
        item["label"] = (item["label"] == 2).float()  # a quarter
    assert probed(net, cases)["probe_dice"] == 0
    assert probed(network(), cases)["probe_dice"] > 0.7
    assert evaluate(net, EffectiveRank(net, cases)).state.metrics["effective_rank"] == 0


def test_organs_in_one_half_alone_do_not_count() -> None:
    one, other = (case(seed) for seed in range(2))
    one["label"][one["label"] == 1] = 5
    metrics = probed(network(), [one, other])
    assert set(metrics) == {"probe_dice", "probe_dice_2"}


def test_the_effective_rank_is_monais() -> None:
    net, cases = network(), [case(seed) for seed in range(6)]
    crops = [item["image"].as_tensor() for item in cases[:4]]
    tokens = torch.cat([net.eval().vit(crop[None])[0][0, 1:] for crop in crops]).detach()
    assert torch.equal(patch_tokens(net.vit, crops), tokens)
    rank = evaluate(net, EffectiveRank(net, cases)).state.metrics["effective_rank"]
    score = EmbeddingCollapseMetric()(tokens)["effective_rank_score"]
    assert rank == pytest.approx((1 - float(score)) * 12, rel=1e-5) and 1 < rank < 12
    generator = torch.Generator().manual_seed(0)
    flat = torch.randn(50, 2, generator=generator) @ torch.randn(2, 12, generator=generator)
    assert 1 < effective_rank(flat) < 2.01
    assert effective_rank(torch.eye(12)) == pytest.approx(11, rel=1e-5)  # of 12 tokens, less their mean


def test_crops_are_read_once_and_split_by_case() -> None:
    cases = [case(seed) for seed in range(3)]
    crops, labels = read_crops(dataset(cases), 0, PATCH)
    again, _ = read_crops(dataset(cases), 0, PATCH)
    others, _ = read_crops(dataset(cases), 1, PATCH)
    assert [len(half) for half in crops] == [6, 3] == [len(half) for half in labels]
    assert all(
        torch.equal(a, b) for half, same in zip(crops, again, strict=True) for a, b in zip(half, same, strict=True)
    )
    assert not torch.equal(crops[0][0], others[0][0])
    assert all(type(crop) is Tensor and crop.shape == (1, 12, 24, 24) for half in crops for crop in half)
    net, items = network(), [case(0)]
    rank = EffectiveRank(net, items)
    first = evaluate(net, rank).state.metrics["effective_rank"]
    items.clear()
    assert evaluate(net, rank).state.metrics["effective_rank"] == first


def test_nothing_is_changed_and_nothing_drawn() -> None:
    """Weights, mode, gradients and all generators are as before, and so is what others watch."""
    net = network()
    net.train()
    weights = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    cases = [case(seed) for seed in range(4)]
    states = [torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()]
    probes = [OrganProbe(net, dataset(cases)), EffectiveRank(net, cases)]

    class Engine:
        class state:  # noqa: N801 (as ignite names it)
            metrics: dict[str, float] = {}  # noqa: RUF012

    for probe in probes:
        probe(Engine)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.random.get_state()[1].tolist() == states[1] and random.getstate() == states[2]
    assert net.training and net.vit.training
    assert all(torch.equal(tensor, weights[name]) for name, tensor in net.state_dict().items())
    assert all(parameter.grad is None for parameter in net.parameters())
    assert set(Engine.state.metrics) == {"effective_rank", "probe_dice", "probe_dice_1", "probe_dice_2"}
    alone = evaluate(net, FeatureSpread(net)).state.metrics
    assert alone.items() <= evaluate(net, FeatureSpread(net), *probes).state.metrics.items()


def test_without_a_data_set_there_is_no_probe() -> None:
    assert probe_cases("", seed=0) == [] and probe_names("") == []
    net = network()
    assert evaluate(net, OrganProbe(net, dataset([]))).state.metrics == {}


def test_an_encoder_that_is_not_finite_is_told_of() -> None:
    net = network()
    torch.nn.init.constant_(net.vit.norm.bias, torch.nan)
    with pytest.raises(InputError, match="what the encoder makes of a crop is NaN or infinite"):
        patch_tokens(net.vit, [torch.zeros(1, 12, 12, 12)])


@pytest.mark.parametrize("organs", [0, 1])
def test_crops_without_an_organ_are_told_of(organs: int) -> None:
    """No voxel at all, or a voxel here and there."""
    cases = [case(seed) for seed in range(2)]
    for item in cases:
        item["label"] *= 0
        item["label"][:, ::4, ::4, ::4] = organs
    message = (
        r"^/data/FEW: no organ fills most of a patch of \[6, 6, 6\] voxels in both halves of the 2 cases that are "
        r"probed; give --probe_dir labels of larger organs$"
    )
    with pytest.raises(InputError, match=message):
        OrganProbe(network(), dataset(cases), "/data/FEW")


def write(folder: Path, cases: int) -> Path:
    """An nnU-Net folder of tiny CTs in LPS of anisotropic voxels."""
    for part in ("imagesTr", "labelsTr"):
        (folder / part).mkdir(parents=True)
    for number in range(cases):
        generator = np.random.default_rng(number)
        label = np.zeros((8, 9, 6), np.uint8)
        label[2:6, 2:7, 2:5] = 1
        image = np.where(label, 60, -1000) + generator.normal(0, 20, label.shape)
        affine = np.diag([-2.0, -3.0, 4.0, 1.0])
        nib.save(nib.Nifti1Image(image.astype(np.int16), affine), folder / "imagesTr" / f"c{number:02d}_0000.nii.gz")
        nib.save(nib.Nifti1Image(label, affine), folder / "labelsTr" / f"c{number:02d}.nii.gz")
    return folder


def test_cases_are_chosen_by_seed(tmp_path: Path) -> None:
    folder = write(tmp_path / "data", MOST_CASES + 2)
    chosen = probe_cases(folder, 3, "CT", (-175, 250), 1)
    assert len(chosen) == MOST_CASES and len({item["label"] for item in chosen}) == MOST_CASES
    assert all(Path(item["image"]).name.removesuffix("_0000.nii.gz") == Path(item["label"]).name[:3] for item in chosen)
    assert chosen == probe_cases(folder, 3) != probe_cases(folder, 4)
    assert probe_names(folder) == []
    (folder / "dataset.json").write_text('{"labels": {"background": 0, "left kidney": 1}}')
    assert probe_names(folder) == ["background", "left kidney"]
    listed = [
        {key: f"data/{Path(item[key]).parent.name}/{Path(item[key]).name}" for key in item} for item in chosen[:2]
    ]
    (tmp_path / "list.json").write_text(str({"training": listed}).replace("'", '"'))
    assert sorted(item["label"] for item in probe_cases(tmp_path / "list.json", 0)) == sorted(
        item["label"] for item in chosen[:2]
    )


def test_folders_that_cannot_be_probed(tmp_path: Path) -> None:
    """One line each, with the folder and the setting."""
    layout = r"; give --probe_dir a folder with imagesTr and labelsTr, or a \.json list of cases$"
    (tmp_path / "scans" / "imagesTr").mkdir(parents=True)
    write(tmp_path / "one", 1)
    write(tmp_path / "none", 0)
    write(tmp_path / "images", 2)
    for file in (tmp_path / "images" / "imagesTr").iterdir():
        file.unlink()
    messages = {
        "missing": "missing: no such folder" + layout,
        "missing.json": "missing.json: no such folder" + layout,
        "scans": "scans: no labels in it, as it has no folder labelsTr" + layout,
        "one": r"one: 1 labelled case, but a probe .*; give --probe_dir two cases or more$",
        "none": "none: no scan found; .*" + layout,
        "images": "images: no scan found; .*" + layout,
    }
    for name, message in messages.items():
        with pytest.raises(InputError, match=message) as caught:
            probe_cases(tmp_path / name, 0)
        assert "\n" not in str(caught.value) and "dataset_dir" not in str(caught.value)
    damaged = write(tmp_path / "damaged", 2)
    (damaged / "labelsTr" / "c01.nii.gz").write_bytes(b"no label")
    with pytest.raises(InputError, match=r"c01\.nii\.gz: "):
        probe_cases(damaged, 0)
    (damaged / "labelsTr" / "c01.nii.gz").unlink()
    with pytest.raises(InputError, match=r"damaged: 1 problem\(s\):\n.*c01_0000.nii.gz: no label"):
        probe_cases(damaged, 0)


def test_tissue_maps_are_not_probed_and_no_overlay_would_change_that(tmp_path: Path) -> None:
    """CTs are drawn to train and to evaluate; a probe has its own chain of transforms."""
    folder = write(tmp_path / "maps", 2)
    (folder / "dataset.json").write_text('{"channel_names": {"0": "tissue map"}}')
    with pytest.raises(InputError) as caught:
        probe_cases(folder, 0)
    assert str(caught.value) == (
        f"{folder}/dataset.json: channel 0 is 'tissue map', no scan; "
        "give --probe_dir labelled CTs, as a probe draws none"
    )


@pytest.mark.integration
def test_a_training_is_watched_and_stays_the_same_to_the_last_bit(datasets: dict[str, Path], tmp_path: Path) -> None:
    """With a probe and without: the same weights, the same other curves."""
    curves: dict[str, dict[str, list[float]]] = {}
    for name, settings in (("plain", ()), ("probed", ("--probe_dir", str(datasets["btcv"])))):
        train(datasets["btcv"], tmp_path / name, "--val_interval", "1", "--epochs", "2", *settings)
        events = EventAccumulator(str(tmp_path / name))
        events.Reload()
        curves[name] = {tag: [scalar.value for scalar in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    timed = {"crops_per_second", "data_wait"}
    added = {tag for tag in curves["probed"] if tag.startswith("probe_dice")}
    assert {"probe_dice", "probe_dice_liver"} <= added and len(curves["probed"]["probe_dice"]) == 2
    assert all(0 <= score <= 1 for tag in added for score in curves["probed"][tag])
    assert all(1 < rank < 64 for rank in curves["plain"]["effective_rank"])
    same = curves["plain"].keys() - timed
    assert same == curves["probed"].keys() - added - timed
    assert {tag: curves["plain"][tag] for tag in same} == {tag: curves["probed"][tag] for tag in same}
    plain, probed = (torch.load(tmp_path / name / "model.pt", weights_only=True) for name in ("plain", "probed"))
    assert all(torch.equal(plain[name], probed[name]) for name in plain)
