#!/usr/bin/env bash
# Makes tests/data/lavis_recordings again: small runs of LAVIS 1.0.2 beside the larger ones of its HEAD, for what those
# lack: float64, T5, a prompt, one query, a cross-attention period of 3, padding-heavy texts, equal images.
#   bash scripts/parity/record_for_tests.sh [PYTHON OF THE LAVIS ENVIRONMENT]
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
python="${1:-$here/../../.venv-lavis/bin/python}"
export OMP_NUM_THREADS=1
small=(--target "$here/../../tests/data/lavis_recordings" --dtype float64 --img 8 --patch 4 --vit-width 4 --vit-mlp 8
  --vit-depth 1 --q-width 6 --q-mlp 10 --max-positions 12 --vocab 16 --embed-dim 5 --lm-width 8)
"$python" "$here/record_lavis.py" "${small[@]}" --name stage1_short_texts --batch 5 --texts short --same-images 2 \
  --queries 3 --cross-attention-every 3 --temperature 0.4 --seed 3 --leave-out after_adamw
"$python" "$here/record_lavis.py" "${small[@]}" --name stage2_t5 --kind stage2_t5 --batch 4 --queries 1 --q-layers 2 \
  --seed 5 --leave-out after_adamw
"$python" "$here/record_lavis.py" "${small[@]}" --name stage2_opt_prompt --kind stage2_opt --batch 4 --queries 2 \
  --q-layers 2 --prompt "a photo of " --max-txt 24 --seed 7 --leave-out after_adamw
chmod 644 "$here"/../../tests/data/lavis_recordings/*
