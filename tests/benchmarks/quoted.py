"""What README, guides and model cards quote of the measurements in `docs/results`; a test finds it in them.

    python -m tests.benchmarks.quoted

After new measurements (`--out docs/results` of `tests.benchmarks.speed`, or the four files of
`tests.benchmarks.study`) copy what it prints. Figures of other machines stand in `docs/results/README.md` alone.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .study.report import table
from .study.settings import MAIN_LABELS, OURS, SCRATCH

RESULTS = Path(__file__).parents[2] / "docs" / "results"
SLICES = 300
"""Of the scan whose inference is quoted."""
FLOAT32 = "float32"
"""The pre-training step as the bundle runs it."""
BASELINE = "published way, float32"
"""The step as the authors' code computes it."""
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
    """That of the results: what is measured, here and beside it."""
    step = {name: row["step"]["fastest"] for name, row in figures("Pre-training step")["variants"].items()}
    window = {name: row["all"]["fastest"] for name, row in figures("Segmentation window")["variants"].items()}
    chain = {(row["chain"], row["slices"]): row for row in figures("Inference chain without the network")["rows"]}
    ours, stock = chain["ours", SLICES], chain["stock", SLICES]
    read, loaded = (crops(row)["crops/s a core"] for row in (STORE, WHOLE_VOLUMES))
    baseline, whole = "baseline, float32", "whole volumes with `torch.load` and MONAI"
    monai = "MONAI's masked autoencoder, float32"
    unfused = "bfloat16, attention not fused"
    scan = f"512 x 512 x {SLICES} voxels to labels, without the network"
    swin, unetr = "MONAI SwinUNETR (48), float32", "MONAI UNETR-B/16, float32"
    rows = [
        pair("pre-training step of 4 crops, float32", step[FLOAT32], baseline, step[BASELINE], "s"),
        pair("the same, bfloat16", step["bfloat16"], baseline, step[BASELINE], "s"),
        pair("the same, bfloat16", step["bfloat16"], "attention not fused", step[unfused], "s"),
        pair("the same, float32", step[FLOAT32], "MONAI's masked autoencoder of its sizes", step[monai], "s"),
        ("augmented crops a second and core", f"{read:.3g}", whole, f"{loaded:.3g}", f"{read / loaded:.3g}"),
        pair("window of 96³, float32", window["ours, float32"], baseline, window["published, float32"], "s"),
        pair("the same, bfloat16", window["ours, bfloat16"], baseline, window["published, float32"], "s"),
        pair("the same, float32", window["ours, float32"], "MONAI's UNETR (ViT-B)", window[unetr], "s"),
        pair("the same, float32", window["ours, float32"], "MONAI's SwinUNETR (48)", window[swin], "s"),
        pair(scan, ours["seconds"], "MONAI's transforms and inferer", stock["seconds"], "s"),
        pair("the same, peak memory", ours["peak GB"], "the same", stock["peak GB"], "GB"),
    ]
    return table(["", "here", "", "beside it", "times as good"], rows)


def crops_line() -> str:
    """The guide's to pre-training: crops that a core reads."""
    read, loaded = (crops(row)["crops/s a core"] for row in (STORE, WHOLE_VOLUMES))
    return f"{read:.0f} augmented crops of 96^3 a second and core; from whole float32 volumes with MONAI {loaded:.0f}"


def speed_ups() -> dict[str, float]:
    """How many times as good as the baseline, on the machine of `speed.json`."""
    step = figures("Pre-training step")["variants"]
    window = {name: row["all"]["fastest"] for name, row in figures("Segmentation window")["variants"].items()}
    rows = figures("Inference chain without the network")["rows"]
    ours, stock = ({row["chain"]: row for row in rows if row["slices"] == SLICES}[chain] for chain in ("ours", "stock"))
    return {
        "pre-training step, float32": step[FLOAT32]["ratio"],
        "pre-training step, bfloat16": step["bfloat16"]["ratio"],
        "window of 96³, float32": window["published, float32"] / window["ours, float32"],
        "window of 96³, bfloat16": window["published, float32"] / window["ours, bfloat16"],
        "inference chain, time": stock["seconds"] / ours["seconds"],
        "inference chain, memory": stock["peak GB"] / ours["peak GB"],
    }


def other_machines() -> dict[str, list[float]]:
    """The same on other machines, from the table of the results."""
    rows = re.findall(r"^\| ([^|]+) \| [\d.]+ \| ([\d., ]+) \|$", (RESULTS / "README.md").read_text(), re.MULTILINE)
    return {name: [float(figure) for figure in figures.split(",")] for name, figures in rows}


def machines_table() -> str:
    """That of the results: speed-ups on the machine of `speed.json` and on others."""
    others = {name: ", ".join(f"{figure:.3g}" for figure in found) for name, found in other_machines().items()}
    rows = [(name, f"{found:.3g}", others[name]) for name, found in speed_ups().items()]
    return table(["times as good as the baseline", "speed.json", "other machines"], rows)


