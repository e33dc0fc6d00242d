"""No iteration of training makes the host wait for the device, unless it prints a line."""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from ignite.engine import Events
from monai.bundle import ConfigWorkflow
from torch.utils._python_dispatch import TorchDispatchMode

from shared_networks.training.host_copy import HostCopy
from tests.conftest import ROOT

WARM_UP = 3  # iterations in which libraries and optimisers set themselves up
PRINTED = 10  # each so many iterations the loss is printed
READERS = ("_local_scalar_dense", "nonzero", "equal", "masked_select")  # what a GPU would be waited for


class Readers(TorchDispatchMode):
    """Note each operator that gives a value to Python: on a GPU each of them waits."""

    def __init__(self, note: Callable[[str], None]) -> None:
        super().__init__()
        self.note = note
        self.late = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.overloadpacket.__name__ in READERS and not self.late:
            self.note("".join(traceback.format_stack(limit=12)[:-1]))
        return func(*args, **(kwargs or {}))

    @contextmanager
    def reading_late(self) -> Iterator[None]:
        """What is read meanwhile has arrived, on a GPU, before it is read."""
        self.late = True
        try:
            yield
        finally:
            self.late = False


def waits(flow: ConfigWorkflow, device: torch.device) -> dict[int, list[str]]:
    """Train, and return where each iteration, from its batch's arrival to its last handler, waits for the device."""
    trainer = flow.parser.get_parsed_content("train#trainer")
    found: dict[int, list[str]] = {}
    note = Readers(lambda place: found[trainer.state.iteration].append(place))
    read = HostCopy.read

    def read_late(copy: HostCopy) -> float:
        with note.reading_late():
            return read(copy)

    def start() -> None:
        found[trainer.state.iteration] = []
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("warn")
        else:
            note.__enter__()

    def stop() -> None:
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")
        else:
            note.__exit__(None, None, None)

    def shown(message: Warning | str, _kind: Any, file: str, line: int, *_: Any) -> None:
        if "synchroniz" in str(message):
            found[trainer.state.iteration].append(
                f"{file}:{line}: {message}\n{''.join(traceback.format_stack()[-14:])}"
            )

    trainer.add_event_handler(Events.ITERATION_STARTED, start)
    # Validation begins with the epoch's end, and the run's own handlers are attached after these: they end with it.
    trainer.add_event_handler(Events.STARTED, lambda: trainer.add_event_handler(Events.ITERATION_COMPLETED, stop))
    with warnings.catch_warnings(), mock.patch.object(HostCopy, "read", read_late):
        warnings.simplefilter("always")
        with mock.patch.object(warnings, "showwarning", shown):
            flow.run()
    return found


@pytest.mark.parametrize(
    ("bundle", "optimizer", "known"),
    [
        ("hi_end_mae_pretrain", "torch.optim.AdamW", 0),
        ("hi_end_mae_pretrain", "shared_networks.training.muon.Muon", 0),
        ("hi_end_mae_btcv_seg", "torch.optim.AdamW", 1),  # MONAI's Dice loss looks whether a class weight is below 0
    ],
)
def test_an_iteration_waits_for_nothing(
    datasets: dict[str, Path], tmp_path: Path, device: torch.device, bundle: str, optimizer: str, known: int
) -> None:
    settings: dict[str, Any] = {"epochs": 5, "val_interval": 99, "num_samples": 1, "warmup_epochs": 1, "amp": True}
    if known:
        settings |= {"split#val_fraction": 0.4, "split#test_fraction": 0.0, "pretrained_encoder": ""}
    else:
        settings |= {"val_fraction": 0.3, "batch_size": 1}
    flow = ConfigWorkflow(
        config_file=[str(ROOT / bundle / "configs" / name) for name in ("train.json", "tiny.json")],
        logging_file=False,
        bundle_root=str(ROOT / bundle),
        dataset_dir=str(datasets["btcv"]),
        ckpt_dir=str(tmp_path),
        output_dir=str(tmp_path),
        device=str(device),
        **{"optimizer#_target_": optimizer, **settings},
    )
    flow.initialize()
    found = waits(flow, device)
    assert max(found) >= PRINTED
    for iteration in range(WARM_UP, max(found) + 1):
        allowed = known + (iteration % PRINTED == 0)
        places = found[iteration]
        assert len(places) <= allowed, f"iteration {iteration}: {len(places)} waits, the last {places[-1]}"
