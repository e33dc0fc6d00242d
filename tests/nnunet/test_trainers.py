"""The trainers in the real nnU-Net: its commands as the guide prints them, and its trainer and predictor."""

from __future__ import annotations

import json
import pickle
import re
import shutil
from copy import deepcopy
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.transforms import Compose, EnsureChannelFirst, LoadImage, Orientation
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIOWithReorient
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.preprocessing.normalization.map_channel_name_to_normalization import get_normalization_scheme
from nnunetv2.run.load_pretrained_weights import load_pretrained_weights
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from shared_networks.datasets.record import read_record, write_model
from shared_networks.doors.nnunet.network import REORIENTING_READERS
from shared_networks.errors import InputError
from shared_networks.networks.checkpoints import read_weights
from shared_networks.transforms.intensity import ScaleByModalityd

from ..conftest import ROOT
from .conftest import FIRST, PLANS, SECOND, command

SMALL = ROOT / "hi_end_mae_pretrain" / "weights" / "small.pt"
POSITIONS = "vit.patch_embedding.position_embeddings"
ENCODER = "HI_END_MAE_ENCODER"


GUIDE = (ROOT / "docs" / "nnunet.md").read_text()


def printed(fence: int = 0) -> list[str]:
    """Commands of one of the guide's fences that are nnU-Net's."""
    lines = re.findall(r"```bash\n(.*?)```", GUIDE, re.DOTALL)[fence].splitlines()
    return [line for line in lines if line.startswith("nnUNetv2_")]


def made_small(line: str, folders: Path) -> str:
    """A printed command on the first data set, one epoch, on a CPU."""
    line = re.sub(r"(-d|_train) 1\b", r"\1 801", line).replace("spacing 3 3 3", "spacing 12 12 12 -np 1 -npfp 1")
    line = line.replace("HiEndMAESmall", "HiEndMAESmallShort").replace("imagesTs", f"{folders}/raw/{FIRST}/imagesTs")
    line = line.replace("-o predicted", f"-o {folders}/predicted -npp 1 -nps 1")
    return line if "plan_and" in line else f"{line} -device cpu"


@pytest.fixture(scope="session")
def trained(folders: Path) -> tuple[Path, list[str]]:
    """The first data set's results, and what the guide's commands said."""
    return folders / "results" / FIRST, [command(made_small(line, folders)) for line in printed()]


@pytest.fixture(autouse=True)
def no_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ENCODER, raising=False)


def trainer(name: str, folders: Path, dataset: str = FIRST, plans_name: str = PLANS, **entries: Any) -> Any:
    """A trainer of nnU-Net on a data set, whose plans may get other entries."""
    folder = folders / "preprocessed" / dataset
    plans = {**json.loads((folder / f"{plans_name}.json").read_text()), **entries, "continue_training": False}
    found = recursive_find_trainer_class_by_name(name)
    return found(plans, "3d_fullres", "all", json.loads((folder / "dataset.json").read_text()), torch.device("cpu"))


def test_guide_trains_and_predicts_on_the_scans_grid(trained, folders: Path) -> None:
    _, (_, training, prediction) = trained
    assert "148 keys loaded into the encoder" in training
    assert "Mean Validation Dice" in training
    assert "Found class nnUNetTrainerHiEndMAESmallShort" in prediction
    (scan,) = (folders / "raw" / FIRST / "imagesTs").iterdir()
    source, result = nib.load(scan), nib.load(folders / "predicted" / scan.name.replace("_0000", ""))
    assert result.shape == source.shape
    np.testing.assert_allclose(result.affine, source.affine, atol=1e-3)
    labels = np.asanyarray(result.dataobj)
    assert set(np.unique(labels)) <= set(range(14))


def test_the_other_commands_of_the_guide_differ_in_voxels_and_trainer_alone() -> None:
    published = [line.replace("1.5 1.5 1.5", "3 3 3").replace("HiEndMAE -p", "HiEndMAESmall -p") for line in printed(1)]
    assert published == printed()[:2]
    assert "export nnUNet_extTrainer=$PWD/shared_networks/doors/nnunet\n" in GUIDE  # as in conftest.py
    assert f"export {ENCODER}=" in GUIDE


def test_channel_names_of_the_guide_are_nnunets() -> None:
    assert get_normalization_scheme("CT").__name__ == "CTNormalization"
    assert get_normalization_scheme("noNorm").__name__ == "NoNormalization"


