"""Release zips: each bundle alone, with its own copy of this package, the same to the byte wherever it is made.

Run in a clone of the repository:

    python -m shared_networks.bundle.release --output_dir dist
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, NoReturn
from zipfile import ZipFile, ZipInfo

import torch
from monai.bundle import ConfigParser

from shared_networks.bundle.card import card_labels, model_card, note_on_release, released_card, with_ckpt_dir
from shared_networks.bundle.config_format import format_config
from shared_networks.bundle.description import described_card, described_metadata, input_text, scans_of
from shared_networks.bundle.relabel import RELABELLED
from shared_networks.datasets.labels import model_labels
from shared_networks.datasets.record import (
    SAFETENSORS,
    different_settings,
    read_record,
    record_file,
    safetensors_form,
    trained_labels,
)
from shared_networks.errors import InputError, report_in_one_line
from shared_networks.files import atomic_write
from shared_networks.networks.checkpoints import check_weights
from shared_networks.version import (
    RELEASED_FILES,
    __version__,
    bundle_names,
    record_text,
    released_content,
    released_record,
)

ROOT = Path(__file__).resolve().parents[2]
ALL = "all"
GUIDES = ("data", "inference", "pretraining", "settings", "training")
"""Pages of the repository's `docs` that cards link to. They link to each other alone."""


def release(
    output_dir: str | Path, bundle: str = ALL, overlay: str = "", weights: str | Path = "", root: Path = ROOT
) -> list[Path]:
    """Write `NAME_vX.Y.Z.zip` of bundles, and beside each its checksum.

    A zip has one folder, of the bundle's name: configs, documents and licence, guides, the model card, this package,
    `models/model.pt` where weights are given, and `SHA256SUMS` of them all. Files are stored uncompressed with one time
    and one mode, so that the same source gives the same bytes with every version of Python and zlib.

    Args:
        output_dir: folder to write to; older zips of this version are replaced.
        bundle: name of one bundle; by default all of them.
        overlay: name of an overlay to bake into the configs, such as `small`; see :func:`bake`.
        weights: flat state_dict of the bundle's network; see :func:`released_weights`. By default those that the
            overlay names, where they exist.
        root: source tree.

    Returns:
        The zips.

    Raises:
        InputError: `root` is no source tree, the bundles' versions differ, or an argument is of no use.
    """
    names = bundle_names(root)
    check_versions(root, names)
    if bundle not in (ALL, *names):
        raise InputError(f"--bundle {bundle}: there is no such bundle; give {', '.join(names)} or {ALL}")
    if weights and bundle == ALL:
        raise InputError(f"--weights {weights}: are one bundle's; name it: --bundle {' or '.join(names)}")
    return [
        write_release(Path(output_dir), name, bundle_files(root, name, overlay, weights))
        for name in (names if bundle == ALL else [bundle])
    ]


def check_versions(root: Path, names: Sequence[str]) -> None:
    """Compare the version of each bundle with this package's: they are released together.

    Args:
        root: source tree.
        names: of the bundles.

    Raises:
        InputError: a bundle has another version, or no word on this one in its changelog.
    """
    for name in names:
        file = root / name / "configs" / "metadata.json"
        metadata = json.loads(file.read_text())
        if metadata["version"] != __version__:
            raise InputError(
                f"{file}: version is {metadata['version']!r}, shared_networks/version.py has {__version__!r}; "
                "all bundles are released together: set it to version.py's"
            )
        if not metadata["changelog"].get(__version__):
            raise InputError(f"{file}: changelog has nothing on {__version__!r}; write there what is new in it")


