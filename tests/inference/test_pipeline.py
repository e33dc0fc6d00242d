"""Reading ahead and saving behind, while the network works. Events tell what overlaps, and no clock."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import DataLoader
from monai.engines import SupervisedEvaluator
from monai.inferers import Inferer
from torch import nn

from shared_networks.datasets.scans import Source
from shared_networks.errors import InputError, input_error_in
from shared_networks.inference import predict
from shared_networks.inference.predict import LabelLater, SaveInBackground, Scans, one_case
from shared_networks.inference.save import SaveImageLabelsd
from shared_networks.inference.sliding_window import Labels, SlidingWindowLabels, with_scan_meta
from tests.inference.test_predict import NAMES, hounsfield, scans, write

SHAPE = (14, 9, 11)
PATIENCE = 60  # seconds; what does not overlap fails after it


class Above(SlidingWindowLabels):
    """Labels what is above -175 HU liver, with a probability of the scan's own, once `before` has returned."""

    def __init__(self, before: Callable[[str], None] = lambda name: None) -> None:
        super().__init__((8, 8, 8), organ="liver", label_names=NAMES)
        self.before = before

    def begin(self, inputs: Any, network: Any, *args: Any, **kwargs: Any) -> Future[Labels]:
        name = Path(inputs.meta["filename_or_obj"][0]).name[0]
        self.before(name)
        probability = torch.full(inputs.shape[2:], ord(name) / 128, dtype=torch.float16)
        found: Future[Labels] = Future()
        found.set_result(Labels(with_scan_meta((inputs > 0).to(torch.uint8).as_tensor(), inputs), probability))
        return found


