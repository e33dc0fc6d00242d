"""What the optimiser may decay."""

from __future__ import annotations

from typing import Any

from torch import nn

UNDECAYED = ("cls_token", "mask_token", "position_embeddings")


def parameter_groups(network: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Split the trainable parameters for AdamW: decay on weights, none on biases, norms, tokens and positions.

    The published code builds these groups and then trains without them.

    Args:
        network: the network, on its device.
        weight_decay: decay of the first group.

    Returns:
        Two groups in the form that torch optimisers take; frozen parameters are in neither.
    """
    decayed: list[nn.Parameter] = []
    undecayed: list[nn.Parameter] = []
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            spared = parameter.ndim < 2 or name.endswith(UNDECAYED)
            (undecayed if spared else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": undecayed, "weight_decay": 0.0}]
