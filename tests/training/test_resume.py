"""Never losing work: real runs of the pre-training bundle, killed and stopped, and the writing of states."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from ignite.engine import Events
from ignite.metrics import Loss
from monai.data import DataLoader, Dataset
from monai.engines import SupervisedEvaluator, SupervisedTrainer
from monai.handlers import LrScheduleHandler, ValidationHandler, from_engine
from monai.optimizers import WarmupCosineSchedule
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal.distributed.fake_pg import FakeStore

from shared_networks.datasets.record import TrainingRecord, read_record, save_tensors, training_record, write_model
from shared_networks.datasets.splits import Split
from shared_networks.errors import InputError, input_error_in
from shared_networks.files import GO_ON, atomic_write
from shared_networks.training import host_copy
from shared_networks.training.ema import EMA
from shared_networks.training.handlers import StopOnNonFinite
from shared_networks.training.host_copy import HostCopy
from shared_networks.training.muon import Muon
from shared_networks.training.resume import SaveBestModel, TrainingRun
from shared_networks.training.run_folder import check_run_folder
from shared_networks.training.sampler import SeededSampler
from tests.conftest import ROOT, full_disk

PRETRAIN = ROOT / "hi_end_mae_pretrain"
SMALL = "--epochs 4 --warmup_epochs 1 --val_interval 2 --num_samples 2 --batch_size 1 --val_fraction 0.3"


def command(data: Path, out: Path, *more: str) -> list[str]:
    files = "['configs/train.json','configs/tiny.json']"
    words = [sys.executable, "-W", "ignore", "-m", "monai.bundle", "run", "--config_file", files, *SMALL.split()]
    return [*words, "--dataset_dir", str(data), "--ckpt_dir", str(out), "--output_dir", str(out), *more]


def environment(before: Path | None) -> dict[str, str]:
    """Return that of a process that finds a folder's modules before all others."""
    path = os.pathsep.join(str(folder) for folder in (before, os.getenv("PYTHONPATH")) if folder)
    return os.environ | {"PYTHONPATH": path}


def train(data: Path, out: Path, *more: str, code: int = 0, before: Path | None = None) -> str:
    """Run a training to its exit code, with a folder of modules that are found before all others."""
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    done = subprocess.run(command(data, out, *more), cwd=PRETRAIN, env=environment(before), **pipes)
    assert done.returncode == code, done.stdout[-5000:]
    return done.stdout


def signal_at(folder: Path, state: str, how: str, whom: str = "os.getpid()") -> Path:
    """Write a module that lets a training get a signal while a state is half written, whatever the machine's load.

    Args:
        folder: of the module; to be found before all others. It will have the file `pid`, of the process that saves.
        state: in the file's name.
        how: the signal's name.
        whom: number of the process that gets it, as Python of that process.
    """
    folder.mkdir()
    lines = f"""
        import io, os, pathlib, signal, torch

        def save(content, stream, *rest, save_whole=torch.save, **more):
            save_whole(content, file := io.BytesIO(), *rest, **more)
            half = len(file.getvalue()) // 2
            stream.write(file.getvalue()[:half])
            stream.flush()
            if {state!r} in str(stream.name):
                pathlib.Path(__file__).with_name("pid").write_text(str(os.getpid()))
                os.kill({whom}, signal.{how})
            stream.write(file.getvalue()[half:])

        torch.save = save
    """
    (folder / "sitecustomize.py").write_text(textwrap.dedent(lines))  # Python imports it before anything else
    return folder


def loss_curve(out: Path) -> dict[int, float]:
    """Loss by iteration, as TensorBoard would show it; the resumed run's where it repeats one."""
    events = EventAccumulator(str(out))
    events.Reload()
    return {scalar.step: scalar.value for scalar in events.Scalars("masked_mse")}


