"""Hydra's door: find the configs, compose them, and turn mistakes into errors that say which keys exist."""

from __future__ import annotations

import difflib
import logging
import math
import os
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException, InstantiationException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

import blip2train
from blip2train.errors import Blip2TrainError, ConfigError

QUIET_WARNINGS = (
    r".*isinstance\(treespec, LeafSpec\).*",  # Lightning 2.6 on torch 2.11
    r"Found \d+ module\(s\) in eval mode at the start of training.*",  # frozen parts stay in eval mode on purpose
    r".*does not have many workers which may be a bottleneck.*",  # data_wait_fraction says when they are
)

PACKAGE_DIR = Path(blip2train.__file__).resolve().parent


def config_dir() -> Path:
    """The shipped configs: inside an installed package, else beside the package of a checkout."""
    for candidate in (PACKAGE_DIR / "configs", PACKAGE_DIR.parent / "configs"):
        if (candidate / "train.yaml").is_file():
            return candidate
    raise ConfigError("no configs found", where=str(PACKAGE_DIR), fix="reinstall blip2train; the wheel ships them")


def run_id() -> str:
    """One name per run, the same in every process of it: scheduler's job id or the time, kept in the environment.

    Raises:
        ConfigError: torchrun started several processes and gave them no name in common.
    """
    known = (os.environ.get(name) for name in ("BLIP2TRAIN_RUN_ID", "SLURM_JOB_ID", "TORCHELASTIC_RUN_ID"))
    given = next((name for name in known if name and name != "none"), None)
    if given is None and "TORCHELASTIC_RUN_ID" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(
            "several processes of torchrun, and nothing that names their run folder",
            where="run_dir",
            fix="torchrun --rdzv-id=NAME (or --standalone), or run_dir=FOLDER",
        )
    chosen = given or time.strftime("%Y%m%d-%H%M%S")
    os.environ["BLIP2TRAIN_RUN_ID"] = chosen
    return chosen


def register_resolvers() -> None:
    OmegaConf.register_new_resolver("run_id", run_id, replace=True)
    OmegaConf.register_new_resolver("package_dir", lambda: str(PACKAGE_DIR), replace=True)
    OmegaConf.register_new_resolver("divide", divide, replace=True)


def divide(total: int, *parts: int) -> int:
    """Share of a global batch per device, node and micro-batch; the check of the batch catches a remainder.

    Raises:
        ConfigError: a part that is no number ("auto" devices, a list of them).
    """
    for part in parts:
        if not isinstance(part, int) or part < 1:
            raise ConfigError(
                f"a global batch of {total} cannot be divided by {part!r}",
                where="trainer.devices, trainer.num_nodes, trainer.accumulate_grad_batches",
                fix="give their number, or data.batch_size= for the batch of one device",
            )
    return int(total) // math.prod(parts)


def options_first(arguments: list[str]) -> list[str]:
    """Move overrides behind options: argparse, under Hydra, takes `a=1 --config-dir DIR b=2` for a mistake.

    A word that is neither, a sub-verb or an option's value, keeps its place among the options.
    """

    def is_override(argument: str) -> bool:
        return not argument.startswith("-") and ("=" in argument or argument.startswith("~"))

    return sorted(arguments, key=is_override)


def run_verb(config_name: str, function: Callable[[DictConfig], None]) -> None:
    """Run `function` under Hydra with the arguments of this process; user errors end with one clear message."""
    register_resolvers()
    sys.argv[1:] = options_first(sys.argv[1:])
    composed = False

    @hydra.main(version_base="1.3", config_path=str(config_dir()), config_name=config_name)
    def job(config: DictConfig) -> None:
        nonlocal composed
        composed = True
        try:
            function(config)
        except Blip2TrainError as error:
            stop(error)
        except InstantiationException as error:
            cause = find_user_error(error)
            if cause is None:
                raise
            stop(cause)
        except OmegaConfBaseException as error:
            cause = find_user_error(error)
            if cause is not None:
                stop(cause)
            stop(ConfigError(str(error).splitlines()[0], where=str(error.full_key), fix="see --cfg job"))
        except KeyboardInterrupt:
            sys.stderr.write("\ninterrupted; what was finished is kept\n")
            raise SystemExit(130) from None

    try:
        job()
    except SystemExit as leaving:
        if leaving.code == 1 and not composed:  # Hydra has printed what it could not compose; add what exists
            for hint in explain_overrides(config_name, sys.argv[1:]):
                sys.stderr.write(hint + "\n")
        raise


def run_subverb(
    usage: str, verbs: Mapping[str, tuple[str, Callable[[DictConfig], None]]], *, extra: Sequence[str] = ()
) -> None:
    """Take the sub-verb off the command line and run it; without a known one, say what there is.

    Args:
        usage: printed for --help and for an unknown name.
        verbs: name -> (config, function).
        extra: overrides that every one of them gets.
    """
    sys.argv[1:] = options_first(sys.argv[1:])
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name not in verbs:
        asked = name in {"-h", "--help"}
        (sys.stdout if asked else sys.stderr).write(usage + "\n")
        raise SystemExit(0 if asked else 2)
    del sys.argv[1]
    sys.argv += extra
    run_verb(*verbs[name])


def stop(error: Blip2TrainError) -> None:
    sys.stderr.write(f"\n{type(error).__name__}: {error}\n")
    raise SystemExit(2)


