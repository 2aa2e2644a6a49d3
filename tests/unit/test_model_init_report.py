"""The report of first values: complete or an error, short in the log, whole in JSON."""

import pytest
from tiny_model import tiny_qformer, tiny_stage1
from torch import nn

from blip2train.errors import CheckpointError
from blip2train.model.init_report import (
    InitReport,
    check_complete,
    part_of,
    report_part,
    report_pretrained,
    report_random,
)


def test_a_part_is_told_in_the_names_of_the_whole() -> None:
    model = tiny_stage1()
    part = InitReport(
        {name: "bert" for name, _ in model.qformer.named_parameters()},
        sources={"bert": "somewhere"},
        notes={"lm_head.bias": "short"},
    )
    report = report_part(model, "qformer", part)
    assert set(report.origins) == {name for name, value in model.named_parameters() if value.requires_grad}
    assert report.origins["qformer.lm_head.bias"] == "bert" and report.origins["itm_head.weight"] == "random"
    assert report.notes == {"qformer.lm_head.bias": "short"} and report.sources == {"bert": "somewhere"}
    assert sum(report.counts().values()) == len(report.origins)


def test_a_tensor_without_origin_and_an_origin_without_tensor_are_errors() -> None:
    qformer = tiny_qformer()
    origins = dict(report_random(qformer).origins)
    check_complete(qformer, InitReport(origins))
    with pytest.raises(CheckpointError, match="no such tensor: gone"):
        check_complete(qformer, InitReport(origins | {"gone": "bert"}))
    del origins["lm_head.bias"]
    with pytest.raises(CheckpointError, match="no origin: lm_head.bias"):
        check_complete(qformer, InitReport(origins))


def test_frozen_tensors_need_no_origin() -> None:
    layer = nn.Linear(2, 2)
    layer.weight.requires_grad_(False)
    assert set(report_random(layer).origins) == {"bias"}
    check_complete(layer, InitReport({"bias": "random"}))
    check_complete(layer, InitReport({"bias": "random", "weight": "checkpoint"}))


def test_only_what_looked_random_in_a_pretrained_part_is_relabelled() -> None:
    report = InitReport(
        {"vision_encoder.a": "random", "vision_encoder.b": "checkpoint", "vision_encoderx.c": "random", "d": "random"}
    )
    relabelled = report_pretrained(report, "vision_encoder")
    assert relabelled.names("pretrained") == ["vision_encoder.a"]
    assert relabelled.names("random") == ["d", "vision_encoderx.c"]


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("qformer.blocks.3.query_ffn.norm.bias", "qformer.blocks.query_ffn"),
        ("qformer.lm_head.dense.weight", "qformer.lm_head"),
        ("qformer.query_tokens", "qformer.query_tokens"),
        ("temperature", "temperature"),
        ("ln_vision.bias", "ln_vision"),
        ("vision_encoder.backbone.blocks.1.mlp.fc1.weight", "vision_encoder"),
        ("language_model.model.base.layers.0.q.lora_A.weight", "language_model"),
    ],
)
def test_rows_of_the_table(name: str, part: str) -> None:
    assert part_of(name) == part


def test_the_table_counts_every_tensor_once() -> None:
    report = report_random(tiny_stage1())
    lines = report.summary().splitlines()
    assert sum(int(line.split()[-1]) for line in lines[2:]) == len(report.origins) and len(lines) < 20
