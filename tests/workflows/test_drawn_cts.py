"""Training on CTs drawn from tissue maps, by the overlay: cached as bytes, drawn anew, and validated on fixed CTs."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle import ConfigWorkflow

from shared_networks.datasets.leaks import check_start
from shared_networks.datasets.record import Record
from shared_networks.errors import InputError, input_error_in
from shared_networks.synthetic.tissue_table import read_tissue_table
from tests.conftest import BUNDLES, COARSE, ROOT

pytestmark = pytest.mark.integration


def workflow(bundle: str, data: Path, out: Path, *overlays: str, **override: Any) -> ConfigWorkflow:
    configs = ROOT / bundle / "configs"
    settings = {
        "epochs": 1,
        "warmup_epochs": 0,
        "val_interval": 1,
        "num_samples": 2,
        "batch_size": 1,
        "val_fraction": 0.4,
        "spacing": COARSE,
    }
    if "seg" in bundle:
        settings |= {"pretrained_encoder": ""}
        del settings["val_fraction"]
    return ConfigWorkflow(
        config_file=[str(configs / name) for name in ("train.json", "tiny.json", *(overlays or ("synthetic.json",)))],
        logging_file=False,
        bundle_root=str(ROOT / bundle),
        dataset_dir=str(data),
        **{**settings, "ckpt_dir": str(out), "output_dir": str(out), **override},
    )


def check_drawing_on_record(bundle: str, data: Path, out: Path, record: Record) -> None:
    """Another table is another drawing; scans are prepared alike."""
    content = json.loads((data / "tissues.json").read_text())
    content["tissues"][1], content["tissues"][2] = content["tissues"][2], content["tissues"][1]
    (out / "other.json").write_text(json.dumps(content))
    other = workflow(bundle, data, out, tissue_table=str(out / "other.json")).parser.get_parsed_content("record")
    assert record["drawing"].keys() == {"tissue_table", "ranges"} and "drawing" not in record["preparation"]
    with pytest.raises(InputError, match=r"^state.ckpt: trained on CTs drawn with another tissue table; give the --"):
        check_start(other, record, "state.ckpt")


def check_evaluation(bundle: str, data: Path, out: Path, fixed: torch.Tensor) -> None:
    """The report is of the CT that the case always has, and its picture of one on the map's own grid."""
    report = out / "report"
    flow = workflow(bundle, data, out, "synthetic.json", "evaluate.json", output_dir=str(report))
    flow.initialize()
    [case] = flow.parser.get_parsed_content("validate#dataset")
    tissue = nib.load(case["scan"].meta["filename_or_obj"])
    assert case["scan"].shape == case["truth"].shape == (1, *tissue.shape) and case["image"].max() <= 1
    air = np.asarray(tissue.dataobj) == 0
    assert float(case["scan"][0][air].median()) < -900 < -200 < float(case["scan"][0][~air].median())
    chosen = workflow(bundle, data, out, "synthetic.json", "evaluate.json")
    chosen.parser["report_cases"] = "$@split['validation']"
    [again] = chosen.parser.get_parsed_content("validate#dataset")
    assert torch.equal(again["image"].as_tensor(), fixed)
    flow.run()
    assert (report / "test_000_evaluation.png").is_file() and "test_000,liver," in (report / "metrics.csv").read_text()


def of_bundle(bundle: str, folders: dict[str, Path]) -> Path:
    return folders["flare" if "flare" in bundle else "btcv"]


@pytest.mark.parametrize("bundle", BUNDLES)
def test_training_draws_cts_of_tissue_maps(bundle: str, tissue_maps: dict[str, Path], tmp_path: Path) -> None:
    flow = workflow(bundle, of_bundle(bundle, tissue_maps), tmp_path)
    flow.initialize()
    parse = flow.parser.get_parsed_content
    train, validation = parse("train#dataset"), parse("validate#dataset")
    keys = ["image", "label"] if "seg" in bundle else ["image"]
    assert parse("cache_rate") == 1 and train.cache_num == len(train.data) == 2
    assert {train._cache[0][key].dtype for key in keys} == {torch.uint8}
    first, second = (next(iter(parse("train#dataloader"))) for _ in range(2))
    assert first["image"].shape == (2, 1, 48, 48, 48)
    assert first["image"].min() >= 0 and first["image"].max() <= 1 and first["image"].std() > 0.1
    assert first["image"].unique().numel() > 10_000  # no tissue has one value
    assert torch.equal(torch.as_tensor(first["image"]), torch.as_tensor(second["image"]))  # of one epoch and seed
    parse("train#dataloader").sampler.set_epoch(5)
    assert not torch.equal(torch.as_tensor(next(iter(parse("train#dataloader")))["image"]), first["image"].as_tensor())
    fixed = validation[0]["image"].as_tensor()
    fresh = workflow(bundle, of_bundle(bundle, tissue_maps), tmp_path / "again").parser.get_parsed_content(
        "validate#dataset"
    )
    assert torch.equal(fixed, validation[0]["image"].as_tensor()) and torch.equal(fixed, fresh[0]["image"].as_tensor())
    if "seg" in bundle:
        assert set(first["label"].unique().tolist()) > {0} and fixed.shape == validation[0]["label"].shape
    check_drawing_on_record(bundle, of_bundle(bundle, tissue_maps), tmp_path, parse("record"))
    flow.run()
    if "seg" in bundle:
        check_evaluation(bundle, of_bundle(bundle, tissue_maps), tmp_path, fixed)
    weights = torch.load(tmp_path / "model.pt", weights_only=True)
    assert all(tensor.isfinite().all() for tensor in weights.values())
    losses = parse("train#trainer").state.output[0]["loss"]
    assert np.isfinite(float(losses))


