"""Does pre-training pay? From scratch, plain masked autoencoding and Hi-End-MAE, alike in all but the pre-training.

    python -m tests.benchmarks.transfer --out FOLDER
    python -m tests.benchmarks.transfer --out FOLDER --data synthetic --data cohort=/data/cohort
    python -m tests.benchmarks.transfer --out FOLDER --data cohort=/data/cohort --ablations cohort

Every step is a command of the bundles, as a user types it, and `--jobs` of them run side by side. What has run is not
run again, and an interrupted training goes on; other settings in the same folder are refused.

All scans of `imagesTr` are pre-trained on, without their labels. 1, 4 or 16 of them train the segmenter with labels;
which, each seed draws anew, fewer among more. All scans of `imagesTs` test it, on their own grids, after the last step:
no case chooses a model. Arms have the same encoder, crops and steps, and the two pre-trainings decoders of about as
many weights. A pre-training is made once, so seeds are those of fine-tuning, and no interval holds the chance of a
pre-training. Seeds share the test cases: intervals draw both, and there are no tests of significance.

In the folder are then `transfer.md` with the tables, `transfer.csv` with a row a case and organ, and `transfer.png`.
`--size cpu` took 75 minutes on two cores for two data sets, ablations half an hour more (its bfloat16 wants a
processor that has it), `--size gpu` is meant for an hour on a card but has not been run on one, `--size smoke` shows
that the chain runs.
"""
