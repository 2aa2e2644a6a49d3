"""A saved batch comes back as it was; anything else is refused with its path."""

from pathlib import Path

import pytest
import torch
from tiny_model import random_images, random_text, stage2_batch

from blip2train.batch import Stage1Batch
from blip2train.batch_file import load_batch, save_batch
from blip2train.errors import DataError


def test_both_kinds_of_batch_come_back_with_their_facts(tmp_path: Path) -> None:
    ids, mask = random_text([3, 5])
    stage1 = Stage1Batch(None, ids, mask, torch.arange(2), ["a", "b"], torch.ones(2, 4, 6, dtype=torch.uint8))
    stage2 = stage2_batch([2, 3], [4, 1])
    for batch in (stage1, stage2):
        save_batch(batch, tmp_path / "deep" / "batch.pt", step=7, rank=1)
        loaded, facts = load_batch(tmp_path / "deep" / "batch.pt")
        assert type(loaded) is type(batch) and facts == {"step": 7, "rank": 1}
        for name in batch.__slots__:
            before, after = getattr(batch, name), getattr(loaded, name)
            assert torch.equal(before, after) if isinstance(before, torch.Tensor) else before == after
    assert torch.equal(stage2.images, random_images(2))


def test_the_file_holds_no_code(tmp_path: Path) -> None:
    save_batch(stage2_batch([2], [3]), tmp_path / "batch.pt")
    assert set(torch.load(tmp_path / "batch.pt", weights_only=True)) == {"kind", "values", "facts"}


@pytest.mark.parametrize(
    "content", [None, b"", b"no zip at all", b"step,train/loss\n2,7.0", {"kind": "Other"}, {"kind": "Stage1Batch"}, [1]]
)
def test_another_file_is_refused(tmp_path: Path, content: object) -> None:
    path = tmp_path / "batch.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(DataError, match="no batch could be read") as caught:
        load_batch(path)
    assert caught.value.where == str(path)
