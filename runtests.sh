#!/usr/bin/env bash
# Makes the environment and runs the tests; further arguments go to pytest.
#   ./runtests.sh                 unit and then integration tests, in one go
#   ./runtests.sh unit            functions and classes by themselves, in two minutes
#   ./runtests.sh integration     bundles, commands, many synthetic patients
#   ./runtests.sh -m slow         every printed command, several processes, the whole quickstart, and more
#   ./runtests.sh --monailabel    both segmenters in MONAI Label's own server, which gets an environment of its own
#   ./runtests.sh --monailabel-next   the same with pydicom 3, in another environment
#   ./runtests.sh --nnunet        the trainers for nnU-Net in nnU-Net, which gets an environment of its own
#   ./runtests.sh --deploy        a segmenter in MONAI Deploy, which gets an environment of its own of 2 GB
#   ./runtests.sh --gpu           what a GPU can disprove, on one CUDA device
#   ./runtests.sh --gpu --device cpu   the same tests without a GPU
set -euo pipefail
cd "$(dirname "$0")"
[ -x .venv/bin/python ] || python3 -m venv .venv
.venv/bin/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
# Files of tests side by side, on two cores and no more: full-size networks take several GB.
side_by_side="-n 2 --dist loadfile"
case ${1:-} in
    --monailabel | --monailabel-next)
        pins=$PWD/shared_networks/bundle/monai_label/requirements${1#--monailabel}.txt
        export MONAILABEL_VENV=.venv${1#-}
        [ -x "$MONAILABEL_VENV/bin/python" ] || python3 -m venv "$MONAILABEL_VENV"
        # Also for what is built from source: else each build fetches a PyTorch for itself.
        PIP_CONSTRAINT=$pins PIP_BUILD_CONSTRAINT=$pins \
            "$MONAILABEL_VENV/bin/pip" install --quiet --disable-pip-version-check --requirement "$pins"
        set -- $side_by_side tests/monai_label "${@:2}" ;;
    --nnunet)
        pins=$PWD/shared_networks/doors/nnunet/requirements.txt
        [ -x .venv-nnunet/bin/python ] || python3 -m venv .venv-nnunet
        PIP_CONSTRAINT=$pins PIP_BUILD_CONSTRAINT=$pins \
            .venv-nnunet/bin/pip install --quiet --disable-pip-version-check --requirement "$pins" --editable '.[nnunet]'
        # The CPU build of PyTorch with the CUDA build of torchvision, which nnU-Net's networks import.
        .venv-nnunet/bin/python -c "import torchvision" 2> /dev/null ||
            export PYTHONPATH=$PWD/shared_networks/bundle/monai_label/torchvision_without_operators
        exec .venv-nnunet/bin/python -m pytest tests/nnunet "${@:2}" ;;
    --deploy)
        [ -x .venv-deploy/bin/python ] || python3 -m venv .venv-deploy
        .venv-deploy/bin/pip install --quiet --disable-pip-version-check \
            --requirement shared_networks/bundle/monai_deploy/requirements.txt
        set -- tests/monai_deploy "${@:2}" ;;
    --gpu) set -- tests/gpu "${@:2}" ;;
    unit) set -- $side_by_side -m "not slow and not integration" "${@:2}" ;;
    integration) set -- $side_by_side -m "integration and not slow" "${@:2}" ;;
    -m) set -- $side_by_side "$@" ;;
    "")
        .venv/bin/python -m pytest $side_by_side -m "not slow and not integration"
        set -- $side_by_side -m "integration and not slow" ;;
esac
exec .venv/bin/python -m pytest "$@"