def test_log_names_what_was_loaded_and_the_encoders_voxels(trained) -> None:
    results, _ = trained
    (log,) = (results / f"nnUNetTrainerHiEndMAESmallShort__{PLANS}__3d_fullres" / "fold_0").glob("training_log*.txt")
    text = log.read_text()
    assert f"weights from {SMALL}: 148 keys loaded" in text
    assert "voxels are 12 x 12 x 12 mm, and the encoder was pre-trained on 3 x 3 x 3 mm" in text
    assert "-overwrite_target_spacing 3 3 3" in text


def test_training_moved_the_weights_and_the_checkpoint_predicts(trained, folders: Path) -> None:
    results, _ = trained
    model = results / f"nnUNetTrainerHiEndMAESmallShort__{PLANS}__3d_fullres"
    predictor = nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(model), (0,))
    assert predictor.network.segmenter.vit.grid == [
        -(-n // 6) for n in predictor.configuration_manager.patch_size[::-1]
    ]
    state, file = predictor.network.segmenter.state_dict(), read_weights(SMALL)
    name = "vit.blocks.0.attn.qkv.weight"
    assert 0 < (state[name] - file[name]).abs().max() < 0.1


def test_encoder_is_the_files_to_the_bit(trained, folders: Path) -> None:
    fine_tuned = trainer("nnUNetTrainerHiEndMAESmall", folders)
    fine_tuned.initialize()
    state, file = fine_tuned.network.segmenter.state_dict(), read_weights(SMALL)
    loaded = [name for name in state if name.startswith("vit.") and name != POSITIONS]
    assert len(loaded) == 148
    assert all(torch.equal(state[name], file[name]) for name in loaded)
    assert fine_tuned.optimizer.param_groups[0]["lr"] == pytest.approx(3e-3 / 10)  # a warm-up of 10 epochs


def test_scratch_needs_no_file_and_differs(trained, folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENCODER, "nowhere.pt")
    scratch = trainer("nnUNetTrainerHiEndMAESmallScratch", folders)
    scratch.initialize()
    state, file = scratch.network.segmenter.state_dict(), read_weights(SMALL)
    matrices = [name for name in state if name.startswith("vit.blocks") and name.endswith("qkv.weight")]
    assert len(matrices) == 12
    assert all((state[name] - file[name]).abs().max() > 0.05 for name in matrices)


def test_published_size_has_the_official_encoder(trained, folders: Path) -> None:
    found = trainer("nnUNetTrainerHiEndMAE", folders)
    with torch.device("meta"):
        network = found.build_network_architecture(found.plans_manager, found.configuration_manager, 1, 14)
    shapes = {name: list(tensor.shape) for name, tensor in network.segmenter.state_dict().items()}
    official = json.loads((ROOT / "tests/data/official_checkpoint_keys_vit_large_p12.json").read_text())
    assert shapes["vit.blocks.11.attn.qkv.weight"] == official["module.encoder.blocks.11.attn.qkv.weight"]
    assert shapes["vit.patch_embedding.patch_embeddings.1.weight"] == [1536, 12**3]
    found.network = torch.nn.Linear(2, 2)
    optimizer, schedule = found.configure_optimizers()
    rates = []
    for epoch in range(1000):
        schedule.last_epoch = epoch
        rates.append(schedule.get_lr()[0])
    assert isinstance(optimizer, torch.optim.AdamW)
    assert (max(rates), rates.index(max(rates)), optimizer.param_groups[0]["weight_decay"]) == (1e-4, 100, 1e-5)


@pytest.mark.parametrize("case", [0, 1])
def test_encoder_gets_what_the_bundle_feeds(turned: Path, folders: Path, case: int, monkeypatch) -> None:
    """Stored as LPS, read by SimpleITK, transposed by the plans, normalised: the same as by the bundle's transforms."""
    fine_tuned = trainer("nnUNetTrainerHiEndMAESmall", folders, SECOND, "nnUNetPlans")
    fine_tuned.initialize()
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    fine_tuned.on_train_start()
    network = fine_tuned.network
    assert fine_tuned.plans_manager.transpose_forward != [0, 1, 2]
    assert network.mirrored == (True, True, False)
    data, _, _, properties = fine_tuned.dataset_class(str(turned / "nnUNetPlans_3d_fullres")).load_case(f"case_{case}")
    assert list(data.shape[1:]) == list(properties["shape_before_cropping"])
    found = network.prepare(torch.from_numpy(np.asarray(data[:]))[None])
    read = Compose([LoadImage(), EnsureChannelFirst(), Orientation("RAS", labels=None)])
    image = read(folders / "raw" / SECOND / "imagesTr" / f"case_{case}_0000.nii.gz")
    expected = ScaleByModalityd("image", "CT", (-175, 250))({"image": image})["image"].as_tensor()
    before = [network.padding(size)[0] for size in expected.shape[1:]]
    inner = found[0][(slice(None), *(slice(b, b + n) for b, n in zip(before, expected.shape[1:], strict=True)))]
    assert expected.std() > 0.1
    torch.testing.assert_close(inner, expected, rtol=0, atol=1e-4)
    assert found.sum() == pytest.approx(float(inner.sum()), rel=1e-5)  # else air


def test_state_of_scans_goes_into_checkpoints(turned: Path, folders: Path, tmp_path: Path, monkeypatch) -> None:
    first = trainer("nnUNetTrainerHiEndMAESmall", folders, SECOND, "nnUNetPlans")
    first.initialize()
    first.network.mirrored, first.network.window = (True, True, False), (-100.0, 200.0)
    first.save_checkpoint(str(tmp_path / "checkpoint.pth"))
    monkeypatch.setenv(ENCODER, "nowhere.pt")  # a checkpoint of nnU-Net needs no encoder
    resumed = trainer("nnUNetTrainerHiEndMAESmall", folders, SECOND, "nnUNetPlans")
    resumed.load_checkpoint(str(tmp_path / "checkpoint.pth"))
    assert (resumed.network.mirrored, resumed.network.window) == ((True, True, False), (-100.0, 200.0))
    state = resumed.network.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in first.network.state_dict().items())


