#!/usr/bin/env bash
# What a pull request must pass: lint, format, types, layers.  `scripts/test.sh` runs the tests.
set -euo pipefail
export BLIP2TRAIN_EXTRAS="dev,deepspeed"
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
ruff check .
ruff format --check .
mypy
lint-imports