def evaluator(data: Scans, transform: Callable[[Any], Any], inferer: Inferer) -> SupervisedEvaluator:
    later = LabelLater(inferer)
    return SupervisedEvaluator(
        device=torch.device("cpu"),
        val_data_loader=DataLoader(data, batch_size=1, num_workers=0, collate_fn=one_case),
        network=nn.Identity(),
        inferer=later,
        postprocessing=SaveInBackground(transform, data, later),
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in "abcd":
        write(tmp_path / "in" / f"{name}.nii.gz", hounsfield(SHAPE, seed=ord(name)))
    return tmp_path / "in"


def test_next_scan_is_read_and_last_one_saved_while_the_network_works(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    was_read, worked = ({name: threading.Event() for name in "abcde"} for _ in range(2))
    read = Scans.read

    def reading(data: Scans, source: Source, alone: bool = True) -> Any:
        item = read(data, source, alone)
        was_read[source.case[-1]].set()
        return item

    def working(name: str) -> None:
        worked[name].set()
        if name < "d":
            assert was_read[chr(ord(name) + 1)].wait(PATIENCE)  # although this scan is not done

    def saving(case: Any) -> Any:
        if case["name"] < "d":
            assert worked[chr(ord(case["name"]) + 1)].wait(PATIENCE)  # although this one is not saved
        saved.append((case["name"], threading.current_thread() is threading.main_thread()))
        return case

    saved: list[tuple[str, bool]] = []
    monkeypatch.setattr(Scans, "read", reading)
    data = scans(folder)
    data.run(evaluator(data, saving, Above(working)))
    assert saved == [(name, False) for name in "abcd"]
    assert data.done == [f"in/{name}" for name in "abcd"] and data.failed == {}


def test_results_are_each_scan_s_own(folder: Path, tmp_path: Path) -> None:
    """Also the probabilities, which the inferer has replaced by the next scan's when they are saved."""
    (tmp_path / "model.pt").touch()
    saver = SaveImageLabelsd(
        label_names=NAMES, output_dir=tmp_path / "out", checkpoints=[tmp_path / "model.pt"], overlay=False, organ=1
    )
    released = {name: threading.Event() for name in "abcde"}

    def saving(case: Any) -> Any:
        if case["name"] < "d":
            assert released[chr(ord(case["name"]) + 1)].wait(PATIENCE)
        return saver(case)

    class Slow(Above):
        def begin(self, inputs: Any, network: Any, *args: Any, **kwargs: Any) -> Future[Labels]:
            found = super().begin(inputs, network)
            released[Path(inputs.meta["filename_or_obj"][0]).name[0]].set()
            return found

    data = scans(folder, skip=saver.is_done)
    data.run(evaluator(data, saving, Slow()))
    for name in "abcd":
        labels, chances = (nib.load(tmp_path / "out" / f"{name}_{kind}.nii.gz") for kind in ("seg", "liver"))
        np.testing.assert_array_equal(labels.dataobj, hounsfield(SHAPE, seed=ord(name)) > -175)
        np.testing.assert_allclose(chances.dataobj, ord(name) / 128, atol=1e-3)
    saver.finish(data)
    rows = (tmp_path / "out" / "statistics.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in rows] == ["case", *(name for name in "abcd" for _ in NAMES[1:])]
    data.run(evaluator(data, saver, Above()))
    assert (data.skipped, data.done) == ([f"in/{name}" for name in "abcd"], [])


@pytest.mark.parametrize("where", ["read", "network", "saving"])
@pytest.mark.parametrize("bad", ["a", "c", "d"])
def test_failure_costs_its_scan_alone(where: str, bad: str, folder: Path) -> None:
    def fail(name: str) -> None:
        if name == bad:
            raise ValueError("odd")

    def saving(case: Any) -> Any:
        if where == "saving":
            fail(case["name"])
        return case

    if where == "read":
        (folder / f"{bad}.nii.gz").write_bytes(b"no scan")
    data = scans(folder)
    data.run(evaluator(data, saving, Above(fail) if where == "network" else Above()))
    assert data.done == [f"in/{name}" for name in "abcd" if name != bad]
    assert list(data.failed) == [str(folder / f"{bad}.nii.gz")]
    assert (
        "cannot be read" in data.failed[str(folder / f"{bad}.nii.gz")] if where == "read" else "odd" in str(data.failed)
    )
    with pytest.raises(InputError, match=r"^1 of 4 scan\(s\) not segmented:"):
        data.report()


@pytest.mark.parametrize("bad", ["a", "d"])
def test_results_that_cannot_be_written_end_the_run(bad: str, folder: Path) -> None:
    def saving(case: Any) -> Any:
        if case["name"] == bad:
            raise InputError("out: cannot be written") from PermissionError(13, "Permission denied")
        return case

    data = scans(folder)
    with pytest.raises(Exception) as caught:
        data.run(evaluator(data, saving, Above()))
    assert str(input_error_in(caught.value)) == "out: cannot be written"
    assert data.writer is None and data.reader is None


def test_two_scans_are_in_memory_only_if_both_fit(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = scans(folder)
    needed = data.memory_needed(data.data[0])
    assert needed is not None
    ahead = [True, False, False, False]
    readers: list[bool] = []
    read = Scans.read

    def reading(data: Scans, source: Source, alone: bool = True) -> Any:
        readers.append(alone)
        return read(data, source, alone)

    monkeypatch.setattr(Scans, "read", reading)
    for free, expected in ((int(needed * 1.9), [True] * 4), (int(needed * 2.1), ahead), (None, ahead)):
        monkeypatch.setattr(predict, "free_memory", lambda free=free: free)
        readers.clear()
        data = scans(folder)
        data.run(evaluator(data, lambda case: case, Above()))
        assert readers == expected and len(data.done) == 4


@pytest.mark.parametrize("in_transform", [False, True])
def test_scan_that_runs_out_of_memory_beside_another_is_read_again_alone(
    in_transform: bool, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare, tried = Scans.prepare, []

    def preparing(data: Scans, source: Source) -> Any:
        tried.append(source.case[-1])
        if source.case[-1] == "b" and tried.count("b") == 1:
            if in_transform:
                raise RuntimeError("applying transform") from MemoryError()  # as MONAI does
            raise MemoryError
        return prepare(data, source)

    monkeypatch.setattr(Scans, "prepare", preparing)
    data = scans(folder)
    data.run(evaluator(data, lambda case: case, Above()))
    assert data.done == [f"in/{name}" for name in "abcd"] and tried == list("abbcd")


class Bands(nn.Module):
    """Three classes by intensity; NaN for a window with a voxel at the ceiling of the intensity range."""

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        logits = torch.cat([0.5 - image, image - 0.5, 0.2 - (image - 0.5).abs()], dim=1) * 9
        return logits * (float("nan") if image.max() > 0.999 else 1)


def test_labels_made_later_are_those_of_the_inferer(folder: Path) -> None:
    """A scan of which the network makes NaN fails alone, although that is found when the next one is on its way."""
    bad = hounsfield(SHAPE, seed=9).clip(max=200)
    bad[5, 4, 3] = 900
    write(folder / "b.nii.gz", bad)
    for name in "acd":
        write(folder / f"{name}.nii.gz", hounsfield(SHAPE, seed=ord(name)).clip(max=200))
    inferer = SlidingWindowLabels((8, 8, 8), organ="liver", label_names=NAMES)
    saved: dict[str, Any] = {}
    data = scans(folder)
    run = evaluator(data, lambda case: saved.update({case["name"]: case}), inferer)
    run.network = Bands()
    data.run(run)
    assert data.done == [f"in/{name}" for name in "acd"]
    assert list(data.failed) == [str(folder / "b.nii.gz")] and "the network's output" in str(data.failed)
    data.start()
    for item in data:
        if item["name"] != "b":
            batch = one_case([item])
            expected = inferer(batch["image"], Bands())[0]
            found = saved[item["name"]]
            assert torch.equal(found["pred"].as_tensor(), expected.as_tensor()) and len(expected.unique()) == 3
            np.testing.assert_array_equal(found["pred"].affine, expected.affine)
            assert torch.equal(found["organ_probability"], inferer.organ_probability)