def test_pretrained_weights_are_checkpoints_of_nnunet_alone(trained, folders: Path) -> None:
    results, _ = trained
    fine_tuned = trainer("nnUNetTrainerHiEndMAESmallScratch", folders)
    fine_tuned.initialize()
    with pytest.raises(KeyError, match="network_weights"):
        load_pretrained_weights(fine_tuned.network, SMALL)
    model = results / f"nnUNetTrainerHiEndMAESmallShort__{PLANS}__3d_fullres"
    load_pretrained_weights(fine_tuned.network, model / "fold_0" / "checkpoint_final.pth")
    saved = torch.load(model / "fold_0" / "checkpoint_final.pth", weights_only=False)["network_weights"]
    state = fine_tuned.network.state_dict()
    assert all(torch.equal(state[name], saved[name]) for name in saved)


def test_reader_decides_how_scans_lie_after_pretrained_weights(trained, folders: Path, monkeypatch) -> None:
    fine_tuned = trainer("nnUNetTrainerHiEndMAESmallScratch", folders)
    fine_tuned.initialize()
    fine_tuned.network.mirrored = (True, True, True)  # of the scans of another training
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    fine_tuned.on_train_start()
    assert fine_tuned.network.mirrored == (False, False, False)


def test_readers_that_turn_scans_give_ras(folders: Path) -> None:
    assert SimpleITKIOWithReorient.__name__ in REORIENTING_READERS
    for scan in sorted((folders / "raw" / FIRST / "imagesTr").iterdir()):
        values, _ = SimpleITKIOWithReorient().read_images((str(scan),))
        upright = nib.as_closest_canonical(nib.load(scan)).get_fdata()
        np.testing.assert_array_equal(values[0].transpose(2, 1, 0), upright)


def encoder_of(folder: Path, **preparation: Any) -> Path:
    """The encoder that ships, with a record of another preparation."""
    record: Any = read_record(SMALL)
    changed = {**record, "preparation": {**record["preparation"], **preparation}}
    write_model(read_weights(SMALL), folder / "model.pt", changed)
    return folder / "model.pt"


def test_window_is_the_encoders(trained, folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENCODER, str(encoder_of(tmp_path, intensity_range=[-1010, 200])))
    fine_tuned = trainer("nnUNetTrainerHiEndMAESmall", folders)
    fine_tuned.initialize()
    assert fine_tuned.network.window == (-1010, 200)
    fine_tuned.plans_manager.plans["image_reader_writer"] = "NibabelIO"
    with pytest.raises(InputError, match="different orientations"):  # and the reader keeps them
        fine_tuned.on_train_start()
    assert fine_tuned.network.mirrored == (False, False, False)


