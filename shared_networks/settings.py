"""Settings: what each one takes, and how the words of a command line become its value.

`python -m monai.bundle run` reads options as Python literals: `out#1` becomes `out`, `20261125` a number, `yes` a text
that counts as true. Here every setting of all configs is declared once, and its value is read from the text as typed.
"""

from __future__ import annotations

import difflib
import inspect
import math
import os
import re
import sys
from ast import literal_eval
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from itertools import zip_longest
from pydoc import ErrorDuringImport, locate
from typing import Any, NamedTuple

import torch
from monai.bundle import ConfigComponent, ConfigParser, ConfigWorkflow, create_workflow, run
from monai.bundle.utils import DEFAULT_EXP_MGMT_SETTINGS

from shared_networks.copies import check_copy
from shared_networks.errors import InputError

_FLAG = re.compile(r"--|-[a-zA-Z]")  # what fire takes for an option; "-175" is a value
_ITEM = re.compile(r"""\s*("(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*'|[^,]*?)\s*(?:,|$)""")
_YES, _NO = ("true", "yes", "on", "1"), ("false", "no", "off", "0")


class Kind(NamedTuple):
    """What a setting takes.

    Attributes:
        read: makes the value from text or from a value of a config; raises ValueError where it cannot.
        expected: what to give, in words that follow "give"; a function where it depends on the machine.
        native: types of the values that MONAI may have made of the text without harm, for deeper settings.
        as_typed: the text is the value, even where it begins with `$`, `@` or `%`.
    """

    read: Callable[[Any], Any]
    expected: str | Callable[[], str]
    native: tuple[type, ...]
    as_typed: bool = False


class Given(NamedTuple):
    """A value that somebody gave for a setting.

    Attributes:
        name: of the setting, `a#b` for a deeper one.
        value: text as typed; True or False of an option without a value; a value of a file.
        passed: what MONAI made of it.
        file: that gives the value; none for the command line.
    """

    name: str
    value: Any
    passed: Any
    file: str = ""

    def __str__(self) -> str:
        if self.file:
            return f"{self.name} = {self.value!r} in {self.file}"
        return f"--{self.name}" + ("" if isinstance(self.value, bool) else f" {self.value or repr(self.value)}")


def _items(value: Any) -> list[Any]:
    """The items of a list, of a text such as `[a, 'b, c']` or `a,b`, or of a single value."""
    if isinstance(value, (list, tuple)):
        return list(value)
    if not isinstance(value, str):
        return [value]
    text = value.strip()
    if text[:1] in ("[", "("):
        if text[-1:] != {"[": "]", "(": ")"}[text[0]]:
            raise ValueError
        text = text[1:-1].strip()
    items, start = [], 0
    while start < len(text):
        found = _ITEM.match(text, start)
        if not found:
            raise ValueError
        items.append(_unquoted(found[1]))
        start = found.end()
    return items


