"""Does the method pay, on real anatomy, beyond chance? The design is in `design.md`.

    python -m tests.benchmarks.study --out FOLDER --test 'real CT=/data/BTCV' --unlabelled /data/CTs --minutes 120
    python -m tests.benchmarks.study --out FOLDER --size gpu --test 'real CT=/data/BTCV'

Every step is a command of the bundles, as a user types it, and `--jobs` of them run side by side. What has run is not
run again, and an interrupted training goes on; other settings in the same folder are refused. After `--minutes` no
further run begins, and the report is of what is there. The runs that answer most come first.

`--test NAME=FOLDER` adds labelled scans of another source to the test cases; given later, it tests the trained networks
again. `--unlabelled FOLDER` adds real CTs to pre-train on, for the ablations alone. `--known FOLDER` goes on from the
results of another machine, whose runs are gone.

In the folder are then `transfer.md` with the tables, `transfer.csv` with a row a case, `pretrainings.csv`, and figures.
`--size small` is the same for the network of which weights ship, `--size gpu` for the published
one; `--size smoke` shows that the chain runs.
"""
