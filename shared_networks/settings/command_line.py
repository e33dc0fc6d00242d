"""Settings: what each one takes, and how the words of a command line become its value.

`python -m monai.bundle run` reads options as Python literals: `out#1` becomes `out`, `20261125` a number, `yes` a text
that counts as true. Here every setting of all configs is declared once, and its value is read from the text as typed.
"""

from __future__ import annotations

import copy
import difflib
import inspect
import json
import logging
import math
import os
import re
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pydoc import ErrorDuringImport, locate
from typing import Any, NamedTuple

from monai.bundle import ConfigComponent, ConfigParser, ConfigWorkflow, ReferenceResolver, create_workflow, run
from monai.bundle.utils import DEFAULT_EXP_MGMT_SETTINGS
from monai.utils import ensure_tuple

from shared_networks.errors import InputError
from shared_networks.processes import check_processes
from shared_networks.settings.kinds import FLAG, NOT_NEGATIVE, Kind, list_of, number, whole
from shared_networks.settings.table import SETTINGS
from shared_networks.settings.words import OPTION, command_line_options, positional_words
from shared_networks.version import check_copy

logger = logging.getLogger(__name__)

_NO_TEXT = re.compile(r"\s*(?:[+-]?[\d._]+(?:e[+-]?\d+)?|true|false|yes|no|on|off)\s*", re.IGNORECASE)


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


def take_settings(resolved: dict[str, Any]) -> None:
    """Put the settings of `python -m monai.bundle run` in place of what MONAI made of them.

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
    if sys.argv[1] == "run_workflow" and words[:1] and not OPTION.match(words[0]):  # the workflow's class
        words = words[1:]
    settings = command_line_settings(words)
    if settings.get("bundle_root", resolved.get("bundle_root")) != resolved.get("bundle_root"):
        check_copy(settings["bundle_root"])
    resolved.update(settings)


def command_line_settings(arguments: Sequence[str]) -> dict[str, Any]:
    """Read all settings of a run, from its config files, `args_file` and the command line.

    Args:
        arguments: the words after `run`.

    Returns:
        Values by name, of the declared settings that are neither components nor expressions.

    Raises:
        InputError: a line for each setting that does not exist or cannot have its value; or torchrun started several
            processes, and the configs do not make them work together.
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
    _check_processes(config)
    beside = _monai_settings(of_monai.get("tracking"))
    given = [
        *(Given(name, value, value, str(file)) for name, value in defaults.items()),
        *(Given(name, value, passed[name]) for name, value in options.items()),
    ]
    first = files.split(",")[0] if isinstance(files, str) and not os.path.isfile(files) else ensure_tuple(files)[0]
    problems = _texts_for_numbers(config.get(), ConfigParser(ConfigParser.load_config_file(first)), str(files))
    to_run = [*positional_words(arguments), *([of_monai["run_id"]] if "run_id" in of_monai else ())]
    problems += [
        f"{word}: is neither an option nor its value, and nothing of this name can be run; give a list as [a,b,c]"
        for word in to_run
        if not _has(config, str(word))
    ]
    try:
        settings = read_settings(config, given, beside, str(files))
    except InputError as error:
        problems.append(str(error))
    if of_monai.get("tracking") and "#" in str(options.get("output_dir", "")):
        problems.append(f"--output_dir {options['output_dir']}: MONAI's --tracking cannot take a # there")
    if problems:
        raise InputError("\n".join(problems))
    stages = [of_monai.get("init_id", "initialize"), *(to_run or ["run"]), of_monai.get("final_id", "finalize")]
    for name in _unused(config, (name.removeprefix("+") for name in of_monai.keys() - beside), map(str, stages)):
        logger.warning("--%s: has no effect, as nothing that %s run reads it", name, files)
    return settings


def _check_processes(config: ConfigParser) -> None:
    """Refuse processes of torchrun without the overlay for them, before each reads all scans."""
    work, network, start = (str(config.get().get(name)) for name in ("run", "network", "initialize"))
    if "@training_run" in work:
        check_processes("DistributedDataParallel" in network, "multi_gpu_train.json")
    elif "@validate#evaluator" in work:
        check_processes("init_process_group" in start, "multi_gpu.json")


