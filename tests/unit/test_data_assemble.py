"""A batch put together from parts is the batch that one worker would have collated, byte for byte."""

from dataclasses import fields
from pathlib import Path

import pytest
import torch
from torch import Tensor

from blip2train.batch import Sample
from blip2train.cli.config import build, compose
from blip2train.data.assemble import assemble
from blip2train.data.collate import Stage1Collator, Stage2Collator
from blip2train.data.stream import Part

TEXTS = ("a red circle", "two small blue squares left of a green triangle", "a", "one yellow star", "the big red cross")


def samples(count: int, *, stored: bool = False) -> list[Sample]:
    generator = torch.Generator().manual_seed(1)
    shape = (5, 8) if stored else (3, 4, 4)
    return [
        Sample(
            key=f"k{number}",
            dataset="set",
            image=torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8),
            caption=TEXTS[number % len(TEXTS)],
            image_id=number * 7,
        )
        for number in range(count)
    ]


def collators() -> list[Stage1Collator | Stage2Collator]:
    first = compose("train", ["experiment=microworld_stage1", "run_dir=x"]).data.collator
    made = [build(first)]
    for name in ("opt", "t5"):
        settings = [f"experiment=microworld_stage2_{name}", "run_dir=x", "init_from=scratch"]
        made.append(build(compose("train", settings).data.collator))
    return made


@pytest.fixture(scope="module")
def all_collators() -> list[Stage1Collator | Stage2Collator]:
    return collators()


def parts_of(rows: list[Sample], collate: Stage1Collator | Stage2Collator, step: int, start: int) -> list[Part]:
    """As workers bring them where the batch begins at local sample `start`."""
    parts = []
    for worker in range(step):
        first = (worker - start) % step
        own = rows[first::step]
        parts.append(Part(collate(own) if own else None, first, {}, []))
    return parts


@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize("step", [1, 2, 3, 4, 8])
def test_parts_make_the_batch_of_one_worker(
    all_collators: list[Stage1Collator | Stage2Collator], step: int, stored: bool
) -> None:
    for collate in all_collators:
        for count, start in ((5, 0), (6, 3), (1, 1), (11, 7)):
            rows = samples(count, stored=stored)
            made, expected = assemble(parts_of(rows, collate, step, start), pad_id=collate.pad_id), collate(rows)
            for field in fields(expected):
                ours, theirs = getattr(made, field.name), getattr(expected, field.name)
                if isinstance(theirs, Tensor):
                    assert ours.dtype == theirs.dtype and torch.equal(ours, theirs), field.name
                else:
                    assert ours == theirs, field.name


def test_a_single_part_is_not_copied(all_collators: list[Stage1Collator | Stage2Collator]) -> None:
    part = Part(all_collators[0](samples(3)), 0, {}, [])
    assert assemble([part], pad_id=0) is part.rows


def test_padding_is_the_tokenizers_own(all_collators: list[Stage1Collator | Stage2Collator], tmp_path: Path) -> None:
    """The oracle above needs texts of different lengths in different parts, or it would not see the padding."""
    for collate in all_collators:
        parts = parts_of(samples(4), collate, 2, 0)
        names = [field.name for field in fields(parts[0].rows) if field.name.endswith("_mask")]
        assert any(len({getattr(part.rows, name).shape[1] for part in parts}) == 2 for name in names)
