from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle import ConfigWorkflow
from monai.transforms import Compose

from shared_networks import files
from shared_networks.errors import InputError, input_error_in
from shared_networks.store import prepare as module
from shared_networks.store import runs
from shared_networks.store.format import centres_file, manifest_entries, read_manifest, read_volume
from shared_networks.store.runs import Queue, SharedManifest
from shared_networks.transforms.intensity import ScaleByModalityd
from tests.conftest import ROOT
from tests.datasets.test_scans import even, write_series

pytestmark = pytest.mark.integration

BUNDLE = ROOT / "hi_end_mae_pretrain"
SHAPE = (30, 20, 14)
ANISOTROPIC = np.array([[0, 0, -2.5, 20], [-1.2, 0, 0, 30], [0, 1.8, 0, -40], [0, 0, 0, 1.0]])  # ILP-like axes, not RAS


def body(seed: int, shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    """Noisy tissue in air, off the middle."""
    values = np.full(shape, -1000, np.int16)
    tissue = np.random.default_rng(seed).integers(-150, 400, shape).astype(np.int16)
    values[4:-3, 2:-5, 1:-2] = tissue[4:-3, 2:-5, 1:-2]
    return values


def save(file: Path, values: np.ndarray, affine: np.ndarray = ANISOTROPIC) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(values, affine), file)
    return file


@pytest.fixture
def data(tmp_path: Path) -> Path:
    for seed in range(3):
        save(tmp_path / "set" / "imagesTr" / f"c{seed}_0000.nii.gz", body(seed))
    return tmp_path / "set"


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "store"


def run(data: Path, out: Path, **settings: Any) -> None:
    """In this process, by the bundle's own config."""
    settings = {"num_workers": 0, "min_size": 8, **settings}
    flow = ConfigWorkflow(
        config_file=str(BUNDLE / "configs" / "prepare.json"),
        logging_file=False,
        workflow_type="train",
        properties_path=None,
        bundle_root=str(BUNDLE),
        dataset_dir=str(data),
        prepared_dir=str(out),
        **settings,
    )
    flow.parser.parse(reset=True)
    try:
        flow.parser.get_parsed_content("run")
    except RuntimeError as error:
        raise input_error_in(error) or error from error


def command(data: Path, out: Path, *words: str, **settings: Any) -> subprocess.Popen[str]:
    """As a user runs it."""
    config = f"--config_file configs/prepare.json --dataset_dir {data} --prepared_dir {out} --min_size 8"
    run = [sys.executable, "-W", "ignore", "-m", "monai.bundle", "run", *config.split(), *words]
    pipe = subprocess.PIPE
    return subprocess.Popen(run, cwd=BUNDLE, stdout=pipe, stderr=pipe, text=True, **settings)


def stored(out: Path) -> dict[str, bytes]:
    """Everything that matters in a store: files and entries, without what the clock says."""
    files = {str(path.relative_to(out)): path.read_bytes() for path in (out / "cases").rglob("*") if path.is_file()}
    entries = {case: {**entry, "state": ""} for case, entry in manifest_entries(out).items()}
    return {**files, "manifest": json.dumps(entries, sort_keys=True).encode()}


def times(out: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in (out / "cases").rglob("*.npy")}


def published_chain(**settings: Any) -> Compose:
    """What train.json does to a scan, up to the padding."""
    flow = ConfigWorkflow(
        config_file=str(BUNDLE / "configs" / "train.json"), logging_file=False, bundle_root=str(BUNDLE), **settings
    )
    flow.parser.parse(reset=True)
    *chain, pad = flow.parser.get_parsed_content("train#deterministic_transforms")
    assert type(pad).__name__ == "SpatialPadd"
    return Compose(chain)


def test_scans_are_prepared_as_training_prepares_them() -> None:
    train = json.loads((BUNDLE / "configs" / "train.json").read_text())
    prepare = json.loads((BUNDLE / "configs" / "prepare.json").read_text())
    chain = train["train"]["deterministic_transforms"]
    left_out = ("LoadImaged", "EnsureChannelFirstd", "SpatialPadd")
    assert prepare["preprocessing"]["transforms"] == [t for t in chain if t["_target_"] not in left_out]
    assert all(prepare[name] == train[name] for name in ("modality", "spacing", "intensity_range", "paths"))


