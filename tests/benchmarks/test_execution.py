from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from pathlib import Path

import pytest

from shared_networks.errors import InputError
from tests.benchmarks.study.execution import Run, Sitting, execute, execute_all
from tests.conftest import ROOT


@pytest.fixture(autouse=True)
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A place for modules, which new processes know too."""
    (tmp_path / "modules").mkdir()
    monkeypatch.syspath_prepend(tmp_path / "modules")


@pytest.fixture
def workers(modules: None) -> Iterator[Executor]:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        yield pool


def python(folder: Path, code: str, *words: str) -> Run:
    """The command that runs a module of this code."""
    root = next(parent for parent in (folder, *folder.parents) if (parent / "modules").is_dir())
    (root / "modules" / f"payload_{folder.name}.py").write_text(code)
    return Run("testing", folder, ".", ["-m", f"payload_{folder.name}", *words])


def test_a_run_is_done_once_and_recorded(tmp_path: Path, workers: Executor) -> None:
    run = python(tmp_path / "a", f"open({str(tmp_path / 'times')!r}, 'a').write('x'); print('said')")
    record = execute(run, workers)
    assert execute(run, workers) == record == json.loads((tmp_path / "a" / "run.json").read_text())
    assert (tmp_path / "times").read_text() == "x"
    assert (tmp_path / "a" / "log.txt").read_text() == "said\n"
    assert record["words"] == run.words


def test_a_run_is_the_command(tmp_path: Path, workers: Executor) -> None:
    """With its arguments, in its folder, as the main module; and it leaves the worker as it was."""
    code = (
        "import os, sys; print(sys.argv[1:], os.getcwd(), __name__); sys.path.insert(0, '.'); os.system('echo child')"
    )
    for name, words in (("a", ["--x", "1"]), ("b", [])):
        run = python(tmp_path / name, code, *words)._replace(bundle="hi_end_mae_pretrain")
        execute(run, workers)
        said = f"{words} {ROOT / 'hi_end_mae_pretrain'} __main__"
        assert sorted((tmp_path / name / "log.txt").read_text().splitlines()) == [said, "child"]
    execute(python(tmp_path / "c", "import sys; assert '.' not in sys.path"), workers)


def test_a_record_has_the_time_taken_and_the_processors(tmp_path: Path, workers: Executor) -> None:
    code = "import time; time.sleep(0.5); start = time.process_time()\nwhile time.process_time() < start + 0.5: pass"
    record = execute(python(tmp_path / "a", code), workers)
    assert record["seconds"] >= 1
    assert 0.5 <= record["processor_seconds"] < record["seconds"]


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("print('last words'); raise SystemExit(3)", r"log\.txt: exit code 3: last words"),
        ("raise SystemExit('last words')", r"log\.txt: exit code 1: last words"),
        ("1 / 0", r"log\.txt: exit code 1: ZeroDivisionError: division by zero"),
    ],
)
def test_a_failed_run_is_done_again(tmp_path: Path, workers: Executor, code: str, said: str) -> None:
    run = python(tmp_path / "a", code)
    for _ in range(2):
        with pytest.raises(InputError, match=said):
            execute(run, workers)


def test_a_run_that_is_killed_is_told(tmp_path: Path, workers: Executor) -> None:
    with pytest.raises(InputError, match=r"log\.txt: its process was killed; start again to go on"):
        execute(python(tmp_path / "a", "import os; os.kill(os.getpid(), 9)"), workers)


def test_results_of_other_settings_are_refused(tmp_path: Path, workers: Executor) -> None:
    execute(python(tmp_path / "a", "pass"), workers)
    with pytest.raises(InputError, match=r"/a: made with other settings \(--x\); give another --out"):
        execute(python(tmp_path / "a", "pass", "--x"), workers)


def test_chains_run_side_by_side_and_their_commands_in_turn(tmp_path: Path) -> None:
    pipe, file = str(tmp_path / "pipe"), str(tmp_path / "file")
    os.mkfifo(pipe)  # opening it waits for the other side
    chains = [
        [
            python(tmp_path / "1", f"import signal; signal.alarm(60); open({pipe!r}, 'w'); open({file!r}, 'w')"),
            python(tmp_path / "2", f"open({file!r})"),
        ],
        [python(tmp_path / "3", f"import signal; signal.alarm(60); open({pipe!r})")],
    ]
    records = execute_all(chains, 2)
    assert [record["words"] for record in records] == [run.words for chain in chains for run in chain]


def test_after_a_failure_no_chain_begins(tmp_path: Path) -> None:
    chains = [[python(tmp_path / str(number), "number")] for number in range(3)]
    with pytest.raises(InputError, match="NameError: name 'number' is not defined"):
        execute_all(chains, 1)
    assert not (tmp_path / "2").exists()


def test_after_the_time_only_what_is_done_is_read(tmp_path: Path) -> None:
    def write(name: str) -> Run:
        return python(tmp_path / name, f"open({str(tmp_path / name / 'x')!r}, 'a').write('x')")

    sitting = Sitting(1, None)
    sitting.run([[write("a")]])
    over = Sitting(1, 0)
    over.run([[write("a"), write("b")], [write("c")]])
    assert over.records == sitting.records
    assert (tmp_path / "a" / "x").read_text() == "x"
    assert not (tmp_path / "b").exists() and not (tmp_path / "c").exists()