def _unused(config: ConfigParser, names: Iterable[str], stages: Iterable[str]) -> list[str]:
    """Return settings of a config that nothing reads which its stages run, as an overlay has replaced what did."""
    parser = ConfigParser(copy.deepcopy(config.get()))
    parser.parse()
    items = parser.ref_resolver.items
    read: set[str] = set()
    waiting = ["imports", *stages]
    while waiting:
        item = waiting.pop()
        if item not in read and item in items:
            read.add(item)
            waiting += ReferenceResolver.find_refs_in_config(items[item].get_config(), item)

    def is_read(name: str) -> bool:
        item = ReferenceResolver.normalize_id(name) + "::"
        return any(f"{other}::".startswith(item) or item.startswith(f"{other}::") for other in read)

    given = [name for name in sorted(names) if re.split("#|::", name)[0] in config.get()]
    return [name for name in given if not is_read(name)]


def read_settings(
    config: ConfigParser, given: Iterable[Given], beside: Collection[str] = (), files: str = ""
) -> dict[str, Any]:
    """Check what was given for a config, and all its settings.

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
    named = set()
    for one in given:
        one = one._replace(name=one.name.removeprefix("+").replace("::", "#"))
        name, top = one.name, one.name.partition("#")[0]
        named.add(top)
        if top in beside and top not in config.get():
            continue
        if one.value is False and not one.file and top[:1] == "_" and _has(config, top[1:]):
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
        component = isinstance(value, dict) and bool(one.file)
        if name == top and name in SETTINGS and not _is_expression(value, one) and not component:
            settings[name] = value
        before = config.get(name)
        if _has(config, name) or _has(config, name.rpartition("#")[0]):
            config[name] = one.passed
        if name != top and top in SETTINGS and not isinstance(config[top], dict):
            try:
                _read(SETTINGS[top], Given(top, config[top], config[top], "the config"))
            except InputError as error:
                problems.append(f"{one}: {top} would be {config[top]}; {str(error).rpartition(': ')[2]}")
                config[name] = before
    for name, kind in SETTINGS.items():
        if name in settings or not _has(config, name):
            continue
        one = Given(name, config[name], config[name], files or "the config")
        if isinstance(one.value, dict) or _is_expression(one.value, one):
            continue
        try:
            value = _read(kind, one)
        except InputError as error:
            problems.append(str(error))
            continue
        if "#" not in name:
            settings[name] = value
        elif isinstance(one.value, str) and str not in kind.native:  # MONAI takes it as it is
            problems.append(f"{one}: is text; write {json.dumps(value)}")
    problems += _misfits(settings)
    if config.get().keys() >= {"prepared_dir", "tissue_table"}:
        problems.append(
            "configs/prepared.json and configs/synthetic.json are given together, but a store holds scans and no "
            "tissue maps; leave one of the two out"
        )
    if "checkpoint" in named and (several := settings.get("checkpoints")):
        problems.append(f"one model, {settings.get('checkpoint')}, and several, {several}, are given; give one of both")
    if problems:
        raise InputError("\n".join(problems))
    if (
        "ckpt_dir" in named & settings.keys()
        and "checkpoint" in config.get()
        and not named & {"checkpoint", "checkpoints"}
    ):
        # What is given comes before an overlay's default.
        settings["checkpoint"], config["checkpoint"] = f"{settings['ckpt_dir']}/model.pt", "$@ckpt_dir + '/model.pt'"
    return settings


def _has(config: ConfigParser, name: str) -> bool:
    """Return whether a config has a setting, such as `optimizer#lr`; a config itself searches for the nearest name."""
    found = config.get()
    for key in ReferenceResolver.split_id(name) if name else ():
        if isinstance(found, list) and key.isdecimal() and int(key) < len(found):
            found = found[int(key)]
        elif isinstance(found, dict) and key in found:
            found = found[key]
        else:
            return False
    return True


def _misfits(settings: Mapping[str, Any]) -> list[str]:
    """A line for all settings that do not go together."""
    lines = []
    epochs, warmup = settings.get("epochs", math.inf), settings.get("warmup_epochs", 0)
    if epochs <= warmup > 1:  # a trial of one epoch may warm up in it
        lines.append(
            f"--epochs {epochs} ends within --warmup_epochs {warmup}, at the highest learning rate; give such as "
            f"--warmup_epochs {epochs // 10}"
        )
    if "img_size" in settings and "patch_size" in settings:
        size, patch = settings["img_size"], settings["patch_size"]
        patches = patch if isinstance(patch, list) else [patch] * 3
        if any(n % p for n, p in zip(size, patches, strict=True)):
            nearest = [max(round(n / p), 1) * p for n, p in zip(size, patches, strict=True)]
            line = f"--img_size {size} is no multiple of --patch_size {patch}; give such as --img_size {nearest}"
            lines.append(line.replace(", ", ","))
    return lines


def _texts_for_numbers(content: Any, base: ConfigParser, files: str, name: str = "") -> list[str]:
    """A line for each text of an overlay in place of a number or a flag of the base: YAML reads `1e-2` as text."""
    if isinstance(content, (dict, list)):
        parts = content.items() if isinstance(content, dict) else enumerate(content)
        return [line for key, value in parts for line in _texts_for_numbers(value, base, files, f"{name}#{key}")]
    name = name.lstrip("#")
    if name in SETTINGS or not isinstance(content, str) or not _NO_TEXT.fullmatch(content):
        return []
    try:
        kind = _kind_of(*_found(base, name))
    except InputError:  # the overlay's own
        return []
    if kind is None or str in kind.native:
        return []
    return [f"{Given(name, content, content, files)}: is text; give {kind.expected}, without quotes"]


def _is_expression(value: Any, one: Given) -> bool:
    """Return whether MONAI evaluates a value: an expression, reference or macro; paths on the command line are none."""
    if isinstance(value, (list, tuple)):
        return bool(one.file) and any(_is_expression(item, one) for item in value)
    if not isinstance(value, str) or value[:1] not in ("$", "@", "%"):
        return False
    kind = SETTINGS.get(one.name)
    return bool(one.file) or kind is None or not kind.as_typed


def _read(kind: Kind, one: Given) -> Any:
    """Read a value, or raises InputError with what to give."""
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
    # A dict without a target in place of a component would leave MONAI with that dict.
    component = isinstance(current, dict) and "_target_" in current
    if isinstance(current, dict) and (not isinstance(one.passed, dict) or (component and "_target_" not in one.passed)):
        raise InputError(f"{one}: {name} is not one value; set its parts, as --{name}#PART VALUE")
    if not one.file and isinstance(one.value, str) and "#" in one.value:
        raise InputError(f"{one}: MONAI cannot take a # in this setting; give a value or a path without")
    if "#" not in name:
        if isinstance(current, list) and not isinstance(one.passed, (list, tuple)):
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
    if found and not _has(config, found[1]):
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
            fix = f"did you mean --{prefix}{nearest[0]}?" if nearest else f"there are {', '.join(choices) or 'none'}"
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


def unknown_options(options: Collection[str], known: Collection[str]) -> list[str]:
    """Compare option names with the top-level keys of a config.

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
    """Call a function with the options of a command line, as its own command line.

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
    """Name that monai itself reads: the parameters that an option of `run` can reach, and experiment tracking's."""
    functions: tuple[Callable[..., Any], ...] = (run, create_workflow, ConfigWorkflow)
    parameters = [p for function in functions for p in inspect.signature(function).parameters.values()]
    names = {p.name for p in parameters if p.kind is not p.VAR_KEYWORD} | {ConfigParser.meta_key}
    if tracking:
        settings: Any = DEFAULT_EXP_MGMT_SETTINGS.get(str(tracking)) or ConfigParser.load_config_files(tracking)
        names |= {"output_dir", "save_execute_config", *settings["configs"]}
    return names