def test_stored_voxels_are_those_of_the_chain_and_lie_where_they_did(data, out):
    run(data, out)
    for seed, item in enumerate(read_manifest(out)):
        entry = manifest_entries(out)[item["case"]]
        whole = published_chain()({"image": str(data / "imagesTr" / f"c{seed}_0000.nii.gz")})["image"]
        offset = np.linalg.solve(whole.affine.numpy(), np.array(entry["affine"])[:, 3])[:3]
        start = np.rint(offset).astype(int)
        np.testing.assert_allclose(offset, start, atol=1e-3)
        np.testing.assert_allclose(np.array(entry["affine"])[:3, :3], whole.affine[:3, :3], atol=1e-6)
        box = (slice(None), *(slice(s, s + n) for s, n in zip(start, item["shape"][1:], strict=True)))
        inside = whole[box].numpy()
        assert np.abs(read_volume(item["image"], item["shape"]) - inside).max() * 425 < 0.5  # HU; really 0.0033
        assert (whole > 0).sum() == (inside > 0).sum()
        assert all(np.any(inside > 0, axis=axes)[[0, -1]].all() for axes in ((0, 2, 3), (0, 1, 3), (0, 1, 2)))


def test_manifest_says_what_was_done(data, out):
    run(data, out)
    entry = manifest_entries(out)["set/imagesTr/c1"]
    values = body(1)
    assert entry["source"] == [str(data / "imagesTr" / "c1_0000.nii.gz")]
    assert entry["source_shape"] == [1, *SHAPE] and entry["source_spacing"] == [1.2, 1.8, 2.5]
    assert entry["source_axcodes"] == "PSL"
    assert entry["bytes"] == Path(entry["source"][0]).stat().st_size and len(entry["sha256"]) == 64
    intensity = entry["intensity"]
    assert (intensity["min"], intensity["max"]) == (-1000, values.max())
    assert intensity["mean"] == pytest.approx(values.mean(), abs=1e-3)
    assert intensity["p50"] == pytest.approx(np.percentile(values, 50), abs=1e-3)
    assert entry["settings"]["intensity_range"] == [-175, 250] and entry["versions"]["monai"]
    centres = np.load(centres_file(out / entry["file"]))
    volume = read_volume(out / entry["file"], entry["shape"])[0]
    assert centres.shape == (2, 4096, 3) and centres.dtype == np.int16
    foreground, background = (volume[tuple(kind.T)] > 0 for kind in centres.astype(int))
    assert foreground.mean() > 0.999 and background.mean() < 0.001  # a step of the store may round to 0
    assert entry["foreground"] == pytest.approx((volume > 0).mean(), abs=1e-3)


def test_background_falls_back_to_foreground():
    centres = module.draw_centres(np.ones((2, 3, 4), bool), np.random.RandomState(0), 50)
    assert centres.shape == (2, 50, 3)
    assert (centres.max((0, 1)) == [1, 2, 3]).all()


def test_second_run_does_only_what_is_missing_or_changed(data, out, capsys):
    run(data, out)
    before = times(out)
    assert "3 cases to prepare, 0 already done" in capsys.readouterr().out
    run(data, out)
    assert "0 cases to prepare, 3 already done" in capsys.readouterr().out
    assert times(out) == before

    listed = manifest_entries(out)["set/imagesTr/c0"]["state"]
    touched, changed = data / "imagesTr" / "c0_0000.nii.gz", data / "imagesTr" / "c1_0000.nii.gz"
    os.utime(touched, ns=(1, 1))
    save(changed, body(7))
    lost = out / "cases" / "set" / "imagesTr" / "c2.npy"
    lost.unlink()
    run(data, out)
    assert "3 cases to prepare, 0 already done" in capsys.readouterr().out
    redone = {path.name.split(".")[0] for path, when in times(out).items() if before[path] != when}
    assert redone == {"c1", "c2"}
    assert manifest_entries(out)["set/imagesTr/c0"]["state"] != listed
    run(data, out)
    assert "0 cases to prepare, 3 already done" in capsys.readouterr().out

    run(data, out, spacing=[2.0, 2.0, 2.0])
    assert "3 cases to prepare, 0 already done" in capsys.readouterr().out
    assert all(entry["spacing"] == [2.0] * 3 for entry in manifest_entries(out).values())


