"""`blip2train report`: run folders -> one self-contained report.html, and their scores as summary.json."""

from __future__ import annotations

import logging
from pathlib import Path

from omegaconf import DictConfig, ListConfig

from blip2train.cli.config import run_verb
from blip2train.errors import ConfigError
from blip2train.run_dir import RunDir

log = logging.getLogger(__name__)


def main() -> None:
    run_verb("report", run)


def run(config: DictConfig) -> None:
    from blip2train.report.html import build_report
    from blip2train.report.summary import summarize

    folders = list(config.runs) if isinstance(config.runs, ListConfig) else [config.runs]
    if config.run:
        folders.append(config.run)
    if not folders:
        raise ConfigError(
            "no run given", where="run=, runs=", fix="report run=FOLDER, or report 'runs=[A,B]' to compare"
        )
    runs = [RunDir.open(folder) for folder in folders]
    out = Path(config.out) if config.out else runs[-1].path
    page = build_report(runs, out, config.title or " and ".join(run.path.name for run in runs))
    log.info("report: %s\nsummary: %s", page, summarize(runs, out))


if __name__ == "__main__":
    main()
