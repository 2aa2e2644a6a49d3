"""`blip2train convert from=lavis|huggingface|sharded|blip2train to=... source=... target=...`: weights in, and out.

Every direction goes through our own form, a run folder (checkpoint/converted.py), so two formats need two readers and
two writers. The target appears only when all of it is written and checked.
"""

from __future__ import annotations

import dataclasses
import importlib
import logging
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from omegaconf import DictConfig, OmegaConf

from blip2train.cli.config import compose, quiet_libraries, require_filled, resolved_yaml, run_verb
from blip2train.errors import CheckpointError, ConfigError
from blip2train.run_dir import RunDir, read_json, write_json

if TYPE_CHECKING:
    from torch import Tensor, nn

    from blip2train.checkpoint.converted import ConversionReport

log = logging.getLogger(__name__)

OURS = "blip2train"
DIRECTIONS = {
    ("lavis", OURS): "convert_lavis.from_lavis",
    (OURS, "lavis"): "convert_lavis.to_lavis",
    ("huggingface", OURS): "convert_huggingface.from_huggingface",
    (OURS, "huggingface"): "convert_huggingface.to_huggingface",
    ("sharded", OURS): "convert_sharded.from_sharded",
}
"""Between two names: the function, by module in blip2train/cli. Others go through our own form.

Nothing is made sharded: a checkpoint of ours is whole and loads under every strategy."""

LAVIS_FILE = Path("model.pth")
"""What a LAVIS target folder holds; a target= that ends like it is that file itself."""

LAST = "last"
"""What source_checkpoint= is where nobody sets it."""

OWN_KEYS = ("from", "to", "source", "target", "source_checkpoint")
"""What convert.yaml adds to a training config; a converted run's config.yaml holds none of it."""


class Direction(Protocol):
    """Convert `source` into the new, empty `folder`; `config` is convert.yaml's with the user's overrides."""

    def __call__(self, config: DictConfig, source: Path, folder: Path) -> ConversionReport: ...


def main() -> None:
    run_verb("convert", run)


def run(config: DictConfig) -> None:
    convert(config)


def convert(config: DictConfig) -> ConversionReport:
    """Convert what `config` names; writes the target folder (or .pth file) and returns what was done.

    Raises:
        ConfigError: an unknown format, no such source, a target in use, a model the target cannot be built for.
        CheckpointError: the source does not fit the described model, or holds what the target cannot.
    """
    steps = plan(config)
    source, target = Path(config.source), Path(config.target)
    if not source.exists():
        raise ConfigError("no such file or folder", where=f"source={source}", fix="give the weights to be converted")
    check_overrides(config)
    quiet_libraries()
    from blip2train.checkpoint.converted import REPORT, write_atomically

    def write(folder: Path) -> ConversionReport:
        report = _run_steps(config, steps, source, folder)
        facts = {"from": config["from"], "to": config.to, "source": source.name, **dataclasses.asdict(report)}
        write_json(folder / REPORT, facts)
        return report

    single = config.to == "lavis" and target.suffix == LAVIS_FILE.suffix
    report = write_atomically(target, write, only=LAVIS_FILE.name if single else None)
    log.info("%s -> %s: %s\n%s", config["from"], config.to, target, report.summary())
    return report


def plan(config: DictConfig) -> list[str]:
    """The directions to run, one after the other.

    Raises:
        ConfigError: a value is not set, or names no format.
    """
    missing = [key for key in OWN_KEYS if OmegaConf.is_missing(config, key)]
    sources, targets = (sorted({pair[side] for pair in DIRECTIONS}) for side in (0, 1))
    usage = f"from= one of {', '.join(sources)}; to= one of {', '.join(targets)}; source=FILE_OR_FOLDER target=FOLDER"
    if missing:
        raise ConfigError(f"not set: {', '.join(missing)}", where=", ".join(missing), fix=usage)
    start, end = config["from"], config.to
    for key, name, known in (("from", start, sources), ("to", end, targets)):
        if name not in known:
            raise ConfigError(f"no format {name!r}", where=f"{key}=", fix=f"known: {', '.join(known)}")
    if start == end:
        raise ConfigError(f"from and to are both {start}", where="from=, to=", fix=usage)
    if (start, end) in DIRECTIONS:
        return [DIRECTIONS[start, end]]
    return [DIRECTIONS[start, OURS], DIRECTIONS[OURS, end]]


def check_overrides(config: DictConfig) -> None:
    """Out of our form, the run's config.yaml describes the model; into it, there is no choice of checkpoints.

    Raises:
        ConfigError: a value is given that would not be read.
    """
    if config["from"] != OURS:
        _check_no_checkpoint(config)
        return
    plain: Any = OmegaConf.to_container(compose("convert", []), resolve=False)
    given: Any = OmegaConf.to_container(config, resolve=False)
    unread = sorted(key for key in given if key not in OWN_KEYS and given[key] != plain.get(key))
    if unread:
        raise ConfigError(
            f"from={OURS} takes the model from the run's config.yaml; not read: {', '.join(unread)}",
            where=f"{', '.join(unread)} on the command line",
            fix=f"leave them out; besides from=, to=, source= and target= only {OWN_KEYS[-1]}= counts",
        )


def _check_no_checkpoint(config: DictConfig) -> None:
    if config.source_checkpoint != LAST:
        raise ConfigError(
            f"a source of {config['from']} holds one state of the weights: not read",
            where=f"source_checkpoint={config.source_checkpoint}",
            fix=f"leave it out; it chooses among the checkpoints of a run, with from={OURS}",
        )


def load_direction(name: str) -> Direction:
    """The function behind a row of DIRECTIONS, imported when it is needed."""
    module, function = name.rsplit(".", 1)
    return cast(Direction, getattr(importlib.import_module(f"blip2train.cli.{module}"), function))