def test_a_moved_data_set_is_the_same_and_another_of_its_name_is_not(data, out, tmp_path, capsys):
    run(data, out)
    before = times(out)
    other = shutil.copytree(data, tmp_path / "other" / "set")
    save(other / "imagesTr" / "c0_0000.nii.gz", body(9))
    run(other, out, max_failed=0.5)
    assert "set/imagesTr/c0: the store has another scan under this id" in capsys.readouterr().out
    assert times(out) == before and len(manifest_entries(out)) == 3
    shutil.rmtree(data)
    run(other, out)
    assert {path.name for path, when in times(out).items() if before[path] != when} == {"c0.npy", "c0.centres.npy"}


def test_excluded_cases_stay_out_and_are_taken_out(data, out, tmp_path, capsys, caplog):
    run(data, out)
    names = tmp_path / "exclude.txt"
    names.write_text("# test cases\nC1_0000.nii.gz\nnobody\n")
    run(data, out, exclude=str(names))
    said = capsys.readouterr().out
    assert "0 cases to prepare, 2 already done, 1 excluded" in said
    assert "1 of the excluded cases removed from the store: set/imagesTr/c1\n" in said
    assert "nobody: to be excluded, but no case is named so" in caplog.text
    assert [item["case"] for item in read_manifest(out)] == ["set/imagesTr/c0", "set/imagesTr/c2"]
    assert not [path for path in (out / "cases").rglob("c1*")]
    flat = tmp_path / "flat"
    save(flat / "c1.nii", body(11))
    save(flat / "d.nii", body(12))
    run(flat, out, exclude=str(names))
    assert [item["case"] for item in read_manifest(out)] == ["flat/d", "set/imagesTr/c0", "set/imagesTr/c2"]
    names.write_text("flat\nimagesTr\n")
    with pytest.raises(InputError, match=r"exclude\.txt: leaves out all 2 cases"):
        run(flat, out, exclude=str(names))
    assert len(read_manifest(out)) == 3 and "removed from the store" not in capsys.readouterr().out


def test_the_same_scan_under_two_names_is_a_warning(data, out, caplog):
    shutil.copy(data / "imagesTr" / "c0_0000.nii.gz", data / "imagesTr" / "copy.nii.gz")
    run(data, out)
    assert "the same scan under several ids: set/imagesTr/c0, set/imagesTr/copy" in caplog.text


BAD: dict[str, Callable[[Path], object]] = {
    "cannot be read (EOFError": lambda f: f.write_bytes(f.read_bytes()[:-2000]),
    "is not 3D": lambda f: save(f, np.stack([body(0)] * 2, -1)),
    "all voxels are 0": lambda f: save(f, np.zeros(SHAPE, np.int16)),
    "values from 0 to 1000 are not HU": lambda f: save(f, np.abs(body(0))),
    "too small: (": lambda f: save(f, body(0), np.diag([0.1, 0.1, 0.1, 1.0])),
    "values are not HU: nothing lies above": lambda f: save(f, np.minimum(body(0), -300 - body(0) % 7)),
}


def test_bad_files_are_listed_good_ones_kept_and_the_exit_code_says_so(data, out, capsys):
    for number, spoil in enumerate(BAD.values()):
        spoil(save(data / "imagesTr" / f"x{number}_0000.nii.gz", np.random.default_rng(0).permutation(body(0))))
    done = command(data, out, "--num_workers", "0")
    stdout, stderr = done.communicate()
    assert done.returncode == 1
    assert "Traceback" not in stderr
    assert "error: 6 of 9 cases failed, more than the share of 0.05 that may (max_failed)" in stderr
    lines = (out / "failed.txt").read_text().splitlines()
    assert [line.split("\t")[0] for line in lines] == [f"set/imagesTr/x{number}" for number in range(6)]
    assert [line for reason, line in zip(BAD, lines, strict=True) if reason not in line] == []
    assert "6 failed:\nset/imagesTr/x0: cannot be read" in stdout
    assert "9 cases to prepare" in stdout and "of disk (free: " in stdout
    assert len(read_manifest(out)) == 3
    run(data, out, max_failed=0.7)
    assert "6 cases to prepare, 3 already done" in capsys.readouterr().out


def test_a_case_whose_source_went_bad_leaves_the_store(data, out, capsys):
    run(data, out)
    save(data / "imagesTr" / "c0_0000.nii.gz", np.zeros(SHAPE, np.int16))
    with pytest.raises(InputError, match="1 of 3 cases failed"):
        run(data, out)
    assert [item["case"] for item in read_manifest(out)] == ["set/imagesTr/c1", "set/imagesTr/c2"]
    assert "1 of them left the store, as their source or their files changed: set/imagesTr/c0\n" in (
        capsys.readouterr().out
    )


