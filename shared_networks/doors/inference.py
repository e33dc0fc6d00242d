"""Run a bundle's inference config in this process, as `python -m monai.bundle run` does in its own."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.bundle import ConfigParser
from monai.utils import get_seed, set_determinism

from shared_networks.datasets.record import read_record, trained_labels
from shared_networks.doors.bundles import all_bundles, find_segmenter, label_names, short_name
from shared_networks.errors import InputError, input_error_in
from shared_networks.networks.checkpoints import read_weights
from shared_networks.settings.command_line import Given, read_settings
from shared_networks.settings.table import SETTINGS

SIZES = ("small", "tiny", "")
"""Overlays that make a network of another size; none for the full one."""

FAST_OVERLAP = 0.0
"""Share of a window that the next one covers too, where speed counts more; measured in `docs/results/fast.json`."""


def run_inference(
    bundle: str, scans: Sequence[str], fast: bool, given: Sequence[Given], one_scan: bool = False
) -> None:
    """Segment scans by a bundle's inference config.

    The process is left as it was: import path, random states and deterministic modes.

    Args:
        bundle: its name, see :func:`shared_networks.doors.bundles.find_segmenter`.
        scans: paths of :func:`shared_networks.datasets.scans.find_scans`.
        fast: whether windows overlap by :data:`FAST_OVERLAP`.
        given: settings, of which `output_dir` is needed; without a `checkpoint` or `checkpoints`
            :func:`default_weights` are used.
        one_scan: refuse data of several scans.

    Raises:
        FailedScansError: a scan failed; the others are done.
        InputError: a setting does not exist or cannot have its value, data or weights are of no use, or results cannot
            be written.
    """
    folder = find_segmenter(bundle)
    names = [one.name for one in given]
    if "bundle_root" in names:
        raise InputError("--bundle_root: follows from --bundle; give the name of a bundle there")
    if fast and "overlap" in names:
        raise InputError("--fast sets --overlap; give one of them")
    given = [*given, *([Given("overlap", FAST_OVERLAP, FAST_OVERLAP)] if fast else ())]
    weights = _weights(given)
    if not weights:
        weights = [default_weights(folder)]
        given = [*given, Given("checkpoint", str(weights[0]), str(weights[0]))]
    if "label_names" not in names:
        for file in weights:
            check_owner(file, folder)
    with _process_left_as_it_was():
        try:
            parser = configured(folder, network_size(folder, weights[0], given), given)
            parser.ref_resolver.resolved_content["dataset_dir"] = list(scans)
            parser.get_parsed_content("initialize")
            if one_scan and (count := len(parser.get_parsed_content("datalist"))) != 1:
                raise InputError(
                    f"{scans[0]}: holds {count} scans; give one, or segment folders with hi-end-mae segment"
                )
            parser.get_parsed_content("run")
        except Exception as error:
            found = input_error_in(error)
            if found is None:
                raise
            raise found from None


def configured(bundle: Path, size: str, given: Sequence[Given]) -> ConfigParser:
    """Return a bundle's inference config with settings, ready to be run.

    Args:
        bundle: its folder.
        size: one of :data:`SIZES`.
        given: settings.

    Raises:
        InputError: a setting does not exist or cannot have its value.
    """
    files = [f"{name}.json" for name in ("inference", size) if name]
    config = ConfigParser()
    config.read_config([bundle / "configs" / file for file in files])
    root = Given("bundle_root", str(bundle), str(bundle))
    settings = read_settings(config, [root, *given], files=f"{' and '.join(files)} of {bundle.name}")
    config.parse()
    # As resolved values: a path is no expression, whatever it begins with.
    config.ref_resolver.resolved_content.update(settings)
    return config


def network_size(bundle: Path, weights: Path, given: Sequence[Given]) -> str:
    """Return the one of :data:`SIZES` whose network has the shapes of weights, else the nearest; that is then refused.

    Args:
        bundle: its folder.
        weights: a model of any size.
        given: settings.

    Raises:
        InputError: the weights cannot be read, or as :func:`configured`.
    """
    found = {(name, tensor.shape) for name, tensor in read_weights(weights).items()}
    fitting = {}
    for size in SIZES:
        config = configured(bundle, size, given)
        with torch.device("meta"):  # shapes alone, without memory
            network = config.get_parsed_content("network_def")
        shapes = {(name, tensor.shape) for name, tensor in network.state_dict().items()}
        if found == shapes:
            return size
        fitting[size] = len(found & shapes)
    return max(SIZES, key=fitting.__getitem__)


def default_weights(bundle: Path) -> Path:
    """Return the weights to segment with where none are named: those that ship, else those that the bundle trained.

    Args:
        bundle: its folder.

    Raises:
        InputError: neither are there and of the bundle's labels, or a record is of no use.
    """
    files = [bundle / "weights" / "small.pt", bundle / "models" / "model.pt"]
    for file in (file for file in files if file.is_file()):
        if (record := read_record(file)) is None or trained_labels(record) == label_names(bundle):
            return file
    raise InputError(
        f"{bundle}: has no weights of its labels, neither {files[0].relative_to(bundle)} nor "
        f"{files[1].relative_to(bundle)}; train it, or give --weights a model.pt of these labels"
    )


def check_owner(weights: Path, bundle: Path) -> None:
    """Refuse weights that another bundle trained, and name that bundle.

    Weights without a record, or of labels that no bundle has, are left to the bundle's own check.

    Args:
        weights: a model.
        bundle: folder of the bundle that is to take them.

    Raises:
        InputError: they are another bundle's, or their record is of no use.
    """
    if (record := read_record(weights)) is None:
        return
    trained = trained_labels(record)
    owners = [other for other in all_bundles().values() if label_names(other) == trained]
    if owners and bundle not in owners:
        fix = f"give --bundle {short_name(owners[0])}" if trained else f"give a model of {bundle.name}"
        raise InputError(f"{weights}: weights of {owners[0].name}, not of {bundle.name}; {fix}")


def _weights(given: Sequence[Given]) -> list[Path]:
    """The models that settings name; none where they name none."""
    by_name = {one.name: one.value for one in given}
    for name in ("checkpoints", "checkpoint"):
        if name in by_name:
            try:
                files = SETTINGS[name].read(by_name[name])
                return [Path(file) for file in (files if isinstance(files, list) else [files])]
            except (ValueError, TypeError):  # said with the other settings
                return []
    return []


@contextmanager
def _process_left_as_it_was() -> Iterator[None]:
    """Undo what a config does to a process that is not its own."""
    path, hook, seed = [*sys.path], sys.excepthook, get_seed()
    states: Any = random.getstate(), np.random.get_state()
    cudnn = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    gpus = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices=gpus):
        try:
            yield
        finally:
            set_determinism(seed)
            torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = cudnn
            random.setstate(states[0])
            np.random.set_state(states[1])
            sys.path[:], sys.excepthook = path, hook
