"""Train in fewer steps than AdamW: orthogonalise the momentum of matrices."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
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
        matrices = [
            (parameter, group)
            for group in self.param_groups
            for parameter in group["params"]
            if parameter.grad is not None and is_matrix(parameter)
        ]
        updates = [self.advance(parameter, group["momentum"]) for parameter, group in matrices]
        for (parameter, group), update in zip(matrices, orthogonalise_all(updates), strict=True):
            size = 0.2 * math.sqrt(max(update.shape))
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
            parameter.add_(update.view_as(parameter), alpha=-group["lr"] * size)
        gradients = [(parameter, parameter.grad) for parameter, _ in matrices]
        for parameter, _ in matrices:
            parameter.grad = None  # AdamW leaves out what has none
        try:
            super().step()
        finally:
            for parameter, gradient in gradients:
                parameter.grad = gradient
        return loss

    def advance(self, parameter: Tensor, momentum: float) -> Tensor:
        """Bring a matrix's momentum up to date and return where it leads, `[out, rest]`."""
        state, gradient = self.state[parameter], parameter.grad
        assert gradient is not None
        if not state:
            state["step"] = torch.zeros((), device=parameter.device)  # AdamW asks every state for it when it loads
            state["momentum_buffer"] = torch.zeros_like(parameter)
        state["step"] += 1
        state["momentum_buffer"].lerp_(gradient, 1 - momentum)
        return gradient.lerp(state["momentum_buffer"], momentum).flatten(1)


def is_matrix(parameter: Tensor) -> bool:
    """Return whether a parameter `[out, ...]` has at least 16 rows and 16 columns once it is flattened."""
    return parameter.ndim >= 2 and min(parameter.shape[0], parameter[0].numel()) >= _SMALLEST


def orthogonalise_all(matrices: Sequence[Tensor]) -> list[Tensor]:
    """Orthogonalise matrices `[rows, columns]` of any sizes; those of one size in one go, as most are small."""
    results: dict[int, Tensor] = {}
    sizes = [(matrix.shape, matrix.device, matrix.dtype) for matrix in matrices]
    for size in dict.fromkeys(sizes):
        places = [place for place, other in enumerate(sizes) if other == size]
        together = orthogonalise(torch.stack([matrices[place] for place in places]))
        results.update(zip(places, together, strict=True))
    return [results[place] for place in range(len(matrices))]


def orthogonalise(matrices: Tensor) -> Tensor:
    """Move the singular values of matrices close to 1, to between 0.7 and 1.2, by Newton-Schulz iterations.

    Args:
        matrices: `[..., rows, columns]`.

    Returns:
        `[..., rows, columns]` in the matrices' type; computed in bfloat16 where the processor multiplies it faster.
    """
    a, b, c = _COEFFICIENTS
    fast = matrices.is_cuda or torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    x = matrices.to(torch.bfloat16 if fast else torch.float32)
    if tall := x.shape[-2] > x.shape[-1]:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(_STEPS):
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    return (x.mT if tall else x).to(matrices.dtype)
