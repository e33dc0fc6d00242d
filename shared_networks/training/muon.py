"""Train in fewer steps than AdamW: orthogonalise the momentum of matrices."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW

_SMALLEST = 16  # rows and columns from which a parameter counts as a matrix
_STEPS, _COEFFICIENTS = 5, (3.4445, -4.7750, 2.0315)  # of the iteration, from Jordan et al.


class Muon(AdamW):
    """Step matrices along their orthogonalised momentum, and all else by AdamW.

    K. Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024; updates are scaled to the size of
    AdamW's, 0.2 in the mean square, by Liu et al., "Muon is scalable for LLM training", 2025 (arXiv 2502.16982), so
    that one learning rate serves both. `torch.optim.Muon` takes nothing but matrices of two dimensions: here kernels of
    convolutions, flattened to `[out, rest]`, count too, and whatever is smaller than 16 on a side is AdamW's.

    Args:
        params: parameters or groups, as torch optimisers take them.
        momentum: of the matrices.
        adamw: arguments of :class:`torch.optim.AdamW`; `lr` and `weight_decay` hold for the matrices too.
    """

    def __init__(self, params: Any, momentum: float = 0.95, **adamw: Any) -> None:
        super().__init__(params, **adamw)
        for group in self.param_groups:
            group.setdefault("momentum", momentum)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Step all parameters that have a gradient; return what `closure` returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        gradients = []
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None and is_matrix(parameter):
                    self.step_matrix(parameter, group)
                    gradients.append((parameter, parameter.grad))
                    parameter.grad = None  # AdamW leaves out what has none
        try:
            super().step()
        finally:
            for parameter, gradient in gradients:
                parameter.grad = gradient
        return loss

    def step_matrix(self, parameter: Tensor, group: dict[str, Any]) -> None:
        """Step one matrix of a group."""
        state, gradient = self.state[parameter], parameter.grad
        assert gradient is not None
        if not state:
            state["step"] = torch.zeros((), device=parameter.device)  # AdamW asks every state for it when it loads
            state["momentum_buffer"] = torch.zeros_like(parameter)
        state["step"] += 1
        state["momentum_buffer"].lerp_(gradient, 1 - group["momentum"])
        update = gradient.lerp(state["momentum_buffer"], group["momentum"]).flatten(1)
        size = 0.2 * math.sqrt(max(update.shape))
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(orthogonalise(update).view_as(parameter), alpha=-group["lr"] * size)


def is_matrix(parameter: Tensor) -> bool:
    """Return whether a parameter `[out, ...]` has at least 16 rows and 16 columns once it is flattened."""
    return parameter.ndim >= 2 and min(parameter.shape[0], parameter[0].numel()) >= _SMALLEST


def orthogonalise(matrix: Tensor) -> Tensor:
    """Move the singular values of a matrix close to 1, to between 0.7 and 1.2, by Newton-Schulz iterations.

    Args:
        matrix: `[rows, columns]`.

    Returns:
        `[rows, columns]` in the matrix's type; computed in bfloat16 where the processor multiplies it faster.
    """
    a, b, c = _COEFFICIENTS
    fast = matrix.is_cuda or torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    x = matrix.to(torch.bfloat16 if fast else torch.float32)
    if wide := x.shape[0] > x.shape[1]:
        x = x.T
    x = x / (x.norm() + 1e-7)
    for _ in range(_STEPS):
        square = x @ x.T
        x = a * x + (b * square + c * square @ square) @ x
    return (x.T if wide else x).to(matrix.dtype)
