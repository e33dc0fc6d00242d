"""What the README and the model cards quote of `docs/results`, in their words; a test finds it in them.

    python -m tests.benchmarks.quoted

After new measurements (`--out docs/results` of `tests.benchmarks.speed`, or the three files of
`tests.benchmarks.transfer`) copy what it prints.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .transfer.results import table

RESULTS = Path(__file__).parents[2] / "docs" / "results"
SLICES = 300
"""Of the scan whose inference is quoted."""
FLOAT32 = "float32, matmul precision medium"
"""The pre-training bundle's own setting."""
STORE, WHOLE_VOLUMES = "store, 8 crop(s) a volume", "torch.load and MONAI, 8 a volume"
"""Ways to read crops."""


def figures(title: str) -> dict[str, Any]:
    """Those of a part of `speed.json`."""
    return json.loads((RESULTS / "speed.json").read_text())["parts"][title]["figures"]


def crops(row: str) -> dict[str, float]:
    """What reading augmented crops one way costs: crops a second of a core, MB a crop and so on."""
    return figures("Crops for pre-training")["rows"][row]


def pair(what: str, ours: float, beside: str, other: float, unit: str) -> Sequence[str]:
    """A line of the table: two figures, of which less is better, and how many times as good ours is."""
    return what, f"{ours:.3g} {unit}", beside, f"{other:.3g} {unit}", f"{other / ours:.3g}"


def speed_table() -> str:
    """The README's: what is measured, here and beside it."""
    step = {name: row["step"]["fastest"] for name, row in figures("Pre-training step")["variants"].items()}
    window = {name: row["all"]["fastest"] for name, row in figures("Segmentation window")["variants"].items()}
    chain = {(row["chain"], row["slices"]): row for row in figures("Inference chain without the network")["rows"]}
    ours, stock = chain["ours", SLICES], chain["stock", SLICES]
    read, loaded = (crops(row)["crops/s a core"] for row in (STORE, WHOLE_VOLUMES))
    published, whole = "published way, float32", "whole volumes with `torch.load` and MONAI"
    monai = "MONAI's masked autoencoder, float32"
    unfused = "bfloat16, attention not fused"
    scan = f"512 x 512 x {SLICES} voxels to labels, without the network"
    swin, unetr = "MONAI SwinUNETR (48), float32", "MONAI UNETR-B/16, float32"
    rows = [
        pair("pre-training step of 4 crops, float32", step[FLOAT32], published, step["published way, float32"], "s"),
        pair("the same, bfloat16", step["bfloat16"], published, step["published way, float32"], "s"),
        pair("the same, bfloat16", step["bfloat16"], "attention not fused", step[unfused], "s"),
        pair("the same, float32", step[FLOAT32], "MONAI's masked autoencoder of its sizes", step[monai], "s"),
        ("augmented crops a second and core", f"{read:.3g}", whole, f"{loaded:.3g}", f"{read / loaded:.3g}"),
        pair("window of 96³, float32", window["ours, float32"], published, window["published, float32"], "s"),
        pair("the same, bfloat16", window["ours, bfloat16"], published, window["published, float32"], "s"),
        pair("the same, float32", window["ours, float32"], "MONAI's UNETR (ViT-B)", window[unetr], "s"),
        pair("the same, float32", window["ours, float32"], "MONAI's SwinUNETR (48)", window[swin], "s"),
        pair(scan, ours["seconds"], "MONAI's transforms and inferer", stock["seconds"], "s"),
        pair("the same, peak memory", ours["peak GB"], "the same", stock["peak GB"], "GB"),
    ]
    return table(["", "here", "", "beside it", "times as good"], rows)


def crops_line() -> str:
    """The pre-training card's: crops that a core reads."""
    read, loaded = (crops(row)["crops/s a core"] for row in (STORE, WHOLE_VOLUMES))
    return f"{read:.0f} augmented crops of 96^3 a second and core; from whole float32 volumes with MONAI {loaded:.0f}"


def step_line() -> str:
    """The pre-training card's: the step against the published one."""
    rows = figures("Pre-training step")["variants"]
    return "float32 {:.2f} times, bfloat16 {:.2f} times".format(
        *(rows[name]["ratio"] for name in (FLOAT32, "bfloat16"))
    )


def window_line() -> str:
    """The segmenters' cards': a window against the published one."""
    rows = figures("Segmentation window")["variants"]
    ours, bfloat16, published = (
        rows[name]["all"]["fastest"] for name in ("ours, float32", "ours, bfloat16", "published, float32")
    )
    ours_took = f"{ours:.1f} s in float32 and {bfloat16:.1f} s in bfloat16"
    return f"{ours_took}, where the published network's way took {published:.1f} s"


def memory_line() -> str:
    """The segmenters' cards': peak memory of inference by slices."""
    rows = figures("Inference chain without the network")["rows"]
    ours = {row["slices"]: row["peak GB"] for row in rows if row["chain"] == "ours"}
    (stock,) = (row["peak GB"] for row in rows if row["chain"] == "stock" and row["slices"] == SLICES)
    peaks = ", ".join(f"{peak:.1f}" for peak in ours.values())
    return f"{peaks} GB | measured, without the network; MONAI's chain took {stock:.0f} GB for {SLICES} |"


def tables(header: str) -> list[str]:
    """Those of `transfer.md` that start so."""
    return [block for block in (RESULTS / "transfer.md").read_text().split("\n\n") if block.startswith(header)]


def transfer_tables() -> list[str]:
    """The README's: mean Dice by labelled cases and arm, a table a data set."""
    return tables("| labelled cases | from scratch")


def ablation_tables() -> list[str]:
    """The README's: mean Dice by ablation, a table a data set."""
    return tables("|  | mean Dice |")


def differences() -> set[str]:
    """Intervals of differences, of which the README quotes some, such as `+0.02 to +0.09`."""
    found = re.findall(r"\(([+-][\d.]+) to ([+-][\d.]+)\)", "".join(tables("| labelled cases | compared")))
    return {f"{float(low):+.2f} to {float(high):+.2f}" for low, high in found}


def main() -> None:
    """Command line."""
    print(
        speed_table(),
        crops_line(),
        step_line(),
        window_line(),
        memory_line(),
        *transfer_tables(),
        *ablation_tables(),
        sep="\n\n",
    )


if __name__ == "__main__":
    main()
