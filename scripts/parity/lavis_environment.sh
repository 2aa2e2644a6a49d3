#!/usr/bin/env bash
# An environment with LAVIS 1.0.2 as its authors published it, for recording what it computes; ours cannot hold it, for it
# needs transformers < 4.27.  `bash scripts/parity/lavis_environment.sh [FOLDER]`, FOLDER defaults to .venv-lavis.
# Needs python 3.11 (the tokenizers of that time have no wheel for later ones): LAVIS_PYTHON names another one.
# LAVIS comes without its dependencies (OpenCV, spaCy, decord, ...): BLIP-2 imports only those listed here.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
venv="${1:-$here/../../.venv-lavis}"
python="${LAVIS_PYTHON:-python3.11}"
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
pip=("$venv/bin/python" -m pip install --quiet --disable-pip-version-check -c "$here/constraints-lavis.txt")
"${pip[@]}" iopath numpy omegaconf pandas safetensors timm tokenizers torch torchvision transformers
"${pip[@]}" --no-deps salesforce-lavis
(cd "$here" && "$venv/bin/python" -c "import lavis_source; print('LAVIS is ready:', lavis_source.blip2_qformer.Blip2Qformer)")
