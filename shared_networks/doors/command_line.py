"""The command `hi-end-mae`, on fire as `python -m monai.bundle` is."""

from __future__ import annotations

import json
import logging
import sys
import warnings
from collections.abc import Sequence

import fire
from fire.decorators import SetParseFn
from fire.parser import DefaultParseValue

from shared_networks.doors.bundles import segmenters
from shared_networks.errors import FailedScansError, InputError
from shared_networks.version import __version__

# Settings, PyTorch and MONAI are imported by the commands alone: help has to come at once.

HELP = """hi-end-mae: organs in CT scans

usage:
  hi-end-mae segment SCANS [options]   write label maps of scans
  hi-end-mae info [--json]             say what is installed
  hi-end-mae COMMAND --help            explain a command
  hi-end-mae --version

example:
  hi-end-mae segment ct.nii.gz --out labels

exit codes:
  0  all is done
  1  some scan failed, and the others are done
  2  the command or a setting is wrong

Not a medical device: not for diagnosis."""

SEGMENT_HELP = """hi-end-mae segment SCANS [options]: write label maps of scans

SCANS are NIfTI files (.nii.gz or .nii), folders that hold NIfTI files and DICOM series at any depth, or .json lists of
cases; one or several. Scans are CTs in Hounsfield units.

options:
  --out FOLDER       of the results (default: labels)
  --bundle NAME      labels to find: {bundles}, or a bundle's full name (default: btcv)
  --weights FILE     a model that this bundle trained, of any size (default: the small one that ships, else
                     models/model.pt of the bundle)
  --device DEVICE    cpu, cuda or such as cuda:1 (default: a GPU if one is found)
  --fast             take fewer windows, in less time
  --NAME VALUE       any other setting of the bundle's inference config, such as --overlay False

results, for each scan:
  NAME_seg.nii.gz    labels on the scan's own grid
  NAME_seg.json      names of the labels, weights and settings
  NAME_overlay.png   slices with labels
  NAME_preview.png   the organs' surfaces
and of all together:
  statistics.csv     volume, HU, pieces and place of every organ
  report.json        versions, weights, settings, scans that failed, scans to look at
A result that exists, made of the same scan by the same weights and settings, is left there.

exit codes:
  0  all scans are segmented, or were before
  1  some scan failed, as the last lines say, and the others are done
  2  the command or a setting is wrong

Settings are listed in configs/inference.json of the bundles, which are in
{folder}"""

INFO_HELP = """hi-end-mae info [--json]: say what is installed

Versions of packages, the bundles with their weights' SHA-256, and the devices that PyTorch can compute on. Add it to a
report of a problem. With --json as JSON.

exit codes: 0, or 2 if the command is wrong"""

_SWITCHES = {"segment": ("--fast",), "info": ("--json",)}
"""Options that need no value."""
_SHORT = {"out": "output_dir", "weights": "checkpoint"}
"""Options that stand for a setting of the bundle."""


@SetParseFn(str)  # text as typed: the settings say what they take
def segment_command(*scans: str, **options: str) -> int:
    """Segment scans; see :data:`SEGMENT_HELP`.

    Returns:
        The exit code.

    Raises:
        InputError: as :func:`shared_networks.doors.inference.run_inference`, or an option is of no use.
    """
    from shared_networks.doors.inference import run_inference
    from shared_networks.settings.command_line import Given

    bundle, fast = options.pop("bundle", "btcv"), _switch(options, "fast")
    for short, name in _SHORT.items():
        if short not in options:
            continue
        if name in options:
            raise InputError(f"--{short}, --{name}: are the same; give one of them")
        if options[short] in ("", *_SWITCHED):
            raise InputError(f"--{short}: has no value; give a path")
        options[name] = options.pop(short)
    paths = [*scans, *([options.pop("dataset_dir")] if "dataset_dir" in options else [])]
    if "" in paths:
        raise InputError("'': is no path; give files or folders, as in: hi-end-mae segment ct.nii.gz --out labels")
    if not paths:
        raise InputError("SCANS: are missing; give files or folders, as in: hi-end-mae segment ct.nii.gz --out labels")
    options = {"output_dir": "labels", **options}
    given = [Given(name, _SWITCHED.get(text, text), DefaultParseValue(text)) for name, text in options.items()]
    run_inference(bundle, paths, fast, given)
    print(f"results are in {options['output_dir']}")
    return 0


@SetParseFn(str)
def info_command(*words: str, **options: str) -> int:
    """Print what is installed; see :data:`INFO_HELP`.

    Returns:
        The exit code.

    Raises:
        InputError: an option is of no use.
    """
    as_json = _switch(options, "json")
    if unknown := [*words, *(f"--{name}" for name in options)]:
        raise InputError(f"{unknown[0]}: is no option of info; give --json or nothing")
    from shared_networks.doors.info import as_text, installation

    found = installation()
    print(json.dumps(found, indent=2) if as_json else as_text(found))
    return 0


_SWITCHED = {"True": True, "False": False}
"""What fire makes of an option without a value."""


def _switch(options: dict[str, str], name: str) -> bool:
    """Take an option that needs no value."""
    text = options.pop(name, "False")
    if text not in _SWITCHED:
        raise InputError(f"--{name} {text}: give True or False, or no value")
    return _SWITCHED[text]


def help_text(command: str = "") -> str:
    """Return the help of a command, or of `hi-end-mae` itself."""
    if command == "segment":
        found = segmenters()
        folder = next(iter(found.values())).parent
        return SEGMENT_HELP.format(bundles=" or ".join(sorted(found)), folder=folder)
    return INFO_HELP if command == "info" else HELP


def dispatch(words: Sequence[str]) -> int:
    """Run the command that words are.

    Args:
        words: of the command line, without `hi-end-mae`.

    Returns:
        The exit code.

    Raises:
        InputError: no such command, or as the command.
    """
    commands = {"segment": segment_command, "info": info_command}
    command = words[0] if words else ""
    if command == "--version":
        print(f"hi-end-mae {__version__}")
        return 0
    if not words or {"--help", "-h"} & set(words):
        print(help_text(command))
        return 0
    if command not in commands:
        raise InputError(f"{command}: is no command; give segment or info, as in: hi-end-mae segment ct.nii.gz")
    if lone := {"-", "--"} & set(words):  # fire would end the command there
        raise InputError(f"{lone.pop()}: is neither an option nor a path")
    switches = _SWITCHES[command]
    words = [f"{word}=True" if word in switches else word for word in words]
    return int(fire.Fire(commands, command=words, name="hi-end-mae", serialize=lambda code: None))


def run_command(words: Sequence[str]) -> int:
    """Run a command and say what is wrong in one line.

    Args:
        words: of the command line, without `hi-end-mae`.

    Returns:
        The exit code: 0, all is done; 1, some scan failed; 2, the command or a setting is wrong; 130, interrupted.
    """
    try:
        return dispatch(words)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1 if isinstance(error, FailedScansError) else 2
    except KeyboardInterrupt:
        print("error: interrupted; results that are there stay, and the same command goes on", file=sys.stderr)
        return 130


def main() -> int:
    """Be the command `hi-end-mae`: the process is its own, with warnings for users alone."""
    warnings.simplefilter("ignore")
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("monai").setLevel(logging.ERROR)  # it warns of readers that are not used
    return run_command(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