def find_user_error(error: BaseException) -> Blip2TrainError | None:
    """The error of ours that Hydra's `instantiate` or a resolver's caller wrapped, if there is one."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, Blip2TrainError):
            return cause
        cause = cause.__cause__ or cause.__context__
    return None


def compose(config_name: str, overrides: list[str]) -> DictConfig:
    """Compose a config in-process (quickstart, tests); mistakes are `ConfigError`s that say which keys exist."""
    register_resolvers()
    active = GlobalHydra.instance().is_initialized()
    try:
        if active:
            return hydra.compose(config_name, overrides)
        with hydra.initialize_config_dir(str(config_dir()), version_base="1.3"):
            return hydra.compose(config_name, overrides)
    except HydraException as error:
        hints = explain_overrides(config_name, overrides)
        raise ConfigError(
            str(error).splitlines()[0], where=" ".join(overrides), fix="; ".join(hints) or "see --cfg job"
        ) from error


def explain_overrides(config_name: str, arguments: list[str]) -> list[str]:
    """For each override that names no option or key that exists: which there are, and the closest one."""
    given = [item for item in arguments if "=" in item and item[0] not in "-+~"]
    groups = [item for item in given if _is_group(item.split("=", 1)[0])]
    values = [item.split("=", 1)[0] for item in given if item not in groups and not item.startswith("hydra.")]
    if not any(item.startswith(("--config-dir", "-cd")) for item in arguments):  # a folder of the user's has more
        options = [hint for item in groups if (hint := _explain_option(*item.split("=", 1)))]
        if options:
            return options
    try:
        register_resolvers()
        GlobalHydra.instance().clear()
        with hydra.initialize_config_dir(str(config_dir()), version_base="1.3"):
            config = hydra.compose(config_name, groups)
    except HydraException:
        return []
    return [hint for key in values if (hint := _explain_key(config, key))]


def _is_group(key: str) -> bool:
    return (config_dir() / key.split("@")[0]).is_dir()


def _explain_option(key: str, choice: str) -> str | None:
    """Hydra lists the options of a group, but not those in its folders, where the presets are."""
    folder = config_dir() / key.split("@")[0]
    if choice == "null" or choice[:1] == "[" or "," in choice or (folder / f"{choice}.yaml").is_file():
        return None
    paths = (path.relative_to(folder).with_suffix("") for path in folder.rglob("*.yaml"))
    known = sorted(path.as_posix() for path in paths if not path.name.startswith("_"))
    close = difflib.get_close_matches(choice, known, n=1)
    hint = f" Did you mean {close[0]}?" if close else ""
    return f"{key}: there is no {choice!r}. It has: {', '.join(known)}.{hint}"


def _explain_key(config: DictConfig, key: str) -> str | None:
    node: Any = config
    walked: list[str] = []
    for part in key.split("."):
        known = sorted(map(str, node.keys())) if isinstance(node, DictConfig) else []
        if part not in known:
            close = difflib.get_close_matches(part, known, n=1)
            place = ".".join(walked) or "the top level"
            hint = f" Did you mean {'.'.join([*walked, close[0]])}?" if close else ""
            return f"{key}: there is no {part!r} in {place}. It has: {', '.join(known) or 'no keys'}.{hint}"
        walked.append(part)
        node = OmegaConf.select(config, ".".join(walked), throw_on_resolution_failure=False)
    return None


def resolved_yaml(config: DictConfig) -> str:
    """The config with every interpolation resolved, but package paths kept portable: a run folder may move."""
    register_resolvers()
    plain = OmegaConf.to_container(config, resolve=True)
    return OmegaConf.to_yaml(OmegaConf.create(_portable(plain)))


def _portable(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _portable(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_portable(item) for item in value]
    if isinstance(value, str) and value.startswith(str(PACKAGE_DIR)):
        return "${package_dir:}" + value.removeprefix(str(PACKAGE_DIR))
    return value


def require_filled(config: DictConfig) -> None:
    """Name every mandatory value (`???`) that nobody gave.

    Interpolations are not followed: what they point at has its own place, or, in an evaluation, is in the run's config.
    """
    missing = sorted(_open_values(OmegaConf.to_container(config, resolve=False)))
    if missing:
        raise ConfigError(
            f"{len(missing)} mandatory values are not set: {', '.join(missing)}",
            where=", ".join(missing),
            fix="set them on the command line (key=value) or choose an experiment=",
        )


def _open_values(node: Any, path: str = "") -> list[str]:
    if isinstance(node, dict):
        return [name for key, value in node.items() for name in _open_values(value, f"{path}.{key}" if path else key)]
    if isinstance(node, list):
        return [name for index, value in enumerate(node) for name in _open_values(value, f"{path}[{index}]")]
    return [path] if node == "???" else []


def build(config: Any, **arguments: Any) -> Any:
    """Instantiate `_target_`s; what they receive are plain dicts and lists, so no config leaks out of `cli/`."""
    return hydra.utils.instantiate(config, _convert_="all", **arguments)


def _says_something(record: logging.LogRecord) -> bool:
    """transformers imports DeepSpeed where it is installed, which then reports every machine without a GPU."""
    return not record.getMessage().startswith("Setting accelerator to CPU")


def quiet_libraries() -> None:
    """Keep third-party chatter out of a user's log; warnings and errors stay."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for name in ("httpx", "pytorch_lightning"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("DeepSpeed").addFilter(_says_something)
    for message in QUIET_WARNINGS:
        warnings.filterwarnings("ignore", message=message)
