from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from monai.bundle import ConfigParser, run

from shared_networks.errors import (
    InputError,
    check_overrides,
    command_line_options,
    input_error_in,
    report_in_one_line,
    unknown_options,
)

CONFIG = {
    "initialize": [
        {"_target_": "shared_networks.errors.report_in_one_line"},
        {"_target_": "shared_networks.errors.check_overrides"},
    ],
    "dataset_dir": "",
    "max_epochs": 1,
    "net": {"width": 4},
    "step": "$lambda engine, batch: __import__('shared_networks.data.datalist', fromlist=['x']).find_images(batch)",
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


def test_options_are_read_in_every_form():
    line = "training --dataset_dir /data --net#width=8 --a::b x=y --seed -1 -v 2 --amp --fast-mode"
    assert command_line_options(line.split()) == {
        "dataset_dir": "/data",
        "net#width": "8",
        "a::b": "x=y",
        "seed": "-1",
        "v": "2",
        "amp": "True",
        "fast_mode": "True",
    }


def test_options_equal_what_fire_passes(capsys):
    import fire

    received = {}
    line = "--dataset-dir /data --net#width=8x --noamp --+extra word --tta --seed=-1x -- --verbose"
    fire.Fire(lambda **options: received.update(options), command=line)
    assert command_line_options(line.split()) == {key: str(value) for key, value in received.items()}
    assert received["amp"] is False and received["dataset_dir"] == "/data"


def test_unknown_options_are_named_with_the_nearest_setting():
    known = {"dataset_dir", "train", "initialize"}
    assert unknown_options(["dataset_dir", "train#trainer#max_epochs", "train::x", "+initialize"], known) == []
    assert unknown_options(["datset_dir", "trian#trainer", "zzz"], known) == [
        "--datset_dir: there is no setting 'datset_dir'; did you mean --dataset_dir?",
        "--trian#trainer: there is no setting 'trian'; did you mean --train?",
        "--zzz: there is no setting 'zzz'; the settings are dataset_dir, initialize, train",
    ]


def test_nothing_is_checked_in_other_processes(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["pytest", "run", "--config_file", "missing.json", "--datset_dir", "x"])
    check_overrides()


@pytest.fixture
def bundle_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Makes this process look like `python -m monai.bundle run WORDS` in a folder with two configs."""
    spec = type("Spec", (), {"name": "monai.bundle.__main__"})
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", spec)
    monkeypatch.chdir(tmp_path)
    Path("train.json").write_text(json.dumps({"dataset_dir": "", "net": {"width": 4}}))
    Path("tiny.json").write_text(json.dumps({"+initialize": ["$1"], "net#width": 2, "patch_size": 4}))
    Path("args.json").write_text(json.dumps({"config_file": "train.json", "note": "mine"}))
    return lambda *words: monkeypatch.setattr(sys, "argv", ["__main__.py", *words])


@pytest.mark.parametrize(
    "words",
    [
        "run --config_file train.json --dataset_dir /data --net#width 8",
        "run training --config_file ['train.json','tiny.json'] --patch_size 2 --initialize [] --net::depth=1",
        "run --config_file=train.json,tiny.json --patch-size 2 --_meta_#version 2",
        "run --args_file args.json --dataset_dir /data --note x",
        "run --config_file train.json --tracking mlflow --experiment_name x --output_dir /out",
        "run --config_file train.json --workflow_type inference --workflow_name ConfigWorkflow",
        "run training",
        "ckpt_export --config_file train.json --anything 1",
    ],
)
def test_known_overrides_pass(bundle_run, words):
    bundle_run(*words.split())
    check_overrides()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--config_file train.json --patch_size 2", "--patch_size: there is no setting 'patch_size'; the settings"),
        ("--config_file train.json --experiment_name x", "--experiment_name: there is no setting 'experiment_name'"),
        ("--args_file args.json --datasetdir /data", "did you mean --dataset_dir? (config: train.json)"),
        ("--config_fil x --args_file args.json", "did you mean --config_file?"),
    ],
)
def test_unknown_overrides_are_refused(bundle_run, words, message):
    bundle_run("run", *words.split())
    with pytest.raises(InputError) as caught:
        check_overrides()
    assert message in str(caught.value)


def test_every_parameter_of_run_is_known(bundle_run):
    names = [p.name for p in inspect.signature(run).parameters.values() if p.kind is not p.VAR_KEYWORD]
    bundle_run("run", *(f"--{name}=train.json" for name in names if name not in ("args_file", "tracking")))
    assert "logging_file" in names
    check_overrides()


def test_monai_merges_config_files_as_this_module_relies_on(bundle_run):
    assert set(ConfigParser.load_config_files(["train.json", "tiny.json"])) == {
        "dataset_dir",
        "net",
        "initialize",
        "patch_size",
    }


def test_bundle_run_ends_with_one_line(tmp_path):
    (tmp_path / "train.json").write_text(json.dumps(CONFIG))
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
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
    line = "error: nowhere: no such folder; pass --dataset_dir FOLDER, the folder that holds the scans"
    assert in_ignite[1].splitlines()[-1] == line
    assert "RuntimeError: Failed to evaluate" not in in_ignite[1]

    assert [mistyped[2], in_ignite[2]] == [1, 1]
