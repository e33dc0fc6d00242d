from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle import ConfigWorkflow
from monai.data import MetaTensor
from monai.inferers import SlidingWindowInferer
from monai.transforms import Compose, CropForegroundd, Invertd, Orientationd, Spacingd
from nibabel.affines import from_matvec
from nibabel.orientations import apply_orientation, axcodes2ornt, inv_ornt_aff, ornt_transform
from torch import Tensor, nn

from shared_networks.errors import InputError, input_error_in
from shared_networks.inference.predict import Scans
from shared_networks.inference.uncertainty import (
    SaveUncertaintyd,
    UncertaintyInferer,
    View,
    draw_views,
    dropout_on,
    on_scan_grid,
    ranking_rows,
    uncertainty_of_samples,
)
from tests.conftest import ROOT


class Segmenter(nn.Module):
    """Three classes by intensity, sure where the image is 0 or 1 and unsure between; its dropout acts on features."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.spread = nn.Conv3d(1, 16, 1)
        self.norm = nn.BatchNorm3d(16)  # would update its statistics if more than dropout were set to train
        self.dropout = nn.Dropout3d(dropout)
        self.out = nn.Conv3d(16, 3, 1)
        nn.init.constant_(self.spread.weight, 1.0)
        nn.init.zeros_(self.spread.bias)
        for channel, (slope, offset) in enumerate(((-20, 10), (20, -10), (0, -5))):
            nn.init.constant_(self.out.weight[channel], slope / 16)
            nn.init.constant_(self.out.bias[channel], offset)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.dropout(self.norm(self.spread(x))))


def ramp() -> Tensor:
    """[1, 1, 24, 16, 8]: 0 in the first third of axis 0, a half in the second, 1 in the last."""
    return torch.tensor([0.0, 0.5, 1.0]).repeat_interleave(8).reshape(1, 1, 24, 1, 1).expand(1, 1, 24, 16, 8).clone()


def unsure(network: nn.Module, image: Tensor | None = None, **settings: object) -> Tensor:
    usual = {"method": "dropout", "overlap": 0.25, "sw_batch_size": 3}
    inferer = UncertaintyInferer((8, 8, 8), **{**usual, **settings})  # type: ignore[arg-type]
    with torch.no_grad():
        return inferer(ramp() if image is None else image, network.eval())


@pytest.mark.parametrize("measure", ["entropy", "variance"])
def test_map_is_high_where_the_network_is_unsure(measure: str) -> None:
    out = unsure(Segmenter(0.1), measure=measure)
    assert out.shape == (1, 2, 24, 16, 8)
    assert 0 <= out.min() <= out.max() <= 1
    sure, middle, also_sure = (out[0, 0, at : at + 4].mean().item() for at in (0, 10, 20))
    assert middle > 0.1
    assert middle > 5 * max(sure, also_sure)
    assert (out[0, 1, :4] == 0).all()  # background
    assert (out[0, 1, 20:] == 1).all()


def test_without_dropout_samples_do_not_vary() -> None:
    network = Segmenter(0.1)
    network.dropout.p = 1e-12  # drops nothing
    assert (unsure(network, measure="variance")[:, 0] == 0).all()


def test_entropy_without_dropout_is_that_of_the_prediction() -> None:
    network, image = Segmenter(1e-12), ramp()
    out = unsure(network, image, samples=3, overlap=0.0)
    p = network(image).softmax(dim=1)
    torch.testing.assert_close(out[:, :1], -(p * p.log()).sum(1, keepdim=True) / math.log(3), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("method", ["dropout", "tta"])
def test_draws_follow_the_seed_and_nothing_else(method: str) -> None:
    network = Segmenter(0.3)
    first = unsure(network, method=method, seed=1)
    state = torch.random.get_rng_state()
    torch.manual_seed(99)
    again = unsure(network, method=method, seed=1)
    assert torch.equal(torch.random.get_rng_state(), torch.Generator().manual_seed(99).get_state())
    torch.random.set_rng_state(state)
    assert torch.equal(first, again)
    assert not torch.equal(first, unsure(network, method=method, seed=2))


def test_network_is_left_as_it_was() -> None:
    network = Segmenter(0.3).eval()
    mean = network.norm.running_mean.clone()
    with dropout_on(network):
        assert network.dropout.training
        assert not network.norm.training
        assert not network.training
    assert not network.dropout.training
    unsure(network)
    assert not network.dropout.training
    assert torch.equal(network.norm.running_mean, mean)
    with pytest.raises(RuntimeError), dropout_on(network):
        raise RuntimeError
    assert not network.dropout.training


def test_samples_average_as_they_should() -> None:
    torch.manual_seed(0)
    samples = [torch.randn(2, 4, 3, 3, 3).softmax(dim=1) for _ in range(5)]
    mean, entropy = uncertainty_of_samples(iter(samples), "entropy")
    _, variance = uncertainty_of_samples(iter(samples), "variance")

    stacked = torch.stack(samples).double()
    p = stacked.mean(dim=0)
    torch.testing.assert_close(mean.double(), p, atol=1e-6, rtol=1e-5)
    by_hand = -(p * p.log()).sum(dim=1, keepdim=True) / math.log(4)
    torch.testing.assert_close(entropy.double(), by_hand, atol=1e-6, rtol=1e-5)
    by_hand = stacked.var(dim=0, correction=0).sum(dim=1, keepdim=True) / (1 - 1 / 4)
    torch.testing.assert_close(variance.double(), by_hand, atol=1e-6, rtol=1e-4)


def test_both_measures_reach_from_0_to_1() -> None:
    classes = torch.eye(2).reshape(2, 2, 1, 1, 1)  # two samples, each certain, of different classes
    for measure in ("entropy", "variance"):
        assert uncertainty_of_samples(iter(classes.split(1)), measure)[1].item() == pytest.approx(1)
        assert uncertainty_of_samples(iter([classes[:1]] * 2), measure)[1].item() == 0
    tiny = torch.tensor([[1e-30, 1.0], [0.0, 1.0]]).reshape(2, 1, 2, 1, 1, 1)  # rounding must not cross 0
    assert uncertainty_of_samples(iter(tiny), "entropy")[1].isfinite().all()


def test_views_are_undone() -> None:
    image = torch.rand(2, 1, 4, 5, 6)
    view = View((0, 2), 2.0, 0.5)
    torch.testing.assert_close(view.of(image), image.flip((2, 4)) * 2 + 0.5)
    assert torch.equal(view.mirror(view.mirror(image)), image)
    views = draw_views(20, (1, 2), seed=0)
    assert views[0] == View()
    assert {axis for view in views for axis in view.flips} == {1, 2}
    assert all(0.9 <= view.scale <= 1.1 and -0.1 <= view.shift <= 0.1 for view in views)
    assert len(set(views)) == 20


def test_tta_of_a_network_that_mirroring_does_not_matter_to() -> None:
    """So that a map put back the wrong way round would show: only intensities make it unsure, where they are 0.5."""
    image = ramp().transpose(2, 3)  # the ramp lies along axis 1, which is mirrored
    out = UncertaintyInferer((16, 24, 8), method="tta", measure="variance")(image, Segmenter(0.0).eval())
    assert out[0, 0, :, 8:16].min() > 10 * out[0, 0, :, :8].max()
    assert out[0, 0, :, 8:16].min() > 10 * out[0, 0, :, 16:].max()
    assert (out[0, 1, :, 16:] == 1).all()


def test_windows_are_blended_as_monai_does() -> None:
    network = Segmenter(1e-12).eval()
    ours = unsure(network, mode="gaussian", overlap=0.5)

    def entropy(window: Tensor) -> Tensor:
        return torch.special.entr(network(window).softmax(dim=1)).sum(dim=1, keepdim=True) / math.log(3)

    theirs = SlidingWindowInferer((8, 8, 8), overlap=0.5, mode="gaussian")(ramp(), entropy)
    torch.testing.assert_close(ours[:, :1], theirs, atol=1e-5, rtol=1e-4)


def ensemble(folder: Path) -> list[Path]:
    """Weights of two networks that agree where the image is 0 or 1 and disagree between, each of them sure."""
    files = []
    for fold, offset in enumerate((2.0, -2.0)):
        network = Segmenter(1e-12)
        with torch.no_grad():
            network.out.bias += torch.tensor([offset, -offset, 0])
            network.out.weight *= 5
            network.out.bias *= 5
        files.append(folder / f"fold_{fold}.pt")
        torch.save(network.state_dict(), files[-1])
    return files


def test_an_ensemble_is_unsure_where_its_networks_differ(tmp_path: Path) -> None:
    files, image = ensemble(tmp_path), ramp()
    settings = {"method": "tta", "measure": "variance", "samples": 1, "overlap": 0.0}
    out = unsure(Segmenter(1e-12), image, checkpoints=files, **settings)
    probabilities = []
    for file in files:
        network = Segmenter(1e-12).eval()
        network.load_state_dict(torch.load(file, weights_only=True))
        probabilities.append(network(image).softmax(dim=1))
    expected = torch.stack(probabilities).var(dim=0, correction=0).sum(dim=1, keepdim=True) / (1 - 1 / 2)
    torch.testing.assert_close(out[:, :1], expected, atol=1e-5, rtol=1e-4)
    assert out[0, 0, 8:16].min() > 0.9 > 0.1 > out[0, 0, :8].max()
    once = unsure(Segmenter(1e-12), image, checkpoints=files, method="ensemble", measure="variance", overlap=0.0)
    assert torch.equal(once, out)  # one prediction of each, whatever the number of samples


def test_each_network_of_an_ensemble_contributes_its_samples(tmp_path: Path) -> None:
    first, second = ensemble(tmp_path)
    settings = {"method": "tta", "measure": "variance", "samples": 3, "overlap": 0.0}
    alone, both = (unsure(Segmenter(1e-12), checkpoints=files, **settings) for files in ([first], [first, second]))
    again = unsure(Segmenter(1e-12), checkpoints=[first, first], **settings)
    torch.testing.assert_close(alone, again, atol=1e-5, rtol=1e-4)  # no spread but that of the samples
    assert alone[0, 0, 8:16].mean() < 0.5 < both[0, 0, 8:16].mean()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "folds"}, "uncertainty is 'folds': give --uncertainty tta or ensemble or dropout"),
        ({"method": "ensemble", "checkpoints": ["a.pt"]}, r"is 'ensemble' of 1 checkpoint\(s\): give several, --check"),
        ({"measure": "std"}, "measure is 'std': give --measure entropy or variance"),
        ({"samples": 1}, "samples is 1: give --samples 2 or more"),
        ({"samples": 2.5}, "samples is 2.5: give --samples 2 or more"),
        ({"samples": 0, "checkpoints": ["a.pt", "b.pt"]}, "samples is 0: give --samples 1 or more"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        unsure(Segmenter(0.1), **settings)


def test_dropout_needs_dropout() -> None:
    for network in (Segmenter(0.0), nn.Conv3d(1, 3, 1)):
        with pytest.raises(InputError, match=r"dropout is 0, so .* give --dropout 0.1, or --uncertainty tta"):
            unsure(network)
    unsure(nn.Conv3d(1, 3, 1), method="tta")


def scored(name: str, mean: float, organ_voxels: int) -> dict[str, object]:
    pred = torch.full((2, 4, 4, 4), 0.9)
    pred[1] = 0.5  # half the windows are no majority
    pred[0].view(-1)[:organ_voxels] = mean
    pred[1].view(-1)[:organ_voxels] = 0.6
    affine = torch.diag(torch.tensor([-2.0, 2.0, 5.0, 1.0]).double())
    meta = {"original_affine": affine.numpy(), "spatial_shape": np.array([4, 4, 4]), "filename_or_obj": "series/1.dcm"}
    image = MetaTensor(torch.zeros(1, 4, 4, 4), affine, meta=meta)
    image.spatial_ndim = 1  # as MONAI leaves it after a batch of one
    return {"pred": pred, "image": image, "scan": image, "name": name, "stamp": f"stamp of {name}"}


def test_cases_are_ranked_as_they_come(tmp_path: Path) -> None:
    save = SaveUncertaintyd(output_dir=tmp_path / "new", settings={"samples": 2})
    save(scored("a", 0.2, 10))
    save(scored("b", 0.7, 50))
    save(scored("c", 0.7, 0))
    save(scored("a", 0.3, 10))  # again

    expected = [
        ["rank", "case", "mean_uncertainty", "predicted_ml"],
        ["1", "c", "", "0.0"],
        ["2", "b", "0.7000", "1.0"],
        ["3", "a", "0.3000", "0.2"],
    ]
    assert read(tmp_path / "new" / "uncertainty.csv") == expected
    later = SaveUncertaintyd(output_dir=tmp_path / "new", settings={"samples": 2})
    assert not later.is_done("a", "another scan")
    assert not later.is_done("z", "stamp of z")
    assert all(later.is_done(name, f"stamp of {name}") for name in "abc")
    assert read(tmp_path / "new" / "uncertainty.csv") == expected
    (tmp_path / "new" / "b_uncertainty.nii.gz").unlink()
    assert not later.is_done("b", "stamp of b")
    assert not SaveUncertaintyd(output_dir=tmp_path / "new", settings={"samples": 3}).is_done("a", "stamp of a")
    assert ranking_rows({}) == expected[:1]


def test_a_ranking_of_someone_else_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "uncertainty.csv").write_text("my notes\n")
    with pytest.raises(InputError, match=r"uncertainty\.csv: does not begin with rank,case,mean_uncertainty,"):
        SaveUncertaintyd(output_dir=tmp_path)


def test_a_run_in_which_all_scans_fail_leaves_no_earlier_ranking(tmp_path: Path) -> None:
    SaveUncertaintyd(output_dir=tmp_path)(scored("a", 0.2, 10))
    assert len(read(tmp_path / "uncertainty.csv")) == 2
    (tmp_path / "broken.nii.gz").write_bytes(b"no scan")
    scans = Scans([str(tmp_path / "broken.nii.gz")], Compose([]), (2.0, 2.0, 2.0), 3)
    assert list(scans) == [] and len(scans.failed) == 1
    SaveUncertaintyd(output_dir=tmp_path).finish(scans)
    assert read(tmp_path / "uncertainty.csv") == ranking_rows({})


def read(file: Path) -> list[list[str]]:
    with file.open(newline="") as stream:
        return list(csv.reader(stream))


@pytest.mark.parametrize("axcodes", ["RAS", "PIR", "SLA"])
def test_map_is_put_back_as_monai_inverts(axcodes: str) -> None:
    angle = np.deg2rad(10)
    turn = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
    to_axes = ornt_transform(axcodes2ornt("RAS"), axcodes2ornt(axcodes))
    volume = np.zeros((19, 16, 11), dtype=np.float32)
    volume[5:15, 3:12, 2:9] = np.random.default_rng(0).uniform(50, 200, (10, 9, 7))
    affine = from_matvec(turn @ np.diag([2.0, 3.0, 5.0]), (-20, 30, 7)) @ inv_ornt_aff(to_axes, volume.shape)
    volume = np.ascontiguousarray(apply_orientation(volume, to_axes))
    meta = {"original_affine": affine, "spatial_shape": np.array(volume.shape)}
    steps = Compose(
        [
            Orientationd(keys="image", axcodes="RAS", labels=None),
            Spacingd(keys="image", pixdim=(2.5, 2.5, 2.5), mode="bilinear"),
            CropForegroundd(keys="image", source_key="image", allow_smaller=True),
        ]
    )
    data = steps({"image": MetaTensor(torch.from_numpy(volume)[None], torch.from_numpy(affine), meta=meta)})
    prediction = torch.rand(data["image"].shape)
    ours = on_scan_grid(prediction, data["image"])
    back = Invertd(keys="pred", transform=steps, orig_keys="image", nearest_interp=False, to_tensor=True)
    theirs = back({**data, "pred": MetaTensor(prediction, meta=data["image"].meta)})["pred"].as_tensor()

    assert ours.shape == (1, *volume.shape)
    assert (ours[0][volume == 0] == 0).float().mean() > 0.5  # cropped away
    torch.testing.assert_close(ours, theirs.float(), atol=1e-4, rtol=1e-4)


def workflow(bundle: str, folder: Path, **settings: object) -> ConfigWorkflow:
    """Inference with the overlay, a tiny random network and one scan: PIR, uneven spacing, a bright block in air."""
    angle = np.deg2rad(10)
    turn = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
    axes = np.array([[0.0, 0, 1], [-1, 0, 0], [0, -1, 0]])
    affine = from_matvec(turn @ axes @ np.diag([3.0, 6.0, 2.0]), (20, 30, -50))
    voxels = np.full((30, 14, 45), -1000, dtype=np.int16)
    voxels[4:26, 2:12, 5:40] = 60
    (folder / "scans").mkdir()
    nib.save(nib.Nifti1Image(voxels, affine), folder / "scans" / "ct_0000.nii.gz")
    configs = ROOT / bundle / "configs"
    flow = ConfigWorkflow(
        config_file=[str(configs / file) for file in ("inference.json", "uncertainty.json", "tiny.json")],
        workflow_type="infer",
        logging_file=False,
        bundle_root=str(ROOT / bundle),
        dataset_dir=str(folder / "scans"),
        output_dir=str(folder / "out"),
        **{"checkpoint": str(folder / "model.pt"), "samples": 2, **settings},
    )
    for seed, file in enumerate(("model.pt", "fold_1.pt")):
        torch.manual_seed(seed)
        flow.parser.parse(reset=True)
        torch.save(flow.parser.get_parsed_content("network_def").state_dict(), folder / file)
    return flow


@pytest.mark.parametrize(
    ("bundle", "given", "method", "members"),
    [
        ("hi_end_mae_btcv_seg", {"uncertainty": "dropout"}, "dropout", ["model.pt"]),
        ("hi_end_mae_btcv_seg", {}, "tta", ["model.pt"]),
        ("hi_end_mae_flare_seg", {}, "ensemble", ["model.pt", "fold_1.pt"]),
    ],
)
def test_overlay_writes_a_map_on_the_scans_grid(
    bundle: str,
    given: dict[str, str],
    method: str,
    members: list[str],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    weights = [str(tmp_path / member) for member in members]
    flow = workflow(bundle, tmp_path, checkpoints=weights, **given)
    flow.initialize()
    flow.run()
    assert flow.parser.get_parsed_content("inferer").method == method
    assert ("dropout tells how sure a network is that was trained with dropout" in caplog.text) == (method == "dropout")
    layers = flow.parser.get_parsed_content("network_def").modules()
    assert any(layer.p > 0 for layer in layers if isinstance(layer, nn.Dropout)) == (method == "dropout")

    scan = nib.load(tmp_path / "scans" / "ct_0000.nii.gz")
    result = nib.load(tmp_path / "out" / "ct_uncertainty.nii.gz")
    values = np.asanyarray(result.dataobj)
    assert result.shape == scan.shape
    np.testing.assert_allclose(result.affine, scan.affine, atol=1e-4)
    assert values.dtype == np.float32
    assert 0 <= values.min() <= values.max() <= 1
    assert values[6:24, 4:10, 8:37].min() > 0.1  # a random network is unsure of the body
    assert [row[:2] for row in read(tmp_path / "out" / "uncertainty.csv")] == [["rank", "case"], ["1", "ct"]]
    made_with = json.loads((tmp_path / "out" / "ct_uncertainty.json").read_text())["made_with"]
    assert [line.split(": ")[0] for line in made_with["weights"]] == weights
    files = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "out").iterdir()}
    assert sorted(files) == ["ct_uncertainty.json", "ct_uncertainty.nii.gz", "uncertainty.csv"]
    flow.run()  # nothing is left to be done
    assert (tmp_path / "out" / "ct_uncertainty.nii.gz").stat().st_mtime_ns == files["ct_uncertainty.nii.gz"]


def test_windows_are_blended_as_the_setting_says(tmp_path: Path) -> None:
    flow = workflow("hi_end_mae_btcv_seg", tmp_path)
    made = {}
    for blending in (None, "constant"):
        if blending:
            flow.parser["blending"] = blending
        flow.parser.parse(reset=True)
        assert flow.parser.get_parsed_content("inferer").mode == (blending or "gaussian")
        made[blending] = flow.parser.get_parsed_content("saver").made_with("a scan")
    assert made[None] != made["constant"]  # so that a map of the other is not there already


def test_overlay_without_dropout_says_what_to_give(tmp_path: Path) -> None:
    flow = workflow("hi_end_mae_btcv_seg", tmp_path, uncertainty="dropout", dropout=0.0)
    flow.initialize()
    with pytest.raises(RuntimeError) as caught:
        flow.run()
    assert "give --dropout 0.1" in str(input_error_in(caught.value))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("dicom_seg", True),
        ("organ_probability", "liver"),
        ("overlay", True),
        ("largest_component", True),
        ("tta_flip_axes", [1, 2]),
    ],
)
def test_overlay_refuses_settings_that_ask_for_labels(name: str, value: object, tmp_path: Path) -> None:
    flow = workflow("hi_end_mae_btcv_seg", tmp_path, **{name: value})
    flow.initialize()
    with pytest.raises(RuntimeError) as caught:
        flow.run()
    fix = "give --flip_axes" if name == "tta_flip_axes" else "leave the setting out"
    expected = f"--{name} {value}: uncertainty.json writes no labels; {fix}"
    assert str(input_error_in(caught.value)) == expected
    assert not (tmp_path / "out").exists()
