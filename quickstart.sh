#!/usr/bin/env bash
# From a fresh clone to organ labels on a CT: pre-train, fine-tune, evaluate, segment. Results go to outputs/quickstart,
# in place of those of an earlier run.
#   ./quickstart.sh                 on synthetic CTs, made first
#   ./quickstart.sh --data FOLDER   on your own, nnU-Net style: imagesTr, labelsTr and, where there are, imagesTs, labelsTs
# Options: --bundle hi_end_mae_flare_seg for FLARE22's label order (default hi_end_mae_btcv_seg);
#          --epochs N to fine-tune for longer; --spacing MM for finer voxels than the tiny setting's 4 mm;
#          -- SETTINGS for the fine-tuning alone, such as -- --background_weight 0.05
set -euo pipefail
here=$PWD
cd "$(dirname "$0")"
root=$PWD out=$PWD/outputs/quickstart data="" bundle=hi_end_mae_btcv_seg epochs="" spacing=""
fail() { echo "error: $1" >&2; exit 2; }
while [ $# -gt 0 ]; do
    case $1 in
        --) shift; break ;;
        --data | --bundle | --epochs | --spacing)
            case ${2---} in --*) fail "$1: has no value; give one after it" ;; esac ;;
    esac
    case $1 in
        --data) case $2 in /*) data=$2 ;; *) data=$here/$2 ;; esac
            [ -n "$2" ] && [ -d "$data" ] || fail "--data $2: no such folder"
            data=$(realpath -- "$data") ;;
        --bundle) bundle=${2%/}
            grep -qs '"label_names"' "$bundle/configs/train.json" || fail "--bundle $2: no segmentation bundle in $PWD" ;;
        --epochs) [[ $2 =~ ^0*[1-9][0-9]{0,8}$ ]] || fail "--epochs $2: give a whole number of at least 1"
            epochs=$((10#$2)) ;;
        --spacing) [[ $2 =~ ^[0-9]*\.?[0-9]*$ && $2 =~ [1-9] ]] || fail "--spacing $2: give a number of mm above 0"
            spacing=$2 ;;
        *) sed -n '2,8s/^# \?//p' "$0" >&2; exit 2 ;;
    esac
    shift 2
done
step() { printf '\n== %s (%d s)\n' "$1" "$SECONDS"; }

step "environment"
[ -x .venv/bin/python ] || python3 -m venv .venv
.venv/bin/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable .
python=$root/.venv/bin/python
run() { # run BUNDLE CONFIG OPTIONS...
    (cd "$root/$1" && "$python" -W ignore -m monai.bundle run --config_file "$2" "${@:3}" ${spacing:+--spacing "$spacing"})
}
# glibc keeps freed memory for the next step, in place of asking the system anew: docs/results/README.md.
export MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=1000000000000
SECONDS=0

if [ -z "$data" ]; then
    step "synthetic CTs"
    data=$out/data
    label_set=${bundle#hi_end_mae_}
    "$python" -m shared_networks.synthetic.phantom --out "$data" --label_set "${label_set%_seg}"
fi
scans=$data
[ -d "$data/imagesTs" ] || scans=$data/imagesTr

step "pre-training without labels"
run hi_end_mae_pretrain "['configs/train.json','configs/tiny.json']" \
    --dataset_dir "$data" --ckpt_dir "$out/hi_end_mae_pretrain" --output_dir "$out/hi_end_mae_pretrain" --overwrite True
run hi_end_mae_pretrain "['configs/inference.json','configs/tiny.json']" \
    --dataset_dir "$scans" --checkpoint "$out/hi_end_mae_pretrain/model.pt" --output_dir "$out"

step "fine-tuning from it"
run "$bundle" "['configs/train.json','configs/tiny.json']" ${epochs:+--epochs "$epochs" --val_interval "$(((epochs + 2) / 3))"} \
    --dataset_dir "$data" --pretrained_encoder "$out/hi_end_mae_pretrain/model.pt" \
    --ckpt_dir "$out/$bundle" --output_dir "$out/$bundle" --overwrite True "$@"

step "evaluation on the scans' own grids"
run "$bundle" "['configs/train.json','configs/evaluate.json','configs/tiny.json']" \
    --dataset_dir "$data" --checkpoint "$out/$bundle/model.pt" --output_dir "$out"

step "segmentation"
run "$bundle" "['configs/inference.json','configs/tiny.json']" \
    --dataset_dir "$scans" --checkpoint "$out/$bundle/model.pt" --output_dir "$out" --overlay False

step "done"
echo "models:          $out/hi_end_mae_pretrain/model.pt, $out/$bundle/model.pt"
echo "Dice by organ:   $out/dice.csv"
echo "labels:          $out/*_seg.nii.gz"
echo "pictures:        $out/*_overlay.png (truth and prediction), $out/*_reconstruction.png"
echo "training curves: tensorboard --logdir $out"