def test_encoder_of_mr_is_refused(trained, folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENCODER, str(encoder_of(tmp_path, modality="MR")))
    with pytest.raises(InputError, match=r"model\.pt: pre-trained on MR, .*Set HI_END_MAE_ENCODER to an encoder of CT"):
        trainer("nnUNetTrainerHiEndMAESmall", folders).initialize()


@pytest.mark.parametrize("named", [None, "nowhere.pt"])
def test_missing_encoder_is_told_before_the_network_is_made(trained, folders: Path, named, monkeypatch) -> None:
    if named:
        monkeypatch.setenv(ENCODER, named)
    found = trainer("nnUNetTrainerHiEndMAE", folders)
    message = rf"^HI_END_MAE_ENCODER is '{named or ''}', which is no file\. .*nnUNetTrainerHiEndMAE .*Scratch"
    with pytest.raises(InputError, match=message):
        found.initialize()
    assert found.network is None


def test_encoder_of_another_network_is_refused_in_one_line(trained, folders: Path, tmp_path: Path) -> None:
    golden = ROOT / "tests" / "data" / "hi_end_mae_tiny_1ch.pt"
    shutil.copy(golden, tmp_path / "tiny.pt")
    said = command(
        "nnUNetv2_train 801 3d_fullres 0 -tr nnUNetTrainerHiEndMAESmall -p HiEndMAE -device cpu",
        failing=True,
        HI_END_MAE_ENCODER=str(tmp_path / "tiny.pt"),
    )
    lines = [line for line in said.splitlines() if "Warning" not in line]
    assert lines[-1].startswith(f"error: {tmp_path / 'tiny.pt'}: does not cover the encoder")
    assert "nnUNetTrainerHiEndMAESmall has {'patch_size': 6" in lines[-1]
    assert "Traceback" not in said


def planned_with(folders: Path, **configuration: Any) -> tuple[PlansManager, Any]:
    plans = json.loads((folders / "preprocessed" / FIRST / f"{PLANS}.json").read_text())
    plans["configurations"]["3d_fullres"] |= configuration
    manager = PlansManager(deepcopy(plans))
    return manager, manager.get_configuration("3d_fullres")


@pytest.mark.parametrize(
    ("configuration", "message"),
    [
        ({"patch_size": [56, 64]}, r"patch \[56, 64\] is 2D: choose 3d_fullres"),
        ({"normalization_schemes": ["ZScoreNormalization"]}, "has ZScoreNormalization, and Hi-End-MAE needs"),
        ({"previous_stage": "3d_lowres"}, "hands over the labels of 3d_lowres as channels.*choose 3d_fullres"),
    ],
)
def test_plans_that_the_encoder_cannot_serve_are_refused(trained, folders: Path, configuration, message) -> None:
    found = recursive_find_trainer_class_by_name("nnUNetTrainerHiEndMAESmall")
    with pytest.raises(InputError, match=message):
        found.build_network_architecture(*planned_with(folders, **configuration), 1, 14)


def test_a_reader_that_knows_no_orientation_is_refused(trained, folders: Path, tmp_path: Path) -> None:
    fine_tuned = trainer("nnUNetTrainerHiEndMAESmallScratch", folders, image_reader_writer="Tiff3DIO")
    fine_tuned.initialize()
    source = Path(fine_tuned.preprocessed_dataset_folder)
    for file in source.glob("*.b2nd"):
        (tmp_path / file.name).symlink_to(file)
    for file in source.glob("*.pkl"):
        properties = pickle.loads(file.read_bytes())
        del properties["nibabel_stuff"]
        (tmp_path / file.name).write_bytes(pickle.dumps(properties))
    fine_tuned.preprocessed_dataset_folder = str(tmp_path)
    with pytest.raises(InputError, match="Tiff3DIO does not say how the scan lies"):
        fine_tuned.on_train_start()


def test_all_four_trainers_are_found(folders: Path) -> None:
    base = recursive_find_trainer_class_by_name("nnUNetTrainerHiEndMAE")
    assert base.pretrained and base.shipped is None
    for name in ("Scratch", "Small", "SmallScratch"):
        assert recursive_find_trainer_class_by_name(f"nnUNetTrainerHiEndMAE{name}").pretrained == (name == "Small")
