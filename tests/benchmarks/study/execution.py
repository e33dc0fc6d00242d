"""Commands of the bundles, each with a folder of its results: run side by side, and never twice."""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import runpy
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Executor, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
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


@contextmanager
def output_in(file: Path) -> Iterator[None]:
    """Append to a file what this process writes to its output and errors, whoever writes it."""
    with file.open("a") as log:
        kept = [os.dup(stream) for stream in (1, 2)]
        try:
            for stream in (1, 2):
                os.dup2(log.fileno(), stream)
            yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for stream, before in zip((1, 2), kept, strict=True):
                os.dup2(before, stream)
                os.close(before)


def processor_seconds() -> float:
    """Of this process and those it started."""
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def run_here(run: Run) -> tuple[int, dict[str, float]]:
    """Run a module as the command does, in this process, which so imports everything once for many commands.

    Returns:
        The exit code, and the record's times.
    """
    start, used = time.monotonic(), processor_seconds()
    arguments, path, folder = sys.argv, sys.path[:], Path.cwd()
    place = run.words.index("-m") + 1
    code = 0
    with output_in(run.folder / "log.txt"), warnings.catch_warnings():
        try:
            warnings.simplefilter("ignore")
            os.chdir(ROOT / run.bundle)
            sys.argv = run.words[place:]
            runpy.run_module(run.words[place], run_name="__main__", alter_sys=True)
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
            if isinstance(end.code, str):
                print(end.code)
        except BaseException:
            code = 1
            traceback.print_exc()
        finally:
            sys.argv, sys.path[:] = arguments, path
            os.chdir(folder)
    times = {"seconds": time.monotonic() - start, "processor_seconds": processor_seconds() - used}
    return code, {key: round(value, 1) for key, value in times.items()}


def execute(run: Run, workers: Executor) -> dict[str, Any]:
    """Run a command in a worker, unless its results are there.

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
    log = run.folder / "log.txt"
    try:
        code, times = workers.submit(run_here, run).result()
    except BrokenProcessPool:
        raise InputError(f"{log}: its process was killed; start again to go on") from None
    if code:
        last = log.read_text(errors="replace").strip().splitlines()[-1:]
        raise InputError(f"{log}: exit code {code}: {' '.join(last)}")
    content |= times
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
            records.append(execute(run, workers))
        say(f"{chain[0].part}, {chain[0].folder}: {sum(record['seconds'] for record in records):.0f} s")
        return records

    os.environ["OMP_NUM_THREADS"] = "1"  # of the workers, which share the cores
    fresh = multiprocessing.get_context("spawn")  # a fork would share the GPU's state
    with ProcessPoolExecutor(jobs, fresh) as workers, ThreadPoolExecutor(jobs) as pool:
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
