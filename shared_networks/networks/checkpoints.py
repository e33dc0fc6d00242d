"""Load and convert checkpoints."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Engine
from monai.handlers import CheckpointLoader
from monai.utils import ensure_tuple
from torch import Tensor, nn

from shared_networks.datasets.record import (
    SAFETENSORS,
    TrainingRecord,
    check_network,
    check_start_preparation,
    different_settings,
    listed_differences,
    options,
    read_record,
    record_file,
    safetensors_form,
    save_tensors,
)
from shared_networks.errors import InputError
from shared_networks.files import atomic_write
from shared_networks.networks.hi_end_mae import HiEndMAE
from shared_networks.networks.official import OFFICIAL_PREFIX, from_official, to_official
from shared_networks.networks.positions import POSITIONS, check_grids, grid_text, is_sincos, token_grid
from shared_networks.networks.unetr import HiEndUNETR
from shared_networks.networks.vit import interpolate_positions

logger = logging.getLogger(__name__)
_HALF = (torch.float16, torch.bfloat16)


def read_weights(file: str | Path) -> dict[str, Tensor]:
    """Read a checkpoint as a flat state_dict under our names.

    Reads our `model.pt` (flat), the published `hi_end_mae_10k.pth` (`{"state_dict": ...}`, names prefixed
    `module.`), anything of either form, and `.safetensors`. Nothing but tensors is unpickled. Tensors are mapped from
    the file, page by page as they are used, so that the system can drop them from memory again. Those of half
    precision become float32.

    Raises:
        InputError: if there is no such file, or it holds no weights.
    """
    path = Path(file)
    if not path.is_file():
        raise InputError(f"{path}: no such checkpoint. Give the path of a model.pt or of hi_end_mae_10k.pth.")
    try:
        content: Any
        if path.suffix == SAFETENSORS:
            content = safetensors_form(path).load_file(path)
        else:
            try:
                content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            except RuntimeError:  # written by a PyTorch before 1.6: cannot be mapped
                content = torch.load(path, map_location="cpu", weights_only=True)
    except InputError:
        raise
    except Exception as error:  # torch raises a different type for each way of not being a checkpoint
        # Its text stays in the traceback: for a file with code in it, torch advises to load it unsafely.
        raise InputError(
            f"{path}: not a readable checkpoint ({type(error).__name__}): it is damaged, or holds more than "
            "weights. Download or train it again."
        ) from error
    if isinstance(content, Mapping):
        content = content.get("state_dict", content.get("model", content))
    entries = content.items() if isinstance(content, Mapping) else ()
    weights = {
        str(name).removeprefix(OFFICIAL_PREFIX): t.float() if t.dtype in _HALF else t
        for name, t in entries
        if isinstance(t, Tensor)
    }
    if not weights:
        raise InputError(f"{path}: holds no state_dict of weights. Give a model.pt or hi_end_mae_10k.pth.")
    return from_official(weights) if "encoder.patch_embed.proj.weight" in weights else weights


class WeightsLoader(CheckpointLoader):
    """Load weights as MONAI's `CheckpointLoader`, of every form that :func:`read_weights` reads."""

    def __call__(self, engine: Engine) -> None:
        """Load them, strictly, into the network of `load_dict`."""
        (network,) = self.load_dict.values()
        getattr(network, "module", network).load_state_dict(read_weights(self.load_path))  # also within DDP
        self.logger.info(f"Restored all variables from {self.load_path}")


def half_precision(weights: Mapping[str, Tensor], source: str | Path) -> dict[str, Tensor]:
    """Convert the floating tensors of a state_dict to float16, rounded to nearest, at half the size.

    Args:
        weights: flat state_dict.
        source: their file, for the message.

    Raises:
        InputError: a weight is not finite in float16, which ends at 65504.
    """
    halved = {name: t.half() if t.is_floating_point() else t for name, t in weights.items()}
    if large := [name for name, t in halved.items() if not t.isfinite().all()]:
        raise InputError(f"{source}: {large[0]} has values beyond float16, which ends at 65504; keep these weights")
    return halved


def passed_options(tensors: bool, settings: Mapping[str, Any]) -> str:
    """Say how to run a command with weights that do not fit its settings.

    Args:
        tensors: whether names or shapes differ, so that the weights need other configs.
        settings: values of their training that differ now, by option.
    """
    if not tensors:
        return f"Pass {options(settings)}"
    more = f"with {options(settings)}, " if settings else ""
    return f"Give the configs that it was trained with (such as tiny.json), {more}or the weights of this network."