def bundle_files(root: Path, name: str, overlay: str = "", weights: str | Path = "") -> dict[str, bytes]:
    """Read all that belongs into a bundle's zip but the checksums.

    Args:
        root: source tree.
        name: of the bundle.
        overlay: see :func:`bake`; none by default.
        weights: see :func:`released_weights`; by default those that the overlay names.

    Returns:
        Content of files by their path in the bundle. Weights that the overlay names are in `models` alone.

    Raises:
        InputError: as :func:`check_labels`, :func:`check_scans`, :func:`check_shipped`, :func:`bake`,
            :func:`released_weights` and :func:`shared_networks.version.released_content`.
    """
    bundle = root / name
    files = {
        file: file.relative_to(bundle) for pattern in RELEASED_FILES for file in bundle.glob(pattern) if file.is_file()
    }
    files |= {root / "docs" / f"{guide}.md": Path("docs") / f"{guide}.md" for guide in GUIDES}
    package = (root / "shared_networks").rglob("*")
    files |= {file: file.relative_to(root) for file in package if file.suffix == ".py" or file.name == "py.typed"}
    content = {path.as_posix(): released_content(file) for file, path in files.items()}
    named = overlay_weights(content)
    if overlay:
        content |= bake(content, overlay)
    check_labels(bundle, content)
    check_scans(bundle, content)
    own = named.get(overlay, "")
    if own and not weights and (bundle / own).is_file():
        weights = bundle / own
        del named[overlay]
        if own not in named.values():
            for path in (own, record_file(own).as_posix()):
                content.pop(path, None)
            content |= {
                path: text.replace(own.encode(), b"models/model.pt")
                for path, text in content.items()
                if path.startswith("docs/") and path.endswith(".md")
            }
    elif not weights:
        reason = f"no {own}" if own else "no --weights"
        print(f"{name}: {reason}, so it is released without models/model.pt", flush=True)
    check_shipped(bundle, content, named)
    config = inference_config(bundle, content)
    card = released_card(content["docs/README.md"].decode())
    if weights:
        content |= released_weights(config, Path(weights), overlay)
        card = with_ckpt_dir(card)
    if overlay or weights:
        card = note_on_release(card, release_note(config, overlay, bool(weights)))
    content["docs/README.md"] = card.encode()
    content["README.md"] = model_card(card, json.loads(content["configs/metadata.json"])).encode()
    return content


def check_labels(bundle: Path, files: Mapping[str, bytes]) -> None:
    """Refuse a bundle of which some part is of other labels than it segments.

    Args:
        bundle: its folder.
        files: of the bundle, by path.

    Raises:
        InputError: the card, another config or a record of weights has other labels.
    """
    configs = {name: json.loads(files[f"configs/{name}.json"]) for name in RELABELLED}
    if "label_names" not in configs["inference"]:
        return
    channels = configs["metadata"]["network_data_format"]["outputs"]["pred"]["channel_def"]
    found = {
        "docs/README.md": card_labels(files["docs/README.md"].decode()),
        "configs/train.json": dict(enumerate(configs["train"]["label_names"])),
        "configs/metadata.json": {int(value): name for value, name in channels.items()},
    }
    for path, text in files.items():
        if path.startswith("weights/") and path.endswith(".json"):
            found[path] = {value: name for name, value in json.loads(text)["labels"].items()}
    own = dict(enumerate(configs["inference"]["label_names"]))
    for path, labels in found.items():
        differing = [value for value in sorted({**labels, **own}) if labels.get(value) != own.get(value)]
        if differing:
            there, here = (names.get(differing[0], "nothing") for names in (labels, own))
            raise InputError(
                f"{bundle / path}: its labels are not the label_names of configs/inference.json ({differing[0]} is "
                f"{there} there and {here} here); put them right, or run python -m shared_networks.bundle.relabel, "
                "which also removes weights of other labels"
            )


def check_scans(bundle: Path, files: Mapping[str, bytes]) -> None:
    """Refuse a bundle of which some part is of scans that are prepared otherwise than its inference prepares them.

    Args:
        bundle: its folder.
        files: of the bundle, by path.

    Raises:
        InputError: the card, the metadata or another config has another modality, voxel size, window or crop.
    """
    scans = scans_of(json.loads(files["configs/inference.json"]))
    for path, text in files.items():
        if re.fullmatch(r"configs/\w+\.json", path) and "bundle_root" in (config := json.loads(text)):
            for name, (there, here) in different_settings(scans, scans_of(config)).items():
                raise InputError(
                    f"{bundle / path}: {name} is {here}, and {there} in configs/inference.json; put the wrong one right"
                )
    metadata, card = json.loads(files["configs/metadata.json"]), files["docs/README.md"].decode()
    for path, found, wanted in (
        ("configs/metadata.json", format_config(metadata), format_config(described_metadata(metadata, scans))),
        ("docs/README.md", card, described_card(card, scans)),
    ):
        lines = zip(found.splitlines(), wanted.splitlines(), strict=False)
        if line := next((pair for pair in lines if pair[0] != pair[1]), None):
            there, here = (text.strip(" ,") for text in line)
            raise InputError(
                f"{bundle / path}: by configs/inference.json it says {here}, not {there}; put the wrong one right"
            )


