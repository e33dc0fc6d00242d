"""Commands of the bundles, each with a folder of its results: run side by side, and never twice."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, NamedTuple

from shared_networks.errors import InputError
from shared_networks.files import write_json

ROOT = Path(__file__).parents[3]


class Run(NamedTuple):
    """A command and where its results go.

    Args:
        part: of the benchmark, for the sum of times, such as "fine-tuning".
        folder: of the results, `log.txt` and `run.json`.
        bundle: folder to run it in.
        words: of the command, after `python`.
    """

    part: str
    folder: Path
    bundle: str
    words: list[str]


def bundle_run(part: str, folder: Path, bundle: str, configs: Sequence[str], options: dict[str, Any]) -> Run:
    """Return a run of a bundle with overrides, as a user types it.

    Args:
        part: see :class:`Run`.
        folder: see :class:`Run`.
        bundle: such as `hi_end_mae_pretrain`.
        configs: such as `["train", "prepared"]`.
        options: overrides by id.
    """
    files = repr([f"configs/{name}.json" for name in configs])
    pairs = [(f"--{key}", value if isinstance(value, str) else repr(value)) for key, value in options.items()]
    words = ["-W", "ignore", "-m", "monai.bundle", "run", "--config_file", files]
    return Run(part, folder, bundle, [*words, *(word for pair in pairs for word in pair)])


def execute(run: Run) -> dict[str, Any]:
    """Run a command, unless its results are there.

    Returns:
        `run.json`: the command, its seconds, and seconds of processor time.

    Raises:
        InputError: the folder holds the results of another command, or the command failed.
    """
    record = run.folder / "run.json"
    content: dict[str, Any] = {"part": run.part, "bundle": run.bundle, "words": run.words}
    if record.is_file():
        before = json.loads(record.read_text())
        if changes := sorted(set(run.words) ^ set(before["words"])):
            raise InputError(
                f"{run.folder}: made with other settings ({', '.join(changes[:4])}); give another --out, or remove it"
            )
        if "seconds" in before:
            return before
    write_json(record, content)
    start = time.monotonic()
    with (run.folder / "log.txt").open("a") as log:
        process = subprocess.Popen(
            [sys.executable, *run.words],
            cwd=ROOT / run.bundle,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        last = (run.folder / "log.txt").read_text(errors="replace").strip().splitlines()[-1:]
        raise InputError(f"{run.folder / 'log.txt'}: exit code {process.returncode}: {' '.join(last)}")
    content["seconds"] = round(time.monotonic() - start, 1)
    content["processor_seconds"] = round(usage.ru_utime + usage.ru_stime, 1)
    write_json(record, content)
    return content


def is_done(run: Run) -> bool:
    """Return whether the results of a command are there."""
    record = run.folder / "run.json"
    return record.is_file() and "seconds" in json.loads(record.read_text())


def execute_all(
    chains: Sequence[Sequence[Run]],
    jobs: int,
    say: Callable[[str], None] = print,
    until: Callable[[], bool] = lambda: False,
) -> list[dict[str, Any]]:
    """Run chains of commands side by side, those of a chain one after the other.

    Args:
        chains: of commands.
        jobs: how many chains at a time.
        say: takes a line for each chain that ended.
        until: once it returns true, no further command begins.

    Returns:
        What :func:`execute` returns, chain by chain.

    Raises:
        InputError: see :func:`execute`; chains that have not begun are then left out.
    """

    def follow(chain: Sequence[Run]) -> list[dict[str, Any]]:
        records: list[dict[str, Any]] = []
        for run in chain:
            if until() and not is_done(run):
                return records
            records.append(execute(run))
        say(f"{chain[0].part}, {chain[0].folder}: {sum(record['seconds'] for record in records):.0f} s")
        return records

    with ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(follow, chain) for chain in chains]
        try:
            ended, _ = wait(futures, return_when=FIRST_EXCEPTION)
        finally:
            pool.shutdown(cancel_futures=True)
    for future in ended:
        future.result()
    return [record for future in futures for record in future.result()]


class Sitting:
    """Runs that stop to begin when the time is over.

    Args:
        jobs: runs at a time.
        minutes: after which no further run begins; None for no end.
    """

    def __init__(self, jobs: int, minutes: float | None) -> None:
        self.jobs = jobs
        self.end = None if minutes is None else time.monotonic() + 60 * minutes
        self.records: list[dict[str, Any]] = []

    @property
    def over(self) -> bool:
        return self.end is not None and time.monotonic() >= self.end

    def run(self, chains: Sequence[Sequence[Run]]) -> None:
        """Run chains of commands, see :func:`execute_all`."""
        self.records += execute_all(chains, self.jobs, until=lambda: self.over)
