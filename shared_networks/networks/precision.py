"""Run networks in mixed precision on any device."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from monai.inferers import Inferer
from monai.utils import convert_to_tensor


def autocast_type(device: torch.device | str, amp: bool) -> torch.dtype | None:
    """Return the number type of mixed precision: bfloat16 where the device has it, else float16, `None` without `amp`.

    Float16 overflows, so it needs MONAI's gradient scaler (the trainer's own `amp`); bfloat16 does not.
    """
    if not amp:
        return None
    if torch.device(device).type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.float16
    return torch.bfloat16


class AutocastInferer(Inferer):
    """Run another inferer in mixed precision, on any device; MONAI's engines autocast on CUDA alone.

    Args:
        inferer: what runs the network.
        dtype: of :func:`autocast_type`; `None` for float32.
    """

    def __init__(self, inferer: Inferer, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.inferer = inferer
        self.dtype = dtype

    def __call__(self, inputs: torch.Tensor, network: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Return the network's output, a tensor or a dict of them, in float32, in which losses and metrics are."""
        plain = convert_to_tensor(inputs)  # torch.compile cannot follow MONAI's tensors
        with torch.autocast(inputs.device.type, dtype=self.dtype, enabled=self.dtype is not None):
            output = self.inferer(plain, network, *args, **kwargs)
        return output if self.dtype is None else _in_float32(output)


def _in_float32(output: Any) -> Any:
    """Convert a tensor, or the tensors of a mapping, to float32."""
    if isinstance(output, Mapping):
        return {name: _in_float32(value) for name, value in output.items()}
    return output.float()
