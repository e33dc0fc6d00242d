"""Log whether training is healthy."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from ignite import distributed as idist
from ignite.engine import Engine, Events
from ignite.handlers import ProgressBar
from monai.handlers import StatsHandler, TensorBoardStatsHandler, from_engine
from torch import Tensor, nn
from torch.optim import Optimizer

from shared_networks.networks.hi_end_mae import HiEndMAE
from shared_networks.training.host_copy import HostCopies, before_saving

_LOG_INTERVAL = 10  # iterations between two lines on the terminal


class LogHandlers:
    """Log an engine's metrics to the terminal and TensorBoard, on rank 0 alone.

    Args:
        log_dir: folder of TensorBoard's files.
        loss_name: under which a trainer's loss is logged, with a progress bar; empty for an evaluator.
        description: of the progress bar.
    """

    def __init__(self, log_dir: str | Path, loss_name: str = "", description: str = "") -> None:
        self.log_dir = str(log_dir)
        self.loss_name = loss_name
        self.description = description

    def attach(self, engine: Engine) -> None:
        """Attach to a MONAI engine, after the handlers that add metrics."""
        if idist.get_rank() != 0:  # asked by all ranks: asking sets up ignite's own view of them
            return
        if not self.loss_name:
            StatsHandler(iteration_log=False).attach(engine)
            TensorBoardStatsHandler(log_dir=self.log_dir, iteration_log=False).attach(engine)
            return
        loss: dict[str, Any] = {"tag_name": self.loss_name, "output_transform": from_engine(["loss"], first=True)}
        StatsHandler(iteration_log=lambda _, iteration: iteration % _LOG_INTERVAL == 0, **loss).attach(engine)
        curve = LossCurve(self.loss_name)
        TensorBoardStatsHandler(log_dir=self.log_dir, iteration_event_writer=curve).attach(engine)
        before_saving(engine, curve.finish)
        ProgressBar(desc=self.description, disable=None).attach(engine)


class LossCurve:
    """Write each iteration's loss to TensorBoard once the host has it: at once on a CPU, later on a GPU.

    Args:
        name: of the curve.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.copies = HostCopies()
        self.writer: Any = None

    def __call__(self, engine: Any, writer: Any) -> None:
        """Take the loss of an iteration, and write those that have arrived."""
        self.writer = writer
        loss = from_engine(["loss"], first=True)(engine.state.output)  # in a tuple, unless the output is a list
        self.copies.add(torch.as_tensor(loss[0] if isinstance(loss, tuple) else loss), engine.state.iteration)
        self.write()

    def finish(self, _engine: Any) -> None:
        """Wait for all losses that are on their way, so that a saved state has its curve."""
        self.write(wait=True)

    def write(self, wait: bool = False) -> None:
        """Write losses."""
        for loss, iteration in self.copies.read(wait):
            self.writer.add_scalar(self.name, loss, iteration)
        if self.writer is not None:
            self.writer.flush()


class TrainingMonitor:
    """Add to a trainer's metrics, epoch by epoch, what tells a healthy run from a starved or a diverging one.

    - `learning_rate`: at the end of the epoch;
    - `grad_norm`: median over the epoch's optimiser steps, where :class:`ClipGradients` measures it;
    - `crops_per_second`: of all processes together, waiting included;
    - `data_wait`: share of the time in which this process waited for its next batch.

    Handlers that write an epoch's metrics must come after it.

    Args:
        optimizer: whose learning rate.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer

    def attach(self, engine: Engine) -> None:
        """Attach to a trainer."""
        engine.add_event_handler(Events.EPOCH_STARTED, self.start)
        engine.add_event_handler(Events.GET_BATCH_STARTED, self.start_waiting)
        engine.add_event_handler(Events.GET_BATCH_COMPLETED, self.stop_waiting)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.count)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self.report)

    def start(self, engine: Any) -> None:
        """Begin an epoch."""
        self.started = self.ended = self.asked = time.perf_counter()
        self.waited = 0.0
        self.crops = 0
        self.grad_norms: list[Tensor] = []
        engine.state.grad_norm = None

    def start_waiting(self, _engine: Any) -> None:
        """Note when a batch was asked for."""
        self.asked = time.perf_counter()

    def stop_waiting(self, engine: Any) -> None:
        """Note how long it took, and how many crops came."""
        self.waited += time.perf_counter() - self.asked
        self.crops += len(engine.state.batch["image"])

    def count(self, engine: Any) -> None:
        """Note an iteration's gradient and end."""
        if engine.state.grad_norm is not None:
            self.grad_norms.append(engine.state.grad_norm.detach())
            engine.state.grad_norm = None
        self.ended = time.perf_counter()  # validation follows, which is not to count

    def report(self, engine: Any) -> None:
        """Add the epoch's figures to the metrics."""
        seconds = max(self.ended - self.started, 1e-9)
        engine.state.metrics["learning_rate"] = self.optimizer.param_groups[0]["lr"]
        engine.state.metrics["crops_per_second"] = process_count() * self.crops / seconds
        engine.state.metrics["data_wait"] = self.waited / seconds
        if self.grad_norms:
            engine.state.metrics["grad_norm"] = torch.stack(self.grad_norms).median().item()


def process_count() -> int:
    """Return the number of processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


class FeatureSpread:
    """Add to an evaluator's metrics how much the encoder's features differ, block by block: a probe for collapse.

    `spread_block_N` is the standard deviation of a feature over all tokens seen in the validation (CLS left out),
    averaged over the features of block N. It falls towards 0 where the encoder answers alike whatever it is shown.

    Args:
        network: bare network, whose `vit` is watched.
    """

    def __init__(self, network: HiEndMAE) -> None:
        self.vit = network.vit

    def attach(self, engine: Engine) -> None:
        """Attach to an evaluator."""
        engine.add_event_handler(Events.EPOCH_STARTED, self.start)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self.report)

    def start(self, _engine: Any) -> None:
        """Watch the blocks."""
        self.sums = {block: torch.zeros(3, self.vit.hidden_size, dtype=torch.float64) for block in self.vit.out_indices}
        self.hooks = [self.vit.blocks[block].register_forward_hook(self.watch(block)) for block in self.sums]

    def watch(self, block: int) -> Any:
        """Return a hook that sums up the outputs of a block."""

        def hook(_block: nn.Module, _inputs: Any, tokens: Tensor) -> None:
            features = tokens[:, 1:].detach().flatten(0, 1).double().cpu()
            count = torch.full_like(features[0], len(features))
            self.sums[block] += torch.stack([count, features.sum(0), features.square().sum(0)])

        return hook

    def report(self, engine: Any) -> None:
        """Add the spreads to the metrics and stop watching."""
        for hook in self.hooks:
            hook.remove()
        for block, (count, total, squares) in self.sums.items():
            variance = squares / count - (total / count).square()
            engine.state.metrics[f"spread_block_{block}"] = variance.clamp(min=0).sqrt().mean().item()
