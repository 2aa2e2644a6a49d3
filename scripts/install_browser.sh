#!/usr/bin/env bash
# The browser that the tests of the pages look through: Chromium by apt-get where there is none and we may install one.
# Without it those tests are skipped; BLIP2TRAIN_BROWSER names another Chromium or Chrome.
set -euo pipefail
for name in "${BLIP2TRAIN_BROWSER:-chromium}" chromium-browser google-chrome google-chrome-stable; do
  if command -v "$name" >/dev/null; then
    echo "browser: $(command -v "$name")"
    exit 0
  fi
done
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
  { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium; } >/dev/null 2>&1 || true
fi
command -v chromium || echo "no browser could be installed: install Chromium or Chrome, or the tests of the pages are skipped"
