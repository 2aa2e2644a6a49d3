"""Every preset of the paper and of LAVIS takes two training steps with tiny parts, and keeps every setting of its own.

Tiny are the ViT, the Q-Former and the language model (real classes of transformers, built from a mapping), the shards
are the micro-world's under the preset's own data set names, with its own augmentation. Everything else is the preset's.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig, OmegaConf, open_dict
from tiny_model import LLAMA, OPT, QWEN2, T5
from transformers import AutoTokenizer

from blip2train.checkpoint.io import WEIGHTS
from blip2train.cli.config import build, compose
from blip2train.cli.meta import build_meta
from blip2train.cli.train import TrainOutcome, train
from blip2train.microworld.backbone import ASSETS
from blip2train.run_dir import RunDir

SMALL = {
    "trainer": "cpu", "trainer.devices": 1, "trainer.precision": "bf16-mixed", "trainer.max_steps": 2,
    "optim.warmup_steps": 1, "data.batch_size": 6, "expected_global_batch": 6, "data.num_workers": 0,
    "data.shuffle_window": 32, "model/vision_encoder": "tiny", "model/qformer": "tiny",
    "data/tokenizer": "microworld", "log_every_steps": 1, "checkpoint.every_steps": 0, "num_threads": 1,
}  # fmt: skip
WORDS = 67  # of the micro-world's language model tokenizers
LANGUAGE_MODELS = {"opt": OPT, "llama": LLAMA, "qwen2": QWEN2, "t5": T5}
KEPT = ("stage", "optim", "seed", "data.collator.max_tokens", "data.collator.clean", "trainer.gradient_clip_val")
"""Parts of a preset that must come out of the run as they went in, but for what `SMALL` names."""

FAST = ("paper/stage2_vitg_opt_2_7b", "paper/stage2_vitg_flan_t5_xl", "lavis/stage1_vitg", "lavis/stage2_vitg_opt_2_7b")
SLOW = (
    "paper/stage1_vitl", "paper/stage2_vitl_opt_2_7b", "paper/stage2_vitg_opt_6_7b", "paper/stage2_vitl_flan_t5_xl",
    "paper/stage2_vitg_flan_t5_xxl", "lavis/stage1_vitl", "lavis/stage2_vitl_opt_2_7b", "lavis/stage2_vitg_opt_6_7b",
    "lavis/stage2_vitg_flan_t5_xl", "lavis/stage2_vitl_flan_t5_xl", "lavis/stage2_vitg_flan_t5_xxl",
)  # fmt: skip


def small(preset: str, world: Path, run: Path, *, language_model: str = "", init_from: Path | None = None) -> Any:
    """The preset with tiny parts; a decoder-only or encoder-decoder model stays one."""
    full = compose("train", [f"experiment={preset}", "run_dir=x"])
    shards = [f"data.datasets.{name}.urls=[{world}/train-*.tar]" for name in full.data.datasets]
    overrides = SMALL | {"run_dir": run, "paths.data": world.parent}
    if full.optim.steps_per_epoch:
        overrides["optim.steps_per_epoch"] = 1
    if "llm" in full:
        kind = language_model or ("t5" if "t5" in full.llm.path else "opt")
        overrides |= {"model/language_model": "tiny_t5" if kind == "t5" else "tiny_opt"}
        overrides |= {"llm.model.dtype": full.llm.model.dtype, "init_from": init_from}
        if kind != "t5":
            overrides["llm.tokenizer.path"] = tokenizer_with_start(run.parent / "tokenizer")
    else:
        overrides["init_qformer"] = "null"  # BERT-base does not fit a tiny Q-Former
    chosen = [f"{key}={value}" for key, value in overrides.items()]
    config = compose("train", [f"experiment={preset}", *chosen, *shards])
    if "llm" in full:
        with open_dict(config):
            config.llm.model.path_or_config = LANGUAGE_MODELS[kind] | {"vocab_size": WORDS}
    return config


def tokenizer_with_start(folder: Path) -> Path:
    """The micro-world's tokenizer with OPT's habit: one token both starts and ends a text."""
    tokenizer = AutoTokenizer.from_pretrained(str(ASSETS / "opt"))
    tokenizer.bos_token = tokenizer.eos_token
    tokenizer.save_pretrained(str(folder))
    return folder


def train_small(preset: str, world: Path, run: Path, **changes: Any) -> TrainOutcome:
    return train(small(preset, world, run, **changes), RunDir(run))


def check_run(preset: str, outcome: TrainOutcome) -> None:
    """Two steps with finite losses, a checkpoint, and the preset's settings in the run's record."""
    rows = outcome.run.read_metrics()
    assert outcome.step == 2 and [row["step"] for row in rows] == [1, 2]
    assert all(math.isfinite(row["train/loss"]) for row in rows)
    assert (outcome.run.checkpoints / "step-0000002" / WEIGHTS).is_file()
    full = compose("train", [f"experiment={preset}", "run_dir=x"])
    before, after = settings(full), settings(OmegaConf.load(outcome.run.config_path))
    changed = {key for key in before if before[key] != after.get(key)}
    allowed = {*SMALL, "optim.max_steps", "optim.steps_per_epoch", "stage.objectives.itg.dec_id"}
    assert changed <= allowed, {key: (before[key], after.get(key)) for key in changed - allowed}
    assert len(before) > 15


def settings(config: DictConfig) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key in KEPT:
        found |= flat(OmegaConf.select(config, key), key)
    for name, item in config.data.datasets.items():
        found |= flat(item.weight, f"weight of {name}") | flat(item.transform.get("augment"), f"augmentation of {name}")
    if "llm" in config:
        for key in ("dropout", "lora", "overrides", "_target_", "dtype"):
            found |= flat(config.llm.model.get(key), f"llm.model.{key}")
        found["llm.prefix_split"] = config.llm.prefix_split
        found["predict_start"] = config.data.collator.predict_start
    return found


def flat(value: Any, key: str) -> dict[str, Any]:
    plain = OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
    if not isinstance(plain, dict):
        return {key: plain}
    return {name: leaf for part, item in plain.items() for name, leaf in flat(item, f"{key}.{part}").items()}


@pytest.fixture(scope="module")
def world(laboratory) -> Path:
    return laboratory.data / "microworld"


@pytest.fixture(scope="module")
def stage1(world: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainOutcome:
    return train_small("paper/stage1_vitg", world, tmp_path_factory.mktemp("preset") / "stage1")


def test_the_papers_first_stage_trains(stage1: TrainOutcome) -> None:
    check_run("paper/stage1_vitg", stage1)
    assert {"train/itc_loss", "train/itm_loss", "train/itg_loss"} <= stage1.run.read_metrics()[0].keys()


@pytest.mark.parametrize("preset", [*FAST, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_preset_trains_with_tiny_parts_and_its_own_settings(
    preset: str, world: Path, stage1: TrainOutcome, tmp_path: Path
) -> None:
    """Stage 2 starts from the run of stage 1, as it will at full size."""
    check_run(preset, train_small(preset, world, tmp_path / "run", init_from=stage1.run.path))


@pytest.mark.parametrize("language_model", ["llama", "qwen2"])
def test_the_papers_second_stage_trains_with_another_language_model(
    language_model: str, world: Path, stage1: TrainOutcome, tmp_path: Path
) -> None:
    preset = "paper/stage2_vitg_opt_2_7b"
    outcome = train_small(preset, world, tmp_path / "run", language_model=language_model, init_from=stage1.run.path)
    check_run(preset, outcome)
    recorded = OmegaConf.load(outcome.run.config_path)
    assert recorded.llm.model.path_or_config.model_type == language_model


@pytest.mark.parametrize(
    ("source", "activation", "dropout"), [("lavis", "GELUActivation", True), ("paper", "NewGELUActivation", False)]
)
def test_the_full_flan_t5_computes_as_its_preset_says(source: str, activation: str, dropout: bool) -> None:
    """On the meta device: LAVIS puts exact gelu into Flan-T5 and leaves its dropout on; the paper's stays as it is."""
    preset = f"{source}/stage2_vitg_flan_t5_xl"
    model = build_meta(compose("train", [f"experiment={preset}", "run_dir=x", "init_from=scratch"])).train()
    language_model = model.get_submodule("language_model")
    layers = [part for name, part in language_model.named_modules() if name.endswith("DenseReluDense")]
    activations = {type(layer.act).__name__ for layer in layers}
    assert len(layers) == 48 and activations == {activation}
    rates = {part.p for part in language_model.modules() if isinstance(part, torch.nn.Dropout)}
    on = {part.training for part in language_model.modules() if isinstance(part, torch.nn.Dropout)}
    assert rates == {0.1} and on == {dropout}


def test_lavis_augments_visual_genome_and_not_coco() -> None:
    config = compose("train", ["experiment=lavis/stage1_vitg", "run_dir=x"])
    transforms = {name: build(item.transform) for name, item in config.data.datasets.items()}
    assert transforms["coco"].augment is None
    augment = transforms["visual_genome"].augment
    assert (augment.num_ops, augment.magnitude, len(augment.operations)) == (2, 5.0, 10)
    assert "auto_contrast_lavis" in augment.operations


def test_no_preset_is_forgotten() -> None:
    from blip2train.cli.config import config_dir

    folder = config_dir() / "experiment"
    shipped = {path.relative_to(folder).with_suffix("").as_posix() for path in folder.glob("*/[!_]*.yaml")}
    assert {"paper/stage1_vitg", *FAST, *SLOW} == {name for name in shipped if name.startswith(("paper/", "lavis/"))}
