#!/usr/bin/env bash
# The test suite. Arguments go to pytest; `-m slow` runs the slow ones, `-m ''` all.
set -euo pipefail
export BLIP2TRAIN_EXTRAS="dev,deepspeed"
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1
exec python -m pytest "$@"
