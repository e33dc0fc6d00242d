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
from shared_networks.bundle.relabel import RELABELLED
from shared_networks.datasets.labels import model_labels
from shared_networks.datasets.record import SAFETENSORS, read_record, record_file, safetensors_form
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
        Content of files by their path in the bundle. Weights that an overlay names are in `models` alone.

    Raises:
        InputError: as :func:`check_labels`, :func:`bake`, :func:`released_weights` and
            :func:`shared_networks.version.released_content`.
    """
    bundle = root / name
    files = {
        file: file.relative_to(bundle) for pattern in RELEASED_FILES for file in bundle.glob(pattern) if file.is_file()
    }
    files |= {root / "docs" / f"{guide}.md": Path("docs") / f"{guide}.md" for guide in GUIDES}
    package = (root / "shared_networks").rglob("*")
    files |= {file: file.relative_to(root) for file in package if file.suffix == ".py" or file.name == "py.typed"}
    content = {path.as_posix(): released_content(file) for file, path in files.items()}
    check_labels(bundle, content)
    baked = bake(content, overlay) if overlay else {}
    own = overlay_weights(bundle, overlay, content) if overlay else None
    content |= baked
    if own:
        shipped = own.relative_to(bundle).as_posix()
        content = {path: text for path, text in content.items() if not path.startswith("weights/")}
        content |= {
            path: text.replace(shipped.encode(), b"models/model.pt")
            for path, text in content.items()
            if path.startswith("docs/") and path.endswith(".md")
        }
        if not weights and not own.is_file():
            print(f"{name}: no {shipped}, so it is released without weights", flush=True)
        weights = weights or (own if own.is_file() else "")
    config = ConfigParser(json.loads(content["configs/inference.json"]))
    config["bundle_root"] = str(bundle)
    card = released_card(content["docs/README.md"].decode())
    if weights:
        content |= released_weights(config, Path(weights))
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
        sentences += [
            f"**This release has the network of `configs/{overlay}.json`: {size:.1f} M parameters, voxels of "
            f"{spacing} mm, crops of {crop} voxels.** Its configs have these defaults. What follows describes the full "
            "network."
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


def overlay_weights(bundle: Path, overlay: str, files: Mapping[str, bytes]) -> Path | None:
    """Return the file of weights that an overlay names as `checkpoint`, which need not exist; None if it names none.

    Args:
        bundle: folder of the bundle.
        overlay: name, as for :func:`bake`.
        files: of the bundle, by path.
    """
    config = ConfigParser(json.loads(files["configs/inference.json"]))
    config.update(json.loads(files.get(f"configs/{overlay}.json", b"{}")))
    config["bundle_root"] = str(bundle)
    file = Path(config.get_parsed_content("checkpoint"))
    return None if file.parent.name == "models" else file


def bake(files: Mapping[str, bytes], overlay: str) -> dict[str, bytes]:
    """Make an overlay's settings the defaults of the other configs, and of the metadata.

    The weights that it names are those of the bundle from then on, `models/model.pt`, so `checkpoint` is left out.

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
    if "img_size" in settings:
        shapes = ("inputs#image#spatial_shape", "outputs#pred#spatial_shape")
        own["configs/metadata.json"] = {f"network_data_format#{shape}": settings["img_size"] for shape in shapes}
    baked = {path: with_settings(files[path].decode(), changes).encode() for path, changes in own.items() if changes}
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


def released_weights(config: ConfigParser, weights: Path) -> dict[str, bytes]:
    """Read weights for a bundle's zip, once they are known to fit its network and labels.

    Args:
        config: the bundle's inference config.
        weights: `model.pt` as training writes it: a flat state_dict, for a segmenter with its record beside it; or
            the same as `.safetensors`.

    Returns:
        Content of `models/model.pt`, in PyTorch's form and unchanged numbers, and of its record `models/model.json`,
        which no longer names any case; see :func:`shared_networks.version.released_record`.

    Raises:
        InputError: names or shapes are not the network's, the state_dict is not flat, or the labels are unknown or
            not the bundle's.
    """
    names, network = config.get("label_names"), network_of(config)
    check_weights(weights, network)
    if safe := weights.suffix == SAFETENSORS:
        content = safetensors_form(weights).load_file(weights)
    else:
        content = torch.load(weights, map_location="cpu", weights_only=True)
    if content.keys() != network.state_dict().keys():
        raise InputError(
            f"{weights}: not a flat state_dict under our names, as training writes it; save that alone to a model.pt"
        )
    if names and model_labels(weights) != names:
        raise InputError(
            f"{record_file(weights)}: not the labels of this bundle; release these weights in the one that trained them"
        )
    stream = BytesIO()
    if safe:
        torch.save(content, stream)
    files = {"models/model.pt": stream.getvalue() or weights.read_bytes()}
    if record := read_record(weights):
        digest = hashlib.sha256(files["models/model.pt"]).hexdigest()
        files["models/model.json"] = record_text({**released_record(record), "weights_sha256": digest})
    return files


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
