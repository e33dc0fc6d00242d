"""Save training states, resume from them, and guard the folder of a run.

Nothing random is stored but the seed: crops are a function of (seed, epoch, place) and masks of (seed, rank,
iteration), see `shared_networks.training.sampler` and :class:`shared_networks.training.handlers.SeedIterations`.
"""

from __future__ import annotations

import logging
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from ignite.engine import Engine, Events
from monai.engines import Evaluator, Trainer
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from shared_networks.datasets.leaks import check_start
from shared_networks.datasets.record import (
    Record,
    TrainingRecord,
    read_record,
    record_file,
    save_tensors,
    scores_alike,
    seen_cases,
    write_model,
)
from shared_networks.errors import InputError
from shared_networks.files import GO_ON, UNFINISHED, atomic_write
from shared_networks.networks.cpu import fast_cpu
from shared_networks.processes import check_processes
from shared_networks.training.ema import EMA
from shared_networks.training.handlers import completes_step
from shared_networks.training.host_copy import ReadingEvents
from shared_networks.training.run_folder import STATES, check_run_folder
from shared_networks.training.sampler import SeededSampler

logger = logging.getLogger(__name__)


class SaveBestModel:
    """Write the network's weights, flat, with their record, whenever a validation is the best so far.

    Args:
        network: bare network (not wrapped for several GPUs).
        folder: of the training, `ckpt_dir`; rank 0 writes `model.pt`.
        record: of :func:`shared_networks.datasets.record.training_record`.
    """

    def __init__(self, network: nn.Module, folder: str | Path, record: Record) -> None:
        self.network = network
        self.file = Path(folder) / "model.pt"
        self.record = record

    def attach(self, engine: Engine) -> None:
        """Attach to an evaluator with a key metric."""
        engine.add_event_handler(Events.EPOCH_COMPLETED, self)

    def __call__(self, engine: Any) -> None:
        """Save, if the evaluator has just found a new best.

        Raises:
            InputError: the weights are not finite.
        """
        state = engine.state
        if state.rank == 0 and state.best_metric_epoch == state.epoch:
            score = {"name": state.key_metric_name, "value": float(state.best_metric), "epoch": state.epoch}
            weights = self.network.state_dict()
            check_finite(weights, self.file)
            write_model(weights, self.file, {**self.record, "score": score})


