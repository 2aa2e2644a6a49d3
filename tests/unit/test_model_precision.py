"""The precision policy: every (part, format, trains) is allowed or refused with a reason, and so is every trainer's."""

import typing

import pytest
import torch
from torch import nn

from blip2train.errors import ConfigError
from blip2train.model.precision import DTYPES, PRECISION, Part, check_dtype, check_masters, check_trainer_precision

ALLOWED = {
    ("vision_encoder", "float32", False),
    ("vision_encoder", "float16", False),  # the paper's
    ("vision_encoder", "bfloat16", False),
    ("vision_encoder", "float32", True),
    ("qformer", "float32", True),
    ("decoder_only", "float32", False),
    ("decoder_only", "float16", False),  # the paper's
    ("decoder_only", "bfloat16", False),
    ("encoder_decoder", "float32", False),
    ("encoder_decoder", "bfloat16", False),  # the paper's
    ("lora", "float32", True),
}
PARTS = typing.get_args(Part)


def test_the_table_has_every_part() -> None:
    assert set(PRECISION) == {(part, trains) for part in PARTS for trains in (False, True)}


@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("part", PARTS)
def test_every_combination(part: Part, dtype: str, trains: bool) -> None:
    if (part, dtype, trains) in ALLOWED:
        check_dtype(part, dtype, trainable=trains, where="here")
        return
    with pytest.raises(ConfigError) as caught:
        check_dtype(part, dtype, trainable=trains, where="model.part.dtype")
    policy = PRECISION[part, trains]
    assert policy.why in str(caught.value) and policy.fix in str(caught.value) and policy.why and policy.fix
    assert "model.part.dtype" in str(caught.value) and dtype in str(caught.value)


def test_an_unknown_format_lists_the_known() -> None:
    with pytest.raises(ConfigError, match="unknown dtype 'fp16'.*\n.*\n.*float32, float16, bfloat16"):
        check_dtype("qformer", "fp16", trainable=True, where="x")


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed", "64-true", "32", 32, 16, "bf16", None])
def test_precisions_of_the_trainer_that_keep_float32_masters(precision: str | int | None) -> None:
    check_trainer_precision(precision)


@pytest.mark.parametrize("precision", ["16-true", "bf16-true", "transformer-engine", "transformer-engine-float16"])
def test_precisions_of_the_trainer_that_do_not(precision: str) -> None:
    with pytest.raises(ConfigError, match="stores the Q-Former in half precision") as caught:
        check_trainer_precision(precision)
    assert "bf16-mixed" in str(caught.value)


@pytest.mark.parametrize("precision", [8, "fp8", "half"])
def test_a_precision_that_lightning_does_not_know_is_not_called_half(precision: str | int) -> None:
    with pytest.raises(ConfigError, match=f"Lightning has no precision '?{precision}'?") as caught:
        check_trainer_precision(precision)
    assert "bf16-mixed" in str(caught.value)


def test_every_precision_of_lightning_is_decided() -> None:
    """A precision that a new Lightning adds is refused until somebody has looked at it."""
    from lightning_fabric.connector import _PRECISION_INPUT_STR

    refused = {"16-true", "bf16-true", "transformer-engine", "transformer-engine-float16"}
    for name in typing.get_args(_PRECISION_INPUT_STR):
        if name in refused:
            with pytest.raises(ConfigError):
                check_trainer_precision(name)
        else:
            check_trainer_precision(name)


def test_a_built_model_that_would_train_in_half_precision_is_refused() -> None:
    model = nn.ModuleDict({"frozen": nn.Linear(2, 2).half().requires_grad_(False), "trained": nn.Linear(2, 2)})
    check_masters(model)
    check_masters(model.double())
    model["trained"].bfloat16()
    with pytest.raises(ConfigError, match=r"2 trainable tensors in half precision \(trained.weight bfloat16"):
        check_masters(model)
    assert model["trained"].weight.dtype == torch.bfloat16
