#!/usr/bin/env bash
# From nothing to a trained and evaluated BLIP-2 on the embedded micro-world; overrides as for `blip2train quickstart`.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
exec python -m blip2train.cli.main quickstart "$@"
