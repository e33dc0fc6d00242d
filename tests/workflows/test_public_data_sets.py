"""Data sets as they are distributed, small and synthetic: the documented settings, and no code, fit them."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import SimpleITK
import torch
from monai.bundle import ConfigWorkflow

from shared_networks.datasets.cases import find_cases
from shared_networks.datasets.lists import write_list
from shared_networks.datasets.pairs import case_name
from shared_networks.datasets.record import PARTS
from shared_networks.errors import InputError, input_error_in
from shared_networks.synthetic.tissues import label_names
from tests.conftest import COARSE, ROOT

pytestmark = pytest.mark.integration

BUNDLE = ROOT / "hi_end_mae_btcv_seg"
# Names as in the distributed files, misspelt ones too.
AMOS = [
    *("background", "spleen", "right kidney", "left kidney", "gall bladder", "esophagus", "liver", "stomach", "arota"),
    *("postcava", "pancreas", "right adrenal gland", "left adrenal gland", "duodenum", "bladder", "prostate/uterus"),
]
WORD = [
    *("background", "liver", "spleen", "left_kidney", "right_kidney", "stomach", "gallbladder", "esophagus"),
    *("pancreas", "duodenum", "colon", "intestine", "adrenal", "rectum", "bladder", "Head_of_femur_L"),
    "Head_of_femur_R",
]
CT_ORG = ["background", "liver", "bladder", "lungs", "kidneys", "bone", "brain"]
SLIVER07 = ["background", "liver"]
CT_ORG_FILES = ("volume-*.nii.gz", "labels-*.nii.gz")
SLIVER07_FILES = ("liver-orig*.nii.gz", "liver-seg*.nii.gz")
SAME_ORGAN = {"arota": "aorta", "postcava": "inferior vena cava", "gall bladder": "gallbladder"}

# What the documentation gives for MetaImages.
CONVERT = "import glob, SimpleITK as s; [s.WriteImage(s.ReadImage(f), f[:-3] + 'nii.gz') for f in glob.glob('*.mhd')]"


def value_in(names: Sequence[str], organ: str) -> int:
    """The value of a BTCV organ in another label set; 0 where the set has it not."""
    plain = [SAME_ORGAN.get(name, name.replace("_", " ")) for name in names]
    forms = (organ, {"right kidney": "kidneys", "left kidney": "kidneys"}.get(organ, organ), organ.split(" ")[1:2])
    return next((plain.index(form) for form in forms if form in plain), 0)


def relabelled(source: Path, target: Path, names: Sequence[str]) -> None:
    scan = nib.load(source)
    values = np.array([value_in(names, organ) for organ in label_names("btcv")], np.uint8)
    target.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(values[np.asanyarray(scan.dataobj)], scan.affine), target)


def distribute(source: Path, root: Path, files: dict[int, tuple[str, str]], names: Sequence[str]) -> Path:
    """Lay three cases out as a data set does: by number the names of image and label."""
    for number, (image, label) in files.items():
        (root / image).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source / f"imagesTr/train_{number:03d}_0000.nii.gz", root / image)
        relabelled(source / f"labelsTr/train_{number:03d}.nii.gz", root / label, names)
    return root


@pytest.fixture(scope="module")
def amos(datasets: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    parts = {0: ("Tr", "amos_0001"), 1: ("Tr", "amos_0004"), 2: ("Va", "amos_0008")}
    files = {n: (f"images{part}/{name}.nii.gz", f"labels{part}/{name}.nii.gz") for n, (part, name) in parts.items()}
    root = distribute(datasets["btcv"], tmp_path_factory.mktemp("sets") / "amos22", files, AMOS)
    lists = [
        [{"image": f"./{i}", "label": f"./{label}"} for i, label in files.values() if part in i]
        for part in ("Tr", "Va")
    ]
    content = {
        "labels": {str(value): name for value, name in enumerate(AMOS)},
        "training": lists[0],
        "validation": lists[1],
        "test": [{"image": "./imagesTs/amos_0002.nii.gz"}],
    }
    (root / "dataset.json").write_text(json.dumps(content))
    return root


@pytest.fixture(scope="module")
def word(datasets: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    files = {
        n: (f"imagesTr/word_{k}.nii.gz", f"labelsTr/word_{k}.nii.gz") for n, k in enumerate(("0002", "0004", "0007"))
    }
    root = distribute(datasets["btcv"], tmp_path_factory.mktemp("sets") / "WORD", files, WORD)
    (root / "dataset.json").write_text(json.dumps({"labels": {str(value): name for value, name in enumerate(WORD)}}))
    return root


@pytest.fixture(scope="module")
def ct_org(datasets: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    files = {n: (f"volume-{k}.nii.gz", f"labels-{k}.nii.gz") for n, k in enumerate((2, 10, 100))}
    return distribute(datasets["btcv"], tmp_path_factory.mktemp("sets") / "CT-ORG", files, CT_ORG)


@pytest.fixture(scope="module")
def sliver07_distributed(datasets: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As distributed, MetaImages, which are to be converted."""
    files = {n: (f"liver-orig{n + 1:03d}.nii.gz", f"liver-seg{n + 1:03d}.nii.gz") for n in range(3)}
    root = distribute(datasets["btcv"], tmp_path_factory.mktemp("sets") / "SLIVER07", files, SLIVER07)
    for file in root.glob("*.nii.gz"):
        SimpleITK.WriteImage(SimpleITK.ReadImage(str(file)), str(file).replace(".nii.gz", ".mhd"))
        file.unlink()
    return root


