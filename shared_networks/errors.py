"""Raise errors that the user can put right, and print them in one line."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from types import TracebackType
from typing import Any


class InputError(ValueError):
    """Something the user can fix: one or more lines, each naming the file (or setting) and the fix."""


class FailedScansError(InputError):
    """Some scans of a run failed; the others are done.

    Attributes:
        failed: why, by file.
    """

    def __init__(self, message: str, failed: dict[str, str]) -> None:
        super().__init__(message)
        self.failed = failed


def not_finite(what: str) -> InputError:
    """Return the error for a network's output that holds NaN or infinity."""
    return InputError(
        f"{what} is NaN or infinite: give --amp False if it was computed in half precision, else look at the scan's "
        "values and at the weights"
    )


def input_error_in(error: BaseException) -> InputError | None:
    """Return the first `InputError` among an exception and what raised it, as a traceback would show them."""
    seen: BaseException | None = error
    while seen is not None and not isinstance(seen, InputError):
        seen = seen.__cause__ or (None if seen.__suppress_context__ else seen.__context__)
    return seen


def root_cause(error: BaseException) -> BaseException:
    """Return what an exception goes back to, past the `RuntimeError`s that MONAI wraps around it."""
    while type(error) is RuntimeError and error.__cause__ is not None:
        error = error.__cause__
    return error


def in_one_line(error: BaseException) -> str:
    """Return the type and message of an exception's :func:`root_cause`, such as `ValueError: no number`."""
    cause = root_cause(error)
    return " ".join(f"{type(cause).__name__}: {cause}".split())


def report_in_one_line() -> None:
    """Make an uncaught `InputError` end the process with `error: <message>` on stderr and no traceback.

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