def check_weights(
    checkpoints: str | Path | Sequence[str | Path],
    network: nn.Module,
    preparation: Mapping[str, Any] | None = None,
    advise: Callable[[bool, Mapping[str, Any]], str] = passed_options,
) -> None:
    """Refuse checkpoints that are not of this network and these scans, before any work is done.

    Args:
        checkpoints: a trained `model.pt`, or several.
        network: the network that is to be loaded.
        preparation: how scans are prepared, as for :func:`shared_networks.datasets.record.training_record`; None
            without scans. Without a record it cannot be compared, which is said.
        advise: says what to do about a difference, as :func:`passed_options`.

    Raises:
        InputError: if a file is missing or unreadable, its names or shapes differ from the network's, its positions
            are of another token grid, it is not the file that its record is of, or it was trained with another
            network or on scans prepared otherwise. The settings that differ are named all at once.
    """
    wanted = {name: list(tensor.shape) for name, tensor in network.state_dict().items()}
    here = {**(preparation or {}), **_by_option(network_settings(network))}
    for checkpoint in ensure_tuple(checkpoints):
        _check_is_there(Path(checkpoint))
        weights, record = read_weights(checkpoint), read_record(checkpoint)
        if record is None and preparation is not None:
            logger.warning(
                "%s has no %s: label names, preparation of scans and cases of training cannot be compared",
                checkpoint,
                record_file(checkpoint).name,
            )
        there = {**record["preparation"], **_by_option(record.get("network", {}))} if record else {}
        differing = different_settings(there, here)
        found = {name: list(tensor.shape) for name, tensor in weights.items()}
        names = found.keys() | wanted.keys()
        wrong = sorted(name for name in names if found.get(name) != wanted.get(name))
        ours = isinstance(network, HiEndUNETR | HiEndMAE)
        if ours and all(n.endswith(POSITIONS) and found.get(n, ())[::2] == wanted.get(n, [])[::2] for n in wrong):
            wrong = []  # it is img_size that differs, as is said below
        parts = []
        if wrong:
            name = wrong[0]
            parts.append(
                f"{len(wrong)} of {len(names)} tensors do not fit the network ({name} is {found.get(name, 'not')} "
                f"there, {wanted.get(name, 'not')} here)"
            )
        if differing:
            parts.append(f"trained with other settings: {listed_differences(differing)}")
        if parts:
            settings = {name: before for name, (before, _) in differing.items()}
            raise InputError(f"{checkpoint}: {'; '.join(parts)}. {advise(bool(wrong), settings)}")
        if isinstance(network, HiEndUNETR | HiEndMAE):
            check_grids(checkpoint, weights, network.vit.grid)


def _check_is_there(checkpoint: Path) -> None:
    """Refuse a path without a file, and say where to get weights."""
    if checkpoint.is_file():
        return
    advice = "Train first, or give --checkpoint a model.pt."
    if checkpoint.parent.name == "weights":  # the default of an overlay, such as small.json
        advice = (
            "Give --checkpoint a model.pt that these configs trained, or write it here from one: "
            f"python -m shared_networks.bundle.halve --checkpoint MODEL --output {checkpoint}"
        )
    raise InputError(f"{checkpoint}: no trained weights there. {advice}")


def _by_option(network: Mapping[str, Any]) -> dict[str, Any]:
    """Return :func:`network_settings` by the options that set them."""
    return {f"network_def#{name}": value for name, value in network.items()}


@dataclass(frozen=True)
class LoadReport:
    """Report which keys of a checkpoint were loaded, missing or unexpected, in the words of `load_state_dict`.

    Attributes:
        source: the checkpoint.
        loaded: keys copied into the network.
        missing: keys of the network that the checkpoint lacks, or has in another shape.
        unexpected: keys of the checkpoint that the network lacks; they are not used.
        kept: keys that hold the network's own values, because the checkpoint's are of other classes, or fixed
            positions of another token grid.
        part: `encoder`, `network` or `segmenter`.
        interpolated: learned positions resampled to the network's token grid: the two grids by key.
    """

    source: str
    loaded: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    kept: tuple[str, ...] = ()
    part: str = "encoder"
    interpolated: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"weights from {self.source}: {len(self.loaded)} keys loaded into the {self.part}"]
        lines += [f"  missing keys: {', '.join(self.missing) or 'none'}"]
        lines += [f"  unexpected keys, not used: {', '.join(shorten_names(self.unexpected)) or 'none'}"]
        lines += [f"  interpolated from {grids} tokens: {name}" for name, grids in self.interpolated.items()]
        lines += [f"  not loaded, as the checkpoint's does not fit: {name}" for name in self.kept]
        return "\n".join(lines)


