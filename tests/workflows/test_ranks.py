"""A folder of scans shared by several processes, as torchrun starts them: the results of one, each scan done once."""

from __future__ import annotations

import csv
import io
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import redirect_stdout
from pathlib import Path

import fire
import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser
from monai.bundle import run as run_bundle

from shared_networks.errors import input_error_in
from shared_networks.files import UNFINISHED
from shared_networks.synthetic.phantom import write_dataset
from tests.conftest import COARSE, ROOT

pytestmark = pytest.mark.slow

BUNDLE, PRETRAIN = ROOT / "hi_end_mae_btcv_seg", ROOT / "hi_end_mae_pretrain"
SCANS = 5


@pytest.fixture(scope="module")
def scans(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five scans, and one of which nothing can be read."""
    folder = tmp_path_factory.mktemp("scans")
    write_dataset(folder / "data", train=0, test=SCANS, seed=4, voxel_mm=6.0)
    files = sorted((folder / "data" / "imagesTs").iterdir())
    (files[0].parent / "test_broken_0000.nii.gz").write_bytes(b"no scan")
    return files[0].parent


def tiny_network(bundle: Path) -> torch.nn.Module:
    """A bundle's network with weights of seed 0."""
    parser = ConfigParser()
    parser.read_config([bundle / "configs" / f"{name}.json" for name in ("inference", "tiny")])
    parser["bundle_root"] = str(bundle)
    torch.manual_seed(0)
    network: torch.nn.Module = parser.get_parsed_content("network_def")
    return network


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    network = tiny_network(BUNDLE)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    file = tmp_path_factory.mktemp("weights") / "model.pt"
    torch.save(network.state_dict(), file)
    return file


def command(scans: Path, weights: Path, out: Path, processes: int = 1, configs: str = "inference") -> list[str]:
    names = [*configs.split(), *(["multi_gpu"] if processes > 1 else []), "tiny"]
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)] if processes > 1 else []
    files = repr([f"configs/{name}.json" for name in names])
    coarse = ["--spacing", str(COARSE)]
    options = ["--dataset_dir", scans, "--checkpoint", weights, "--output_dir", out, *coarse]
    words = [sys.executable, "-W", "ignore", *start, "-m", "monai.bundle", "run", "--config_file", files, *options]
    return [str(word) for word in words]


def run(words: list[str], status: int, bundle: Path = BUNDLE) -> str:
    if "torch.distributed.run" not in words:
        return run_here(words, status, bundle)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, cwd=bundle, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == status, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout + done.stderr


def run_here(words: list[str], status: int, bundle: Path) -> str:
    """Run the command of a single process in this one, which need not import all of MONAI again."""
    folder, shown = os.getcwd(), io.StringIO()
    os.chdir(bundle)
    try:
        with redirect_stdout(shown):
            fire.Fire(run_bundle, [*words[words.index("run") + 1 :], "--logging_file", "False"])
        found = 0
    except Exception as error:  # bundles run as a process end with 1
        found = 1
        shown.write(str(input_error_in(error) or error))
    finally:
        os.chdir(folder)
    assert found == status, shown.getvalue()
    return shown.getvalue()


