from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from shared_networks.errors import InputError
from tests.benchmarks.study.execution import Run, Sitting, execute, execute_all


def python(folder: Path, code: str) -> Run:
    return Run("testing", folder, ".", ["-c", code])


def test_a_run_is_done_once_and_recorded(tmp_path: Path) -> None:
    run = python(tmp_path / "a", f"open({str(tmp_path / 'times')!r}, 'a').write('x'); print('said')")
    record = execute(run)
    assert execute(run) == record == json.loads((tmp_path / "a" / "run.json").read_text())
    assert (tmp_path / "times").read_text() == "x"
    assert (tmp_path / "a" / "log.txt").read_text() == "said\n"
    assert record["words"] == run.words


def test_a_record_has_the_time_taken_and_the_processors(tmp_path: Path) -> None:
    record = execute(
        python(
            tmp_path,
            "import time; time.sleep(0.5); start = time.process_time()\nwhile time.process_time() < start + 0.5: pass",
        )
    )
    assert record["seconds"] >= 1
    assert 0.5 <= record["processor_seconds"] < record["seconds"]


def test_an_interrupted_run_is_done_again(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"log\.txt: exit code 3: last words"):
        execute(python(tmp_path, "print('last words'); raise SystemExit(3)"))
    run = Run("testing", tmp_path, ".", json.loads((tmp_path / "run.json").read_text())["words"])
    with pytest.raises(InputError, match="exit code 3"):
        execute(run)


def test_results_of_other_settings_are_refused(tmp_path: Path) -> None:
    execute(python(tmp_path, "pass"))
    with pytest.raises(InputError, match=rf"{tmp_path}: made with other settings \(.*1 \+ 1.*\); give another --out"):
        execute(python(tmp_path, "1 + 1"))


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
    chains = [[python(tmp_path / str(number), "raise SystemExit(number)")] for number in range(3)]
    with pytest.raises(InputError, match="NameError: name 'number' is not defined"):
        execute_all(chains, 1)
    assert not (tmp_path / "2").exists()


def test_after_the_time_only_what_is_done_is_read(tmp_path: Path) -> None:
    def write(name: str) -> Run:
        return Run("testing", tmp_path / name, ".", ["-c", f"open({str(tmp_path / name / 'x')!r}, 'a').write('x')"])

    sitting = Sitting(1, None)
    sitting.run([[write("a")]])
    over = Sitting(1, 0)
    over.run([[write("a"), write("b")], [write("c")]])
    assert over.records == sitting.records
    assert (tmp_path / "a" / "x").read_text() == "x"
    assert not (tmp_path / "b").exists() and not (tmp_path / "c").exists()
