from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from shared_networks.errors import InputError, in_one_line, input_error_in, report_in_one_line, root_cause

CONFIG = {
    "initialize": [
        {"_target_": "shared_networks.errors.report_in_one_line"},
        "$__import__('shared_networks.settings.command_line').settings.command_line.take_settings(__local_refs)",
    ],
    "dataset_dir": "",
    "max_epochs": 1,
    "net": {"width": 4},
    "step": "$lambda engine, batch: __import__('shared_networks.datasets.cases', fromlist=['x']).find_images(batch)",
    "trainer": {"_target_": "ignite.engine.Engine", "process_function": "@step"},
    "run": ["$print('width', @net['width'])", "$@trainer.run([@dataset_dir])"],
}


def wrapped(error: Exception) -> RuntimeError:
    """An exception as monai raises it: wrapped once for the component and once for the expression."""
    try:
        try:
            raise error
        except Exception as inner:
            raise RuntimeError("Failed to instantiate component") from inner
    except RuntimeError as outer:
        try:
            raise RuntimeError("Failed to evaluate") from outer
        except RuntimeError as outermost:
            return outermost


def test_what_an_error_goes_back_to_is_behind_monais_wrappers():
    cause = ValueError("two\nlines")
    assert root_cause(wrapped(cause)) is cause and root_cause(cause) is cause
    assert in_one_line(wrapped(cause)) == "ValueError: two lines"
    of_torch = RuntimeError("size mismatch")
    assert root_cause(wrapped(of_torch)) is of_torch


@pytest.fixture
def hook_calls(monkeypatch: pytest.MonkeyPatch) -> list[BaseException]:
    calls: list[BaseException] = []
    monkeypatch.setattr(sys, "excepthook", lambda kind, error, traceback: calls.append(error))
    return calls


def test_input_error_is_a_value_error_that_a_caller_can_catch():
    with pytest.raises(ValueError, match="broken"):
        raise InputError("broken")


def test_input_error_is_found_behind_causes_and_contexts():
    error = InputError("a.nii.gz: broken")
    assert input_error_in(error) is error
    assert input_error_in(wrapped(error)) is error
    try:
        try:
            raise error
        except InputError:
            raise KeyError("raised while handling it")  # noqa: B904
    except KeyError as other:
        assert input_error_in(other) is error


def test_no_input_error_is_found_where_there_is_none_or_it_was_dropped():
    assert input_error_in(wrapped(ValueError("another"))) is None
    try:
        try:
            raise InputError("handled")
        except InputError:
            raise KeyError("what matters") from None
    except KeyError as other:
        assert input_error_in(other) is None


def test_hook_prints_one_line_for_an_input_error(hook_calls, capsys):
    report_in_one_line()
    error = wrapped(InputError("a.nii.gz: broken; copy it again"))
    sys.excepthook(type(error), error, error.__traceback__)
    assert capsys.readouterr().err == "error: a.nii.gz: broken; copy it again\n"
    assert hook_calls == []


def test_hook_leaves_other_errors_to_the_previous_hook(hook_calls, capsys):
    report_in_one_line()
    error = wrapped(ZeroDivisionError("a bug"))
    sys.excepthook(type(error), error, error.__traceback__)
    assert hook_calls == [error]
    assert capsys.readouterr().err == ""


def test_hook_is_installed_once(hook_calls):
    report_in_one_line()
    hook = sys.excepthook
    report_in_one_line()
    assert sys.excepthook is hook


@pytest.mark.integration
def test_bundle_run_ends_with_one_line(tmp_path):
    (tmp_path / "train.json").write_text(json.dumps(CONFIG))
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-m", "monai.bundle", "run", "--config_file", "train.json"]
    processes = [
        subprocess.Popen(
            command + words, cwd=tmp_path, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        for words in (["--datset_dir", "x"], ["--dataset-dir", "nowhere", "--net#width=8"])
    ]
    mistyped, in_ignite = [(*process.communicate(), process.returncode) for process in processes]

    fix = "did you mean --dataset_dir? (config: train.json)"
    assert mistyped[1].splitlines()[-1] == f"error: --datset_dir: there is no setting 'datset_dir'; {fix}"
    assert "Traceback" not in mistyped[1]
    assert "width" not in mistyped[0]

    # Ignite logs its own traceback; what matters is that the message comes last and once.
    assert "width 8" in in_ignite[0]
    line = "error: nowhere: no such file or folder; give a scan, or a folder or list of scans"
    assert in_ignite[1].splitlines()[-1] == line
    assert "RuntimeError: Failed to evaluate" not in in_ignite[1]

    assert [mistyped[2], in_ignite[2]] == [1, 1]
