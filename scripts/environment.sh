# Sourced by the other scripts: a virtual environment in .venv with the pinned packages, made once. Needs python3 and pip.
#   BLIP2TRAIN_VENV   another place for it
#   BLIP2TRAIN_EXTRAS what to install besides the core, e.g. dev,deepspeed
#   BLIP2TRAIN_PYTHON a python that has everything already (a container's, conda's): used as it is, nothing is made or installed
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$root"
if [ -n "${BLIP2TRAIN_PYTHON:-}" ]; then
  [ -x "$BLIP2TRAIN_PYTHON" ] || { echo "BLIP2TRAIN_PYTHON=$BLIP2TRAIN_PYTHON is no executable file" >&2; exit 1; }
  export PATH="$(cd "$(dirname "$BLIP2TRAIN_PYTHON")" && pwd):$PATH"
  return
fi
venv="${BLIP2TRAIN_VENV:-$root/.venv}"
extras="${BLIP2TRAIN_EXTRAS:-}"

# Same pins, same extras: nothing to do. A larger set of extras that is already there serves too.
wanted="$(cat pyproject.toml constraints.txt blip2train/__init__.py | cksum | cut -d' ' -f1) $root"
stamp="$venv/.blip2train"
if ! { [ -f "$stamp" ] && [ "$(head -1 "$stamp")" = "$wanted" ] && grep -qE "^($extras|dev,deepspeed)$" <(tail -n +2 "$stamp"); }; then
  started=$SECONDS
  echo "setting up $venv (once; a few GB on a machine that has none of it)"
  [ -x "$venv/bin/python" ] || python3 -m venv "$venv"
  # Builds in isolation: antlr4 and deepspeed come as source, and a new venv's own setuptools has no wheel builder.
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".${extras:+[$extras]}"
  { echo "$wanted"; echo "$extras"; } > "$stamp"
  echo "environment ready in $((SECONDS - started)) s"
fi
export PATH="$venv/bin:$PATH"
