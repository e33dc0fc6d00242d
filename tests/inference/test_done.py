"""Which results are there, and of what they were made."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from monai.bundle import ConfigParser
from monai.data import MetaTensor

from shared_networks.datasets.scans import Source
from shared_networks.errors import InputError
from shared_networks.inference.done import NoteDone, read_note
from shared_networks.networks.hi_end_mae import HiEndMAE
from shared_networks.networks.unetr import HiEndUNETR
from tests.conftest import BUNDLES, ROOT


def noted(folder: Path, **settings: object) -> NoteDone:
    weights = folder / "model.pt"
    weights.write_bytes(b"weights")
    return NoteDone("features", ["_features.npz"], folder, [weights], settings)


def case(scan: Path, stamp: str = "scan 1") -> dict[str, Any]:
    scan.parent.mkdir(exist_ok=True)
    scan.touch()
    image = MetaTensor(torch.zeros(1), meta={"filename_or_obj": str(scan)})
    return {"name": "a", "stamp": stamp, "scan": image}


def test_results_are_done_of_one_scan_weights_and_settings(tmp_path: Path) -> None:
    note = noted(tmp_path, amp=False)
    assert not note.is_done("a", "scan 1")
    data = case(tmp_path / "a.nii")
    assert note.begin(data) is note(data) is data
    assert not note.is_done("a", "scan 1")  # the file itself is not there
    (tmp_path / "a_features.npz").touch()
    assert note.is_done("a", "scan 1")
    assert not note.is_done("a", "scan 2")
    assert not noted(tmp_path, amp=True).is_done("a", "scan 1")
    (tmp_path / "model.pt").write_bytes(b"other weights")
    assert not note.is_done("a", "scan 1")


@pytest.mark.parametrize("content", ["", "{", "[1]", "3"])
def test_a_note_that_says_nothing_leaves_the_scan_to_do(content: str, tmp_path: Path) -> None:
    (tmp_path / "a_features.json").write_text(content)
    assert read_note(tmp_path / "a_features.json") == {}
    assert not noted(tmp_path).is_done("a", "scan 1")


def refused(note: NoteDone, *files: Path) -> str:
    """Why results of a scan may not be written; nothing where they may."""
    try:
        note.check("a", Source("a", tuple(map(str, files))), {str(file) for file in files})
    except InputError as error:
        return str(error)
    return ""


def test_files_that_no_record_names_are_not_replaced(tmp_path: Path) -> None:
    note, scan = noted(tmp_path), tmp_path / "in" / "a.nii"
    data, result = case(scan), tmp_path / "a_features.npz"
    assert refused(note, scan) == ""
    result.write_text("somebody else's")
    expected = (
        f"{result}: is no result of this scan, as far as records say, and would be lost; give another --output_dir"
    )
    assert refused(note, scan).startswith(expected)
    for content in ("[1]", "{", '{"made_with": 3}', '{"files": ["a_features.npz"]}', '{"made_with": {}, "files": 3}'):
        (tmp_path / "a_features.json").write_text(content)
        assert refused(note, scan).startswith(expected)
    result.unlink()
    assert refused(note, scan).startswith(f"{tmp_path}/a_features.json: is no result of this scan")
    (tmp_path / "a_features.json").unlink()
    note.begin(data)  # and is killed
    result.write_text("half of ours")
    assert refused(note, scan) == ""
    result.unlink()
    result.symlink_to(tmp_path / "nowhere")
    (tmp_path / ".unfinished_a_features.json").unlink()
    assert refused(note, scan).startswith(expected)


def test_results_are_replaced_by_those_of_the_same_scan_alone(tmp_path: Path) -> None:
    note, scan, other = noted(tmp_path), tmp_path / "in" / "a.nii", tmp_path / "other" / "a.nii"
    note(note.begin(case(scan)))
    (tmp_path / "a_features.npz").touch()
    case(other)
    assert refused(note, scan) == refused(noted(tmp_path, amp=True), scan) == ""
    assert refused(note, other) == (
        f"{tmp_path}/a_features.npz: is a result of another scan, {scan}, and would be lost; give another "
        "--output_dir, or rename one of them"
    )
    assert refused(note, tmp_path / "first.dcm", scan) == ""  # a slice more of the same series
    link = tmp_path / "link.nii"
    link.symlink_to(scan)
    assert refused(note, link) == ""
    scan.unlink()  # the data set has moved
    assert refused(note, other) == ""


def test_a_scan_of_the_run_is_never_replaced(tmp_path: Path) -> None:
    note, scan = noted(tmp_path), tmp_path / "in" / "a.nii"
    note(note.begin(case(scan)))
    result = tmp_path / "a_features.npz"
    result.touch()
    with pytest.raises(InputError, match=f"^{result}: is a scan of this run, and would be lost; give another"):
        note.check("a", Source("a", (str(scan),)), {str(scan), str(result)})


def test_a_scan_that_is_done_again_keeps_nothing_of_before(tmp_path: Path) -> None:
    first = NoteDone("attention", ["_main.png", "_3.nii.gz"], tmp_path, [], {"at": 3})
    data = case(tmp_path / "in" / "a.nii")
    for file in first.targets("a"):
        (tmp_path / file).touch()
    first(first.begin(data))
    again = NoteDone("attention", ["_main.png", "_4.nii.gz"], tmp_path, [], {"at": 4})
    again.begin(data)
    assert sorted(file.name for file in tmp_path.glob("a_*")) == ["a_attention.json", "a_main.png"]
    assert not first.is_done("a", "scan 1") and not again.is_done("a", "scan 1")
    assert json.loads((tmp_path / "a_attention.json").read_text())["files"] == ["a_main.png", "a_4.nii.gz"]


OTHERS = {"in_channels": 2, "patch_size": [6, 12, 24], "feature_size": 4, "hidden_size": 96, "num_layers": 13,
          "num_heads": 3, "mlp_ratio": 2.0, "out_indices": [1, 5, 11], "num_upsamples": 2, "norm_name": "batch",
          "mask_ratio": 0.5, "decoder_hidden_size": 48, "decoder_num_heads": 3, "decoder_self_layers": 1}  # fmt: skip
"""Another value of each argument of the networks; patches of other sides can have the same number of voxels."""
ELSEWHERE = {"img_size", "out_channels"}  # in the preparation, and the labels
WITHOUT_EFFECT = {"local_init", "use_checkpoint", "dropout"}  # on a trained network in evaluation mode


@pytest.mark.parametrize(
    ("bundle", "overlays", "network", "saver"),
    [
        *[(BUNDLES[0], overlays, HiEndMAE, "done") for overlays in ([], ["features"], ["attention"])],
        *[(BUNDLES[1], overlays, HiEndUNETR, "saver") for overlays in ([], ["uncertainty"])],
    ],
)
def test_results_depend_on_all_of_a_network_that_weights_do_not_show(
    bundle: str, overlays: list[str], network: type, saver: str
) -> None:
    def made(name: str = "", value: object = None) -> tuple[dict[str, Any], Any]:
        config = ConfigParser()
        config.read_config([ROOT / bundle / "configs" / f"{file}.json" for file in ("inference", *overlays, "tiny")])
        config["bundle_root"] = str(ROOT / bundle)
        if network is HiEndMAE:
            config["network_def#local_init"] = False  # which computes, and nothing can be on the device meta
        if name:
            config["patch_size" if name == "patch_size" else f"network_def#{name}"] = value
        with torch.device("meta"):
            weights = config.get_parsed_content("network_def").state_dict()
        return {key: tensor.shape for key, tensor in weights.items()}, config.get_parsed_content(saver).settings

    shapes, settings = made()
    hidden = []
    for name in inspect.signature(network).parameters.keys() - ELSEWHERE - WITHOUT_EFFECT:
        others, changed = made(name, OTHERS[name])
        if others == shapes:
            hidden.append(name)
            assert changed != settings, name
    assert {"num_heads", "out_indices", "patch_size"} <= {*hidden}