@pytest.fixture(scope="module")
def sliver07(sliver07_distributed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = shutil.copytree(sliver07_distributed, tmp_path_factory.mktemp("sets") / "converted")
    subprocess.run([sys.executable, "-c", CONVERT], cwd=root, check=True)
    return root


def workflow(data: Path | str, out: Path, *configs: str, **settings: Any) -> ConfigWorkflow:
    return ConfigWorkflow(
        config_file=[str(BUNDLE / "configs" / f"{name}.json") for name in (*configs, "tiny")],
        workflow_type="infer" if configs == ("inference",) else "train",
        logging_file=False,
        bundle_root=str(BUNDLE),
        dataset_dir=str(data),
        output_dir=str(out),
        **({} if configs == ("inference",) else {"ckpt_dir": str(out), "pretrained_encoder": ""}),
        **{"epochs": 1, "num_samples": 1, "network_def#feature_size": 4, "spacing": COARSE, **settings},
    )


def trained(data: Path | str, out: Path, **settings: Any) -> ConfigWorkflow:
    flow = workflow(data, out, "train", **settings)
    flow.initialize()
    flow.run()
    flow.finalize()
    return flow


def refusal(flow: ConfigWorkflow) -> str:
    with pytest.raises(Exception) as caught:
        flow.initialize()
    return str(input_error_in(caught.value))


def record_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "model.json").read_text())


def names_of(cases: Sequence[dict[str, Any]]) -> list[str]:
    return [case_name(case["image"]) for case in cases]