def check_shipped(bundle: Path, files: Mapping[str, bytes], named: Mapping[str, str]) -> None:
    """Refuse weights of a bundle that do not fit the overlay that names them, and tell of those that none names.

    Args:
        bundle: its folder.
        files: of the bundle, by path.
        named: of :func:`overlay_weights`.

    Raises:
        InputError: weights are of another network, or of scans prepared otherwise.
    """
    for overlay, file in named.items():
        if file in files:
            config = inference_config(bundle, files, overlay)

            def advise(tensors: bool, settings: Mapping[str, Any], config: str = f"configs/{overlay}.json") -> str:
                here = f", or put {_as_json(settings)} there" if settings else ""
                return f"{config} takes it by default: write it from a model that was trained with it{here}"

            check_weights(bundle / file, network_of(config), config.get_parsed_content("preparation"), advise)
    for file in files:
        if file.startswith("weights/") and not file.endswith(".json") and file not in named.values():
            print(f"{bundle.name}: no config names {file}, so it is not compared with one", flush=True)


def inference_config(bundle: Path, files: Mapping[str, bytes], overlay: str = "") -> ConfigParser:
    """Return the inference config of a bundle's files, under an overlay if one is named."""
    config = ConfigParser(json.loads(files["configs/inference.json"]))
    settings = json.loads(files[f"configs/{overlay}.json"]) if overlay else {}
    config.update({name: value for name, value in settings.items() if name.split("#")[0] in config})
    config["bundle_root"] = str(bundle)
    return config


def release_note(config: ConfigParser, overlay: str, weights: bool) -> str:
    """Say on top of a card what a release is, where the card alone would mislead.

    Args:
        config: the release's inference config.
        overlay: that is baked in, if any: the card describes the full network.
        weights: whether `models` holds weights, so that a training needs another folder.
    """
    sentences = []
    if overlay:
        size = sum(p.numel() for p in network_of(config).parameters() if p.requires_grad) / 1e6
        spacing, crop = (
            " x ".join(f"{length:g}" for length in config.get_parsed_content(key)) for key in ("spacing", "img_size")
        )
        values = input_text(config.get_parsed_content("preparation"))
        sentences += [
            f"**This release has the network of `configs/{overlay}.json`: {size:.1f} M parameters, voxels of "
            f"{spacing} mm, crops of {crop} voxels.** Its input is {values}. Its configs have "
            "these defaults. What follows describes the full network, before these changes."
        ]
    if weights:
        sentences += [
            "Its weights are `models/model.pt`, so training needs another folder: `--ckpt_dir trained`. Other commands "
            "then take `--checkpoint trained/model.pt`."
        ]
    return " ".join(sentences)


def network_of(config: ConfigParser) -> torch.nn.Module:
    """Return the network of a bundle's inference config, with a channel for each label."""
    if names := config.get("label_names"):
        config["num_classes"] = len(names)
    network: torch.nn.Module = config.get_parsed_content("network_def")
    return network


def overlay_weights(files: Mapping[str, bytes]) -> dict[str, str]:
    """Return the weights that overlays take by default, which need not exist: paths in the bundle by overlay.

    Args:
        files: of the bundle, by path.
    """
    named = {}
    for path, text in files.items():
        if overlay := re.fullmatch(r"configs/(\w+)\.json", path):
            default = str(json.loads(text).get("checkpoint", ""))
            if file := re.search(r"(?<![^/'])weights/[\w.-]+", default):
                named[overlay[1]] = file[0]
    return named


