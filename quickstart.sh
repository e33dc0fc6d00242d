#!/usr/bin/env bash
# From a fresh clone to organ labels on a CT: segment with the weights that ship, and go on from them: pre-train,
# fine-tune, evaluate, segment. Results go to outputs/quickstart, in place of those of an earlier run.
#   ./quickstart.sh                 on synthetic CTs, made first
#   ./quickstart.sh --data FOLDER   on your own, nnU-Net style: imagesTr, labelsTr and, where there are, imagesTs, labelsTs
#   ./quickstart.sh --segment PATH  only labels, volumes and pictures of your own CT or folder of CTs
# Options: --bundle hi_end_mae_flare_seg for FLARE22's label order (default hi_end_mae_btcv_seg);
#          --epochs N to fine-tune for longer; --spacing MM for other voxels in training than the setting's;
#          -- SETTINGS for the fine-tuning alone, such as -- --background_weight 0.05
set -euo pipefail
here=$PWD
cd "$(dirname "$0")"
root=$PWD out=$PWD/outputs/quickstart data="" own="" bundle=hi_end_mae_btcv_seg epochs="" spacing=""
bundles="hi_end_mae_btcv_seg hi_end_mae_flare_seg" # label sets of synthetic CTs
fail() { echo "error: $1" >&2; exit 2; }
while [ $# -gt 0 ]; do
    case $1 in
        --) shift; break ;;
        --data | --segment | --bundle | --epochs | --spacing)
            case ${2---} in --*) fail "$1: has no value; give one after it" ;; esac ;;
    esac
    case $1 in
        --data) case $2 in /*) data=$2 ;; *) data=$here/$2 ;; esac
            [ -n "$2" ] && [ -d "$data" ] || fail "--data $2: no such folder"
            data=$(realpath -- "$data") ;;
        --segment) case $2 in /*) own=$2 ;; *) own=$here/$2 ;; esac
            [ -n "$2" ] && [ -e "$own" ] || fail "--segment $2: no such file or folder"
            own=$(realpath -- "$own") ;;
        --bundle) case $2 in /*) path=$2 ;; *) path=$here/$2 ;; esac
            for bundle in $bundles ""; do
                if [ "${2%/}" = "$bundle" ] || [ "$path" -ef "$root/$bundle" ]; then break; fi
            done
            [ -n "$bundle" ] || fail "--bundle $2: give ${bundles/ / or } of this clone; for others see docs/training.md" ;;
        --epochs) [[ $2 =~ ^0*[1-9][0-9]{0,8}$ ]] || fail "--epochs $2: give a whole number of at least 1"
            epochs=$((10#$2)) ;;
        --spacing) [[ $2 =~ ^[0-9]*\.?[0-9]*$ && $2 =~ [1-9] ]] || fail "--spacing $2: give a number of mm above 0"
            spacing=$2 ;;
        *) sed -n '2,9s/^# \?//p' "$0" >&2; exit 2 ;;
    esac
    shift 2
done
encoder=$root/hi_end_mae_pretrain/weights/small.pt segmenter=$root/$bundle/weights/small.pt
step() { printf '\n== %s (%d s)\n' "$1" "$SECONDS"; }

step "environment"
[ -x .venv/bin/python ] || python3 -m venv .venv
.venv/bin/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable .
python=$root/.venv/bin/python
run() { # run BUNDLE CONFIGS OPTIONS...
    (cd "$root/$1" && "$python" -W ignore -m monai.bundle run --config_file "[$2,'configs/small.json']" "${@:3}")
}
label_set=${bundle#hi_end_mae_} label_set=${label_set%_seg}
phantoms() { "$python" -m shared_networks.synthetic.phantom --label_set "$label_set" --out "$@"; }
# glibc keeps freed memory for the next step, in place of asking the system anew: docs/results/README.md.
export MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=1000000000000
SECONDS=0

step "segmentation with the weights that ship"
rm -rf "$out/shipped"
[ -n "$own" ] || phantoms "$out/shipped" --train 0 --test 1 --seed 1
run "$bundle" "'configs/inference.json'" --dataset_dir "${own:-$out/shipped}" --output_dir "$out/shipped"
step "done"
echo "labels:          $out/shipped/*_seg.nii.gz"
echo "pictures:        $out/shipped/*_overlay.png $out/shipped/*_preview.png"
echo "statistics:      $out/shipped/statistics.csv"
cut -d , -f 1-3 "$out/shipped/statistics.csv"
[ -z "$own" ] || exit 0

epochs=${epochs:-4}
tuning=(--init_weights "$segmenter" --warmup_epochs 1 --num_samples 1 --learning_rate 0.0001
    --epochs "$epochs" --val_interval "$(((epochs + 2) / 3))")
finer=(${spacing:+--spacing "$spacing"})

if [ -z "$data" ]; then
    step "synthetic CTs"
    data=$out/data
    phantoms "$data" --train 8 --test 2
fi
scans=$data
[ -d "$data/imagesTs" ] || scans=$data/imagesTr

step "pre-training without labels"
run hi_end_mae_pretrain "'configs/train.json'" --init_weights "$encoder" --epochs 2 --warmup_epochs 1 --num_samples 2 \
    --learning_rate 0.0001 "${finer[@]}" --overwrite True \
    --dataset_dir "$data" --ckpt_dir "$out/hi_end_mae_pretrain" --output_dir "$out/hi_end_mae_pretrain"
run hi_end_mae_pretrain "'configs/inference.json'" "${finer[@]}" \
    --dataset_dir "$scans" --checkpoint "$out/hi_end_mae_pretrain/model.pt" --output_dir "$out"

step "fine-tuning"
run "$bundle" "'configs/train.json'" "${tuning[@]}" "${finer[@]}" --overwrite True \
    --dataset_dir "$data" --ckpt_dir "$out/$bundle" --output_dir "$out/$bundle" "$@"

step "evaluation on the scans' own grids"
run "$bundle" "'configs/train.json','configs/evaluate.json'" "${finer[@]}" \
    --dataset_dir "$data" --checkpoint "$out/$bundle/model.pt" --output_dir "$out"

step "segmentation"
run "$bundle" "'configs/inference.json'" "${finer[@]}" \
    --dataset_dir "$scans" --checkpoint "$out/$bundle/model.pt" --output_dir "$out" --overlay False

step "done"
echo "models:          $out/hi_end_mae_pretrain/model.pt, $out/$bundle/model.pt"
echo "Dice by organ:   $out/dice.csv"
echo "labels:          $out/*_seg.nii.gz"
echo "pictures:        $out/*_evaluation.png (truth and prediction), $out/*_reconstruction.png"
echo "training curves: tensorboard --logdir $out"
