#!/usr/bin/env bash
# Everything that needs a GPU, in one command under ten minutes: the tests marked gpu, then a smoke quickstart on the device.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python -c "import torch; assert torch.cuda.is_available(), 'no CUDA device'; print(torch.cuda.get_device_name())"
python -m pytest -m gpu
on_device="['trainer=gpu']"
python -m blip2train.cli.quickstart limit=smoke out=outputs/gpu_check "stage1.overrides=$on_device" "stage2.overrides=$on_device"
