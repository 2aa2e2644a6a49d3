"""`blip2train doctor`: looks at machine, data, weights and config before a long run, and tries a step of it.

Started alone it looks at this machine and starts what it needs; started by torchrun or srun, as the training will be,
every process takes part and rank 0 speaks.
"""

from __future__ import annotations

import logging
from dataclasses import asdict
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from blip2train.cli import check
from blip2train.cli.config import quiet_libraries, require_filled, run_verb
from blip2train.cli.doctor.context import Context, of_training
from blip2train.cli.doctor.launch import join_launch
from blip2train.cli.doctor.row import Row, worst
from blip2train.cli.doctor.session import choose, run_checks
from blip2train.cli.doctor.table import LiveTable
from blip2train.errors import ConfigError
from blip2train.exit_code import USER_ERROR
from blip2train.run_dir import check_writable, write_json

SECONDS_BEYOND = 60.0
"""The processes of a launch wait so much longer for each other than a check may take."""


def main() -> None:
    run_verb("doctor", run)


def run(config: DictConfig) -> None:
    """Run the checks and print them; leaves with code 2 when one failed."""
    started = HydraConfig.get()
    if started.mode == RunMode.MULTIRUN:
        raise ConfigError("the doctor looks at one config", where="-m", fix="leave -m out, with one value for each key")
    folders = [source.path for source in started.runtime.config_sources if source.provider == "command-line"]
    arguments = [*(f"--config-dir={folder}" for folder in folders), *started.overrides.task]
    if worst(diagnose(config, arguments)) == "fail":
        raise SystemExit(USER_ERROR)


def diagnose(config: DictConfig, arguments: list[str]) -> list[Row]:
    """All chosen checks of a composed config, in order; the rows of all machines.

    Args:
        config: of `configs/doctor.yaml`.
        arguments: overrides and options of the command line, for the training that is tried.

    Raises:
        ConfigError: a setting of the doctor itself; no experiment; a launch that is not complete.
    """
    require_filled(config)
    if not all(config.get(part) for part in ("stage", "model", "data", "optim")):
        check.check_train(config)  # says what to choose
    for key in ("steps", "shards", "check_minutes"):
        if config[key] <= 0:
            raise ConfigError(f"{key} is {config[key]}", where=key, fix="give a number above 0")
    names = choose(list(config.only), list(config.skip))
    seconds = 60.0 * config.check_minutes
    launch = join_launch(seconds + SECONDS_BEYOND)
    if config.out and launch.is_main:
        check_writable(Path(config.out), f"out={config.out}")
    quiet_libraries()
    # what a check has to say is in its row
    logging.getLogger("blip2train").setLevel(logging.ERROR)
    context = Context(of_training(config), launch, arguments, seconds, steps=config.steps, shards=config.shards)
    rows = run_checks(names, context, LiveTable(launch.is_main))
    if config.out and launch.is_main:
        result = {"format": 1, "name": config.name, "result": worst(rows)}
        facts = asdict(context.facts)
        write_json(Path(config.out), result | {"rows": [row.as_json() for row in rows], "facts": facts})
    return rows


if __name__ == "__main__":
    main()
