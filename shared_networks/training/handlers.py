"""Seed, check, clip and monitor training iterations."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from ignite.engine import Engine, Events
from monai.data import MetaTensor
from monai.engines import IterationEvents
from monai.engines.utils import PrepareBatch, default_prepare_batch
from monai.handlers import LrScheduleHandler
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from shared_networks.errors import InputError
from shared_networks.training.host_copy import HostCopies, before_saving
from shared_networks.training.monitors import TrainingMonitor, process_count
from shared_networks.training.sampler import derived_seed


class PrepareBatchSelfSupervised(PrepareBatch):
    """The image is its own target: a batch `{"image": [B, C, H, W, D]}` becomes (image, image) on the device."""

    def __call__(
        self,
        batchdata: dict[str, Tensor],
        device: str | torch.device | None = None,
        non_blocking: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        """Move the image of `batchdata` to `device`; see :class:`PrepareBatchSelfSupervised`."""
        image, _ = default_prepare_batch({"image": batchdata["image"]}, device, non_blocking, **kwargs)
        return image, image


class TrainingHandlers:
    """Attach to a trainer what every training here needs, in the order in which it has to act.

    These are the schedule, stepped every iteration; :class:`SeedIterations`; :class:`ReduceOnStep`;
    :class:`ClipGradients`; :class:`StopOnNonFinite`; :class:`KeepLoss`; and
    :class:`shared_networks.training.monitors.TrainingMonitor`. They come before the handlers that validate, so that
    weights are checked before they are.

    Args:
        network: bare network (not wrapped for several GPUs).
        optimizer: its optimiser.
        lr_scheduler: of the optimiser, in iterations.
        seed: of the run.
        max_grad_norm: largest 2-norm of all gradients together; `None` does not clip.
    """

    def __init__(
        self,
        network: nn.Module,
        optimizer: Optimizer,
        lr_scheduler: Any,
        seed: int,
        max_grad_norm: float | None = None,
    ) -> None:
        self.handlers: list[Any] = [
            LrScheduleHandler(lr_scheduler, print_lr=False, epoch_level=False),
            SeedIterations(seed),
            ReduceOnStep(),
            ClipGradients(network, max_grad_norm),
            StopOnNonFinite(),
            KeepLoss(),
            TrainingMonitor(optimizer),
        ]

    def attach(self, engine: Engine) -> None:
        """Attach to a MONAI trainer."""
        for handler in self.handlers:
            handler.attach(engine)


class SeedIterations:
    """Seed torch before each iteration from (seed, rank, iteration).

    The masks of pre-training and dropout then differ between processes, and training that was interrupted draws what it
    would have drawn.

    Args:
        seed: the run's.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def attach(self, engine: Engine) -> None:
        """Attach to a trainer."""
        engine.add_event_handler(Events.ITERATION_STARTED, self)

    def __call__(self, engine: Any) -> None:
        """Seed every generator of torch, on GPUs too."""
        torch.manual_seed(derived_seed(self.seed, engine.state.rank, engine.state.iteration))


class ClipGradients:
    """Measure the norm of the gradient before each optimiser step and, on request, limits it.

    The norm is left in `engine.state.grad_norm`, a scalar tensor (0 between steps of accumulated gradients).

    Args:
        network: whose gradients.
        max_norm: largest 2-norm of all gradients together; `None` only measures.
    """

    def __init__(self, network: nn.Module, max_norm: float | None = None) -> None:
        self.parameters = [p for p in network.parameters() if p.requires_grad]
        self.max_norm = max_norm

    def attach(self, engine: Engine) -> None:
        """Attach to a MONAI trainer."""
        engine.add_event_handler(IterationEvents.BACKWARD_COMPLETED, self)

    def __call__(self, engine: Any) -> None:
        """Clip, if the optimiser is about to step."""
        if not completes_step(engine):
            return
        if engine.scaler is not None:
            engine.scaler.unscale_(engine.optimizer)
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        engine.state.grad_norm = nn.utils.get_total_norm(gradients)
        if self.max_norm is not None:
            nn.utils.clip_grads_with_norm_(self.parameters, self.max_norm, engine.state.grad_norm)


