"""Errors that the user can put right, and how they reach the terminal."""

from __future__ import annotations

import difflib
import inspect
import re
import sys
from collections.abc import Callable, Collection, Sequence
from functools import partial
from itertools import takewhile, zip_longest
from types import TracebackType
from typing import Any

from monai.bundle import ConfigParser, ConfigWorkflow, create_workflow, run
from monai.bundle.utils import DEFAULT_EXP_MGMT_SETTINGS

_FLAG = re.compile(r"--|-[a-zA-Z]")  # what fire takes for an option; "-175" is a value


class InputError(ValueError):
    """Something the user can fix: one or more lines, each naming the file (or setting) and the fix."""


def not_finite(what: str) -> InputError:
    """Return the error for a network's output that holds NaN or infinity."""
    return InputError(
        f"{what} is NaN or infinite: give --amp False if it was computed in half precision, else look at the scan's "
        "values and at the weights"
    )


def input_error_in(error: BaseException) -> InputError | None:
    """Returns the first `InputError` among an exception and what raised it, as a traceback would show them."""
    seen: BaseException | None = error
    while seen is not None and not isinstance(seen, InputError):
        seen = seen.__cause__ or (None if seen.__suppress_context__ else seen.__context__)
    return seen


def report_in_one_line() -> None:
    """Makes an uncaught `InputError` end the process with `error: <message>` on stderr and no traceback.

    monai wraps whatever is raised in a config in RuntimeErrors, one for each component and expression on the way,
    and the one line that helps is lost in some hundred lines of traceback. The exit code stays 1, every other
    exception goes to the hook that was there before, and whoever runs the config in process (MONAI Label, Python)
    still gets an ordinary exception to catch. Calling it again changes nothing.
    """
    if getattr(sys.excepthook, "func", None) is not _one_line_hook:
        sys.excepthook = partial(_one_line_hook, sys.excepthook)


def _one_line_hook(
    previous: Callable[[type[BaseException], BaseException, TracebackType | None], Any],
    kind: type[BaseException],
    error: BaseException,
    traceback: TracebackType | None,
) -> None:
    found = input_error_in(error)
    if found is None:
        previous(kind, error, traceback)
    else:
        print(f"error: {found}", file=sys.stderr)


def check_overrides() -> None:
    """Refuses options of `python -m monai.bundle run` that name nothing in the config.

    monai adds an unknown `--datset_dir X` to the config, where nobody reads it, and runs with the default. Does
    nothing in any other process.

    Raises:
        InputError: a line for each unknown option, with the nearest known one.
    """
    main = getattr(sys.modules["__main__"], "__spec__", None)
    if getattr(main, "name", None) != "monai.bundle.__main__" or sys.argv[1:2] != ["run"]:
        return
    from fire.parser import DefaultParseValue  # only here: in process, fire is not needed

    options = command_line_options(sys.argv[2:])
    arguments = ConfigParser.load_config_file(options["args_file"]) if "args_file" in options else {}
    given = {**arguments, **{key: DefaultParseValue(value) for key, value in options.items()}}
    if "config_file" not in given:  # named by position, as nobody does
        return
    config = ConfigParser.load_config_files(given["config_file"])
    known = {*config, *arguments, *_monai_settings(given.get("tracking"))}
    if unknown := unknown_options(options, known):
        raise InputError("\n".join(f"{line} (config: {given['config_file']})" for line in unknown))


def command_line_options(arguments: Sequence[str]) -> dict[str, str]:
    """Reads options as fire does.

    Args:
        arguments: the words after `run`, such as `["--dataset-dir", "/data", "--net#width=8", "--noamp"]`.

    Returns:
        Their values by name, here `{"dataset_dir": "/data", "net#width": "8", "amp": "False"}`.
    """
    words = list(takewhile(lambda word: word != "--", arguments))  # what follows is for fire itself
    options = {}
    for word, following in zip_longest(words, words[1:], fillvalue="--"):
        if not _FLAG.match(word):
            continue
        key, equals, value = word.lstrip("-").partition("=")
        key = key.replace("-", "_")
        if not equals and not _FLAG.match(following):
            value = following
        elif not equals:
            key, value = (key[2:], "False") if key.startswith("no") else (key, "True")
        options[key] = value
    return options


def unknown_options(options: Collection[str], known: Collection[str]) -> list[str]:
    """Compares option names with the top-level keys of a config.

    Args:
        options: names, which may be nested (`a#b` or `a::b`) or carry monai's leading `+`.
        known: top-level names.

    Returns:
        A line for each option whose first component is not known, with the nearest known name.
    """
    lines = []
    for option in options:
        name = re.split("#|::", option.removeprefix("+"))[0]
        if name not in known:
            nearest = difflib.get_close_matches(name, sorted(known), n=1)
            fix = f"did you mean --{nearest[0]}?" if nearest else f"the settings are {', '.join(sorted(known))}"
            lines.append(f"--{option}: there is no setting {name!r}; {fix}")
    return lines


def _monai_settings(tracking: Any) -> set[str]:
    """Names that monai itself reads: the parameters that an option of `run` can reach, and experiment tracking's."""
    functions: tuple[Callable[..., Any], ...] = (run, create_workflow, ConfigWorkflow)
    parameters = [p for function in functions for p in inspect.signature(function).parameters.values()]
    names = {p.name for p in parameters if p.kind is not p.VAR_KEYWORD} | {ConfigParser.meta_key}
    if tracking:
        settings: Any = DEFAULT_EXP_MGMT_SETTINGS.get(str(tracking)) or ConfigParser.load_config_files(tracking)
        names |= {"output_dir", "save_execute_config", *settings["configs"]}
    return names