def _unquoted(text: str) -> str:
    """The content of a text in quotes of its own, which MONAI's command line asks for here and there."""
    if re.fullmatch(r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*\"""", text):
        return str(literal_eval(text))
    return text


def _number(value: Any) -> float:
    if isinstance(value, bool):
        raise ValueError
    if isinstance(value, str):
        value = int(value) if re.fullmatch(r"\s*[+-]?[\d_]+\s*", value) else float(value)
    if not math.isfinite(value):
        raise ValueError
    return value


def _whole(value: Any) -> int:
    number = _number(value)
    if number != int(number):
        raise ValueError
    return int(number)


def _flag(value: Any) -> bool:
    text = str(value).strip().casefold()
    if text not in _YES + _NO:
        raise ValueError
    return text in _YES


def _path(value: Any) -> str:
    if isinstance(value, (bool, list, tuple, dict, type(None))):
        raise ValueError
    return _unquoted(value) if isinstance(value, str) else str(value)


def _device(value: Any) -> torch.device:
    try:
        device = torch.device(value if isinstance(value, torch.device) else str(value).strip())
    except RuntimeError:
        raise ValueError from None
    if (device.index or 0) >= _devices().get(device.type, 0):
        raise ValueError
    return device


def _devices() -> dict[str, int]:
    """Number of the devices of this machine, by type."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return {"cpu": 1, "cuda": gpus, "mps": int(torch.backends.mps.is_available())}


def _device_names() -> str:
    names = [f"{kind}:{index}" if kind == "cuda" else kind for kind, n in _devices().items() for index in range(n)]
    return f"a device of this machine: {', '.join(names)}"


def number(expected: str, fits: Callable[[float], bool]) -> Kind:
    """A number within limits."""

    def read(value: Any) -> float:
        result = _number(value)
        if not fits(result):
            raise ValueError
        return result

    return Kind(read, expected, (int, float))


def whole(expected: str, fits: Callable[[int], bool]) -> Kind:
    """A whole number within limits."""

    def read(value: Any) -> int:
        result = _whole(value)
        if not fits(result):
            raise ValueError
        return result

    return Kind(read, expected, (int,))


def three(item: Kind, expected: str, repeat: bool = True) -> Kind:
    """Three values, for the axes left-right, back-front and foot-head, or one for all three."""

    def read(value: Any) -> list[Any]:
        values = [item.read(part) for part in _items(value)]
        if repeat and len(values) == 1:
            values *= 3
        if len(values) != 3:
            raise ValueError
        return values

    return Kind(read, expected, (list, tuple))


def ascending(expected: str) -> Kind:
    """Two numbers, the lower one first."""

    def read(value: Any) -> list[float]:
        values = [_number(part) for part in _items(value)]
        if len(values) != 2 or not values[0] < values[1]:
            raise ValueError
        return values

    return Kind(read, expected, (list, tuple))


def list_of(item: Kind, expected: str, distinct: bool = False, least: int = 0) -> Kind:
    """A list, or one item for a list of it."""

    def read(value: Any) -> list[Any]:
        values = [item.read(part) for part in _items(value)]
        if len(values) < least or (distinct and len(set(values)) < len(values)):
            raise ValueError
        return values

    return Kind(read, expected, (list, tuple))


def choice(*names: str) -> Kind:
    """One of a few words."""

    def read(value: Any) -> str:
        return {name.casefold(): name for name in names}.get(str(value).strip().casefold()) or _refused()

    return Kind(read, " or ".join((", ".join(names[:-1]), names[-1])), (str,))


def optional(kind: Kind) -> Kind:
    """Also None, or null, for none."""

    def read(value: Any) -> Any:
        return None if value is None or value in ("None", "null") else kind.read(value)

    expected = kind.expected
    return Kind(read, f"{expected}, or None", (*kind.native, type(None)), kind.as_typed)


def _refused() -> Any:
    raise ValueError


def _name(value: Any) -> str:
    text = _unquoted(value.strip()) if isinstance(value, str) else str(value)
    return text or _refused()


def _file_list(value: Any) -> list[str]:
    """Paths: in brackets as a list, else the one that the text is, with its commas."""
    if isinstance(value, str):
        bracketed = value.strip()[:1] == "[" and not os.path.exists(value)
        value = _items(value) if bracketed else [value] if value.strip() else []
    return [_path(item) for item in _items(value)]


def _patch(value: Any) -> int | list[int]:
    sizes = [COUNT.read(part) for part in _items(value)]
    if len(sizes) not in (1, 3):
        raise ValueError
    return sizes[0] if len(sizes) == 1 else sizes


def _organ(value: Any) -> str | int:
    try:
        return NOT_NEGATIVE.read(value)
    except ValueError:
        return _name(value)


def _number_type(value: Any) -> torch.dtype | None:
    types = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": None, "None": None}
    name = str(value).removeprefix("torch.")
    return types[name] if name in types else _refused()


FLAG = Kind(_flag, "True or False", (bool,))
COUNT = whole("a whole number of at least 1", lambda n: n >= 1)
NOT_NEGATIVE = whole("a whole number of at least 0", lambda n: n >= 0)
SEED = whole("a whole number from 0 to 4294967295", lambda n: 0 <= n < 2**32)
POSITIVE = number("a number above 0", lambda x: x > 0)
AMOUNT = number("a number of at least 0", lambda x: x >= 0)
SHARE = number("a number from 0 to 1", lambda x: 0 <= x <= 1)
BELOW_ONE = number("a number of at least 0 and below 1", lambda x: 0 <= x < 1)
ANY_TEXT = Kind(_path, "a text", (str,), as_typed=True)
PATH = Kind(lambda value: _path(value) or _refused(), "a path", (str,), as_typed=True)
PATH_OR_NONE = Kind(_path, "a path, or '' for none", (str,), as_typed=True)
FILES = Kind(_file_list, "a path, or a list such as \"['a.pt','b.pt']\"", (list, tuple), as_typed=True)
AXES = list_of(
    whole("an axis", lambda n: n in (0, 1, 2)),
    "axes out of 0 (left-right), 1 (back-front) and 2 (foot-head), such as [1,2], or [] for none",
    distinct=True,
)
NAME = Kind(_name, "a name", (str,))
NAMES = list_of(NAME, "a list of names, such as [case_1,case_2]")
LABELS = list_of(NAME, "a list of two names or more, such as \"['background','liver']\"", least=2)
NUMBER_TYPE = Kind(_number_type, "bfloat16, float16 or float32", ())

SETTINGS: dict[str, Kind] = {
    # data
    "bundle_root": PATH,
    "dataset_dir": PATH_OR_NONE,
    "prepared_dir": PATH_OR_NONE,
    "folder": PATH,
    "images_glob": optional(ANY_TEXT),
    "labels_glob": optional(ANY_TEXT),
    "images": optional(FILES),
    "labels": optional(FILES),
    "exclude": PATH_OR_NONE,
    "modality": optional(choice("CT", "MR")),
    "label_names": LABELS,
    "num_classes": COUNT,
    "check_voxels": FLAG,
    "check_sides": FLAG,
    "max_failed": SHARE,
    "min_size": COUNT,
    "cache_rate": SHARE,
    # split
    "val_cases": NAMES,
    "val_fraction": BELOW_ONE,
    "fold": optional(NOT_NEGATIVE),
    "num_folds": whole("a whole number of at least 2", lambda n: n >= 2),
    "test_fraction": BELOW_ONE,
    "num_train_cases": optional(COUNT),
    # weights and results
    "pretrained_encoder": PATH_OR_NONE,
    "init_weights": PATH_OR_NONE,
    "checkpoint": PATH,
    "checkpoints": FILES,
    "trt_checkpoint": PATH,
    "ckpt_dir": PATH,
    "output_dir": PATH,
    "output": PATH_OR_NONE,
    "format": choice("model", "official", "monai_vit"),
    # where and how to compute
    "device": Kind(_device, _device_names, (str,)),
    "amp": FLAG,
    "precision": NUMBER_TYPE,
    "train_precision": NUMBER_TYPE,
    "matmul_precision": choice("highest", "high", "medium"),
    "compile": FLAG,
    "seed": SEED,
    "num_workers": NOT_NEGATIVE,
    # input
    "spacing": three(POSITIVE, "three numbers above 0, or one for all three, such as [1.5,1.5,1.5]"),
    "intensity_range": ascending("two numbers, the lower one first, such as [-175,250]"),
    "img_size": three(COUNT, "three whole numbers of at least 1, or one for all three, such as [96,96,96]"),
    "patch_size": Kind(_patch, "a whole number of at least 1, or three", (int, list, tuple)),
    # training
    "epochs": COUNT,
    "warmup_epochs": NOT_NEGATIVE,
    "val_interval": COUNT,
    "batch_size": COUNT,
    "num_samples": COUNT,
    "accumulation_steps": COUNT,
    "max_grad_norm": optional(POSITIVE),
    "learning_rate": POSITIVE,
    "layer_decay": number("a number above 0 and at most 1", lambda x: 0 < x <= 1),
    "freeze_encoder": FLAG,
    "ema_decay": BELOW_ONE,
    "early_stop": NOT_NEGATIVE,
    "background_weight": AMOUNT,
    "flip_axes": AXES,
    "rotate_prob": SHARE,
    "resume": FLAG,
    "overwrite": FLAG,
    "continues": FLAG,
    "in_place": FLAG,
    "save_minutes": AMOUNT,
    # evaluation and inference
    "nsd_tolerance": AMOUNT,
    "sw_batch_size": COUNT,
    "overlap": BELOW_ONE,
    "blending": choice("constant", "gaussian"),
    "tta_flip_axes": AXES,
    "largest_component": FLAG,
    "organ_probability": optional(Kind(_organ, "a label's name or value", (str, int))),
    "skip_existing": FLAG,
    "overlay": FLAG,
    "uncertainty": choice("tta", "ensemble", "dropout"),
    "measure": choice("entropy", "variance"),
    "samples": COUNT,
    "dropout": BELOW_ONE,
    "feature_dtype": choice("float16", "float32"),
    "voxel": optional(three(NOT_NEGATIVE, "three whole numbers of at least 0, such as [30,60,10]", repeat=False)),
    "label": optional(NOT_NEGATIVE),
    # network
    "network_def#in_channels": COUNT,
    "network_def#feature_size": COUNT,
    "network_def#hidden_size": COUNT,
    "network_def#num_layers": COUNT,
    "network_def#num_heads": COUNT,
    "network_def#decoder_hidden_size": COUNT,
    "network_def#decoder_num_heads": COUNT,
    "network_def#decoder_self_layers": NOT_NEGATIVE,
    "network_def#mlp_ratio": POSITIVE,
    "network_def#tap_layers": list_of(NOT_NEGATIVE, "a list of block indices, such as [3,6,9]", distinct=True),
    "network_def#mask_ratio": number("a number above 0 and below 1", lambda x: 0 < x < 1),
    "network_def#dropout": BELOW_ONE,
    "network_def#checkpointing": FLAG,
}
"""What every setting of the configs takes, by name."""


def take_settings(resolved: dict[str, Any]) -> None:
    """Puts the settings of `python -m monai.bundle run` in place of what MONAI made of them.

    Does nothing in any other process: there settings are Python values.

    Args:
        resolved: what the config's references stand for, by id; MONAI hands it to expressions as `__local_refs`, and
            an id that is in it already is not resolved again.

    Raises:
        InputError: a line for each setting that does not exist or cannot have its value.
    """
    main = getattr(sys.modules["__main__"], "__spec__", None)
    if getattr(main, "name", None) != "monai.bundle.__main__" or sys.argv[1:2] not in (["run"], ["run_workflow"]):
        return
    words = sys.argv[2:]
    if sys.argv[1] == "run_workflow" and words[:1] and not _FLAG.match(words[0]):  # the workflow's class
        words = words[1:]
    settings = command_line_settings(words)
    if settings.get("bundle_root", resolved.get("bundle_root")) != resolved.get("bundle_root"):
        check_copy(settings["bundle_root"])
    resolved.update(settings)


def command_line_settings(arguments: Sequence[str]) -> dict[str, Any]:
    """Reads all settings of a run: those of its config files, of `args_file` and of the command line.

    Args:
        arguments: the words after `run`.

    Returns:
        Values by name, of the declared settings that are neither components nor expressions.

    Raises:
        InputError: a line for each setting that does not exist or cannot have its value.
    """
    from fire.parser import DefaultParseValue  # only here: in process, fire is not needed

    options = command_line_options(arguments)
    passed: dict[str, Any] = {
        key: DefaultParseValue(value) if isinstance(value, str) else value for key, value in options.items()
    }
    file = passed.get("args_file")
    defaults = ConfigParser.load_config_file(file) if file else {}
    of_monai = {**defaults, **passed}
    if "config_file" not in of_monai:  # named by position, as nobody does
        return {}
    files = of_monai["config_file"]
    config = ConfigParser(ConfigParser.load_config_files(files))
    beside = _monai_settings(of_monai.get("tracking"))
    given = [
        *(Given(name, value, value, str(file)) for name, value in defaults.items()),
        *(Given(name, value, passed[name]) for name, value in options.items()),
    ]
    to_run = [*positional_words(arguments), *([of_monai["run_id"]] if "run_id" in of_monai else ())]
    problems = [
        f"{word}: is neither an option nor its value, and nothing of this name can be run; give a list as [a,b,c]"
        for word in to_run
        if str(word) not in config
    ]
    try:
        settings = read_settings(config, given, beside, str(files))
    except InputError as error:
        problems.append(str(error))
    if of_monai.get("tracking") and "#" in str(options.get("output_dir", "")):
        problems.append(f"--output_dir {options['output_dir']}: MONAI's --tracking cannot take a # there")
    if problems:
        raise InputError("\n".join(problems))
    return settings


def read_settings(
    config: ConfigParser, given: Iterable[Given], beside: Collection[str] = (), files: str = ""
) -> dict[str, Any]:
    """Checks what was given for a config, and all its settings.

    Args:
        config: as the files have it; what was given is put into it.
        given: in order of precedence, the last one counts.
        beside: names that may be given too, but are not in the config.
        files: that the config is from.

    Returns:
        Values by name, of the declared settings that are neither components nor expressions.

    Raises:
        InputError: a line for each setting that does not exist or cannot have its value.
    """
    settings: dict[str, Any] = {}
    problems = []
    for one in given:
        one = one._replace(name=one.name.removeprefix("+").replace("::", "#"))
        name, top = one.name, one.name.partition("#")[0]
        if top in beside and top not in config.get():
            continue
        if one.value is False and not one.file and top[:1] == "_" and top[1:] in config:
            problems.append(f"--no-{top[1:]}: is no option; write --{top[1:]} False")
            continue
        if unknown := unknown_options([one.name], {*config.get(), *beside}):
            problems += [f"{line} ({f'{one.file}; ' if one.file else ''}config: {files})" for line in unknown]
            continue
        try:
            value = _checked(config, one)
        except InputError as error:
            problems.append(str(error))
            continue
        settings.pop(top, None)
        if name == top and name in SETTINGS and not _is_expression(value, one) and not isinstance(value, dict):
            settings[name] = value
        before = config.get(name)
        if name in config or name.rpartition("#")[0] in config:
            config[name] = one.passed
        if name != top and top in SETTINGS and not isinstance(config[top], dict):
            try:
                _read(SETTINGS[top], Given(top, config[top], config[top], "the config"))
            except InputError as error:
                problems.append(f"{one}: {top} would be {config[top]}; {str(error).rpartition(': ')[2]}")
                config[name] = before
    for name, kind in SETTINGS.items():
        if name in settings or name not in config:
            continue
        one = Given(name, config[name], config[name], files or "the config")
        if isinstance(one.value, dict) or _is_expression(one.value, one):
            continue
        try:
            value = _read(kind, one)
        except InputError as error:
            problems.append(str(error))
        else:
            settings |= {} if "#" in name else {name: value}
    problems += _misfits(settings)
    if problems:
        raise InputError("\n".join(problems))
    return settings


def _misfits(settings: Mapping[str, Any]) -> list[str]:
    """A line for settings that do not go together."""
    if "img_size" not in settings or "patch_size" not in settings:
        return []
    size, patch = settings["img_size"], settings["patch_size"]
    patches = patch if isinstance(patch, list) else [patch] * 3
    if not any(n % p for n, p in zip(size, patches, strict=True)):
        return []
    nearest = [max(round(n / p), 1) * p for n, p in zip(size, patches, strict=True)]
    line = f"--img_size {size} is no multiple of --patch_size {patch}; give such as --img_size {nearest}"
    return [line.replace(", ", ",")]


def _is_expression(value: Any, one: Given) -> bool:
    """Whether MONAI evaluates a value: an expression, a reference or a macro; paths on the command line are none."""
    if isinstance(value, (list, tuple)):
        return bool(one.file) and any(_is_expression(item, one) for item in value)
    if not isinstance(value, str) or value[:1] not in ("$", "@", "%"):
        return False
    kind = SETTINGS.get(one.name)
    return bool(one.file) or kind is None or not kind.as_typed


def _read(kind: Kind, one: Given) -> Any:
    """Reads a value, or raises InputError with what to give."""
    expected = kind.expected if isinstance(kind.expected, str) else kind.expected()
    if not one.file and isinstance(one.value, bool) and kind.native != (bool,):
        raise InputError(f"--{one.name}: has no value; give {expected}")
    try:
        return kind.read(one.value)
    except (ValueError, TypeError, OverflowError):
        raise InputError(f"{one}: give {expected}") from None


def _checked(config: ConfigParser, one: Given) -> Any:
    """The value of one setting that exists at its first level, checked against the config as far as it is known."""
    name = one.name
    if _is_expression(one.value, one):
        _check_reference(config, one)
        return one.value
    if name == ConfigParser.meta_key or name.startswith(f"{ConfigParser.meta_key}#"):
        return one.passed
    if "#" not in name and name in SETTINGS:
        return one.value if isinstance(one.value, dict) and one.file else _read(SETTINGS[name], one)
    current, annotation = _found(config, name)
    if not one.file and isinstance(one.value, str) and "#" in one.value:
        raise InputError(f"{one}: MONAI cannot take a # in this setting; give a value or a path without")
    if "#" not in name:
        part = dict if isinstance(current, dict) else list if isinstance(current, list) else object
        if part is not object and not isinstance(one.passed, (part, tuple) if part is list else part):
            raise InputError(f"{one}: {name} is not one value; set its parts, as --{name}#PART VALUE")
        return one.passed
    kind = SETTINGS.get(name) or _kind_of(current, annotation)
    if kind:
        value = _read(kind, one)
        if type(one.passed) not in kind.native or (kind.as_typed and one.passed != value):
            text = repr(value).replace(" ", "")
            fix = f"write --{one.name} {text}" if kind.native and type(value) in kind.native else "give it in a config"
            raise InputError(f"{one}: deeper settings are taken as Python writes them; {fix}")
    return one.passed


def _check_reference(config: ConfigParser, one: Given) -> None:
    found = re.fullmatch(r"@([\w#:]+)", one.value)
    if found and found[1] not in config:
        nearest = difflib.get_close_matches(found[1], sorted(config.get()), n=1)
        fix = f"did you mean @{nearest[0]}?" if nearest else "give the name of a setting after @"
        raise InputError(f"{one}: there is no {found[1]!r}; {fix}")


def _found(config: ConfigParser, name: str) -> tuple[Any, str]:
    """What a config has under a name, else the default of the component that takes it; with its annotation."""
    value, annotation = config.get(), ""
    *path, last = name.split("#")
    for depth, key in enumerate([*path, last]):
        if isinstance(value, list) and re.fullmatch(r"\d+", key) and int(key) < len(value):
            value = value[int(key)]
            continue
        if not isinstance(value, (dict, list)):
            raise InputError(f"--{name}: {'#'.join([*path, last][:depth])} has no parts")
        known = [str(k) for k in value] if isinstance(value, dict) else [str(index) for index in range(len(value))]
        parameters = _parameters(value) if depth == len(path) else {}
        if key in parameters:
            annotation = str(parameters[key].annotation)
        if isinstance(value, dict) and key in value:
            value = value[key]
        elif key in parameters or (key in ConfigComponent.non_arg_keys and "_target_" in value):
            value = parameters[key].default if key in parameters else None
        elif any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            value = None
        else:
            choices = sorted({*known, *parameters} - {"_desc_", "_target_", "_requires_"})
            nearest = difflib.get_close_matches(key, choices, n=1)
            prefix = "".join(f"{part}#" for part in [*path, last][:depth])
            fix = f"did you mean --{prefix}{nearest[0]}?" if nearest else f"there are {', '.join(choices)}"
            raise InputError(f"--{name}: there is no setting {prefix + key!r}; {fix}")
    return value, annotation


def _parameters(component: Any) -> Mapping[str, inspect.Parameter]:
    """The parameters of what a component of a config makes."""
    if not isinstance(component, dict) or not isinstance(component.get("_target_"), str):
        return {}
    try:
        target: Any = locate(str(ConfigComponent(component).resolve_module_name()))
        return inspect.signature(target).parameters
    except (TypeError, ValueError, ErrorDuringImport):  # not found, or written in C: it may take anything
        return inspect.signature(lambda **anything: anything).parameters


def _kind_of(current: Any, annotation: str) -> Kind | None:
    """What may stand in place of a value of a config; None where anything may."""
    if isinstance(current, str) and current.startswith("@"):
        return SETTINGS.get(current[1:])
    if isinstance(current, bool):
        return FLAG
    if isinstance(current, float) or (isinstance(current, int) and "float" in annotation):
        return number("a number", math.isfinite)
    if isinstance(current, int) and "Sequence" not in annotation:
        return NOT_NEGATIVE if current >= 0 else whole("a whole number", lambda n: True)
    if isinstance(current, list) and current and all(type(item) in (int, float) for item in current):
        return list_of(number("a number", math.isfinite), f"a list of numbers, such as {str(current).replace(' ', '')}")
    return None


def command_line_options(arguments: Sequence[str]) -> dict[str, str | bool]:
    """Reads options as fire does.

    Args:
        arguments: the words after `run`, such as `["--dataset-dir", "/data", "--net#width=8", "--noamp"]`.

    Returns:
        Their texts by name, or True or False without a text, here
        `{"dataset_dir": "/data", "net#width": "8", "amp": False}`.
    """
    return _split(arguments)[0]


def positional_words(arguments: Sequence[str]) -> list[str]:
    """Returns the words that are neither options nor their values; arguments as `command_line_options`."""
    return _split(arguments)[1]


def _split(arguments: Sequence[str]) -> tuple[dict[str, str | bool], list[str]]:
    words = list(arguments)
    if "--" in words:  # what follows the last one is for fire itself
        words = words[: len(words) - 1 - words[::-1].index("--")]
    options: dict[str, str | bool] = {}
    positional = []
    taken = False
    for word, following in zip_longest(words, words[1:], fillvalue="--"):
        if taken or not _FLAG.match(word):
            positional += [] if taken else [word]
            taken = False
            continue
        key, equals, text = word.lstrip("-").partition("=")
        key = key.replace("-", "_")
        value: str | bool = text
        if not equals and not _FLAG.match(following):
            value, taken = following, True
        elif not equals:
            key, value = (key[2:], False) if key.startswith("no") else (key, True)
        options[key] = value
    return options, positional


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
            names = sorted(key for key in known if not key.startswith("_"))
            nearest = difflib.get_close_matches(name, names, n=1)
            fix = f"did you mean --{nearest[0]}?" if nearest else f"the settings are {', '.join(names)}"
            lines.append(f"--{option}: there is no setting {name!r}; {fix}")
    return lines


def call_with_options(function: Callable[..., Any], kinds: Mapping[str, Kind], arguments: Sequence[str]) -> Any:
    """Calls a function with the options of a command line, as its own command line.

    Args:
        function: its docstring is the help; parameters without a default are required.
        kinds: what each parameter takes.
        arguments: words of the command line, `--name value` or `--name=value`.

    Returns:
        What the function returns; None where `--help` was asked for.

    Raises:
        InputError: a line for each option that is unknown, missing or has a wrong value; or a file cannot be read or
            written.
    """
    if {"--help", "-h"} & set(arguments):
        print(inspect.getdoc(function))
        return None
    options = command_line_options(arguments)
    problems = [f"{word}: is no option and no value; give --name value" for word in positional_words(arguments)]
    problems += unknown_options(options, kinds)
    values = {}
    for name, parameter in inspect.signature(function).parameters.items():
        if name in options:
            try:
                values[name] = _read(kinds[name], Given(name, options[name], options[name]))
            except InputError as error:
                problems.append(str(error))
        elif name in kinds and parameter.default is parameter.empty:
            problems.append(f"--{name}: is missing; give {kinds[name].expected}")
    if problems:
        raise InputError("\n".join(problems))
    try:
        return function(**values)
    except OSError as error:
        raise InputError(str(error)) from error


def _monai_settings(tracking: Any) -> set[str]:
    """Names that monai itself reads: the parameters that an option of `run` can reach, and experiment tracking's."""
    functions: tuple[Callable[..., Any], ...] = (run, create_workflow, ConfigWorkflow)
    parameters = [p for function in functions for p in inspect.signature(function).parameters.values()]
    names = {p.name for p in parameters if p.kind is not p.VAR_KEYWORD} | {ConfigParser.meta_key}
    if tracking:
        settings: Any = DEFAULT_EXP_MGMT_SETTINGS.get(str(tracking)) or ConfigParser.load_config_files(tracking)
        names |= {"output_dir", "save_execute_config", *settings["configs"]}
    return names
