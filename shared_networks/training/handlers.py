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
from shared_networks.training.monitors import TrainingMonitor
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
    :class:`StopOnNonFinite`; :class:`ClipGradients`; and :class:`shared_networks.training.monitors.TrainingMonitor`.

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
            StopOnNonFinite(),
            ClipGradients(network, max_grad_norm),
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
        self.max_norm = math.inf if max_norm is None else max_norm

    def attach(self, engine: Engine) -> None:
        """Attach to a MONAI trainer."""
        engine.add_event_handler(IterationEvents.BACKWARD_COMPLETED, self)

    def __call__(self, engine: Any) -> None:
        """Clip, if the optimiser is about to step."""
        if not completes_step(engine):
            return
        if engine.scaler is not None:
            engine.scaler.unscale_(engine.optimizer)
        engine.state.grad_norm = nn.utils.clip_grad_norm_(self.parameters, self.max_norm)


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
    """Stop training before a loss that is no number reaches the weights, and names the cases of the batch."""

    def attach(self, engine: Engine) -> None:
        """Attach to a MONAI trainer."""
        engine.add_event_handler(IterationEvents.LOSS_COMPLETED, self)

    def __call__(self, engine: Any) -> None:
        """Check the loss.

        Raises:
            InputError: it is NaN or infinite.
        """
        loss = engine.state.output["loss"]
        if not torch.isfinite(loss):
            names = list(dict.fromkeys(batch_cases(engine.state.batch)))
            raise InputError(
                f"the loss is {loss.item()} in iteration {engine.state.iteration} (epoch {engine.state.epoch}), with "
                f"the cases {', '.join(names)}: look at these, or lower --learning_rate, or set --max_grad_norm 1 or "
                "--amp False; --resume True goes on from the last saved state"
            )


def batch_cases(batch: Mapping[str, Any]) -> Sequence[str]:
    """Name of the cases in a batch: its `case`, or the files that its images were read from."""
    image = batch["image"]
    if "case" in batch:
        return [str(name) for name in batch["case"]]
    files = image.meta.get("filename_or_obj", ()) if isinstance(image, MetaTensor) else ()
    return [files] if isinstance(files, str) else [str(file) for file in files]