def test_amos_by_its_own_lists_and_labels(amos: Path, datasets: dict[str, Path], tmp_path: Path) -> None:
    """One override follows to the head, the metric, the table and the segmentation."""
    out = tmp_path / "out"
    trained(amos / "dataset.json", out, label_names="@dataset_labels", val_interval=1)
    split = record_of(out)
    assert split["labels"] == {name: v for v, name in enumerate(AMOS)}
    assert [list(split[part]) for part in PARTS] == [["amos_0001", "amos_0004"], ["amos_0008"], []]
    assert split["dataset"] == "amos22/dataset.json"
    weights = torch.load(out / "model.pt", weights_only=True)
    assert 16 in {len(tensor) for name, tensor in weights.items() if name.endswith("conv.conv.bias")}, weights.keys()

    evaluation = workflow(
        amos / "dataset.json", out, "train", "evaluate", label_names="@dataset_labels", checkpoint=str(out / "model.pt")
    )
    evaluation.initialize()
    evaluation.run()
    with next(out.glob("*.csv")).open() as stream:
        assert {"duodenum", "prostate/uterus"} <= set(",".join(next(csv.reader(stream))).split(","))

    scans = datasets["btcv"] / "imagesTs"
    foreign = {"checkpoint": str(out / "model.pt")}
    line = refusal(workflow(scans, out, "inference", **foreign))
    assert line.startswith(f"{out}/model.json: the model was trained on other labels")
    assert line.endswith("Pass --label_names @model_labels")
    inference = workflow(scans, out, "inference", label_names="@model_labels", **foreign)
    inference.initialize()
    assert inference.parser.get_parsed_content("label_names") == AMOS
    inference.run()
    assert list(out.glob("*_seg.nii.gz"))


def listed(data: Path, files: tuple[str, str]) -> Path:
    """The list that the documented command writes."""
    write_list(str(data), *files, str(data / "cases.json"))
    return data / "cases.json"


def test_ct_org_by_a_written_list_and_named_labels(ct_org: Path, tmp_path: Path) -> None:
    settings = {"label_names": CT_ORG, "split#test_fraction": 0.3}
    flow = trained(listed(ct_org, CT_ORG_FILES), tmp_path, **settings)
    cases = flow.parser.get_parsed_content("split")
    found = [(Path(c["image"]).name, Path(c["label"]).name) for part in cases.values() for c in part]
    assert sorted(found) == [(f"volume-{k}.nii.gz", f"labels-{k}.nii.gz") for k in (10, 100, 2)]
    assert [len(cases[part]) for part in ("train", "validation", "test")] == [1, 1, 1]
    split = record_of(tmp_path)
    assert list(split["test"]) == names_of(cases["test"]) and split["split"]["test_fraction"] == 0.3
    assert split["labels"]["brain"] == 6


