"""What all benchmarks share: modes, windows, means, pictures, and the eval folder they end in."""

from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from benchmark_world import make_record, write_records
from PIL import Image
from torch import nn

from blip2train.batch import EvalItem
from blip2train.benchmark.base import evaluating, mean_by, percent, share_of_records, windows
from blip2train.benchmark.thumbnail import LONGEST_SIDE, read_with_pictures, thumbnail
from blip2train.run_dir import RunDir


def _items(count: int) -> list[EvalItem]:
    return [EvalItem(str(row), row, torch.zeros(3, 2, 2, dtype=torch.uint8)) for row in range(count)]


@pytest.mark.parametrize("count", range(12))
def test_windows_keep_order_and_leave_nobody_alone(count: int) -> None:
    found = list(windows(iter(_items(count)), 4))
    assert [item.image_id for window in found for item in window] == list(range(count))
    assert all(len(window) >= 2 for window in found) or count == 1
    assert all(len(window) <= 5 for window in found)


@pytest.mark.parametrize("was_training", [True, False])
def test_evaluating_gives_the_mode_back_even_after_an_error(was_training: bool) -> None:
    model = nn.Dropout().train(was_training)
    with pytest.raises(KeyError), evaluating(model):
        assert not model.training
        assert not torch.is_grad_enabled()
        raise KeyError
    assert model.training is was_training
    assert torch.is_grad_enabled()


def test_means_are_percent_and_by_named_group_only() -> None:
    assert percent([0.0, 1.0, 0.5, 0.5]) == 50.0
    rows = [{"kind": "b", "hit": 1.0}, {"kind": "a", "hit": 0.0}, {"kind": "", "hit": 1.0}, {"kind": "b", "hit": 0.0}]
    assert list(mean_by(rows, "hit", "kind").items()) == [("a", 0.0), ("b", 50.0)]


def test_thumbnail_is_a_small_jpeg_of_the_same_picture() -> None:
    image = torch.zeros(3, 400, 200, dtype=torch.uint8)
    image[0, :200] = 250
    image[2, 200:] = 250
    picture = Image.open(BytesIO(thumbnail(image)))
    assert picture.format == "JPEG"
    assert max(picture.size) == LONGEST_SIDE
    pixels = np.asarray(picture).astype(int)
    assert (pixels[10, 40] - [250, 0, 0]).max() < 12
    assert (pixels[-10, 40] - [0, 0, 250]).max() < 12
    tiny = Image.open(BytesIO(thumbnail(torch.zeros(3, 64, 64, dtype=torch.uint8))))
    assert tiny.size == (64, 64)


def test_pictures_are_kept_as_they_were_before_the_encoders_transform(tmp_path: Path) -> None:
    urls = write_records(tmp_path, [make_record(name, color, [name]) for name, color in (("a", "red"), ("b", "blue"))])
    pictures: dict[str, bytes] = {}
    items = list(read_with_pictures(urls, lambda image, generator: image[:, :2, :3], None, pictures))
    assert [item.image.shape for item in items] == [(3, 2, 3)] * 2
    for key, channel in (("a", 0), ("b", 2)):
        picture = np.asarray(Image.open(BytesIO(pictures[key])))
        assert picture.shape == (8, 8, 3)
        assert picture.mean(axis=(0, 1)).argmax() == channel


def test_progress_knows_its_end_with_and_without_an_index(tmp_path: Path) -> None:
    urls = write_records(tmp_path, [make_record(str(index), "red", ["red"]) for index in range(7)])
    assert share_of_records(urls, None) == 7
    assert share_of_records(urls, 3) == 3
    assert share_of_records(urls, 100) == 7
    (tmp_path / "index.json").unlink()
    assert share_of_records(urls, None) == 7


def test_run_folder_keeps_pictures_by_key_and_drops_those_of_an_earlier_evaluation(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.write_eval("coco", {"chance": 1.0}, [], {"val/0001.a b": b"one", "x%2F": b"two"})
    assert {key: path.read_bytes() for key, path in run.eval_images("coco").items()} == {
        "val/0001.a b": b"one",
        "x%2F": b"two",
    }
    run.write_eval("coco", {"chance": 2.0}, [{"key": "z"}], {"z": b"three"})
    assert list(run.eval_images("coco")) == ["z"]
    assert run.read_eval("coco") == ({"chance": 2.0}, [{"key": "z"}])
    assert run.eval_images("never_evaluated") == {}
