"""Several runs that fill one store at a time: no case is lost, none is prepared twice, and one may be killed."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import pytest

from shared_networks.datasets.scans import Source
from shared_networks.store.format import append_entry, manifest_entries, manifest_file, write_manifest
from shared_networks.store.runs import Queue, SharedManifest
from tests.store.test_prepare import body, command, run, save, stored

pytestmark = pytest.mark.integration


@pytest.fixture
def data(tmp_path: Path) -> Path:
    for seed in range(30):
        save(tmp_path / "set" / f"c{seed:02d}.nii.gz", body(seed))
    return tmp_path / "set"


def wait_for_lines(out: Path, count: int) -> None:
    while not (manifest_file(out).exists() and len(manifest_file(out).read_bytes().splitlines()) >= count):
        time.sleep(0.005)


@pytest.mark.parametrize("killed", [False, True])
def test_runs_share_the_cases_of_a_store(killed: bool, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "store"
    processes = [command(data, out, "--num_workers", "1", start_new_session=True) for _ in range(3)]
    if killed:
        wait_for_lines(out, 3)
        processes[0].kill()
    said = [process.communicate(timeout=300) for process in processes]
    first = 1 if killed else 0
    assert all(process.returncode == 0 for process in processes[first:]), said
    for text, _ in said[first:]:
        assert f"30 cases in {out}" in text and "0 failed" in text
    lines = manifest_file(out).read_text().splitlines()
    assert len(lines) == 30 == len({json.loads(line)["id"] for line in lines})
    run(data, tmp_path / "alone")
    assert stored(out) == stored(tmp_path / "alone")


def test_runs_over_different_data_sets_fill_one_store(data: Path, tmp_path: Path) -> None:
    out, other = tmp_path / "store", tmp_path / "other"
    for seed in range(10):
        save(other / f"d{seed}.nii.gz", body(50 + seed))
    save(other / "bad.nii.gz", body(0)).write_bytes(b"no scan")
    processes = [
        command(data, out, "--num_workers", "1"),
        command(other, out, "--num_workers", "1", "--max_failed", "0.5"),
    ]
    for process in processes:
        _, stderr = process.communicate(timeout=300)
        assert process.returncode == 0, stderr
    assert len(manifest_entries(out)) == 40
    assert [line.split("\t")[0] for line in (out / "failed.txt").read_text().splitlines()] == ["other/bad"]
    run(data, out)  # which knows nothing of the other folder
    assert (out / "failed.txt").read_text().startswith("other/bad\t") and len(manifest_entries(out)) == 40
    save(other / "bad.nii.gz", body(99))
    run(other, out)
    assert (out / "failed.txt").read_text() == ""


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("end", ["finished", "killed"])
def test_a_run_waits_for_cases_that_another_is_at(end: str, workers: int, data: Path, tmp_path: Path) -> None:
    """It does them itself if the other lets go of them without an entry."""
    out = tmp_path / "store"
    run(data, out)
    case, entry = "set/c07", manifest_entries(out)["set/c07"]
    other = SharedManifest(out)
    if end == "killed":
        other.remove([case])
    else:  # the other run has written its files, and the entry follows
        write_manifest(out, {k: v for k, v in manifest_entries(out).items() if k != case})
    claim = other.claim(case)
    assert claim is not None
    thread = threading.Thread(target=run, args=(data, out), kwargs={"num_workers": workers})
    thread.start()
    time.sleep(1)
    assert thread.is_alive() and case not in manifest_entries(out)
    if end == "finished":
        other.append({**entry, "mark": "of the other run"})
    other.give_back(claim)
    thread.join(timeout=600)
    assert not thread.is_alive()
    assert ("mark" in manifest_entries(out)[case]) == (end == "finished")
    assert not list(out.rglob("*.lock*"))[1:], "only the manifest's own"


def test_a_manifest_follows_what_others_write(tmp_path: Path) -> None:
    mine, theirs = SharedManifest(tmp_path), SharedManifest(tmp_path)

    def seen() -> dict[str, int]:
        with mine.locked() as entries:
            return {case: entry["n"] for case, entry in entries.items()}

    assert seen() == {}
    theirs.append({"id": "a", "n": 1})
    assert seen() == {"a": 1}
    theirs.append({"id": "a", "n": 2})
    mine.append({"id": "b", "n": 3})
    assert seen() == {"a": 2, "b": 3}
    theirs.retract("a")
    assert seen() == {"b": 3}
    write_manifest(tmp_path, {"c": {"id": "c", "n": 4}, "d": {"id": "d", "n": 5}, "e": {"id": "e", "n": 6}})
    assert seen() == {"c": 4, "d": 5, "e": 6}
    with manifest_file(tmp_path).open("a") as stream:
        stream.write('{"id": "half')  # of a run that was killed
    assert seen() == {"c": 4, "d": 5, "e": 6}
    append_entry(tmp_path, {"id": "f", "n": 7})
    assert seen() == {"c": 4, "d": 5, "e": 6, "f": 7}
    theirs.remove(["c", "nowhere"])
    assert seen() == {"d": 5, "e": 6, "f": 7}
    with mine.locked():
        mine.write()
    assert list(manifest_entries(tmp_path)) == ["d", "e", "f"]


def test_a_long_manifest_is_followed_by_its_end(tmp_path: Path) -> None:
    mine, theirs = SharedManifest(tmp_path), SharedManifest(tmp_path)
    for number in range(120):
        theirs.append({"id": f"c{number}", "text": "x" * 1000})
        if number % 40 == 0:
            with mine.locked() as entries:
                assert len(entries) == number + 1
    with mine.locked() as entries:
        assert entries == manifest_entries(tmp_path)


def test_a_case_is_claimed_by_one_run(tmp_path: Path) -> None:
    mine, theirs = SharedManifest(tmp_path), SharedManifest(tmp_path)
    claim = mine.claim("set/a")
    assert claim is not None and theirs.claim("set/a") is None and theirs.claim("set/b") is not None
    queue = Queue(theirs, [Source("set/a", ()), Source("set/c", ())], lambda source, entry: False)
    taken = queue.take()
    assert taken is not None and taken[0].case == "set/c" and queue.take() is None
    mine.give_back(claim)
    taken = queue.take()
    assert taken is not None and taken[0].case == "set/a"
    queue.close()
    assert mine.claim("set/a") is not None


def test_files_of_a_case_that_a_run_is_at_are_no_leftovers(tmp_path: Path) -> None:
    mine, theirs = SharedManifest(tmp_path), SharedManifest(tmp_path)
    claim = theirs.claim("set/a")
    files = [tmp_path / "cases" / "set" / name for name in (".unfinished_a.npy", "a.centres.npy", "a.npy", "b.npy")]
    for file in files:
        file.touch()
    mine.remove_leftovers()
    assert [file.exists() for file in files] == [True, True, True, False]
    assert claim is not None
    theirs.give_back(claim)
    mine.remove_leftovers()
    assert not any(file.exists() for file in files)