def test_sliver07_is_refused_until_it_is_converted(
    sliver07_distributed: Path, sliver07: Path, datasets: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(InputError) as caught:
        listed(sliver07_distributed, ("liver-orig*.mhd", SLIVER07_FILES[1]))
    line = str(caught.value)
    assert "finds 3 file(s) that are no NIfTI" in line and "convert the files to .nii.gz first" in line
    before, after = (
        nib.load(file)
        for file in (datasets["btcv"] / "imagesTr/train_000_0000.nii.gz", sliver07 / "liver-orig001.nii.gz")
    )
    np.testing.assert_array_equal(np.asanyarray(after.dataobj), np.asanyarray(before.dataobj))
    np.testing.assert_allclose(after.affine, before.affine, atol=1e-3)


@pytest.mark.parametrize(
    ("name", "names", "settings"),
    [("word", WORD, {"label_names": "@dataset_labels"}), ("sliver07", SLIVER07, {"label_names": SLIVER07})],
)
def test_word_and_sliver07_pass_the_checks(
    name: str, names: list[str], settings: dict[str, Any], request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    data = request.getfixturevalue(name)
    flow = workflow(listed(data, SLIVER07_FILES) if name == "sliver07" else data, tmp_path / "out", "train", **settings)
    flow.initialize()
    assert flow.parser.get_parsed_content("label_names") == names
    network = flow.parser.get_parsed_content("network_def")
    with torch.no_grad():
        assert network.eval()(torch.zeros(1, 1, 48, 48, 48)).shape[1] == len(names)
    assert len(flow.parser.get_parsed_content("loss").cross_entropy.weight) == len(names)
    parts = flow.parser.get_parsed_content("split")
    assert sorted(map(len, parts.values())) == [0, 1, 2]
    assert not list((tmp_path / "out").glob("*.json"))  # written once training starts


def test_another_bundles_data_are_refused_in_one_line(datasets: dict[str, Path], tmp_path: Path) -> None:
    line = refusal(workflow(datasets["flare"], tmp_path / "out", "train"))
    assert line.startswith(f"{datasets['flare']}/dataset.json: its labels are not label_names: 1 is 'liver' there and")
    assert "--label_names @dataset_labels" in line and "\n" not in line
    assert not (tmp_path / "out").exists()


def test_orphans_and_bad_files_come_in_one_list(datasets: dict[str, Path], tmp_path: Path) -> None:
    data = shutil.copytree(datasets["btcv"], tmp_path / "data")
    image, label = (f"{data}/imagesTr/train_{{}}_0000.nii.gz".format, f"{data}/labelsTr/train_{{}}.nii.gz".format)
    Path(label("000")).unlink()
    scan = nib.load(label("001"))
    nib.save(nib.Nifti1Image(np.asanyarray(scan.dataobj) + np.uint8(20), scan.affine), label("001"))
    shutil.copy(image("001"), image("009"))
    shutil.copy(label("001"), label("009"))
    lines = refusal(workflow(data, tmp_path / "out", "train")).splitlines()
    assert lines[0] == f"{data}: 4 problem(s):"
    assert lines[1].startswith(f"{image('000')}: no label; add the label train_000.nii.gz")
    assert [line.partition(": label values ")[0] for line in lines[2:4]] == [label("001"), label("009")]
    assert lines[4] == (
        f"{image('009')}: the same voxels as {image('001')}; remove one, or a scan may both train and test"
    )
    assert not (tmp_path / "out").exists()


def test_a_mirrored_case_is_refused_unless_the_patient_is(datasets: dict[str, Path], tmp_path: Path) -> None:
    data = shutil.copytree(datasets["btcv"], tmp_path / "data")
    for file in (data / "imagesTr/train_001_0000.nii.gz", data / "labelsTr/train_001.nii.gz"):
        scan = nib.load(file)
        nib.save(nib.Nifti1Image(np.asanyarray(scan.dataobj), np.diag([-1.0, 1, 1, 1]) @ scan.affine), file)
    flow = workflow(data, tmp_path / "out", "train")
    assert "train_001.nii.gz: left and right are swapped (liver is to the left of spleen" in refusal(flow)
    workflow(data, tmp_path / "out", "train", **{"datalist#check#sides": False}).initialize()


def test_folds_report_on_cases_that_neither_trained_nor_chose(datasets: dict[str, Path], tmp_path: Path) -> None:
    tested = []
    for fold in range(3):
        flow = workflow(datasets["btcv"], tmp_path, "train", **{"split#fold": fold, "split#num_folds": 3})
        cases = flow.parser.get_parsed_content("split")
        assert len({name for part in cases.values() for name in names_of(part)}) == 3
        tested += names_of(cases["test"])
    assert sorted(tested) == ["train_000", "train_001", "train_002"]


def test_lists_handed_over_by_a_program_need_no_data_set(
    datasets: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As MONAI Label trains."""
    cases = find_cases(datasets["btcv"])
    lists = {"train#dataset#data": cases[:2], "validate#dataset#data": cases[2:]}
    flow = trained("", tmp_path, **lists)
    assert flow.parser.get_parsed_content("split") == {"train": [], "validation": [], "test": []}
    split = record_of(tmp_path)
    assert (split["dataset"], list(split["train"]), split["test"]) == ("", ["train_000", "train_001"], {})
    assert record_of(tmp_path)["split"]["num_folds"] == 5
    trained("", tmp_path, run_id="", **lists)  # in place, and with the whole config resolved, as there
    assert "only a better model replaces it" in capsys.readouterr().out
    assert refusal(workflow("", tmp_path / "other", "train")).startswith("no case to check; look at dataset_dir")
