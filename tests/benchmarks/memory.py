"""How much GPU memory a pre-training step needs, and so which batch and flags a card can take.

    python -m tests.benchmarks.memory --config_file configs/train.json

Further options override the config, as in `python -m monai.bundle run`. The step runs on tensors without data, so
this needs neither a GPU nor memory, and no formula has to be kept in step with the network.
"""

from __future__ import annotations

import math
import sys
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from monai.bundle import ConfigParser
from monai.utils import ensure_tuple_rep
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from shared_networks.errors import InputError, report_in_one_line
from shared_networks.settings.command_line import Given, read_settings
from shared_networks.settings.kinds import FILES
from shared_networks.settings.words import command_line_options, positional_words

GIB = 2**30
CARDS = (8, 16, 24, 80)
CROPS = ("batch_size", "num_samples", "accumulation_steps")  # their product is the recipe's crops
CONTEXT = int(0.75 * GIB)  # CUDA context, cuBLAS and cuDNN workspaces
FRAGMENTATION = 0.1  # of what a step allocates beyond weights, gradients and moments
MANY_CROPS = 8  # so many in a step keep a GPU busy: below it, checkpointing's larger batch is worth its recomputing


@dataclass(frozen=True)
class StepMemory:
    """Bytes of one training step, without and with the allowance.

    Args:
        weights: parameters and buffers.
        gradients: of the trainable parameters.
        moments: AdamW's two.
        activations: kept for the backward pass when the forward pass ends; in mixed precision these include one copy
            of the weights, whatever the batch.
        peak: most bytes at once in the step, all of the above and what comes and goes included.
    """

    weights: int
    gradients: int
    moments: int
    activations: int
    peak: int

    @property
    def total(self) -> int:
        """What a card needs: the peak, a CUDA context of 0.75 GiB, and a tenth of the activations for fragmentation."""
        fixed = self.weights + self.gradients + self.moments
        return self.peak + CONTEXT + int(FRAGMENTATION * (self.peak - fixed))


