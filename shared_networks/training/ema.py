"""Average weights over the course of training (EMA)."""

from __future__ import annotations

from typing import Any

import torch
from ignite.engine import Engine, Events
from torch import Tensor, nn

from shared_networks.training.handlers import completes_step


class EMA:
    """Validate and saves an exponential moving average of the weights in place of the last ones.

    After each step of the optimiser, average += (1 - decay) * (weights - average), with the decay held below
    (1 + steps) / (10 + steps) so that a short run's average does not remember its start. For each validation the
    network holds the average, and afterwards its own weights again. `decay` of 0 does nothing.

    Args:
        network: bare network.
        decay: such as 0.999.
        trainer: MONAI trainer whose steps count.
        evaluator: MONAI evaluator that sees the average.

    Raises:
        ValueError: `decay` is not in [0, 1).
    """

    def __init__(self, network: nn.Module, decay: float, trainer: Engine, evaluator: Engine) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"ema_decay is {decay}; it must be at least 0 (none) and below 1, such as 0.999.")
        self.network = network
        self.decay = decay
        self.steps = 0
        self.average: dict[str, Tensor] = {}
        self.own: dict[str, Tensor] = {}
        if decay > 0:
            trainer.add_event_handler(Events.STARTED, self.start)
            trainer.add_event_handler(Events.ITERATION_COMPLETED, self.update)
            evaluator.add_event_handler(Events.STARTED, self.swap_in)
            evaluator.add_event_handler(Events.COMPLETED, self.swap_out)

    def start(self, _engine: Any) -> None:
        """Begin with the weights as they are, unless an average was resumed."""
        if not self.average:
            self.average = self.copy()

    @torch.no_grad()
    def update(self, engine: Any) -> None:
        """Follow a step of the optimiser."""
        if not completes_step(engine):
            return
        self.steps += 1
        weight = 1 - min(self.decay, (1 + self.steps) / (10 + self.steps))
        for name, tensor in self.network.state_dict().items():
            if tensor.is_floating_point():
                self.average[name].lerp_(tensor, weight)
            else:
                self.average[name].copy_(tensor)

    def swap_in(self, _engine: Any) -> None:
        """Give the network the average."""
        if self.average:
            self.own = self.copy()
            self.network.load_state_dict(self.average)

    def swap_out(self, _engine: Any) -> None:
        """Give the network its own weights back."""
        if self.own:
            self.network.load_state_dict(self.own)
            self.own = {}

    def copy(self) -> dict[str, Tensor]:
        """Copy the network's present weights."""
        return {name: tensor.detach().clone() for name, tensor in self.network.state_dict().items()}

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs."""
        return {"steps": self.steps, "average": self.average}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with the average of an earlier run."""
        self.steps = state["steps"]
        own = self.network.state_dict()
        self.average = {name: tensor.to(own[name].device, copy=True) for name, tensor in state["average"].items()}