@pytest.mark.parametrize("bundle", BUNDLES[:2])
def test_tissue_maps_are_no_cts_and_cts_no_tissue_maps(
    bundle: str, datasets: dict[str, Path], tissue_maps: dict[str, Path], tmp_path: Path
) -> None:
    """One clear line before anything is written: a network must not learn indices as Hounsfield units."""
    with pytest.raises(Exception, match=r".") as caught:
        workflow(bundle, tissue_maps["btcv"], tmp_path / "out", "tiny.json").initialize()
    error = input_error_in(caught.value)
    assert error is not None and "channel 0 is 'tissue map', no scan" in str(error) and "\n" not in str(error)
    with pytest.raises(Exception, match=r".") as caught:
        workflow(bundle, datasets["btcv"], tmp_path / "out").initialize()
    assert f"{datasets['btcv']}/tissues.json: no such file" in str(input_error_in(caught.value))
    with pytest.raises(Exception, match=r".") as caught:
        table = str(tissue_maps["btcv"] / "tissues.json")
        workflow(bundle, datasets["btcv"], tmp_path / "out", tissue_table=table).initialize()
    assert re.search(r"train_000_0000.nii.gz: tissues -\d+, .* are not in the table", str(input_error_in(caught.value)))
    assert not (tmp_path / "out").exists()


def test_own_label_maps_train_with_the_table_that_the_page_prints(datasets: dict[str, Path], tmp_path: Path) -> None:
    """Air, body and organs of somebody else's labels, with the documented file."""
    page = (ROOT / "docs" / "data.md").read_text()
    (printed,) = re.findall(r"```json\n(.*?)```", page, re.DOTALL)
    folder = tmp_path / "own"
    shutil.copytree(datasets["btcv"] / "labelsTr", folder / "labelsTr")
    (folder / "imagesTr").mkdir()
    (folder / "tissues.json").write_text(printed)
    names = ["background", "liver", "spleen"]
    table = read_tissue_table(folder / "tissues.json")
    assert set(names[1:]) <= set(table.names)
    for file in sorted((folder / "labelsTr").glob("*.nii.gz")):
        scan = nib.load(datasets["btcv"] / "imagesTr" / file.name.replace(".nii.gz", "_0000.nii.gz"))
        label, hu = np.asarray(nib.load(file).dataobj), np.asarray(scan.dataobj)
        organs = np.select([label == 6, label == 1], [1, 2], 0).astype(np.uint8)
        tissue = np.where(hu > -300, table.names.index("fat"), 0).astype(np.uint8)
        for value, name in enumerate(names[1:], 1):
            tissue[organs == value] = table.names.index(name)
        nib.save(nib.Nifti1Image(tissue, scan.affine), folder / "imagesTr" / f"{file.name[:-7]}_0000.nii.gz")
        nib.save(nib.Nifti1Image(organs, scan.affine), file)
    (folder / "dataset.json").write_text(json.dumps({"labels": {name: value for value, name in enumerate(names)}}))
    flow = workflow("hi_end_mae_btcv_seg", folder, tmp_path / "out", label_names=names)
    flow.initialize()
    flow.run()
    assert (tmp_path / "out" / "model.pt").is_file()


def test_a_bad_table_stops_training_with_its_name_and_value(tissue_maps: dict[str, Path], tmp_path: Path) -> None:
    bad = tmp_path / "bad.json"
    bad.write_text('{"tissues": [{"name": "air", "hu": "none"}]}')
    with pytest.raises(Exception, match=r".") as caught:
        workflow("hi_end_mae_btcv_seg", tissue_maps["btcv"], tmp_path / "out", tissue_table=str(bad)).initialize()
    error = input_error_in(caught.value)
    assert isinstance(error, InputError) and f"{bad}: tissue 0: 'hu' of 'air' is 'none'" in str(error)


def test_strong_augmentation_keeps_crops_and_labels_together(datasets: dict[str, Path], tmp_path: Path) -> None:
    flow = workflow("hi_end_mae_btcv_seg", datasets["btcv"], tmp_path, "strong_augmentation.json", num_samples=4)
    flow.initialize()
    batch = next(iter(flow.parser.get_parsed_content("train#dataloader")))
    image, label = batch["image"].as_tensor(), batch["label"].as_tensor()
    assert image.shape == label.shape == (4, 1, 48, 48, 48) and image.isfinite().all()
    assert set(label.unique().tolist()) <= set(range(14)) and label.any()
    liver, rest = image[label == 6].mean(), image[label == 0].mean()
    assert liver > rest + 0.1  # the label still lies on the bright organ
    flow.run()
    assert (tmp_path / "model.pt").is_file()