def shorten_names(names: Sequence[str]) -> list[str]:
    """Shorten parameter names to their top module with a count; single ones stay whole."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(name.split(".")[0], []).append(name)
    return [f"{top}.* ({len(group)})" if len(group) > 1 else group[0] for top, group in groups.items()]


def load_encoder(
    network: HiEndUNETR | HiEndMAE, checkpoint: str | Path, preparation: Mapping[str, Any] | None = None
) -> LoadReport | None:
    """Load a pre-trained encoder into a network's `vit`, print what was loaded, and refuse half an encoder.

    Args:
        network: whose `vit` is to be loaded.
        checkpoint: our pre-training `model.pt`, the published `hi_end_mae_10k.pth`, a segmenter's `model.pt`, or
            an empty string to start from scratch. At another `img_size` positions that were learned are interpolated;
            of fixed ones the network has its own.
        preparation: how scans are prepared now, see :func:`shared_networks.datasets.record.training_record`. A record
            of another spacing or window causes a warning. None does not compare.

    Returns:
        The report, None from scratch.

    Raises:
        InputError: if the file is missing or unreadable, does not cover the whole encoder, is of another modality, or
            the token grid of its learned positions cannot be told.
    """
    if not checkpoint:
        print("pretrained_encoder is empty: the encoder starts from scratch", flush=True)
        return None
    if not Path(checkpoint).is_file():
        raise InputError(
            f"{checkpoint}: no pre-trained encoder there. Give --pretrained_encoder a model.pt of hi_end_mae_pretrain, "
            "the published hi_end_mae_10k.pth, or '' to train from scratch."
        )
    return _load(network, checkpoint, "encoder", preparation=preparation)


def load_start_weights(
    network: HiEndUNETR, init_weights: str | Path, pretrained_encoder: str | Path, record: TrainingRecord
) -> LoadReport | None:
    """Load the weights that the training of a segmenter starts from.

    Args:
        network: to be loaded.
        init_weights: a whole segmenter, see :func:`load_segmenter`; an empty string for none.
        pretrained_encoder: without one, its encoder alone; see :func:`load_encoder`.
        record: of the training. If it trains on a model in place, that model is loaded later, and the encoder may be
            missing.

    Returns:
        The report, None where nothing is loaded.

    Raises:
        InputError: as :func:`load_segmenter` and :func:`load_encoder`.
    """
    if init_weights:
        return load_segmenter(network, init_weights, record["labels"], record["preparation"])
    if record.model is not None and not Path(pretrained_encoder).is_file():
        return None
    return load_encoder(network, pretrained_encoder, record["preparation"])


def load_hi_end_mae(
    network: HiEndMAE, checkpoint: str | Path, preparation: Mapping[str, Any] | None = None
) -> LoadReport | None:
    """Load a whole pre-training network to continue its pre-training, print a report, and refuse anything else.

    Args:
        network: to be loaded.
        checkpoint: our `model.pt`, the published `hi_end_mae_10k.pth`, or an empty string to start from scratch.
            Position tables of another `img_size` are left out, as the network computes its own.
        preparation: see :func:`load_encoder`.

    Returns:
        The report, None from scratch.

    Raises:
        InputError: if the file is missing or unreadable, its names or shapes are not the network's, or it is of another
            modality.
    """
    return _load(network, checkpoint, "network", preparation=preparation) if checkpoint else None


def load_segmenter(
    network: HiEndUNETR,
    checkpoint: str | Path,
    labels: Mapping[str, int] | None = None,
    preparation: Mapping[str, Any] | None = None,
) -> LoadReport | None:
    """Load a fine-tuned segmenter, to go on from it, print what was loaded, and drop its head if the classes differ.

    Args:
        network: to be loaded.
        checkpoint: a `model.pt` of a segmentation bundle, or an empty string for none. At another `img_size` its
            learned positions are interpolated.
        labels: values of the labels by name; a head that was trained on others is dropped too. None does not compare.
        preparation: see :func:`load_encoder`.

    Returns:
        The report, None for none.

    Raises:
        InputError: if the file is missing or unreadable, if anything but head and positions is not the network's, if it
            is of another modality, or if the token grid of its positions cannot be told.
    """
    return _load(network, checkpoint, "segmenter", labels, preparation) if checkpoint else None


def network_settings(network: nn.Module) -> dict[str, Any]:
    """Return the settings of a network that change what it computes but no tensor's shape.

    Args:
        network: a :class:`HiEndUNETR` or :class:`HiEndMAE`; others have none.

    Returns:
        `num_heads`, `out_indices` and for pre-training `decoder_num_heads`, as the networks take them.
    """
    if not isinstance(network, HiEndUNETR | HiEndMAE):
        return {}
    heads = {module.num_heads for name, module in network.vit.named_modules() if name.endswith("attn")}
    settings = {"num_heads": heads.pop(), "out_indices": network.vit.out_indices}
    if isinstance(network, HiEndMAE):
        heads = {module.num_heads for name, module in network.decoder.named_modules() if name.endswith("attn")}
        settings |= {"decoder_num_heads": heads.pop()} if heads else {}
    return settings


def _load(
    network: HiEndUNETR | HiEndMAE,
    checkpoint: str | Path,
    part: str,
    labels: Mapping[str, int] | None = None,
    preparation: Mapping[str, Any] | None = None,
) -> LoadReport:
    """Load the network, or its encoder alone, and change nothing if the checkpoint does not cover it."""
    record = read_record(checkpoint)
    settings = network_settings(network)
    check_network(checkpoint, record, {"num_heads": settings["num_heads"]} if part == "encoder" else settings)
    if preparation is not None:
        check_start_preparation(checkpoint, record, preparation)
    if record is None and part == "segmenter":
        logger.warning("%s has no record: cases that trained it may now validate or test unnoticed", checkpoint)
    weights = read_weights(checkpoint)
    prefix = "vit." if part == "encoder" else ""
    own = {name: tensor for name, tensor in network.state_dict().items() if name.startswith(prefix)}
    kept: tuple[str, ...] = ()
    interpolated = {}
    for name in (name for name in own if name.endswith(POSITIONS) and name in weights):
        table, here = weights[name], network.vit.grid
        if table.ndim != 3 or table.shape[::2] != own[name].shape[::2]:
            continue  # of another width, so it is missing
        there = token_grid(table, here)
        if there == here:
            continue
        if "vit.cls_token" in weights or (there and is_sincos(table, there)):  # pre-training never trains them
            kept += (name,)
            del weights[name]
        elif there:
            interpolated[name] = f"{grid_text(there)} to {grid_text(here)}"
            weights[name] = interpolate_positions(table.float(), there, here)
        else:
            raise InputError(
                f"{checkpoint}: the token grid of its {table.shape[1]} learned positions cannot be told, to "
                f"interpolate them to {grid_text(here)} tokens. Give the img_size that it was trained with."
            )
    fits = {name: weights[name] for name in own if name in weights and weights[name].shape == own[name].shape}
    if part == "segmenter":
        others = labels is not None and record is not None and record["labels"] != labels
        head = [name for name in own if name.startswith("out.") and name in weights and (others or name not in fits)]
        if head:
            found, wanted = len(weights[head[0]]), len(own[head[0]])
            which = f"has {found} classes, not {wanted}" if found != wanted else "was trained on other labels"
            print(f"{checkpoint}: {which}: its head is left out and starts anew", flush=True)
            fits = {name: tensor for name, tensor in fits.items() if name not in head}
            kept += tuple(head)
    report = LoadReport(
        source=str(checkpoint),
        loaded=tuple(name for name in fits if name not in kept and name not in interpolated),
        missing=tuple(name for name in own if name not in fits and name not in kept),
        unexpected=tuple(name for name in weights if name not in own),
        kept=kept,
        part=part,
        interpolated=interpolated,
    )
    print(report, flush=True)
    if report.missing:
        wrong = [
            f"{name} is {list(weights[name].shape)} there, {list(own[name].shape)} here"
            for name in sorted(report.missing, key=lambda name: name.endswith(POSITIONS))
            if name in weights
        ]
        detail = wrong[0] if wrong else f"{report.missing[0]} is not there"
        raise InputError(
            f"{checkpoint}: does not cover the {part}, {len(report.missing)} of {len(own)} tensors are missing "
            f"({detail}). Give a checkpoint of the same patch size, width and depth as network_def."
        )
    if report.unexpected and part != "encoder":
        raise InputError(
            f"{checkpoint}: {len(report.unexpected)} tensors have no place in the network (such as "
            f"{report.unexpected[0]}). Give a checkpoint of the same depth as network_def."
        )
    network.load_state_dict({**network.state_dict(), **fits}, strict=True)
    return report


def load_hi_end_mae_10k(
    num_classes: int = 14, checkpoint: str | Path = "hi_end_mae_10k.pth", **network: Any
) -> HiEndUNETR:
    """Make a segmenter on the encoder that the authors pre-trained on ten thousand CTs.

    Args:
        num_classes: output channels, background included.
        checkpoint: the published file (the address is in the README), or our pre-training `model.pt`.
        network: further arguments of :class:`HiEndUNETR`; by default the published vit_large_p12 at 96^3.

    Returns:
        The network, its encoder loaded in full, its convolutions freshly initialised.

    Raises:
        InputError: if the file is missing, unreadable, or not of this encoder.

    Example:
        >>> network = load_hi_end_mae_10k(num_classes=14, checkpoint="hi_end_mae_10k.pth")
        >>> logits = network(torch.zeros(1, 1, 96, 96, 96))  # [1, 14, 96, 96, 96]
    """
    segmenter = HiEndUNETR(out_channels=num_classes, **network)
    load_encoder(segmenter, checkpoint)
    return segmenter


def to_monai_vit(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert the encoder of a network to the names of :class:`monai.networks.nets.ViT`.

    They load strictly into `ViT(..., proj_type="perceptron", qkv_bias=True)` of the same sizes. That ViT has no CLS
    token unless it classifies, and there its norms have epsilon 1e-5, so the CLS token is left out: the outputs are
    equal to the encoder's as segmenters run it, not as in pre-training, where all tokens attend to CLS too.

    Args:
        state_dict: all weights of the network.
    """
    weights = {name.removeprefix("vit."): tensor for name, tensor in state_dict.items() if name.startswith("vit.")}
    weights.pop("cls_token", None)
    # MONAI's blocks carry a norm for cross-attention even where there is none.
    norms = {n.replace("norm1", "norm_cross_attn"): t for n, t in weights.items() if ".norm1." in n}
    return weights | {n: torch.ones_like(t) if n.endswith("weight") else torch.zeros_like(t) for n, t in norms.items()}