class TrainingRun:
    """What training needs to go on, saved by epoch, by time and on SIGTERM, and read when it starts again.

    States are files `state/state_ITERATION.ckpt`, written atomically by rank 0, the newest `keep` kept. They hold
    network, optimiser, schedule, gradient scaler, epoch, iteration, best metric, seed and record, and are read by every
    rank, so the folder must be one that all machines see.

    Args:
        folder: of the run, with `model.pt`, which validation writes (see :class:`SaveBestModel`), and `state`.
        network: bare network.
        optimizer: its optimiser.
        lr_scheduler: stepped every iteration.
        trainer: MONAI trainer, `trainer.data_loader.sampler` a :class:`shared_networks.training.sampler.SeededSampler`.
        evaluator: MONAI evaluator that the trainer's handlers run.
        record: of :func:`shared_networks.datasets.record.training_record`, shared with :class:`SaveBestModel`.
        seed: of the run.
        resume: go back to the newest state there is.
        overwrite: remove an earlier training in the folder.
        every_epochs: save after so many epochs.
        every_minutes: save between as well, after so many minutes without.
        keep: states kept.
        ema: average of the weights, saved and restored with them.
    """

    def __init__(
        self,
        folder: str | Path,
        network: nn.Module,
        optimizer: Optimizer,
        lr_scheduler: LRScheduler,
        trainer: Trainer,
        evaluator: Evaluator,
        record: TrainingRecord,
        seed: int = 0,
        resume: bool = False,
        overwrite: bool = False,
        every_epochs: int = 1,
        every_minutes: float = 15.0,
        keep: int = 2,
        ema: EMA | None = None,
    ) -> None:
        self.folder = Path(folder) / STATES
        self.model = Path(folder) / "model.pt"
        self.network = network
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.trainer: Any = trainer
        self.evaluator: Any = evaluator
        self.record = record
        self.seed = seed
        self.resume = resume
        self.overwrite = overwrite
        self.every_epochs = every_epochs
        self.every_seconds = 60 * every_minutes
        self.keep = keep
        self.ema = ema
        self.rank: int = self.trainer.state.rank
        self.validated_epoch = 0
        self.saved_at = time.monotonic()
        self.stop_signal = 0
        self.left = False
        self.votes: dist.ProcessGroup | None = None

    @property
    def unfinished(self) -> bool:
        """Return whether epochs are left to train."""
        state = self.trainer.state
        return state.iteration < state.epoch_length * state.max_epochs

    @property
    def unvalidated(self) -> bool:
        """Return whether all epochs are trained and the last was not validated, so that its model may be unsaved."""
        return not self.unfinished and not self.left and self.validated_epoch < self.trainer.state.max_epochs

    def run(self) -> None:
        """Train to the end, validate the last epoch, and save a model in any case.

        Raises:
            InputError: as :meth:`start`, or a file cannot be written.
            SystemExit: SIGTERM ended it before, so that whatever should follow a whole training does not. The code is
                143, as a shell tells of the signal.
        """
        self.start()
        with fast_cpu(self.network, torch.device(self.trainer.state.device)), self.stopping_on_sigterm():
            if self.unfinished:
                self.trainer.run()
            if self.unvalidated:
                self.evaluator.run(self.trainer.state.max_epochs)
        self.finish()
        if self.left:
            sys.exit(128 + self.stop_signal)

    def start(self) -> None:
        """Attach to trainer and evaluator; resume, remove or challenge the training in the folder.

        A model is the one to beat, validated first on the present validation cases, where it is trained on in place,
        where no state is left to resume from, or where the state chose it by other cases, scans or labels.

        Raises:
            InputError: as :func:`check_run_folder`; or no state can be read though some exist, or they are of another
                network, seed, split or other labels; or of several processes each has a network of its own.
        """
        check_processes(isinstance(self.trainer.network, DistributedDataParallel), "multi_gpu_train.json")
        check_run_folder(self.model.parent, self.record, self.resume, self.overwrite)
        found = self.states()
        if self.resume and found:
            self.load(found)
            for broken_off in self.folder.glob(f"{UNFINISHED}*") if self.rank == 0 else ():
                broken_off.unlink()
        elif self.resume and self.model.is_file():  # it was checked that it is of this training
            logger.warning("%s has no state beside it: training starts anew", self.model)
            self.see(read_record(self.model) or {})
            self.challenge()
        elif self.overwrite:
            self.remove(self.model, record_file(self.model))
        elif self.record.in_place:
            self.remove()
            self.challenge()
        if dist.is_available() and dist.is_initialized():
            self.votes = dist.new_group(backend="gloo")  # on the CPU: asking NCCL would halt the GPU in every iteration
        self.trainer.add_event_handler(Events.ITERATION_COMPLETED, self.after_iteration)
        self.trainer.add_event_handler(Events.EPOCH_COMPLETED, self.after_epoch)
        self.trainer.register_events(*ReadingEvents)
        self.evaluator.add_event_handler(Events.EPOCH_COMPLETED, self.after_validation)

    def states(self) -> list[Path]:
        """Return the states in the folder, the newest first."""
        return sorted(self.folder.glob("state_*.ckpt"), reverse=True)

    def remove(self, *files: Path) -> None:
        """Remove the states of an earlier training, then further files of it."""
        if self.rank == 0:
            for file in (*self.states(), *self.folder.glob(f"{UNFINISHED}*"), *files):
                file.unlink(missing_ok=True)

    def see(self, record: Record) -> None:
        """Note the cases of an earlier training that is gone on with, also those that are no longer in the data set."""
        for part, cases in self.record["seen_before"].items():
            cases.update(seen_cases(record, part))

    def challenge(self, epoch: int = 0) -> None:
        """Make a model that is already there the one to beat.

        Args:
            epoch: that it is of; 0 is before the first.

        Raises:
            InputError: it is of another network.
        """
        if not self.model.is_file():
            return
        older = torch.load(self.model, map_location="cpu", weights_only=True)
        own = {name: tensor.clone() for name, tensor in self.network.state_dict().items()}
        check_same_network(own, older, self.model)
        self.network.load_state_dict(older)
        self.evaluator.run(max(epoch, 1))
        self.network.load_state_dict(own)
        if self.evaluator.state.best_metric_epoch != -1:
            self.evaluator.state.best_metric_epoch = epoch
            if self.rank == 0:
                score = f"{self.evaluator.state.key_metric_name} {self.evaluator.state.best_metric:.4f}"
                print(f"{self.model} has {score}; only a better model replaces it", flush=True)

    def finish(self) -> None:
        """Save the weights as `model.pt` where there was nothing to validate them on."""
        if self.rank == 0 and not self.unfinished and not self.left and self.evaluator.state.best_metric_epoch == -1:
            weights = getattr(self.ema, "average", None) or self.network.state_dict()
            check_finite(weights, self.model)
            write_model(weights, self.model, {**self.record, "score": None})
            logger.warning("no validation cases: %s holds the weights at the end of the training", self.model)

    @contextmanager
    def stopping_on_sigterm(self) -> Iterator[None]:
        """Take SIGTERM as a request to stop, and after training leave it to whoever had it before."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGTERM, self.request_stop)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before or signal.SIG_DFL)

    def request_stop(self, number: int, _frame: Any) -> None:
        """Note a signal; training stops after the iteration that is under way."""
        self.stop_signal = number

    def after_validation(self, engine: Any) -> None:
        """Remember which epoch was validated."""
        self.validated_epoch = engine.state.epoch

    def after_iteration(self, engine: Any) -> None:
        """Save within an epoch, if time is up, and leave, if told to."""
        if not completes_step(engine) or engine.state.iteration % engine.state.epoch_length == 0:
            return  # gradients accumulated by halves are not saved; the epoch's last state comes after its validation
        if self.is_told_to_stop():
            self.leave(engine)
        elif self.is_time():
            self.save()

    def after_epoch(self, engine: Any) -> None:
        """Save at the end of an epoch, if it is due, and leave, if told to."""
        if self.is_told_to_stop():
            self.leave(engine)
        elif engine.state.epoch % self.every_epochs == 0 or not self.unfinished or self.is_time():
            self.save()

    def is_time(self) -> bool:
        """Return whether the last state is older than `every_minutes`."""
        return time.monotonic() - self.saved_at > self.every_seconds

    def is_told_to_stop(self) -> bool:
        """Return whether any process got SIGTERM; all must leave after the same iteration, or some wait for ever."""
        if self.votes is not None:
            vote = torch.tensor(self.stop_signal)
            dist.all_reduce(vote, dist.ReduceOp.MAX, group=self.votes)
            self.stop_signal = int(vote)
        return self.stop_signal != 0

    def leave(self, engine: Any) -> None:
        """Save and end the trainer's run."""
        self.left = True
        self.save()
        if self.rank == 0:
            at = f"epoch {engine.state.epoch}, iteration {engine.state.iteration}"
            print(
                f"stopped by signal {self.stop_signal} at {at}; --resume True goes on from {self.states()[0]}",
                flush=True,
            )
        engine.terminate()

    def save(self) -> None:
        """Write a state, then remove those that are no longer kept. Only rank 0 writes.

        Raises:
            InputError: it cannot be written, or a loss or a weight is not finite.
        """
        self.trainer.fire_event(ReadingEvents.READ_ALL)  # a loss that is NaN is told of with its cases
        self.saved_at = time.monotonic()
        if self.rank != 0:
            return
        at = self.trainer.state
        file = self.folder / f"state_{at.iteration:09d}.ckpt"
        check_finite(self.network.state_dict(), file)
        if self.ema is not None:
            check_finite(self.ema.average, file)
        content = {
            "iteration": at.iteration,
            "epoch": at.epoch,
            "epoch_length": at.epoch_length,
            "seed": self.seed,
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.lr_scheduler.last_epoch,
            "scaler": None if self.trainer.scaler is None else self.trainer.scaler.state_dict(),
            "best_metric": float(self.evaluator.state.best_metric),
            "best_metric_epoch": self.evaluator.state.best_metric_epoch,
            "validated_epoch": self.validated_epoch,
            "record": dict(self.record),
            "ema": None if self.ema is None else self.ema.state_dict(),
        }
        with atomic_write(file, GO_ON) as unfinished:
            save_tensors(content, unfinished)
        states = self.states()
        place = states.index(file)
        # Larger numbers are of epochs that had more iterations; they would be taken for newer at the next resume.
        for other in (*states[:place], *states[place + self.keep :]):
            other.unlink(missing_ok=True)

    def load(self, files: list[Path]) -> None:
        """Go back to the first of the files that can be read; see :meth:`start`."""
        for file in files:
            try:
                state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
                break
            except Exception as error:  # torch raises a different type for each way of being damaged
                logger.warning("%s: cannot be read (%s); trying the one before", file, type(error).__name__)
        else:
            raise InputError(f"{self.folder}: none of its states can be read; remove them to start anew")
        self.check(state, file)
        self.see(state["record"])
        score, epoch = state["best_metric"], state["best_metric_epoch"]
        if epoch != -1 and not self.model.is_file():
            logger.warning("%s is gone: the best model is chosen anew", self.model)
            epoch = -1
        if epoch != -1 and not scores_alike(state["record"], self.record):
            logger.warning("%s: other scans or labels validate now, so that its best model is validated anew", file)
            self.challenge(epoch)  # before the average is loaded, which would take the model's place
        else:
            self.evaluator.state.best_metric, self.evaluator.state.best_metric_epoch = score, epoch
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.trainer.scaler is not None and state["scaler"] is not None:
            self.trainer.scaler.load_state_dict(state["scaler"])
        self.validated_epoch = state["validated_epoch"]
        if self.ema is not None and state["ema"] is not None:
            self.ema.load_state_dict(state["ema"])

        length, max_epochs = self.trainer.state.epoch_length, self.trainer.state.max_epochs
        iteration, schedule = state["iteration"], state["schedule"]
        if length != state["epoch_length"]:  # another number of processes, batch size or cases
            epochs_done = iteration // state["epoch_length"]
            iteration = schedule = epochs_done * length
            logger.warning(
                "an epoch had %d iterations and has %d now: going on from the start of epoch %d",
                state["epoch_length"],
                length,
                epochs_done + 1,
            )
        self.lr_scheduler.last_epoch = schedule
        # The state's rates are its own schedule's: at the end of a run 0, with which more epochs would begin.
        for group, rate in zip(self.optimizer.param_groups, self.lr_scheduler.get_lr(), strict=True):
            group["lr"] = rate
        self.trainer.load_state_dict({"iteration": iteration, "epoch_length": length, "max_epochs": max_epochs})
        sampler, batch = self.trainer.data_loader.sampler, self.trainer.data_loader.batch_size
        if isinstance(sampler, SeededSampler):
            sampler.start = iteration % length * batch
        if self.rank == 0 and self.unfinished:
            print(f"resuming from {file}: iteration {iteration} of {length * max_epochs}", flush=True)
        elif self.rank == 0:
            print(f"finished: {file} is at epoch {state['epoch']} of {max_epochs}; --epochs N trains on", flush=True)

    def check(self, state: Mapping[str, Any], file: Path) -> None:
        """Refuse a state of another training; see :meth:`start`."""
        if "record" not in state:
            raise InputError(f"{file}: saved by an earlier version, without a record; --overwrite True starts anew")
        if state["seed"] != self.seed:
            raise InputError(f"{file}: its seed is {state['seed']}, not {self.seed}; pass --seed {state['seed']}")
        check_start(self.record, state["record"], file)
        check_same_network(self.network.state_dict(), state["network"], file)
        groups = (self.optimizer.param_groups, state["optimizer"]["param_groups"])
        kinds = [{"momentum", "betas"} & made[0].keys() for made in groups]
        if kinds[0] != kinds[1]:
            raise InputError(f"{file}: trained with another optimiser; pass --muon {'momentum' in kinds[1]}")
        own, there = ([len(group["params"]) for group in made] for made in groups)
        if own != there:
            raise InputError(
                f"{file}: its optimiser has {len(there)} group(s) of {sum(there)} parameters, here {len(own)} of "
                f"{sum(own)}; give the --optimizer#params#layer_decay and --optimizer#params#freeze_encoder of then"
            )


