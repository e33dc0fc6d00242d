"""Write a trained model with its record at half its size, as weights ship:

python -m shared_networks.bundle.halve --checkpoint models/model.pt --output weights/small.pt
"""

from __future__ import annotations

import sys
from pathlib import Path

from shared_networks.datasets.record import SAFETENSORS, check_record_is_free, read_record, record_file, write_model
from shared_networks.errors import InputError, report_in_one_line
from shared_networks.networks.checkpoints import half_precision, read_weights
from shared_networks.settings.command_line import call_with_options
from shared_networks.settings.kinds import PATH
from shared_networks.version import released_record


def halve(checkpoint: str | Path, output: str | Path) -> None:
    """Write the weights of a model as float16, with its record beside them, in one act.

    Whatever loads a model computes in float32 from it. The record no longer names any case. An older output is
    replaced.

    Args:
        checkpoint: `model.pt` with its record `model.json`.
        output: the file to write, `.pt` or `.safetensors`; its record is `small.json` for `small.pt`.

    Raises:
        InputError: the model has no record or one of other weights, a weight is too large for float16, or the output
            is the model itself, would have its record's name, ends otherwise or cannot be written.
    """
    file = Path(output)
    if file.suffix not in (".pt", SAFETENSORS) or file.resolve() == Path(checkpoint).resolve():
        raise InputError(
            f"--output {output}: give another file than --checkpoint, with a name that ends in .pt or {SAFETENSORS}"
        )
    check_record_is_free(file)
    weights, record = read_weights(checkpoint), read_record(checkpoint)
    if record is None:
        raise InputError(f"{record_file(checkpoint)}: no such file; weights ship with the record of their training")
    write_model(half_precision(weights, checkpoint), file, released_record(record))
    before, after = (Path(path).stat().st_size / 1e6 for path in (checkpoint, file))
    print(f"{file}: {len(weights)} tensors, {after:.1f} MB in place of {before:.1f} MB")


if __name__ == "__main__":
    report_in_one_line()
    call_with_options(halve, {"checkpoint": PATH, "output": PATH}, sys.argv[1:])