REFUSING = {
    "modality": ({"modality": "MR"}, lambda data: None),
    "min_size": ({"min_size": 48}, lambda data: None),
    "touched": ({"modality": "MR"}, lambda data: [os.utime(file, ns=(1, 1)) for file in data.rglob("*.nii.gz")]),
}


@pytest.mark.parametrize("why", REFUSING)
def test_cases_that_other_settings_refuse_stay_as_they_were_and_are_named(why, data, out, capsys):
    settings, change = REFUSING[why]
    run(data, out)
    before = stored(out)
    change(data)
    capsys.readouterr()
    with pytest.raises(InputError, match="3 of 3 cases failed"):
        run(data, out, **settings)
    assert stored(out) == before
    said = capsys.readouterr().out
    cases = "set/imagesTr/c0, set/imagesTr/c1, set/imagesTr/c2"
    assert f"3 of them stay in the store as they were: {cases}; --exclude FILE removes them\n" in said
    assert f"3 cases in {out}" in said and "left the store" not in said
    run(data, out)
    assert stored(out) == before


def test_a_case_that_cannot_be_read_now_stays_and_one_without_files_leaves(data, out, capsys, monkeypatch):
    run(data, out)
    for name in ("c0", "c1"):
        os.utime(data / "imagesTr" / f"{name}_0000.nii.gz", ns=(1, 1))
    (out / "cases" / "set" / "imagesTr" / "c1.npy").unlink()
    monkeypatch.setattr(module, "_sha256", raising(PermissionError(13, "Permission denied", "c.nii")))
    capsys.readouterr()
    run(data, out, max_failed=0.7)
    assert [item["case"] for item in read_manifest(out)] == ["set/imagesTr/c0", "set/imagesTr/c2"]
    said = capsys.readouterr().out
    assert "1 of them stay in the store as they were: set/imagesTr/c0;" in said
    assert "1 of them left the store, as their source or their files changed: set/imagesTr/c1" in said


def test_cases_prepared_with_other_settings_are_replaced_and_counted_and_named(data, out, capsys):
    run(data, out)
    assert "of them would replace" not in capsys.readouterr().out
    save(data / "imagesTr" / "new_0000.nii.gz", body(4))
    run(data, out, intensity_range=[-175, 1000], spacing=[3.0, 2.0, 2.5])
    assert (
        "3 of them would replace cases prepared with other settings (spacing [3.0, 2.0, 2.5], was [1.5, 1.5, 1.5]; "
        "intensity_range [-175.0, 1000.0], was [-175.0, 250.0]): set/imagesTr/c0, set/imagesTr/c1, set/imagesTr/c2\n"
    ) in capsys.readouterr().out
    assert len(read_manifest(out)) == 4


@pytest.mark.parametrize("how", ["parent killed", "Ctrl-C"])
def test_stopped_in_the_middle_and_run_again_is_the_same_store(tmp_path, out, how):
    data = tmp_path / "set"
    for seed in range(40):
        save(data / f"c{seed}.nii.gz", body(seed))
    out.mkdir()
    claim = SharedManifest(out).claim("set/c39")  # for which the run waits, so that it cannot end before it is stopped
    assert claim
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # else a background job passes on to ignore it
    process = command(data, out, "--num_workers", "1", start_new_session=True)
    signal.signal(signal.SIGINT, before)
    manifest = out / "manifest.jsonl"
    while not (manifest.exists() and len(manifest.read_bytes().splitlines()) >= 2):
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)
    process.kill() if how == "parent killed" else os.killpg(process.pid, signal.SIGINT)
    _, stderr = process.communicate(timeout=60)  # workers hold its pipes: they must end with it
    SharedManifest.give_back(claim)
    assert process.returncode != 0
    if how == "Ctrl-C":
        assert stderr.endswith("stopped; run again to go on from here\n") and "Traceback" not in stderr
        assert not list(out.rglob(".unfinished_*"))
    assert 2 <= len(manifest_entries(out)) < 40
    (out / "cases" / "set" / ".unfinished_c0.npy").write_bytes(b"half")
    (out / "cases" / "set" / "stray.npy").write_bytes(b"no entry")
    run(data, out)
    run(data, tmp_path / "whole")
    assert stored(out) == stored(tmp_path / "whole")