@pytest.fixture(scope="module")
def alone(scans: Path, weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process makes of them."""
    out = tmp_path_factory.mktemp("alone")
    assert f"{SCANS} segmented, 0 there already, 1 failed" in run(command(scans, weights, out), 1)
    return out


def finished(out: Path) -> int:
    """Count the scans whose results are complete; a job that is killed may leave half a file beside them."""
    return len([file for file in out.glob("*_seg.json") if not file.name.startswith(UNFINISHED)])


def assert_same_results(out: Path, expected: Path) -> None:
    assert sorted(file.name for file in out.iterdir()) == sorted(file.name for file in expected.iterdir())
    for file in expected.glob("*_seg.nii.gz"):
        found = nib.load(out / file.name)
        np.testing.assert_array_equal(found.dataobj, nib.load(file).dataobj)
        np.testing.assert_array_equal(found.affine, nib.load(file).affine)
    for file in expected.glob("*.csv"):
        assert list(csv.reader((out / file.name).open())) == list(csv.reader(file.open()))


def test_three_processes_share_the_scans(scans: Path, weights: Path, alone: Path, tmp_path: Path) -> None:
    """With one report, and the bad scan as its only failure; a second time nothing is left to do."""
    shown = run(command(scans, weights, tmp_path, 3), 1)
    assert shown.count(" segmented, ") == 1
    assert f"{SCANS} segmented, 0 there already, 1 failed, 0 passed over" in shown
    assert shown.count("1 of 6 scan(s) not segmented:") == 1 and "test_broken_0000.nii.gz: " in shown
    assert_same_results(tmp_path, alone)
    (tmp_path / "statistics.csv").unlink()
    assert f"0 segmented, {SCANS} there already, 1 failed" in run(command(scans, weights, tmp_path, 3), 1)
    assert_same_results(tmp_path, alone)


@pytest.mark.parametrize(
    ("configs", "missing"),
    [("train", "multi_gpu_train"), ("train multi_gpu", "multi_gpu_train"), ("train evaluate", "multi_gpu")],
)
def test_processes_without_their_overlay_begin_nothing(
    configs: str, missing: str, scans: Path, weights: Path, tmp_path: Path
) -> None:
    words = command(scans.parent, weights, tmp_path / "out", 1, configs)
    words[3:3] = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    if "evaluate" not in configs:
        words[words.index("--checkpoint")] = "--pretrained_encoder"
    shown = run([*words, "--ckpt_dir", str(tmp_path / "models")], 1)
    assert "torchrun started 2 processes, which would each do all of the work" in shown
    assert f"add 'configs/{missing}.json' to --config_file" in shown
    assert list(tmp_path.iterdir()) == []


def test_killed_job_started_again_does_what_is_missing(scans: Path, weights: Path, alone: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    words = command(scans, weights, tmp_path, 2)
    job = subprocess.Popen(words, cwd=BUNDLE, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while not finished(tmp_path) and job.poll() is None:
            time.sleep(0.05)
    finally:
        job.send_signal(signal.SIGTERM)
        job.wait(60)
    before = finished(tmp_path)
    assert before >= 1
    shown = run(words, 1)
    assert f"{SCANS - before} segmented, {before} there already, 1 failed" in shown
    assert_same_results(tmp_path, alone)


def test_two_thousand_scans_with_a_break(weights: Path, tmp_path: Path) -> None:
    """Small ones, ten of which cannot be read; the job is stopped half way and started again."""
    data, out, count, bad = tmp_path / "data", tmp_path / "out", 2000, 10
    data.mkdir()
    for number in range(count):
        body = np.random.default_rng(number).choice(np.array([-1000, -100, 40, 300], np.int16), (10, 9, 8))
        nib.save(nib.Nifti1Image(body, np.diag([-6.0, 6, 8, 1])), data / f"s{number:04d}.nii.gz")
    for number in range(0, count, count // bad):
        (data / f"s{number:04d}.nii.gz").write_bytes(b"no scan")
    words = [*command(data, weights, out, 2), "--overlay", "False"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    job = subprocess.Popen(words, cwd=BUNDLE, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while finished(out) < count // 2 and job.poll() is None:
            time.sleep(0.5)
    finally:
        job.send_signal(signal.SIGTERM)
        job.wait(60)
    before = finished(out)
    shown = run(words, 1)
    assert f"{count - bad - before} segmented, {before} there already, {bad} failed" in shown
    cases = [row["case"] for row in csv.DictReader((out / "statistics.csv").open())]
    assert cases == sorted(cases) and len(set(cases)) == count - bad
    assert len(list(out.glob("*_seg.nii.gz"))) == count - bad


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of the pre-training network."""
    file = tmp_path_factory.mktemp("encoder") / "model.pt"
    torch.save(tiny_network(PRETRAIN).state_dict(), file)
    return file


@pytest.mark.parametrize(("configs", "done"), [("inference", "reconstructed"), ("inference features", "encoded")])
def test_processes_share_reconstructions_and_features(
    configs: str, done: str, scans: Path, encoder: Path, tmp_path: Path
) -> None:
    """The bad scan costs itself alone, and a second time nothing is left to do."""
    for processes in (1, 2):
        words = command(scans, encoder, tmp_path / str(processes), processes, configs)
        assert f"{SCANS} {done}, 0 there already, 1 failed" in run(words, 1, PRETRAIN)
        assert f"0 {done}, {SCANS} there already, 1 failed" in run(words, 1, PRETRAIN)
    one, two = (sorted((tmp_path / str(processes)).iterdir()) for processes in (1, 2))
    assert [file.name for file in one] == [file.name for file in two]
    assert len(one) == SCANS * (2 if "features" in configs else 4)
    for expected, found in zip(one, two, strict=True):
        if expected.suffix == ".npz":
            for name, values in np.load(expected).items():
                np.testing.assert_array_equal(np.load(found)[name], values)
        elif expected.suffix == ".gz":
            np.testing.assert_array_equal(nib.load(found).dataobj, nib.load(expected).dataobj)
    other = [*command(scans, encoder, tmp_path / "1", 1, configs), "--amp", "True"]
    assert f"{SCANS} {done}, 0 there already" in run(other, 1, PRETRAIN)  # of other settings


def test_processes_share_attention_maps(scans: Path, encoder: Path, tmp_path: Path) -> None:
    """Also where a process is left without a scan."""
    few = tmp_path / "few"
    shutil.copytree(scans, few, ignore=shutil.ignore_patterns("*_00[2-9]*"))
    names = []
    for processes in (1, 3):
        out = tmp_path / str(processes)
        words = [*command(few, encoder, out, processes, "inference attention"), "--voxel", "[9,9,9]"]
        assert "2 mapped, 0 there already, 1 failed" in run(words, 1, PRETRAIN)
        names.append(sorted(file.name for file in out.iterdir()))
    assert names[0] == names[1] and len([name for name in names[0] if name.endswith("_attention.png")]) == 2


def test_uncertainty_ranks_the_scans_of_all(scans: Path, weights: Path, tmp_path: Path) -> None:
    good = tmp_path / "good"
    shutil.copytree(scans, good, ignore=shutil.ignore_patterns("*broken*"))
    for processes in (1, 2):
        words = command(good, weights, tmp_path / str(processes), processes, "inference uncertainty")
        run([*words, "--samples", "2", "--overlap", "0.0"], 0)
    tables = [(tmp_path / str(processes) / "uncertainty.csv").read_text() for processes in (1, 2)]
    assert tables[0] == tables[1] and tables[0].count("\n") == SCANS + 1


@pytest.mark.parametrize(("processes", "left_out"), [(2, "none"), (3, "*_00[2-9]*")])
def test_evaluation_is_that_of_one_process_to_the_last_digit(
    processes: int, left_out: str, scans: Path, weights: Path, tmp_path: Path
) -> None:
    """Also where a process is left without a case."""
    data = tmp_path / "data"
    for part in ("imagesTs", "labelsTs"):
        shutil.copytree(scans.parent / part, data / part, ignore=shutil.ignore_patterns("*broken*", left_out))
    for number in (1, processes):
        run([*command(data, weights, tmp_path / str(number), number, "train evaluate"), "--overlap", "0.0"], 0)
    one, several = tmp_path / "1", tmp_path / str(processes)
    assert sorted(file.name for file in several.iterdir()) == sorted(file.name for file in one.iterdir())
    for name in ("dice.csv", "metrics.csv", "reliability.png"):
        assert (several / name).read_bytes() == (one / name).read_bytes()


@pytest.mark.parametrize(("processes", "left_out"), [(2, "none"), (3, "*_00[2-9]*")])
def test_masked_error_and_probes_are_those_of_one_process(
    processes: int, left_out: str, scans: Path, encoder: Path, tmp_path: Path
) -> None:
    data, probed = tmp_path / "data", tmp_path / "probed"
    shutil.copytree(scans, data, ignore=shutil.ignore_patterns("*broken*", left_out))
    for part in ("images", "labels"):
        shutil.copytree(scans.parent / f"{part}Ts", probed / f"{part}Tr", ignore=shutil.ignore_patterns("*broken*"))
    shutil.copy(scans.parent / "dataset.json", probed)
    metrics = []
    for number in (1, processes):
        out = tmp_path / str(number)
        words = [*command(data, encoder, out, number, "train evaluate"), "--probe_dir", str(probed)]
        run([*words, "--val_fraction", "0.99", "--num_workers", "0"], 0, PRETRAIN)
        metrics.append({name: float(value) for name, value in csv.reader((out / "metrics.csv").open())})
    assert {"val_masked_mse", "effective_rank", "probe_dice", "probe_dice_liver"} <= metrics[0].keys()
    assert metrics[1] == pytest.approx(metrics[0], rel=1e-6)  # float32 losses