def bake(files: Mapping[str, bytes], overlay: str) -> dict[str, bytes]:
    """Make an overlay's settings the defaults of the other configs, and what metadata and card say of scans.

    The weights that it names are those of the bundle from then on, `models/model.pt`, so `checkpoint` is left out.
    Other overlays that name weights get the defaults before, where they set none, as these belong to the weights.

    Args:
        files: of a bundle, by path.
        overlay: name of a config that sets values, such as `tiny` of `configs/tiny.json`; expressions without
            references count as such.

    Returns:
        The files that change.

    Raises:
        InputError: there is no such overlay, or it holds more than values, or a setting that no config has.
    """
    file = f"configs/{overlay}.json"
    if file not in files:
        raise InputError(f"--overlay {overlay}: there is no {file} in the bundle; give a name such as tiny")
    values = {key: value for key, value in json.loads(files[file]).items() if not key.endswith("checkpoint")}
    settings = {key: value for key, value in values.items() if not key.startswith("_")}
    if re.search(r'"[@%+]|"[$](\\.|[^"\\])*@|"_target_"', json.dumps(settings)):
        raise InputError(f"--overlay {overlay}: {file} changes more than values, which cannot be baked in; try tiny")
    configs = {path: json.loads(text) for path, text in files.items() if re.fullmatch(r"configs/\w+\.json", path)}
    alone = [path for path, config in configs.items() if "bundle_root" in config or path == "configs/evaluate.json"]
    if lost := [key for key in settings if not any(key.split("#")[0] in configs[path] for path in alone)]:
        raise InputError(f"--overlay {overlay}: no config has {', '.join(lost)} of {file}; take them out")
    own = {path: {k: v for k, v in settings.items() if k.split("#")[0] in configs[path]} for path in alone}
    baked = {path: with_settings(files[path].decode(), changes).encode() for path, changes in own.items() if changes}
    for name in overlay_weights(files).keys() - {overlay}:
        defaults = (ConfigParser(configs[path]) for path in reversed(alone))
        before = {key: config[key] for config in defaults for key in settings if key in config}
        if lacking := {key: value for key, value in before.items() if key not in configs[f"configs/{name}.json"]}:
            baked[f"configs/{name}.json"] = format_config({**configs[f"configs/{name}.json"], **lacking}).encode()
    scans = scans_of(json.loads(baked.get("configs/inference.json", files["configs/inference.json"])))
    metadata, card = json.loads(files["configs/metadata.json"]), files["docs/README.md"].decode()
    if (described := described_metadata(metadata, scans)) != metadata:
        baked["configs/metadata.json"] = format_config(described).encode()
    if (described_anew := described_card(card, scans)) != card:
        baked["docs/README.md"] = described_anew.encode()
    return {**baked, file: format_config(values).encode()}


def with_settings(config: str, settings: Mapping[str, Any]) -> str:
    """Write other values into a config.

    Args:
        config: JSON object.
        settings: values by id, such as `{"img_size": [48, 48, 48], "network_def#hidden_size": 192}`.

    Raises:
        InputError: the config has no such id, and where it would be no place that is left empty for it.
    """
    content, before = json.loads(config), json.loads(config)
    for name, value in settings.items():
        *path, last = name.split("#")
        part, there = content, before
        for key in path:
            part, there = part.get(key, {}), there and there.get(key)
        if there is None or (there and last not in there):
            raise InputError(f"{name}: the config has no such setting to be changed; add it there first")
        part[last] = value
    return format_config(content)


