"""Checks of a model's parts that composition cannot see: number formats, and what the first weights come from."""

from __future__ import annotations

import logging
from typing import Any

from omegaconf import DictConfig, OmegaConf

from blip2train.errors import ConfigError
from blip2train.model.precision import Part, check_dtype, check_trainer_precision
from blip2train.run_dir import RunDir

log = logging.getLogger(__name__)

LANGUAGE_MODELS: dict[str, Part] = {
    "blip2train.model.language_model.decoder_only.DecoderOnly": "decoder_only",
    "blip2train.model.language_model.encoder_decoder.EncoderDecoder": "encoder_decoder",
}
ZERO, FSDP2 = "blip2train.strategy.zero.ZeroStrategy", "blip2train.strategy.fsdp2.Fsdp2Strategy"
STRATEGIES = ("auto", "pytorch_lightning.strategies.DDPStrategy", ZERO, FSDP2)
"""What a trainer's strategy may be, by name or class, besides Lightning's short names of DDP."""

QFORMER_SIZES = (
    *("hidden_size", "num_layers", "num_heads", "intermediate_size"),
    *("num_queries", "cross_attention_every", "image_dim"),
)
"""What makes two Q-Formers the same network; the number of heads shows in no tensor's shape."""

ENCODER_FACTS = ("name", "layer", "final_norm")
"""What makes two vision encoders of one width give the same image tokens."""


def check_precision(config: DictConfig) -> None:
    """Every part's number format against the policy of `model/precision.py`.

    Raises:
        ConfigError: a format the policy refuses.
    """
    check_trainer_precision(config.trainer.get("precision"))
    encoder = config.model.vision_encoder
    where = "model.vision_encoder.dtype"
    check_dtype(
        "vision_encoder", encoder.get("dtype", "float32"), trainable=bool(encoder.get("trainable_blocks")), where=where
    )
    language_model = config.model.get("language_model")
    part = LANGUAGE_MODELS.get(language_model._target_) if language_model else None
    if part is not None:
        check_dtype(part, language_model.get("dtype", "float32"), trainable=False, where="llm.model.dtype")
    check_strategy(config)


def check_strategy(config: DictConfig) -> None:
    """Only strategies under which checkpoints are whole and the maths is DDP's.

    Raises:
        ConfigError: another one, or DeepSpeed in a precision that needs a loss scaler.
    """
    strategy = config.trainer.get("strategy", "auto")
    name = str(strategy.get("_target_", "") if OmegaConf.is_config(strategy) else strategy)
    if name not in STRATEGIES and not name.startswith("ddp"):
        raise ConfigError(
            f"strategy {name!r} writes checkpoints that only it can read, or is unknown",
            where="trainer.strategy",
            fix="trainer=ddp, fsdp2, deepspeed_zero1, deepspeed_zero2, deepspeed_zero3 or deepspeed_zero2_offload",
        )
    precision = {"32": "32-true", "bf16": "bf16-mixed"}.get(
        str(config.trainer.get("precision")), config.trainer.get("precision")
    )
    if name == ZERO and precision not in (None, "32-true", "bf16-mixed"):
        raise ConfigError(
            f"DeepSpeed under trainer.precision={precision}: its loss scaler would be in no checkpoint",
            where="trainer.precision, trainer.strategy",
            fix="trainer.precision=bf16-mixed or 32-true; or trainer=ddp, fsdp2",
        )


def check_first_weights(config: DictConfig, stage: int) -> None:
    """`init_from` and `init_qformer`: given where needed, not contradicting, and of this Q-Former's sizes.

    Raises:
        ConfigError: see above, or there is no run in `init_from`.
    """
    if stage == 2 and config.init_from is None:
        raise ConfigError(
            "stage 2 has no stage-1 weights to start from",
            where="init_from",
            fix="set init_from=<stage-1 run folder>, or init_from=scratch to skip stage 1 on purpose (an ablation)",
        )
    if config.init_from in (None, "scratch"):
        return
    run = RunDir.open(config.init_from, where="init_from=")
    if config.init_qformer is not None:
        raise ConfigError(
            f"the Q-Former has two sources: init_from={config.init_from} and init_qformer={config.init_qformer}",
            where="init_qformer",
            fix="set init_qformer=null (the run's weights replace BERT's), or drop init_from",
        )
    before = OmegaConf.load(run.config_path)
    check_qformer_sizes(before, config, run)
    for fact in ENCODER_FACTS:
        old, new = (_read(side, f"model.vision_encoder.{fact}") for side in (before, config))
        if old != new:
            log.warning(
                "the Q-Former of %s was trained on a vision encoder with %s %s; this one has %s",
                *(run.path, fact, old, new),
            )


def check_qformer_sizes(before: Any, now: DictConfig, run: RunDir) -> None:
    """The Q-Former of a run and the one it is to fill must be the same network.

    Raises:
        ConfigError: names every size that differs, with both numbers.
    """
    pairs = {key: (_read(before, f"model.qformer.{key}"), _read(now, f"model.qformer.{key}")) for key in QFORMER_SIZES}
    other = [f"{key} {old} there, {new} here" for key, (old, new) in pairs.items() if old != new]
    if other:
        raise ConfigError(
            f"the run's Q-Former is another one: {'; '.join(other)}",
            where=f"init_from={run.path}, model.qformer",
            fix="choose the run's model/qformer= and model/vision_encoder= (its config.yaml names their sizes)",
        )


def _read(config: Any, key: str) -> Any:
    return OmegaConf.select(config, key)