class LiveBytes(TorchDispatchMode):
    """Follows each storage that operators make inside the block, from birth to release.

    `now` and `peak` are bytes alive, and most alive at once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.peak = 0
        self.alive: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._follow(leaf.untyped_storage())
        return out

    def _follow(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.alive:
            return

        def release(_: weakref.ref[Any]) -> None:
            del self.alive[key]
            self.now -= size

        self.alive[key] = weakref.ref(storage, release)
        self.now += size
        self.peak = max(self.peak, self.now)


def step_memory(
    build: Callable[[], nn.Module],
    loss: Callable[[Tensor, Tensor], Tensor],
    image_shape: Sequence[int],
    dtype: torch.dtype = torch.float32,
) -> StepMemory:
    """Count the memory of a step of forward and backward pass with AdamW.

    Gradients are there from the start, as in all but the first of the passes that are accumulated. Several processes
    (DistributedDataParallel) need the gradients' bytes once more, for its buckets.

    Args:
        build: makes the network, with or without checkpointing.
        loss: of prediction (float32) and image; must not look at values, as MONAI's Dice losses do.
        image_shape: of the input, [B, C, H, W, D].
        dtype: of autocast; float32 for none.

    Returns:
        Bytes.
    """
    with FakeTensorMode(allow_non_fake_inputs=True), LiveBytes() as bytes_:
        network = build().train()
        weights = sum(t.numel() * t.element_size() for t in (*network.parameters(), *network.buffers()))
        trainable = [p for p in network.parameters() if p.requires_grad]
        for parameter in trainable:
            parameter.grad = torch.zeros_like(parameter)
        moments = [torch.zeros_like(p) for p in trainable for _ in range(2)]
        gradients = sum(p.numel() * p.element_size() for p in trainable)

        image = torch.zeros(*image_shape)
        before = bytes_.peak = bytes_.now
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            prediction = network(image)
        value = loss(prediction.float(), image)
        del prediction
        activations = bytes_.now - before
        value.backward()
        return StepMemory(weights, gradients, sum(m.nbytes for m in moments), activations, bytes_.peak)


def divisors(number: int) -> list[int]:
    """All divisors, ascending."""
    return [n for n in range(1, number + 1) if number % n == 0]


def most_crops(capacity: int, memory: Callable[[int], StepMemory], total: int) -> int:
    """Largest divisor of `total` crops whose step fits.

    Args:
        capacity: bytes of the card.
        memory: of a step, by the number of crops.
        total: crops between two steps of the optimiser.

    Returns:
        Number of crops; 0 if not even one fits.
    """
    fitting = 0
    low, high = 0, len(steps := divisors(total))
    while low < high:
        middle = (low + high) // 2
        if memory(steps[middle]).total <= capacity:
            fitting, low = steps[middle], middle + 1
        else:
            high = middle
    return fitting


def flags(crops: int, total: int, checkpointing: bool) -> str:
    """Options of the training command that take `crops` a step and `total` between two steps of the optimiser."""
    samples = max(n for n in divisors(crops) if n <= 8)
    words = [f"--batch_size {crops // samples} --num_samples {samples}"]
    if crops < total:
        words.append(f"--accumulation_steps {total // crops}")
    if checkpointing:
        words.append("--network_def#use_checkpoint True")
    return " ".join(words)


def advice(config: ConfigParser, cards: Sequence[int] = CARDS) -> str:
    """Which batch and flags each card takes.

    Args:
        config: a pre-training config: its network_def, loss, img_size and crops.
        cards: sizes in GiB.

    Returns:
        A Markdown table: most crops a step (divisors of the recipe's), by precision and checkpointing, and flags for
        bfloat16. Float32 takes `--amp False`.
    """
    config["device"] = "cpu"
    total = math.prod(config.get_parsed_content(name) for name in CROPS)
    size = ensure_tuple_rep(config.get_parsed_content("img_size"), 3)
    channels = config.get_parsed_content("network_def#in_channels")
    loss = config.get_parsed_content("loss")

    @cache
    def memory(dtype: torch.dtype, checkpointing: bool, crops: int) -> StepMemory:
        def build() -> nn.Module:
            config["network_def"]["use_checkpoint"] = checkpointing
            config.parse(reset=True)
            return config.get_parsed_content("network_def")

        return step_memory(build, loss, (crops, channels, *size), dtype)

    columns = [(dtype, ckpt) for dtype in (torch.bfloat16, torch.float32) for ckpt in (False, True)]
    one = memory(torch.bfloat16, False, 1)
    fixed = (one.weights + one.gradients + one.moments) / GIB
    lines = [
        f"Weights, gradients and AdamW's moments take {fixed:.1f} GiB; several processes need "
        f"{one.gradients / GIB:.1f} GiB more each. The recipe's step has {total} crops.",
        "",
        "| card | bfloat16 | with checkpointing | float32 | with checkpointing | flags |",
        "|---|---|---|---|---|---|",
    ]
    for card in cards:
        most = {column: most_crops(card * GIB, partial(memory, *column), total) for column in columns}
        cells = " | ".join(str(most[c]) if most[c] else "does not fit" for c in columns)
        plain, saving = most[columns[0]], most[columns[1]]
        checkpointing = plain < min(MANY_CROPS, saving)
        crops = saving if checkpointing else plain
        option = f"`{flags(crops, total, checkpointing)}`" if crops else f"none: {fixed:.1f} GiB before any crop"
        lines.append(f"| {card} GB | {cells} | {option} |")
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> None:
    """Print the advice for a config.

    Args:
        arguments: words of the command line: `--config_file` (default configs/train.json), then overrides.

    Raises:
        InputError: if an option names nothing in the config or cannot have its value, or the config is not one of
            pre-training.
    """
    from fire.parser import DefaultParseValue  # as monai.bundle reads its options

    words = ["--config_file", "configs/train.json", *arguments]
    options = command_line_options(words)
    passed: dict[str, Any] = {
        key: DefaultParseValue(value) if isinstance(value, str) else value for key, value in options.items()
    }
    del passed["config_file"]
    files = options["config_file"]
    try:
        config = ConfigParser(ConfigParser.load_config_files(FILES.read(files)))
    except (OSError, ValueError) as error:
        fix = "run from a bundle's folder or give --config_file FILE"
        raise InputError(f"{files}: {getattr(error, 'strerror', None) or error or 'no file'}; {fix}") from error
    needed = {"network_def", "loss", "img_size", *CROPS}
    if "labels" in config or needed - set(config.get()):
        raise InputError(f"{files} is no pre-training config: it must have {', '.join(sorted(needed))}, and no labels")
    if stray := positional_words(words):
        raise InputError(f"{stray[0]}: is no option and no value; give --name value")
    given = [Given(name, options[name], value) for name, value in passed.items()]
    config.update(read_settings(config, given, files=str(files)))
    print(advice(config))


if __name__ == "__main__":
    report_in_one_line()
    main(sys.argv[1:])