def released_weights(config: ConfigParser, weights: Path, overlay: str = "") -> dict[str, bytes]:
    """Read weights for a bundle's zip, once they are known to fit its network, labels and preparation of scans.

    Args:
        config: the bundle's inference config.
        weights: `model.pt` as training writes it: a flat state_dict, for a segmenter with its record beside it; or
            the same as `.safetensors`.
        overlay: that is baked into the config, if any, for the message.

    Returns:
        Content of `models/model.pt`, in PyTorch's form and unchanged numbers, and of its record `models/model.json`,
        which no longer names any case; see :func:`shared_networks.version.released_record`.

    Raises:
        InputError: names or shapes are not the network's, scans were prepared otherwise, the state_dict is not flat,
            or the labels are unknown or not the bundle's.
    """

    def advise(tensors: bool, settings: Mapping[str, Any]) -> str:
        if tensors and not settings:
            return "Release with the overlay that it was trained with, such as --overlay tiny"
        copy = f", a copy of configs/{overlay}.json" if overlay and not tensors else ""
        copy = ", a copy of the one that it was trained with" if tensors else copy
        return (
            f"Put {_as_json(settings)} into an overlay of your own in the bundle, such as configs/own.json{copy}, and "
            "release with --overlay own"
        )

    names, network = config.get("label_names"), network_of(config)
    if names and (record := read_record(weights)):
        _check_names(weights, trained_labels(record), names)
    check_weights(weights, network, config.get_parsed_content("preparation"), advise)
    if safe := weights.suffix == SAFETENSORS:
        content = safetensors_form(weights).load_file(weights)
    else:
        content = torch.load(weights, map_location="cpu", weights_only=True)
    if content.keys() != network.state_dict().keys():
        raise InputError(
            f"{weights}: not a flat state_dict under our names, as training writes it; save that alone to a model.pt"
        )
    if names:
        _check_names(weights, model_labels(weights), names)
    stream = BytesIO()
    if safe:
        torch.save(content, stream)
    files = {"models/model.pt": stream.getvalue() or weights.read_bytes()}
    if record := read_record(weights):
        digest = hashlib.sha256(files["models/model.pt"]).hexdigest()
        files["models/model.json"] = record_text({**released_record(record), "weights_sha256": digest})
    return files


def _check_names(weights: Path, there: Sequence[str], here: Sequence[str]) -> None:
    """Refuse weights of other labels than a bundle's."""
    if there != here:
        raise InputError(
            f"{record_file(weights)}: not the labels of this bundle; release these weights in the one that trained them"
        )


def _as_json(settings: Mapping[str, Any]) -> str:
    """Return settings as they stand in a config."""
    return json.dumps(settings)[1:-1]


def write_release(output_dir: Path, name: str, files: Mapping[str, bytes]) -> Path:
    """Write a bundle's zip, with checksums in it and beside it, and prints what it is.

    Args:
        output_dir: folder to write to.
        name: of the bundle, and of the one folder in the zip.
        files: content by path in that folder.

    Returns:
        The zip.

    Raises:
        InputError: it cannot be written.
    """
    sums = "".join(checksum(content, path) for path, content in sorted(files.items()))
    file = output_dir / f"{name}_v{__version__}.zip"
    with atomic_write(file) as unfinished, ZipFile(unfinished, "w") as archive:
        for path, content in sorted({**files, "SHA256SUMS": sums.encode()}.items()):
            entry = ZipInfo(f"{name}/{path}")  # of 1980, stored
            entry.create_system, entry.external_attr = 3, 0o100644 << 16  # Unix on every system
            archive.writestr(entry, content)
    whole = file.read_bytes()
    with atomic_write(file.with_name(f"{file.name}.sha256")) as unfinished:
        unfinished.write_text(checksum(whole, file.name))
    print(f"{file}: {len(files) + 1} files, {len(whole) / 1e6:.1f} MB", flush=True)
    return file


def checksum(content: bytes, path: str) -> str:
    """Return a line that `sha256sum --check` reads."""
    return f"{hashlib.sha256(content).hexdigest()}  {path}\n"


def main(arguments: Sequence[str]) -> None:
    """Run the command line of :func:`release`.

    Raises:
        InputError: as :func:`release`, or for an unknown option.
    """

    def refuse(message: str) -> NoReturn:
        raise InputError(f"{message}; --help lists the options")

    parser = argparse.ArgumentParser(
        "python -m shared_networks.bundle.release", description=__doc__, allow_abbrev=False
    )
    parser.error = refuse  # type: ignore[method-assign]
    parser.add_argument("--output_dir", required=True, help="folder to write the zips to")
    parser.add_argument("--bundle", default=ALL, help="name of one bundle (default: all)")
    parser.add_argument("--overlay", default="", help="overlay to bake into the configs, such as small")
    parser.add_argument(
        "--weights",
        default="",
        help="the bundle's model.pt or .safetensors, a segmenter's with its record beside it (default: those that the "
        "overlay names)",
    )
    release(**vars(parser.parse_args(arguments)))


if __name__ == "__main__":
    report_in_one_line()
    main(sys.argv[1:])