def test_files_replaced_by_a_run_that_was_stopped_have_no_entry(data, out, tmp_path, monkeypatch):
    """Of another window, whose sizes are the same."""
    run(data, out)
    monkeypatch.setattr(runs.SharedManifest, "append", raising(KeyboardInterrupt()))
    with pytest.raises(SystemExit, match="stopped; run again"):
        run(data, out, intensity_range=[-175, 1000])
    monkeypatch.undo()
    assert [*manifest_entries(out)] == ["set/imagesTr/c1", "set/imagesTr/c2"]
    run(data, out)
    run(data, tmp_path / "whole")
    assert stored(out) == stored(tmp_path / "whole")


def test_channels_that_change_places_are_prepared_again(tmp_path, out, capsys):
    first, second = (save(tmp_path / "set" / "imagesTr" / f"c0_000{k}.nii", body(k)) for k in range(2))
    run(tmp_path / "set", out)
    before = read_volume(out / "cases/set/imagesTr/c0.npy", manifest_entries(out)["set/imagesTr/c0"]["shape"])
    first.rename(tmp_path / "other")
    second.rename(first)
    (tmp_path / "other").rename(second)
    run(tmp_path / "set", out)
    assert "1 cases to prepare, 0 already done" in capsys.readouterr().out.partition("cases in")[2]
    after = read_volume(out / "cases/set/imagesTr/c0.npy", manifest_entries(out)["set/imagesTr/c0"]["shape"])
    np.testing.assert_array_equal(after, before[::-1])


def test_a_case_of_other_channels_than_most_stays_as_it_was_and_is_named(data, out, capsys):
    run(data, out)
    for name in ("c1", "c2"):
        save(data / "imagesTr" / f"{name}_0001.nii.gz", body(5))
    capsys.readouterr()
    run(data, out, max_failed=0.5)
    assert {case: entry["shape"][0] for case, entry in manifest_entries(out).items()} == {
        "set/imagesTr/c0": 1,
        "set/imagesTr/c1": 2,
        "set/imagesTr/c2": 2,
    }
    said = capsys.readouterr().out
    assert "set/imagesTr/c0: 1 channel(s), where most cases have 2" in said
    assert "1 of them stay in the store as they were: set/imagesTr/c0; --exclude FILE removes them" in said


def test_killed_worker_is_said(out, monkeypatch):
    monkeypatch.setattr(module, "_work", _die)
    task = module.Task(out, Compose([]), {}, 8, 0)
    out.mkdir()
    queue = Queue(SharedManifest(out), [module.Source(case, ()) for case in "ab"], lambda source, entry: False)
    with pytest.raises(InputError, match="a process was killed, mostly for want of memory, at one of a, b; run again"):
        list(module._results(task, queue, 1))


def _die(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def raising(error: BaseException) -> Callable[..., None]:
    def function(*_: Any) -> None:
        raise error

    return function


def test_files_appear_whole_or_not_at_all(data, out, monkeypatch):
    monkeypatch.setattr(runs, "append_entry", raising(KeyboardInterrupt()))
    with pytest.raises(SystemExit, match="stopped; run again"):
        run(data, out)
    assert manifest_entries(out) == {}  # though the files of a case are there
    monkeypatch.undo()
    shutil.rmtree(out)
    monkeypatch.setattr(files.os, "fsync", raising(OSError(28, "No space left on device")))
    with pytest.raises(
        InputError, match=r"npy: cannot be written \(No space left on device\); make room and run again"
    ):
        run(data, out)
    assert not list(out.rglob("*.npy"))


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (RuntimeError("odd\nscan"), "cannot be prepared (RuntimeError: odd scan)"),
        (MemoryError(), "not enough memory for it"),
        (PermissionError(13, "Permission denied", "a.nii"), "cannot be read or written ([Errno 13] Permission denied"),
    ],
)
def test_one_odd_scan_does_not_end_the_run(data, out, capsys, monkeypatch, error, reason):
    read = module.read_scan
    monkeypatch.setattr(module, "read_scan", lambda s, m: raising(error)() if s.case.endswith("c1") else read(s, m))
    run(data, out, max_failed=0.5)
    assert f"1 failed:\nset/imagesTr/c1: {reason}" in capsys.readouterr().out
    assert len(read_manifest(out)) == 2


