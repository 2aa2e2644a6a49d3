"""Number formats: which part may be stored in which, and which of the trainer's precisions keeps that promise.

The paper keeps ViT and LLM in FP16 and Flan-T5 in BF16 (section 3.4). What trains is float32 and computes in half
precision under autocast; LAVIS does the same by convention, here a refused combination is an error before loading.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from blip2train.errors import ConfigError

if TYPE_CHECKING:
    import torch
    from torch import nn

Part = Literal["vision_encoder", "qformer", "decoder_only", "encoder_decoder", "lora"]

DTYPES = ("float32", "float16", "bfloat16")

_NAMES: Mapping[Part, str] = {
    "vision_encoder": "vision encoder",
    "qformer": "Q-Former",
    "decoder_only": "decoder-only language model",
    "encoder_decoder": "encoder-decoder language model",
    "lora": "LoRA adapter",
}


@dataclass(frozen=True, slots=True)
class Policy:
    """The formats that one part's weights may have, why the others are refused, and what to write instead."""

    allowed: tuple[str, ...]
    why: str = ""
    fix: str = ""


_ANY = Policy(DTYPES)
_MASTER = "an update is smaller than half precision can add to a weight: what trains needs float32 masters"
_MASTER_FIX = "float32; trainer.precision=bf16-mixed still computes in half precision"
_FROZEN_LLM = Policy((), "the language model is always frozen", "adapters beside it train: language_model.lora")

PRECISION: Mapping[tuple[Part, bool], Policy] = {
    ("vision_encoder", False): _ANY,
    ("vision_encoder", True): Policy(("float32",), _MASTER, _MASTER_FIX),
    ("qformer", False): Policy((), "the Q-Former always trains", "leave its parameters trainable"),
    ("qformer", True): Policy(("float32",), _MASTER, _MASTER_FIX),
    ("decoder_only", False): _ANY,
    ("decoder_only", True): _FROZEN_LLM,
    ("encoder_decoder", False): Policy(
        ("float32", "bfloat16"), "T5-like models overflow in float16", "bfloat16, as in the paper"
    ),
    ("encoder_decoder", True): _FROZEN_LLM,
    ("lora", False): Policy((), "adapters always train", "leave lora out"),
    ("lora", True): Policy(("float32",), _MASTER, _MASTER_FIX),
}
"""(part, trains) -> policy. float16 on a CPU is allowed, and slow."""

_TRAINED_PARTS: Mapping[str, Part] = {"vision_encoder": "vision_encoder", "language_model": "lora"}
"""What may train inside a submodule of the model; everything else belongs to the Q-Former and its heads."""

TRAINER_PRECISION = ("32-true", "bf16-mixed", "16-mixed", "64-true")
"""Lightning's precisions that leave trained weights in float32 or better; the others store them in half precision."""

_HALF_MASTERS = ("16-true", "bf16-true", "transformer-engine", "transformer-engine-float16")
_ALIASES = {"64": "64-true", "32": "32-true", "16": "16-mixed", "bf16": "bf16-mixed"}


def check_dtype(part: Part, dtype: str, *, trainable: bool, where: str) -> None:
    """Refuse a format that a part's weights cannot have.

    Args:
        part: which part of the model.
        dtype: "float32", "float16" or "bfloat16".
        trainable: whether any of its weights train.
        where: config key named in the error.

    Raises:
        ConfigError: an unknown format, or one the policy refuses; says why and what to write.
    """
    _check_known(dtype, where)
    policy = PRECISION[part, trainable]
    if dtype not in policy.allowed:
        state = "trainable" if trainable else "frozen"
        raise ConfigError(f"a {state} {_NAMES[part]} in {dtype}: {policy.why}", where=where, fix=policy.fix)


def check_trainer_precision(precision: str | int | None, *, where: str = "trainer.precision") -> None:
    """Refuse a precision of Lightning that stores trained weights in half precision.

    Raises:
        ConfigError: any but `TRAINER_PRECISION` and Lightning's short names for them; None is Lightning's 32-true.
    """
    name = "32-true" if precision is None else _ALIASES.get(str(precision), str(precision))
    if name not in TRAINER_PRECISION:
        stored = f"{precision} stores the Q-Former in half precision: {_MASTER}"
        raise ConfigError(
            stored if name in _HALF_MASTERS else f"Lightning has no precision {precision!r}",
            where=where,
            fix=f"one of {', '.join(TRAINER_PRECISION)}; bf16-mixed for speed",
        )


def check_masters(model: nn.Module) -> None:
    """Refuse a built model that would train in half precision, however it came to be.

    Raises:
        ConfigError: a trainable parameter is not float32 or better; names the first ones.
    """
    half = []
    for name, parameter in model.named_parameters():
        dtype = str(parameter.dtype).removeprefix("torch.")
        policy = PRECISION[_TRAINED_PARTS.get(name.split(".")[0], "qformer"), True]
        if parameter.requires_grad and dtype not in (*policy.allowed, "float64"):
            half.append(f"{name} {dtype}")
    if half:
        raise ConfigError(
            f"{len(half)} trainable tensors in half precision ({', '.join(half[:3])}): {_MASTER}",
            where="the model's dtypes, trainer.precision",
            fix=_MASTER_FIX,
        )


def to_dtype(name: str, *, where: str) -> torch.dtype:
    """Translate a yaml's dtype name.

    Args:
        name: "float32", "float16" or "bfloat16".
        where: config key named in the error.

    Raises:
        ConfigError: any other name.
    """
    import torch  # not at the top: a config is checked before torch is imported

    _check_known(name, where)
    return {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}[name]


def _check_known(name: str, where: str) -> None:
    if name not in DTYPES:
        raise ConfigError(f"unknown dtype {name!r}", where=where, fix=f"one of {', '.join(DTYPES)}")