def convert_weights(network: HiEndMAE, checkpoint: str | Path, output: str | Path, form: str) -> None:
    """Write a checkpoint in another form, after loading it strictly.

    Args:
        network: of the checkpoint's sizes; it is loaded.
        checkpoint: our `model.pt` or the published `hi_end_mae_10k.pth`.
        output: the file to write, which must not exist; `.safetensors` for this form, which is always flat.
        form: `model`, our flat `model.pt`; `official`, the published form and names (`{"state_dict": ...}`);
            or `monai_vit`, the encoder alone, see :func:`to_monai_vit`.

    Raises:
        InputError: for an unknown form, an output that is not set or exists, or that a record of other weights lies
            beside, or a checkpoint that :func:`load_hi_end_mae` refuses.
    """
    if form not in ("model", "official", "monai_vit"):
        raise InputError(f"format is {form!r}: give --format model, official or monai_vit")
    if not output:
        raise InputError("output is not set; pass --output FILE, the file to write")
    target = Path(output)
    if target.exists():
        raise InputError(f"{target}: exists and is not overwritten; move it away or give another --output")
    if (record := record_file(target)).exists():
        raise InputError(f"{target}: {record} there would be taken for its record; give another --output")
    if not checkpoint:
        raise InputError("checkpoint is not set; pass --checkpoint FILE, a model.pt or hi_end_mae_10k.pth")
    load_hi_end_mae(network, checkpoint)
    weights = network.state_dict()
    if form == "official":
        weights = to_official(weights, network.vit.patch_size)
    elif form == "monai_vit":
        weights = to_monai_vit(weights)
    nested = form == "official" and target.suffix != SAFETENSORS
    with atomic_write(target, "give another --output") as unfinished:
        save_tensors({"state_dict": weights} if nested else weights, unfinished)
    print(f"{target}: {len(weights)} tensors written as {form}", flush=True)