def ranges() -> dict[str, str]:
    """Lowest and highest of all machines, such as `1.3 to 1.45`, which is what README and cards quote."""
    others = other_machines()
    found = {name: [here, *others[name]] for name, here in speed_ups().items()}
    return {name: f"{min(figures):.3g} to {max(figures):.3g}" for name, figures in found.items()}


def readme_table() -> str:
    """The README's."""
    times = {name: f"{found} times as fast" for name, found in ranges().items()}
    read, loaded = (crops(row)["crops/s a core"] for row in (STORE, WHOLE_VOLUMES))
    code, network = "the authors' code", "the authors' network"
    scan = f"512 x 512 x {SLICES} voxels to labels, without the network"
    rows = [
        ("pre-training step of 4 crops, float32", code, times["pre-training step, float32"]),
        ("the same, bfloat16", f"{code}, float32", times["pre-training step, bfloat16"]),
        ("window of 96³, float32", network, times["window of 96³, float32"]),
        ("the same, bfloat16", f"{network}, float32", times["window of 96³, bfloat16"]),
        (
            scan,
            "MONAI's transforms and inferer",
            f"{times['inference chain, time']}, in {ranges()['inference chain, memory']} times less memory",
        ),
        (
            "reading for pre-training",
            "whole volumes",
            f"{read:.0f} augmented crops a second and core against {loaded:.0f}",
        ),
    ]
    return table(["measured", "compared with", "result"], rows)


def step_line() -> str:
    """The pre-training card's: the step against the authors' code."""
    found = ranges()
    in_float32, in_bfloat16 = (found[f"pre-training step, {kind}"] for kind in ("float32", "bfloat16"))
    return f"{in_float32} times as fast as the authors' code in float32, and {in_bfloat16} times in bfloat16"


def memory_line() -> str:
    """The guide's to inference: peak memory by slices."""
    rows = figures("Inference chain without the network")["rows"]
    ours = {row["slices"]: row["peak GB"] for row in rows if row["chain"] == "ours"}
    (stock,) = (row["peak GB"] for row in rows if row["chain"] == "stock" and row["slices"] == SLICES)
    peaks = ", ".join(f"{peak:.1f}" for peak in ours.values())
    return f"| {peaks} GB | measured, without the network; MONAI's chain took {stock:.0f} GB for {SLICES} |"


def fast_line() -> str:
    """The guide's to inference: what windows without overlap save and cost."""
    ways = json.loads((RESULTS / "fast.json").read_text())["ways"]
    (seconds, dice), (fast_seconds, fast_dice) = (ways[way].values() for way in ("default", "fast"))
    share = f"{fast_seconds / seconds:.2f} of the CPU time"
    return f"windows do not overlap: {share}, mean Dice {fast_dice:.3f} in place of {dice:.3f} on two synthetic CTs"


def tables(header: str) -> list[str]:
    """Those of `transfer.md` that start so."""
    return [block for block in (RESULTS / "transfer.md").read_text().split("\n\n") if block.startswith(header)]


def dice_tables() -> list[str]:
    """Those of the results: mean Dice by labelled cases and arm, a table a test set."""
    return tables("| labelled cases | from scratch")


def curve_tables() -> list[str]:
    """Mean Dice by steps of fine-tuning, a table a test set."""
    return tables("| steps |")


def ablation_tables() -> list[str]:
    """Mean Dice by ablation, a table a test set, in the field's words."""
    return [found.replace("| taps: ", "| `out_indices`: ") for found in tables("|  | mean Dice |")]


def difference(labels: int, compared: str, test_set: int = 0) -> str:
    """Return a difference of mean Dice with its interval, such as `+0.070 (+0.031 to +0.108)`.

    Args:
        labels: number of labelled cases.
        compared: such as `Hi-End-MAE less from scratch`.
        test_set: number in the order of the file; 0 is the synthetic CTs.
    """
    found = tables("| labelled cases | compared")[test_set]
    (row,) = (line for line in found.splitlines() if line.startswith(f"| {labels} | {compared} |"))
    return row.split("|")[3].strip()


def dice_figures() -> set[str]:
    """All figures of these tables and of the differences, of which README and results quote some."""
    found = [*dice_tables(), *curve_tables(), *ablation_tables(), *tables("| labelled cases | compared")]
    return set(re.findall(r"[+-]?\d\.\d{3}", "".join(found)))


def main() -> None:
    """Command line."""
    print(
        readme_table(),
        speed_table(),
        machines_table(),
        crops_line(),
        step_line(),
        memory_line(),
        fast_line(),
        difference(MAIN_LABELS, f"{OURS} less {SCRATCH}"),
        *dice_tables(),
        *curve_tables(),
        *ablation_tables(),
        sep="\n\n",
    )


if __name__ == "__main__":
    main()
