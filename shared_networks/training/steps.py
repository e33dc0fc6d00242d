"""What surrounds a step of the optimiser: precision, seeds, clipping, and a stop where the loss is no number."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from ignite.engine import Engine, Events
from monai.data import MetaTensor
from monai.engines import IterationEvents
from monai.inferers import Inferer
from monai.utils import convert_to_tensor
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from shared_networks.allocator import keep_freed_memory
from shared_networks.data.draws import derived_seed
from shared_networks.errors import InputError


def autocast_type(device: torch.device | str, amp: bool) -> torch.dtype | None:
    """Number type of mixed precision: bfloat16 where the device has it, else float16, `None` without `amp`.

    Float16 overflows, so it needs MONAI's gradient scaler (the trainer's own `amp`); bfloat16 does not.
    """
    if not amp:
        return None
    if torch.device(device).type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.float16
    return torch.bfloat16


class AutocastInferer(Inferer):
    """Runs another inferer in mixed precision, on any device; MONAI's engines autocast on CUDA alone.

    On the CPU it also lets the process keep the memory of one call for the next.

    Args:
        inferer: what runs the network.
        dtype: of :func:`autocast_type`; `None` leaves all as it is.
    """

    def __init__(self, inferer: Inferer, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.inferer = inferer
        self.dtype = dtype

    def __call__(self, inputs: torch.Tensor, network: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Return the network's output, a tensor or a dict of them, in float32, in which losses and metrics are."""
        if inputs.device.type == "cpu":
            keep_freed_memory()
        plain = convert_to_tensor(inputs)  # torch.compile cannot follow MONAI's tensors
        with torch.autocast(inputs.device.type, dtype=self.dtype, enabled=self.dtype is not None):
            output = self.inferer(plain, network, *args, **kwargs)
        return output if self.dtype is None else _in_float32(output)


def _in_float32(output: Any) -> Any:
    """A tensor, or the tensors of a mapping, in float32."""
    if isinstance(output, Mapping):
        return {name: _in_float32(value) for name, value in output.items()}
    return output.float()


class SeedIterations:
    """Seeds torch before each iteration from (seed, rank, iteration).

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
        """Seed every generator of torch, those of GPUs included."""
        torch.manual_seed(derived_seed(self.seed, engine.state.rank, engine.state.iteration))


class ClipGradients:
    """Measures the norm of the gradient before each optimiser step and, on request, limits it.

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
    """Lets processes exchange gradients only in the iterations that end with a step of the optimiser.

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
    """Whether this iteration ends with a step of the optimiser, as MONAI's trainer accumulates gradients."""
    done = (engine.state.iteration - 1) % engine.state.epoch_length + 1
    return done % engine.accumulation_steps == 0 or done == engine.state.epoch_length


class StopOnNonFinite:
    """Stops training before a loss that is no number reaches the weights, and names the cases of the batch."""

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
    """Names of the cases in a batch: its `case`, or the files that its images were read from."""
    image = batch["image"]
    if "case" in batch:
        return [str(name) for name in batch["case"]]
    files = image.meta.get("filename_or_obj", ()) if isinstance(image, MetaTensor) else ()
    return [files] if isinstance(files, str) else [str(file) for file in files]