def model_config(config: DictConfig) -> DictConfig:
    """The training config within convert.yaml's: what describes the model, complete, without the conversion's own keys.

    Raises:
        ConfigError: it describes no model, or leaves values open.
    """
    described = OmegaConf.masked_copy(config, [str(key) for key in config if key not in OWN_KEYS])
    described.init_from = described.init_qformer = None  # the weights come from the source
    if not described.get("model", None) or not described.get("stage", None):
        raise ConfigError(
            "the source does not say which model it is",
            where="experiment=",
            fix="describe it as for `train`, e.g. experiment=paper/stage1_vitg, with overrides where it differs",
        )
    require_filled(described)
    return described


def load_strictly(model: nn.Module, weights: Path, source: Path) -> None:
    """Compare names and shapes by loading; an error names the user's file, not the one that is written from it."""
    from blip2train.checkpoint.io import load_weights

    try:
        load_weights(model, weights)
    except CheckpointError as error:
        raise CheckpointError(
            error.found,
            where=str(source),
            fix="choose the experiment= of this file; if it is the right one, the file is not whole: fetch it again",
        ) from error


def write_backbones(
    folder: Path, config: DictConfig, language_model: Mapping[str, Tensor], *, vision: bool
) -> dict[str, Any]:
    """Write the language model that a source holds; returns what config.yaml must say to use the parts.

    Args:
        folder: the run folder to be.
        config: a training config.
        language_model: by transformers' names; empty where the source has none.
        vision: whether the run has an encoder of its own in parts/.
    """
    from blip2train.checkpoint.converted import LANGUAGE_MODEL, PARTS, VISION, save_tensors

    changes: dict[str, Any] = {}
    if vision:
        changes["model.vision_encoder.weights"] = f"${{run_dir}}/{PARTS}/{VISION}"
        changes["model.vision_encoder.pretrained"] = False
    if language_model:
        local = Path(str(config.llm.path)) / "config.json"
        architecture = config.llm.get("architecture", None)
        facts = read_json(local) if local.is_file() else OmegaConf.to_container(architecture, resolve=True)
        target = folder / PARTS / LANGUAGE_MODEL
        save_tensors(language_model, target / "model.safetensors")
        write_json(target / "config.json", facts)  # type: ignore[arg-type]  # a mapping: build_meta has read it
        changes["model.language_model.path_or_config"] = f"${{run_dir}}/{PARTS}/{LANGUAGE_MODEL}"
        changes["llm.model.path_or_config"] = changes["model.language_model.path_or_config"]
    return changes


def write_run_config(folder: Path, config: DictConfig, changes: Mapping[str, Any]) -> None:
    """Write config.yaml of a converted run.

    Args:
        folder: the run folder to be.
        config: a training config.
        changes: by key, e.g. the path of a part as "${run_dir}/parts/...", which holds wherever the folder moves.
    """
    whole = OmegaConf.create(resolved_yaml(config))
    for key, value in {"run_dir": ".", **changes}.items():
        OmegaConf.update(whole, key, value)
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(whole), encoding="utf-8")


def write_manifest(folder: Path, seed: int, model: nn.Module, *, facts: Mapping[str, Any]) -> None:
    """Write manifest.json of a converted run.

    Args:
        folder: the run folder to be.
        seed: of its config.
        model: as its config describes it; its parameters are counted.
        facts: where the weights came from: "from" (the format), "file", "steps".
    """
    from blip2train.callback.provenance import describe_run
    from blip2train.model.freezing import count_parameters

    trainable, frozen = count_parameters(model)
    counts = {"trainable_parameters": trainable, "frozen_parameters": frozen, "steps": facts["steps"]}
    origin = describe_run(seed=seed, command=sys.argv, shards=[])
    write_json(folder / "manifest.json", origin | counts | {"converted": dict(facts)})


def card_source(run: RunDir, name: str) -> str:
    """Where a model comes from, for its card: what its run was converted from, or the run itself."""
    origin = run.read_manifest().get("converted")
    return f"{origin['file']} ({origin['from']})" if origin else f"the run {name}"


def vision_encoder_name(config: DictConfig) -> str:
    """A vision encoder's name for a card; timm's name is that of a size, so others are added where they were set."""
    encoder = config.model.vision_encoder
    own: Any = OmegaConf.to_container(encoder.get("model_args", None) or OmegaConf.create({}), resolve=True)
    sizes = [f"{key} {own[key]}" for key in ("embed_dim", "depth", "num_heads", "patch_size") if key in own]
    return f"the network of {encoder.name} with {', '.join(sizes)}" if sizes else str(encoder.name)


def language_model_name(config: DictConfig) -> str:
    """A language model's name for a card: never a path of this machine, which says nothing elsewhere."""
    folder = Path(str(config.llm.path))
    if not folder.is_dir():
        return str(config.llm.path)
    own = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    kind = own.get("model_type", "unknown type")
    return f"the source's own ({kind})" if folder.parent.name == "parts" else f"{folder.name} ({kind})"


def _run_steps(config: DictConfig, steps: list[str], source: Path, folder: Path) -> ConversionReport:
    if len(steps) == 1:
        return load_direction(steps[0])(config, source, folder)
    between = folder / "between.partial"
    try:
        between.mkdir()
        first = load_direction(steps[0])(config, source, between)
        second = load_direction(steps[1])(config, between, folder)
    finally:
        shutil.rmtree(between, ignore_errors=True)
    second.notes = [*first.notes, *second.notes]
    left = [f"{name}: only {config['from']} knows it" for name in first.kept_aside]
    second.not_held = [*first.not_held, *left, *second.not_held]
    return second


if __name__ == "__main__":
    main()
