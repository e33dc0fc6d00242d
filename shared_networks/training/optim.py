"""Group parameters by weight decay and learning rate."""

from __future__ import annotations

from collections.abc import Sized
from typing import Any

from monai.optimizers import WarmupCosineSchedule
from torch import Tensor, nn
from torch.optim import Optimizer

from shared_networks.networks.unetr import HiEndUNETR

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


def layerwise_groups(
    network: HiEndUNETR, learning_rate: float, layer_decay: float = 1.0, freeze_encoder: bool = False
) -> list[dict[str, Any]]:
    """Let the pre-trained encoder learn more slowly than the new layers, the more so the closer to the input.

    Layer-wise learning-rate decay as masked autoencoders are fine-tuned with (Bao et al., "BEiT", ICLR 2022, appendix;
    He et al., "Masked autoencoders are scalable vision learners", CVPR 2022, table 9): block i of n has the rate
    `learning_rate * layer_decay ** (n - i)`, patch embedding and positions `learning_rate * layer_decay ** (n + 1)`,
    and all behind the blocks `learning_rate`.

    Args:
        network: the segmenter, on its device.
        learning_rate: of the layers behind the encoder.
        layer_decay: above 0, at most 1; 1, as published, gives all the same rate.
        freeze_encoder: leave the encoder as it was pre-trained, to see what its features are worth by themselves.

    Returns:
        Groups in the form that torch optimisers take, one for each rate.

    Raises:
        ValueError: `layer_decay` is out of range.
    """
    if not 0 < layer_decay <= 1:
        raise ValueError(f"layer_decay is {layer_decay}; it must be above 0 and at most 1 (1 decays nothing).")
    network.vit.requires_grad_(not freeze_encoder)
    depth = len(network.vit.blocks)
    groups: dict[float, list[Tensor]] = {}
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            rate = learning_rate * layer_decay ** (depth - _layer(name, depth))
            groups.setdefault(rate, []).append(parameter)
    return [{"params": parameters, "lr": rate} for rate, parameters in sorted(groups.items(), reverse=True)]


def _layer(name: str, depth: int) -> int:
    """Return the number of the block that a parameter belongs to: -1 before the first, `depth` behind the last."""
    if name.startswith("vit.blocks."):
        return int(name.split(".")[2])
    return -1 if name.startswith("vit.patch_embedding.") else depth


def warmup_cosine(
    optimizer: Optimizer,
    dataloader: Sized,
    epochs: int,
    warmup_epochs: int = 0,
    max_epochs: int | None = None,
) -> WarmupCosineSchedule:
    """Make the learning-rate schedule: linear warm-up, whose first step already trains, then cosine to zero.

    Args:
        optimizer: whose rates are scheduled, iteration by iteration.
        dataloader: of an epoch; its length counts the iterations.
        epochs: that the warm-up was chosen for.
        warmup_epochs: of these epochs.
        max_epochs: of the trainer, by default `epochs`. MONAI Label sets these alone; the warm-up keeps its share.
    """
    total = epochs if max_epochs is None else max_epochs
    warmup_steps = warmup_epochs * len(dataloader) * total // epochs
    return WarmupCosineSchedule(
        optimizer,
        warmup_steps=warmup_steps,
        t_total=total * len(dataloader),
        warmup_multiplier=1 / max(1, warmup_steps),
    )
