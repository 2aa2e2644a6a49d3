"""What every benchmark is: a trained model in, numbers and predictions out (the arrow from stage/ to
eval/<benchmark>/).

Evaluation protocols are in section 4 and the appendix of the paper; here is only what the three kinds share. LAVIS
spreads this over tasks, runners and per-model `predict_*` methods; here a benchmark gets a plain module and needs no
Trainer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import torch
from torch import nn

from blip2train.batch import EvalItem
from blip2train.data.shards import open_shards
from blip2train.distributed import rank, world_size

Prediction = dict[str, Any]
"""One row of predictions.jsonl: plain JSON values; `key` and `image_id` name the record it belongs to."""

Progress = Callable[[int, int | None], None]
"""Called with (done, total); both only grow, and `total` is None while it is not known."""


@dataclass(slots=True)
class BenchmarkResult:
    """Numbers, rows and pictures of one evaluation.

    Args:
        metrics: recalls and accuracies are percent; CIDEr, BLEU and ROUGE-L are on the scale of coco-caption, where a
            CIDEr of 1.0 is what papers print as 100.
        predictions: the same on every rank, in record order.
        images: JPEG pictures by record key for the report, a bounded number.
    """

    metrics: dict[str, float]
    predictions: list[Prediction]
    images: dict[str, bytes] = field(default_factory=dict)


ModelT = TypeVar("ModelT", bound=nn.Module, contravariant=True)


class Benchmark(Protocol[ModelT]):
    """A named evaluation of the models of one stage (1 or 2)."""

    name: str
    stage: int

    def run(self, model: ModelT, device: torch.device, progress: Progress | None = None) -> BenchmarkResult: ...


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; the module goes back to the mode it came in."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def windows(items: Iterable[EvalItem], size: int) -> Iterator[list[EvalItem]]:
    """Cut a stream into lists of `size`; the last has between 2 and size + 1 so that nobody is left without a partner.

    A stream of one item gives one list of one.
    """
    buffer: list[EvalItem] = []
    for item in items:
        buffer.append(item)
        if len(buffer) == size + 2:
            yield buffer[:size]
            buffer = buffer[size:]
    if buffer:
        yield buffer


def share_of_records(urls: Sequence[str], limit: int | None) -> int:
    """How many records this rank will read, for a progress bar's end."""
    num_records = sum(shard.num_records for shard in open_shards(urls))
    total = num_records if limit is None else min(limit, num_records)
    return len(range(rank(), total, world_size()))


def percent(values: Iterable[float]) -> float:
    """100 times the mean; nan for nothing, which a reader of the JSON cannot mistake for a score of zero."""
    collected = list(values)
    return 100.0 * sum(collected) / len(collected) if collected else float("nan")


def mean_by(rows: Iterable[Mapping[str, Any]], value: str, group: str) -> dict[str, float]:
    """Mean of `value` in percent for every non-empty `group`, groups in alphabetical order."""
    found: dict[str, list[float]] = {}
    for row in rows:
        if row[group]:
            found.setdefault(row[group], []).append(row[value])
    return {name: percent(found[name]) for name in sorted(found)}