def check_finite(weights: Mapping[str, torch.Tensor], file: Path) -> None:
    """Refuse weights that hold NaN or infinity, whatever let them pass: on disk they would be taken for a model.

    Raises:
        InputError: they do.
    """
    floating = {name: tensor for name, tensor in weights.items() if tensor.is_floating_point()}
    found = torch.stack([tensor.isfinite().all() for tensor in floating.values()]).tolist() if floating else []
    if wrong := [name for name, finite in zip(floating, found, strict=True) if not finite]:
        raise InputError(
            f"{file}: not written, as {len(wrong)} of {len(floating)} tensors hold NaN or infinity, the first "
            f"{wrong[0]}; lower --learning_rate, or set --max_grad_norm 1 or --amp False; --resume True goes on from "
            "the last saved state"
        )


def check_same_network(own: Mapping[str, torch.Tensor], there: Mapping[str, torch.Tensor], file: Path) -> None:
    """Compare names and shapes of two state_dicts.

    Raises:
        InputError: they differ.
    """
    shapes, others = ({name: tensor.shape for name, tensor in weights.items()} for weights in (own, there))
    if wrong := sorted(name for name in shapes.keys() | others.keys() if shapes.get(name) != others.get(name)):
        raise InputError(
            f"{file}: is of another network ({len(wrong)} tensors differ, the first {wrong[0]}); give the settings "
            "that it was trained with, or another --ckpt_dir to start anew"
        )
