#!/usr/bin/env bash
# Everything that needs a GPU: the tests marked gpu, a smoke quickstart on the device, then both stages at the paper's
# sizes under DDP and ZeRO-2 (figures to scripts/benchmark/results/gpu_check.json). Each command ends within ten minutes.
#   bash scripts/gpu_check.sh --dry-run   tries the last part's commands on a CPU with tiny models, and says what is unproven
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [[ "${1:-}" == "--dry-run" ]]; then
  exec python scripts/benchmark/gpu_check.py --device cpu --tiny "${@:2}"
fi
python -c "import torch; assert torch.cuda.is_available(), 'no CUDA device'; print(torch.cuda.get_device_name())"
timeout 600 python -m pytest -m gpu
on_device="['trainer=gpu']"
timeout 600 python -m blip2train.cli.quickstart limit=smoke out=outputs/gpu_check_quickstart "stage1.overrides=$on_device" "stage2.overrides=$on_device"
python scripts/benchmark/gpu_check.py "$@"
