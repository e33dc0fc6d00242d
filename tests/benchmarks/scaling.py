"""Hours and gigabytes of a pre-training, from what a crop and a case cost.

    python -m tests.benchmarks.scaling --cases 10000 --epochs 1000 --gpus 1,4,32 --gpu_tflops 312 --share 0.4

    crops        = cases x epochs x crops a case
    crops/s      = GPUs x TFLOP/s of a GPU x share / FLOP of a crop
    hours        = crops / crops/s / 3600
    loader cores = crops/s / crops/s of a core,   read GB/s = crops/s x MB read a crop / 1000
    store GB     = cases x MB of a case / 1000,   prepare core-hours = cases x seconds of a case / 3600

`--share` is the part of the card's peak that a step reaches: `tests.benchmarks.pretrain_step` measures it.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from . import quoted

GFLOP_A_CROP = 340.84
"""Forward and backward pass of vit_large_p12, counted by `tests.benchmarks.pretrain_step`."""
CROPS_A_CORE, MB_A_CROP = (quoted.crops(quoted.STORE)[name] for name in ("crops/s a core", "MB read a crop"))
"""Augmented crops a second, and what is read from disk, as `docs/results/speed.json` has them."""
MB_A_CASE, SECONDS_A_CASE = 21.0, 1.7
"""Of a prepared abdominal CT (350 x 250 x 400 mm at 1.5 mm, two bytes a voxel) and of preparing one."""


def plan(
    cases: int, epochs: int, gpus: int, gpu_tflops: float, share: float, crops_a_case: int = 8
) -> dict[str, float]:
    """What a pre-training of `epochs` over `cases` on `gpus` cards takes."""
    rate = gpus * gpu_tflops * 1e3 * share / GFLOP_A_CROP
    return {
        "crops/s": rate,
        "hours": cases * epochs * crops_a_case / rate / 3600,
        "loader cores": rate / CROPS_A_CORE,
        "read, GB/s": rate * MB_A_CROP / 1000,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--epochs", type=int, default=1000)
    parser.add_argument("--crops_a_case", type=int, default=8)
    parser.add_argument("--gpus", default="1,4,32")
    parser.add_argument("--gpu_tflops", type=float, default=312.0, help="dense bfloat16 peak of a card; 312: A100")
    parser.add_argument("--share", type=float, default=0.4, help="of that peak that a step reaches")
    args = parser.parse_args(arguments)
    rows = {
        gpus: plan(args.cases, args.epochs, gpus, args.gpu_tflops, args.share, args.crops_a_case)
        for gpus in map(int, args.gpus.split(","))
    }
    print(f"| GPUs | {' | '.join(next(iter(rows.values())))} |\n|{'---|' * 5}")
    for gpus, row in rows.items():
        print(f"| {gpus} | {' | '.join(f'{value:,.1f}' for value in row.values())} |")
    print(
        f"\n{args.cases:,} cases: a store of {args.cases * MB_A_CASE / 1e3:,.0f} GB, "
        f"{args.cases * SECONDS_A_CASE / 3600:,.1f} core-hours to prepare."
    )


if __name__ == "__main__":
    main()