class ReduceOnStep:
    """Let processes exchange gradients only in the iterations that end with a step of the optimiser.

    While gradients accumulate, each process keeps its own, as in `DistributedDataParallel.no_sync`, which MONAI's
    trainer does not enter. Nothing changes for a network that is not distributed.
    """

    def attach(self, engine: Engine) -> None:
        """Attach to a MONAI trainer."""
        engine.add_event_handler(Events.ITERATION_STARTED, self)

    def __call__(self, engine: Any) -> None:
        """Choose for this iteration, before its forward pass."""
        if isinstance(engine.network, DistributedDataParallel):
            engine.network.require_backward_grad_sync = completes_step(engine)


def completes_step(engine: Any) -> bool:
    """Return whether this iteration ends with a step of the optimiser, as MONAI's trainer accumulates gradients."""
    done = (engine.state.iteration - 1) % engine.state.epoch_length + 1
    return done % engine.accumulation_steps == 0 or done == engine.state.epoch_length


class StopOnNonFinite:
    """Stop training when the loss, or the gradient of a step, is no number, and name the cases of the batch.

    On the CPU it stops before the step. On a GPU it is told of a number some iterations later
    (:class:`shared_networks.training.host_copy.HostCopies`), so that host and GPU need not wait for each other, and the
    weights in memory may be lost by then. Nothing of them reaches a file: whoever validates or saves has all numbers
    read first, up to the last iteration's.

    Gradients are those of all processes, so that a process stops, too, whose own loss is finite. With a gradient scaler
    they may be infinite: it leaves out such a step.
    """

    def __init__(self) -> None:
        self.copies = HostCopies()
        self.cases: list[str] = []

    def attach(self, engine: Engine) -> None:
        """Attach to a MONAI trainer, after :class:`ClipGradients` and before what validates or saves."""
        engine.add_event_handler(IterationEvents.LOSS_COMPLETED, self)
        engine.add_event_handler(IterationEvents.BACKWARD_COMPLETED, self.check_gradient)
        before_saving(engine, self.read_all)

    def __call__(self, engine: Any) -> None:
        """Check the loss.

        Raises:
            InputError: it is NaN or infinite, or an earlier one is, or an earlier gradient.
        """
        names = batch_cases(engine.state.batch)
        self.cases += names
        self.check(engine, engine.state.output["loss"], "loss", names)

    def check_gradient(self, engine: Any) -> None:
        """Check the norm of the gradient that a step is to take; raise as for a loss."""
        if not completes_step(engine):
            return
        names, self.cases = self.cases, []
        norm = getattr(engine.state, "grad_norm", None)
        if norm is not None and engine.scaler is None:
            self.check(engine, norm, "norm of the gradient", names)

    def check(self, engine: Any, value: Tensor, what: str, names: Sequence[str]) -> None:
        """Send a number on its way, and look at those that have arrived."""
        at = f"iteration {engine.state.iteration} (epoch {engine.state.epoch}), with the cases "
        self.copies.add(value, (what, at + ", ".join(dict.fromkeys(names))))
        self.look(engine)

    def read_all(self, engine: Any) -> None:
        """Wait for all numbers that are on their way; raise as for a loss."""
        self.look(engine, wait=True)

    def look(self, engine: Any, wait: bool = False) -> None:
        """Raise the error of the first number that is not finite."""
        for number, (what, at) in self.copies.read(wait):
            if not math.isfinite(number):
                others = " of this process; others may name theirs" if process_count() > 1 else ""
                raise InputError(
                    f"the {what} is {number} in {at}{others}: look at these, or lower --learning_rate, or set "
                    "--max_grad_norm 1 or --amp False; --resume True goes on from the last saved state"
                )


class KeepLoss:
    """Leave of each iteration's output the loss alone, in the form in which MONAI's handlers read it.

    It takes the place of MONAI's decollation (`decollate` is to be false), which reads the loss and so waits for the
    GPU. The prediction's memory is free for validation.
    """

    def attach(self, engine: Engine) -> None:
        """Attach to a MONAI trainer."""
        engine.add_event_handler(IterationEvents.MODEL_COMPLETED, self)

    def __call__(self, engine: Any) -> None:
        """Drop the rest."""
        output = engine.state.output
        if isinstance(output, Mapping):
            engine.state.output = [{"loss": output["loss"].detach()}]


def batch_cases(batch: Mapping[str, Any]) -> Sequence[str]:
    """Name of the cases in a batch: its `case`, or the files that its images were read from."""
    image = batch["image"]
    if "case" in batch:
        return [str(name) for name in batch["case"]]
    files = image.meta.get("filename_or_obj", ()) if isinstance(image, MetaTensor) else ()
    return [files] if isinstance(files, str) else [str(file) for file in files]