@pytest.fixture(scope="module")
def uninterrupted(datasets: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("uninterrupted")
    train(datasets["btcv"], out)
    return out


def assert_same_run(out: Path, uninterrupted: Path) -> None:
    curve = loss_curve(uninterrupted)
    assert list(curve) == list(range(1, 9)) and len(set(curve.values())) == 8
    assert loss_curve(out) == curve  # exactly
    whole, resumed = (torch.load(folder / "model.pt", weights_only=True) for folder in (uninterrupted, out))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.mark.integration
def test_a_run_killed_in_the_middle_of_a_save_resumes_exactly(
    datasets: dict[str, Path], uninterrupted: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    states, half = out / "state", signal_at(tmp_path / "before", "state_000000003", "SIGKILL")
    train(datasets["btcv"], out, "--training_run#every_minutes", "0", code=-signal.SIGKILL, before=half)
    assert [file.name for file in states.glob(".*")] == [".unfinished_state_000000003.ckpt"]
    output = train(datasets["btcv"], out, "--resume")
    assert f"resuming from {states}/state_000000002.ckpt: iteration 2 of 8" in output
    assert_same_run(out, uninterrupted)
    assert sorted(file.name for file in states.iterdir()) == ["state_000000004.ckpt", "state_000000008.ckpt"]

    before = (out / "model.pt").stat().st_mtime_ns
    output = train(datasets["btcv"], out, "--resume")
    assert f"finished: {states}/state_000000008.ckpt is at epoch 4 of 4; --epochs N trains on" in output
    assert (out / "model.pt").stat().st_mtime_ns == before


@pytest.mark.integration
def test_sigterm_saves_and_exits_as_stopped(datasets: dict[str, Path], uninterrupted: Path, tmp_path: Path) -> None:
    out, early = tmp_path / "out", signal_at(tmp_path / "before", "state_000000001", "SIGTERM")
    shown = train(datasets["btcv"], out, "--training_run#every_minutes", "0", code=143, before=early)
    assert "stopped by signal 15 at epoch" in shown
    assert "resuming from" in train(datasets["btcv"], out, "--resume")
    assert_same_run(out, uninterrupted)


# What follows runs in process, on a network of one number.


class Line(nn.Linear):
    """A network that counts nothing but its steps."""

    def __init__(self) -> None:
        super().__init__(1, 1)


def training(
    folder: Path, epochs: int = 2, cases: int = 6, batch: int = 2, seed: int = 0, val: int = 1, **kwargs: Any
) -> TrainingRun:
    torch.manual_seed(0)
    network = Line()
    record = kwargs.pop("record", None) or a_record()
    data = Dataset([{"image": torch.tensor([float(i)]), "label": torch.ones(1)} for i in range(cases)])
    sampler = SeededSampler(data, num_replicas=1, rank=0, seed=seed)
    loader = DataLoader(Indexed(data), sampler=sampler, batch_size=batch)
    optimizer = kwargs.pop("optimizer", torch.optim.AdamW)(network.parameters(), lr=0.1)
    schedule = WarmupCosineSchedule(optimizer, warmup_steps=1, t_total=epochs * len(loader))
    evaluator = SupervisedEvaluator(
        device=torch.device("cpu"),
        val_data_loader=DataLoader(data, batch_size=cases),
        network=network,
        key_val_metric={"error": Loss(nn.MSELoss(), output_transform=from_engine(["pred", "label"]))},
        metric_cmp_fn=lambda current, best: current < best,
        val_handlers=[SaveBestModel(network, folder, record)],
        decollate=False,
    )
    trainer = SupervisedTrainer(
        device=torch.device("cpu"),
        max_epochs=epochs,
        train_data_loader=loader,
        network=kwargs.pop("wrap")(network) if "wrap" in kwargs else network,
        optimizer=optimizer,
        loss_function=nn.MSELoss(),
        train_handlers=[
            *kwargs.pop("handlers", ()),
            LrScheduleHandler(schedule, print_lr=False, epoch_level=False),
            ValidationHandler(interval=val, validator=evaluator, epoch_level=True),
        ],
        decollate=False,
        accumulation_steps=kwargs.pop("accumulation_steps", 1),
    )
    return TrainingRun(folder, network, optimizer, schedule, trainer, evaluator, record, seed=seed, **kwargs)


def test_several_processes_train_one_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a group, or with one and networks outside of it, each would train a network of its own."""
    refused = "torchrun started 2 processes.* add 'configs/multi_gpu_train.json'"
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match=refused):
        training(tmp_path).run()
    monkeypatch.delenv("WORLD_SIZE")
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        with pytest.raises(InputError, match=refused):
            training(tmp_path).run()
        monkeypatch.setattr(torch.distributed, "new_group", lambda backend: None)  # the fake one has no gloo
        training(tmp_path, wrap=DistributedDataParallel).start()
    finally:
        torch.distributed.destroy_process_group()


def a_record(
    labels: Sequence[str] = ("background", "liver"),
    train: str = "abcd",
    validation: str = "e",
    test: str = "f",
    dataset: str = "/data/ours",
    spacing: Sequence[float] = (2.0, 2.0, 5.0),
    start_weights: Sequence[Path] = (),
    in_place: Path | None = None,
    num_heads: int = 6,
    **split: Any,
) -> TrainingRecord:
    """A record of cases named by letters, whose scans are not on disk; in place, they are handed over for a folder."""
    parts = {"train": train, "validation": validation, "test": test}
    cases = {
        part: [{"image": f"{n}_0000.nii.gz", "label": f"{n}.nii.gz"} for n in names] for part, names in parts.items()
    }
    settings = {"seed": 0, "fold": None, "num_folds": 5, "num_train_cases": None, **split}
    made = Split(cases, settings)
    return training_record(
        dataset,
        made,
        {"spacing": spacing},
        train=list(made["train"]) if in_place else None,
        label_names=labels,
        start_weights=start_weights,
        ckpt_dir=in_place,
        network={"num_heads": num_heads},
    )


class Indexed:
    """Takes draws in place of indices."""

    def __init__(self, data: Dataset) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, draw: Any) -> Any:
        return self.data[draw.case]


def averaged(folder: Path, **kwargs: Any) -> TrainingRun:
    state = training(folder, **kwargs)
    average = EMA(state.network, 0.5, state.trainer, state.evaluator)
    state.ema = average
    return state


def run(state: TrainingRun) -> TrainingRun:
    state.run()
    return state


def spoil(state: TrainingRun, place: int) -> None:
    """One of the cases is NaN; the others are finite."""
    cases: Any = state.trainer.data_loader.dataset.data.data
    for number, case in enumerate(cases):
        case["case"] = f"case{number}"
    cases[place]["image"] = torch.tensor([math.nan])


def third_batch() -> tuple[int, int]:
    """A case of the third of four batches of the first epoch, and one of the fourth."""
    sampler = SeededSampler(range(8), num_replicas=1, rank=0, seed=0)
    sampler.set_epoch(1)
    order = [draw.case for draw in sampler]
    return order[5], order[6]


class Late(HostCopy):
    """A copy that has never arrived, as from the slowest GPU: its value comes only to who waits."""

    def arrived(self) -> bool:
        return False


@pytest.mark.parametrize("copy", [HostCopy, Late])
@pytest.mark.parametrize("accumulation_steps", [1, 2])
@pytest.mark.parametrize("every_minutes", [0.0, 15.0])
def test_weights_of_a_loss_that_is_no_number_reach_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, copy: type, accumulation_steps: int, every_minutes: float
) -> None:
    monkeypatch.setattr(host_copy, "HostCopy", copy)
    bad, other = third_batch()
    state = training(
        tmp_path,
        cases=8,
        keep=9,
        every_minutes=every_minutes,
        accumulation_steps=accumulation_steps,
        handlers=[StopOnNonFinite()],
    )
    spoil(state, bad)
    with pytest.raises(InputError) as caught:
        state.run()
    error = str(input_error_in(caught.value))
    assert "the loss is nan in iteration 3 (epoch 1)" in error
    assert f"case{bad}" in error and f"case{other}" not in error
    files = list((tmp_path / "state").glob("*")) if (tmp_path / "state").exists() else []
    assert {file.name for file in files} <= {"state_000000001.ckpt", "state_000000002.ckpt"}
    for file in files:
        assert all(t.isfinite().all() for t in torch.load(file, weights_only=True)["network"].values())
    assert (len(files) > 0) == (every_minutes == 0)
    assert not (tmp_path / "model.pt").exists()


def test_a_stop_by_signal_saves_nothing_of_a_loss_that_is_no_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host_copy, "HostCopy", Late)
    state = training(tmp_path, cases=8, handlers=[StopOnNonFinite()])
    spoil(state, third_batch()[0])
    stop_after(state, 3)
    with pytest.raises(InputError, match="in iteration 3"):
        state.run()
    assert not list(tmp_path.rglob("*.*"))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_weights_that_are_no_numbers_are_not_written(tmp_path: Path, bad: float) -> None:
    state = training(tmp_path)
    state.start()
    with torch.no_grad():
        state.network.weight.fill_(bad)
    with pytest.raises(InputError, match=r"state_000000000.ckpt: not written, as 1 of 2 tensors hold NaN or infinity"):
        state.save()
    with pytest.raises(InputError, match=r"model.pt: not written, .* the first weight; lower --learning_rate"):
        state.evaluator.run(1)
    state.trainer.state.iteration = 6
    state.evaluator.state.best_metric_epoch = -1
    with pytest.raises(InputError, match=r"model.pt: not written"):
        state.finish()
    assert not list(tmp_path.rglob("*.*"))


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in (folder / "state").iterdir())


def stop_after(state: TrainingRun, iteration: int) -> None:
    """SIGTERM arrives during an iteration."""
    event = Events.ITERATION_STARTED(once=iteration)
    state.trainer.add_event_handler(event, lambda: os.kill(os.getpid(), signal.SIGTERM))


def run_until(state: TrainingRun, iteration: int) -> None:
    stop_after(state, iteration)
    with pytest.raises(SystemExit) as end:
        state.run()
    assert end.value.code == 143


def test_states_are_rotated(tmp_path: Path) -> None:
    run(training(tmp_path, epochs=5))
    assert names(tmp_path) == ["state_000000012.ckpt", "state_000000015.ckpt"]


def test_states_are_written_by_epoch_and_by_time(tmp_path: Path) -> None:
    run(training(tmp_path / "epoch", epochs=5, every_epochs=2, keep=9))
    assert names(tmp_path / "epoch") == [f"state_{i:09d}.ckpt" for i in (6, 12, 15)]  # and the last
    run(training(tmp_path / "time", epochs=2, every_minutes=0.0, keep=9))
    assert names(tmp_path / "time") == [f"state_{i:09d}.ckpt" for i in range(1, 7)]


def test_a_state_holds_all_that_training_needs(tmp_path: Path) -> None:
    state = run(training(tmp_path))
    assert read_record(tmp_path / "model.pt")["score"] == {  # type: ignore[index]
        "name": "error",
        "value": state.evaluator.state.best_metric,
        "epoch": state.evaluator.state.best_metric_epoch,
    }
    content = torch.load(tmp_path / "state" / "state_000000006.ckpt", weights_only=True)
    assert (content["iteration"], content["epoch"], content["epoch_length"], content["schedule"]) == (6, 2, 3, 6)
    assert content["best_metric"] == state.evaluator.state.best_metric and content["best_metric_epoch"] in (1, 2)
    torch.testing.assert_close(content["network"]["weight"], state.network.state_dict()["weight"])
    assert content["optimizer"]["state"][0]["step"] == 6
    assert content["seed"] == 0 and content["scaler"] is None and content["validated_epoch"] == 2


@pytest.mark.parametrize("at", [1, 2, 3, 4, 5, 6])
def test_stopping_anywhere_changes_nothing(tmp_path: Path, at: int) -> None:
    whole = run(training(tmp_path / "whole"))
    stopped = training(tmp_path / "parts")
    run_until(stopped, at)
    assert stopped.trainer.state.iteration == at
    resumed = run(training(tmp_path / "parts", resume=True))
    for key in ("weight", "bias"):
        assert torch.equal(whole.network.state_dict()[key], resumed.network.state_dict()[key])
    assert whole.evaluator.state.best_metric == resumed.evaluator.state.best_metric
    assert whole.evaluator.state.best_metric_epoch == resumed.evaluator.state.best_metric_epoch
    assert whole.optimizer.state_dict()["param_groups"] == resumed.optimizer.state_dict()["param_groups"]


@pytest.mark.parametrize("stopped", [False, True])
def test_sigterm_is_the_programs_again_after_training(tmp_path: Path, stopped: bool) -> None:
    before = signal.getsignal(signal.SIGTERM)
    state = training(tmp_path)
    if stopped:
        run_until(state, 2)
    else:
        run(state)
    assert signal.getsignal(signal.SIGTERM) == before


def test_half_accumulated_gradients_are_not_saved(tmp_path: Path) -> None:
    state = training(tmp_path, epochs=1, cases=12, accumulation_steps=4)  # 6 iterations, steps after 4 and 6
    run_until(state, 2)
    assert state.trainer.state.iteration == 4


def test_the_last_epoch_is_validated_though_not_due(tmp_path: Path) -> None:
    state = training(tmp_path, epochs=3, val=2)
    run(state)
    assert state.validated_epoch == 3
    assert not state.unvalidated and not state.unfinished


def test_more_epochs_train_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(training(tmp_path, epochs=2))
    longer = run(training(tmp_path, epochs=3, resume=True))
    assert longer.trainer.state.iteration == 9
    assert longer.lr_scheduler.t_total == 9  # type: ignore[attr-defined]
    assert "resuming from" in capsys.readouterr().out


def test_more_epochs_and_another_epoch_length_begin_at_the_rate_of_their_schedule(tmp_path: Path) -> None:
    run(training(tmp_path / "a", epochs=2))
    longer = training(tmp_path / "a", epochs=4, resume=True)
    rates: list[float] = []
    longer.trainer.add_event_handler(
        Events.ITERATION_STARTED, lambda engine: rates.append(engine.optimizer.param_groups[0]["lr"])
    )
    run(longer)
    whole = WarmupCosineSchedule(torch.optim.AdamW([nn.Parameter(torch.ones(1))], lr=0.1), 1, t_total=12)
    expected = [0.1 * whole.lr_lambda(step) for step in range(6, 12)]
    assert rates == expected and rates[0] > 0.05

    state = training(tmp_path / "b", epochs=4)
    run_until(state, 5)
    other = training(tmp_path / "b", epochs=4, batch=3, resume=True)
    other.start()
    assert other.optimizer.param_groups[0]["lr"] == 0.1 * other.lr_scheduler.lr_lambda(2)  # type: ignore[attr-defined]


def test_another_number_of_processes_goes_on_from_the_start_of_the_epoch(tmp_path: Path) -> None:
    state = training(tmp_path, epochs=4)
    run_until(state, 5)  # the second of three iterations of epoch 2
    other = training(tmp_path, epochs=4, batch=3, resume=True)  # as if there were more: 2 iterations an epoch
    other.start()
    assert other.trainer.state.iteration == 2 and other.lr_scheduler.last_epoch == 2
    other.trainer.run()
    assert other.trainer.state.iteration == 8


def test_after_a_larger_batch_the_state_of_fewer_iterations_is_the_newest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(training(tmp_path, epochs=2))
    assert names(tmp_path) == ["state_000000003.ckpt", "state_000000006.ckpt"]
    resumed = run(training(tmp_path, epochs=3, batch=6, resume=True))  # an iteration an epoch
    assert names(tmp_path) == ["state_000000003.ckpt"]
    again = run(training(tmp_path, epochs=3, batch=6, resume=True))
    assert f"finished: {tmp_path}/state/state_000000003.ckpt is at epoch 3 of 3" in capsys.readouterr().out
    assert torch.equal(again.network.state_dict()["weight"], resumed.network.state_dict()["weight"])
    assert again.evaluator.state.best_metric == resumed.evaluator.state.best_metric


def test_a_folder_with_a_training_is_refused(tmp_path: Path) -> None:
    run(training(tmp_path))
    held = {file: file.read_bytes() for file in tmp_path.rglob("*.*")}
    with pytest.raises(InputError) as caught:
        training(tmp_path).start()
    assert str(caught.value) == (
        f"{tmp_path}: holds a trained model; give --resume True to go on with it, --overwrite True to remove it and "
        "start anew, or another --ckpt_dir"
    )
    assert {file: file.read_bytes() for file in tmp_path.rglob("*.*")} == held


def test_a_folder_with_states_alone_is_refused(tmp_path: Path) -> None:
    run(training(tmp_path))
    (tmp_path / "model.pt").unlink()
    with pytest.raises(InputError, match="holds an unfinished training; give --resume True to go on with it"):
        check_run_folder(tmp_path, a_record())


def test_a_training_without_a_case_is_refused(tmp_path: Path) -> None:
    """As of a list that names validation cases alone, which can be evaluated."""
    with pytest.raises(InputError, match=r"^ours: no case to train on, 2 validate; list cases .* under 'training'"):
        check_run_folder(tmp_path, a_record(train="", validation="ab"))


def test_a_model_without_states_is_the_one_to_beat_of_its_training(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    good = {"weight": torch.zeros(1, 1), "bias": torch.ones(1)}  # nothing can be better
    write_model(good, tmp_path / "model.pt", a_record(train="abcx"))
    state = run(training(tmp_path, resume=True))
    assert state.trainer.state.iteration == 6 and names(tmp_path)
    assert "model.pt has no state beside it: training starts anew" in caplog.text
    assert torch.load(tmp_path / "model.pt", weights_only=True) == good
    record = read_record(tmp_path / "model.pt")
    assert record is not None and set(record["seen_before"]["train"]) == set("abcx")


def test_a_model_without_states_of_another_training_cannot_be_resumed(tmp_path: Path) -> None:
    write_model({}, tmp_path / "model.pt", a_record(spacing=(1.0, 1.0, 1.0)))
    with pytest.raises(InputError, match=r"model\.pt: trained on scans prepared otherwise: .* or another --ckpt_dir"):
        check_run_folder(tmp_path, a_record(), resume=True)
    (tmp_path / "model.json").unlink()
    with pytest.raises(InputError, match=r"without record and no state .*; give --overwrite True in place of --resume"):
        check_run_folder(tmp_path, a_record(), resume=True)


def test_the_start_of_a_training_that_can_be_resumed_is_checked_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("e_0000.nii.gz").write_bytes(b"a scan")
    write_model({}, tmp_path / "start.pt", a_record(train="e"))
    for resume in (False, True):
        with pytest.raises(InputError, match=r"e \(1 in all\) trained and would now choose the model"):
            check_run_folder(tmp_path / "run", a_record(start_weights=[tmp_path / "start.pt"]), resume=resume)


@pytest.mark.parametrize("settings", [{}, {"overwrite": True}, {"in_place": True}], ids=str)
def test_a_folder_whose_record_is_of_other_weights_is_refused(tmp_path: Path, settings: dict[str, bool]) -> None:
    """Starting anew would remove the record, and the first model replace it."""
    pytest.importorskip("safetensors")
    write_model({"weight": torch.ones(1)}, tmp_path / "model.safetensors", a_record())
    record = a_record(in_place=tmp_path) if settings.pop("in_place", False) else a_record()
    with pytest.raises(InputError, match=r"model\.pt: its record would replace .*, the record of .*\.safetensors; "):
        check_run_folder(tmp_path, record, **settings)


def test_resume_and_overwrite_contradict_each_other(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="resume and overwrite are both set"):
        check_run_folder(tmp_path, a_record(), resume=True, overwrite=True)


def test_overwriting_removes_the_earlier_training_and_starts_anew(tmp_path: Path) -> None:
    good = {"weight": torch.zeros(1, 1), "bias": torch.ones(1)}  # nothing can be better
    run(training(tmp_path, epochs=5))
    write_model(good, tmp_path / "model.pt", a_record(fold=0))
    state = training(tmp_path, record=a_record(fold=1), overwrite=True)
    state.start()
    assert not names(tmp_path) and not list(tmp_path.glob("model.*"))
    state.trainer.run()
    record = read_record(tmp_path / "model.pt")
    assert record is not None and record["split"]["fold"] == 1
    assert names(tmp_path) == ["state_000000003.ckpt", "state_000000006.ckpt"]


def test_resuming_where_nothing_is_starts_anew(tmp_path: Path) -> None:
    assert run(training(tmp_path, resume=True)).trainer.state.iteration == 6


def test_a_damaged_state_falls_back_on_the_one_before(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run(training(tmp_path, epochs=2))
    (tmp_path / "state" / "state_000000006.ckpt").write_bytes(b"half")
    state = training(tmp_path, epochs=2, resume=True)
    state.start()
    assert state.trainer.state.iteration == 3
    assert "state_000000006.ckpt: cannot be read" in caplog.text
    (tmp_path / "state" / "state_000000003.ckpt").write_bytes(b"")
    with pytest.raises(InputError, match="none of its states can be read"):
        training(tmp_path, resume=True).start()


def test_states_of_another_seed_or_network_are_refused(tmp_path: Path) -> None:
    run(training(tmp_path))
    with pytest.raises(InputError, match=r"its seed is 0, not 5; pass --seed 0"):
        training(tmp_path, seed=5, resume=True).start()
    other = training(tmp_path, resume=True)
    other.network = nn.Linear(2, 1)
    with pytest.raises(InputError, match=r"is of another network \(1 tensors differ, the first weight\)"):
        other.start()


def test_the_best_model_is_kept_across_a_resume(tmp_path: Path) -> None:
    state = training(tmp_path)
    run(state)
    (tmp_path / "model.pt").write_bytes(b"the best so far")
    longer = training(tmp_path, epochs=3, resume=True)
    longer.start()
    longer.evaluator.state.best_metric = -1.0  # nothing can be better
    longer.trainer.run()
    assert (tmp_path / "model.pt").read_bytes() == b"the best so far"


def test_in_place_a_better_model_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = {"weight": torch.zeros(1, 1), "bias": torch.ones(1)}  # answers 1, which is the target
    write_model(good, tmp_path / "model.pt", a_record())
    run(training(tmp_path, record=a_record(in_place=tmp_path)))
    assert "model.pt has error 0.0000; only a better model replaces it" in capsys.readouterr().out
    assert torch.load(tmp_path / "model.pt", weights_only=True) == good
    run(training(tmp_path, record=a_record(in_place=tmp_path)))  # the states of the run before are in nobody's way

    worse = {"weight": torch.zeros(1, 1), "bias": torch.tensor([99.0])}
    write_model(worse, tmp_path / "model.pt", a_record(train="xyz"))
    state = run(training(tmp_path, record=a_record(in_place=tmp_path)))
    assert torch.load(tmp_path / "model.pt", weights_only=True)["bias"] < 90
    assert (state.evaluator.state.best_metric_epoch) in (1, 2)
    record = read_record(tmp_path / "model.pt")
    assert record is not None and set(record["train"]) == set("abcd")
    assert set(record["seen_before"]["train"]) == set("xyz")


def test_in_place_a_model_of_another_network_is_refused(tmp_path: Path) -> None:
    write_model({"other": torch.zeros(2)}, tmp_path / "model.pt", a_record())
    with pytest.raises(InputError, match=r"model\.pt: is of another network \(3 tensors differ, the first bias\)"):
        training(tmp_path, record=a_record(in_place=tmp_path)).start()


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"labels": ("background", "spleen")}, r"label_names was \['background', 'spleen'\]"),
        ({"spacing": (1.0, 1.0, 1.0)}, r"spacing was \[1.0, 1.0, 1.0\] and is \[2.0, 2.0, 5.0\]"),
    ],
)
def test_in_place_a_model_of_other_labels_or_preparation_is_refused(
    tmp_path: Path, other: dict[str, Any], said: str
) -> None:
    write_model({}, tmp_path / "model.pt", a_record(**other))
    with pytest.raises(InputError, match=f"trained otherwise than it would be now: {said}"):
        check_run_folder(tmp_path, a_record(in_place=tmp_path))


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (
            {"labels": ("background", "spleen")},
            "trained on other labels, background, liver; here they are background, s",
        ),
        ({"spacing": (1.0, 1.0, 1.0)}, r"spacing was \[2.0, 2.0, 5.0\] and is .*Pass --spacing \[2.0,2.0,5.0\]"),
        ({"num_heads": 3}, "num_heads was 6 and is 3. Pass --network_def#num_heads 6, or another --ckpt_dir"),
        ({"fold": 1}, "trained with another split: fold was None and is 1"),
        ({"num_train_cases": 1}, "num_train_cases was None and is 1. Give the settings of training, --seed 0"),
        ({"train": "abc", "validation": "d"}, r"d \(1 in all\) trained and would now choose the model"),
    ],
)
def test_a_state_is_resumed_with_its_own_labels_scans_and_split(
    tmp_path: Path, other: dict[str, Any], said: str
) -> None:
    run(training(tmp_path))
    with pytest.raises(InputError, match=said):
        training(tmp_path, epochs=3, record=a_record(**other), resume=True).start()


def test_cases_that_are_gone_when_a_training_is_resumed_stay_on_record(tmp_path: Path) -> None:
    run(training(tmp_path))
    run(training(tmp_path, epochs=9, record=a_record(train="abcx"), resume=True))
    state = torch.load(tmp_path / "state" / "state_000000027.ckpt", weights_only=True)
    assert set(state["record"]["seen_before"]["train"]) == set("abcd") and set(state["record"]["train"]) == set("abcx")


def test_a_state_of_other_parameter_groups_is_refused(tmp_path: Path) -> None:
    run(training(tmp_path))
    state = training(tmp_path, epochs=3, resume=True)
    state.optimizer.param_groups.append({**state.optimizer.param_groups[0], "params": []})
    with pytest.raises(
        InputError, match=r"has 1 group\(s\) of 2 parameters, here 2 of 2; give the --optimizer#params#layer_decay and"
    ):
        state.start()


@pytest.mark.parametrize(("there", "here"), [(Muon, torch.optim.AdamW), (torch.optim.AdamW, Muon)])
def test_a_state_of_another_optimiser_is_refused(tmp_path: Path, there: type, here: type) -> None:
    run(training(tmp_path, optimizer=there))
    with pytest.raises(InputError, match=f"trained with another optimiser; pass --muon {there is Muon}"):
        training(tmp_path, epochs=3, optimizer=here, resume=True).start()


def test_a_state_of_a_version_that_kept_no_settings_of_the_network_is_resumed(tmp_path: Path) -> None:
    run(training(tmp_path))
    for file in (tmp_path / "state").iterdir():
        state = torch.load(file, weights_only=True)
        del state["record"]["network"]
        torch.save(state, file)
    assert run(training(tmp_path, epochs=3, resume=True)).trainer.state.iteration == 9


@pytest.mark.parametrize("make", [training, averaged])
@pytest.mark.parametrize("validation", ["ex", "e"])
def test_the_best_model_is_validated_anew_where_other_scans_validate(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, make: Callable[..., TrainingRun], validation: str
) -> None:
    """On the cases of before nothing could be better; on those of now its error is 1."""
    run(make(tmp_path))
    for file in (tmp_path / "state").iterdir():
        torch.save({**torch.load(file, weights_only=True), "best_metric": 0.0, "best_metric_epoch": 1}, file)
    old = {"weight": torch.zeros(1, 1), "bias": torch.zeros(1)}
    write_model(old, tmp_path / "model.pt", a_record())
    now = a_record(validation=validation)
    now["validated_on"] = "of other scans, whatever their names"
    state = make(tmp_path, epochs=9, record=now, resume=True)
    state.start()
    assert "other scans or labels validate now, so that its best model is validated anew" in caplog.text
    assert (state.evaluator.state.best_metric, state.evaluator.state.best_metric_epoch) == (1.0, 1)
    record = read_record(tmp_path / "model.pt")
    assert record is not None and set(record["validation"]) == set(validation)
    assert record["score"] == {"name": "error", "value": 1.0, "epoch": 1}
    assert torch.load(tmp_path / "model.pt", weights_only=True) == old
    state.trainer.run()
    assert state.evaluator.state.best_metric < 1 and torch.load(tmp_path / "model.pt", weights_only=True) != old


def test_a_stop_in_the_last_iteration_leaves_the_choice_of_the_model_to_the_resumed_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = training(tmp_path, val=5)
    run_until(state, 6)
    assert not (tmp_path / "model.pt").exists() and "no validation cases" not in caplog.text
    run(training(tmp_path, val=5, resume=True))
    record = read_record(tmp_path / "model.pt")
    assert record is not None and record["score"]["epoch"] == 2


def test_a_state_without_a_record_is_refused(tmp_path: Path) -> None:
    run(training(tmp_path))
    for file in (tmp_path / "state").iterdir():
        state = torch.load(file, weights_only=True)
        del state["record"]
        torch.save(state, file)
    with pytest.raises(
        InputError, match=r"saved by an earlier version, without a record; --overwrite True starts anew"
    ):
        training(tmp_path, resume=True).start()


def test_a_lost_model_is_chosen_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run(training(tmp_path))
    (tmp_path / "model.pt").unlink()
    run(training(tmp_path, epochs=3, resume=True))
    assert "model.pt is gone: the best model is chosen anew" in caplog.text
    assert (tmp_path / "model.pt").is_file()


def test_without_validation_cases_the_last_weights_are_the_model(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = training(tmp_path)
    state.evaluator.data_loader = []
    state.evaluator.state.epoch_length = 0
    run(state)
    assert "no validation cases" in caplog.text
    assert torch.equal(torch.load(tmp_path / "model.pt", weights_only=True)["bias"], state.network.state_dict()["bias"])


def test_the_moving_average_is_validated_and_saved(tmp_path: Path) -> None:
    state = averaged(tmp_path, epochs=1)
    seen: list[Tensor] = []
    state.trainer.add_event_handler(
        Events.ITERATION_COMPLETED, lambda: seen.append(state.network.state_dict()["bias"].clone())
    )
    first = state.network.state_dict()["bias"].clone()
    run(state)
    expected = first
    for steps, bias in enumerate(seen, 1):
        expected = expected + (1 - min(0.5, (1 + steps) / (10 + steps))) * (bias - expected)
    saved = torch.load(tmp_path / "model.pt", weights_only=True)["bias"]
    torch.testing.assert_close(saved, expected)
    assert torch.equal(state.network.state_dict()["bias"], seen[-1])  # training goes on with its own weights


@pytest.mark.parametrize("at", [2, 3])
def test_the_moving_average_survives_an_interruption(tmp_path: Path, at: int) -> None:
    run(averaged(tmp_path / "whole"))
    stopped = averaged(tmp_path / "parts")
    run_until(stopped, at)
    run(averaged(tmp_path / "parts", resume=True))
    whole, parts = (torch.load(tmp_path / name / "model.pt", weights_only=True) for name in ("whole", "parts"))
    assert torch.equal(whole["weight"], parts["weight"]) and torch.equal(whole["bias"], parts["bias"])


@pytest.mark.parametrize("decay", [-0.1, 1.0])
def test_a_decay_out_of_range_is_refused(tmp_path: Path, decay: float) -> None:
    state = training(tmp_path)
    with pytest.raises(ValueError, match=f"ema_decay is {decay}; it must be at least 0"):
        EMA(state.network, decay, state.trainer, state.evaluator)


def save(content: dict[str, torch.Tensor], file: Path) -> None:
    with atomic_write(file, GO_ON) as unfinished:
        save_tensors(content, unfinished)


def test_a_full_disk_leaves_what_was_saved_before(tmp_path: Path) -> None:
    file = tmp_path / "model.pt"
    save({"weight": torch.ones(3)}, file)
    with full_disk(), pytest.raises(InputError) as caught:
        save({"weight": torch.ones(100_000)}, file)
    assert str(caught.value).startswith(f"{file}: cannot be written (")
    assert "\n" not in str(caught.value) and "--resume True" in str(caught.value)
    assert [file.name for file in tmp_path.iterdir()] == ["model.pt"] and torch.load(file, weights_only=True)[
        "weight"
    ].tolist() == [1.0, 1.0, 1.0]


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"file/state_1.ckpt: cannot be written \(Not a directory|File exists"):
        save({}, tmp_path / "file" / "state_1.ckpt")