def test_no_room_is_refused(data, out, monkeypatch):
    usage = shutil.disk_usage(data)._replace(free=1000)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(InputError, match=r"store: needs up to 0\.00 GB, but only 0\.00 GB are free; make room"):
        run(data, out)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"modality": "PET"}, "modality is 'PET'; pass --modality CT or --modality MR"),
        ({"prepared_dir": ""}, "prepared_dir is not set; pass --prepared_dir FOLDER"),
        ({"dataset_dir": ""}, "dataset_dir is not set; pass --dataset_dir FOLDER"),
        ({"exclude": "nowhere.txt"}, r"nowhere\.txt: not readable as a list of cases"),
    ],
)
def test_settings_that_make_no_sense(data, out, settings, message):
    arguments = {"dataset_dir": data, "prepared_dir": out, **settings}
    with pytest.raises(InputError, match=message):
        run(arguments.pop("dataset_dir"), arguments.pop("prepared_dir"), **arguments)


def test_mr_is_scaled_by_percentiles_channel_by_channel(tmp_path, out):
    tissue = (body(0) > -1000)[None]
    values = [np.where(tissue[0], 200 + np.abs(body(seed)), 3).astype(np.float32) * 10**seed for seed in range(2)]
    for channel, value in enumerate(values):
        save(tmp_path / "mr" / "imagesTr" / f"a_000{channel}.nii.gz", value, np.diag([1.5, 1.5, 1.5, 1.0]))
    run(tmp_path / "mr", out, modality="MR")
    [item] = read_manifest(out)
    entry = manifest_entries(out)[item["case"]]
    assert "intensity_range" not in entry["settings"]
    assert entry["foreground"] == pytest.approx(1, abs=0.2)  # of the box around the body
    stored = read_volume(item["image"], item["shape"])
    assert stored.shape[0] == 2 and stored[0].size < 0.8 * values[0].size
    expected = ScaleByModalityd("image", "MR", (0, 1))({"image": torch.from_numpy(np.stack(values))})["image"].numpy()
    start = np.rint(np.linalg.solve(np.diag([1.5, 1.5, 1.5, 1.0]), np.array(entry["affine"])[:, 3])[:3]).astype(int)
    box = tuple(slice(first, first + size) for first, size in zip(start, item["shape"][1:], strict=True))
    np.testing.assert_allclose(stored, expected[(slice(None), *box)], atol=1e-4)


def test_dicom_series_is_prepared_as_its_nifti(tmp_path, out):
    pytest.importorskip("SimpleITK")
    values = even(body(0))
    affine = np.diag([-1, -1, 1, 1]) @ write_series(tmp_path / "dicom" / "p1", values)
    save(tmp_path / "nifti" / "p1.nii.gz", values, affine)
    run(tmp_path / "dicom", out)
    run(tmp_path / "nifti", out)
    dicom, nifti = read_manifest(out)
    assert (dicom["case"], nifti["case"]) == ("dicom/p1", "nifti/p1")
    volumes = [read_volume(item["image"], item["shape"]) for item in (dicom, nifti)]
    np.testing.assert_allclose(*volumes, rtol=0, atol=1.1 / 65535)  # a step: the affines differ in their last digits
    entries = manifest_entries(out)
    np.testing.assert_allclose(entries["dicom/p1"]["affine"], entries["nifti/p1"]["affine"], atol=1e-4)
    assert entries["dicom/p1"]["files"] == SHAPE[2]


def test_training_reads_the_store(data, out):
    run(data, out)
    files = [str(BUNDLE / "configs" / name) for name in ("train.json", "prepared.json")]
    settings = {"img_size": [24, 24, 24], "num_samples": 2, "batch_size": 1, "num_workers": 0, "val_fraction": 0.3}
    flow = ConfigWorkflow(
        config_file=files, logging_file=False, bundle_root=str(BUNDLE), prepared_dir=str(out), **settings
    )
    flow.parser.parse(reset=True)
    crops = flow.parser.get_parsed_content("train#preprocessing")(read_manifest(out)[0])
    assert [tuple(crop["image"].shape) for crop in crops] == [(1, 24, 24, 24)] * 2
    central = flow.parser.get_parsed_content("validate#dataset")[0]
    assert central["image"].shape == (1, 24, 24, 24)
    assert len(flow.parser.get_parsed_content("train#dataset")) == 2
    flow.parser["spacing"] = [4.0, 4.0, 4.0]
    flow.parser.parse(reset=True)
    with pytest.raises(RuntimeError) as caught:
        flow.parser.get_parsed_content("initialize")
    assert "was prepared with spacing" in str(input_error_in(caught.value))
