"""Decoding and resizing against PIL and the recorded LAVIS transform; the random crop against its definition."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from shard_factory import noise
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms.v2 import functional as F

from blip2train.batch import ImageSpec
from blip2train.data.image_transform import EvalTransform, TrainTransform, decode_image, resize, sample_crop
from blip2train.errors import ConfigError

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def spec(size: int, interpolation: str = "bicubic") -> ImageSpec:
    return ImageSpec(size, CLIP_MEAN, CLIP_STD, interpolation)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_eval_transform_equals_the_recorded_lavis_transform(shared_data: Path) -> None:
    expected = json.loads((shared_data / "image_preprocess" / "expected.json").read_text())
    for row in expected["rows"]:
        size = row["image_size"]
        data = (shared_data / "image_preprocess" / row["image"]).read_bytes()
        pixels = EvalTransform(spec(size))(decode_image(data))
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
        normalised = (pixels / 255 - mean) / std
        level = 1.001 / 255 / min(CLIP_STD)  # one grey level
        torch.testing.assert_close(normalised.mean((1, 2)), torch.tensor(row["mean_per_channel"]), atol=1e-3, rtol=0)
        torch.testing.assert_close(normalised.std((1, 2)), torch.tensor(row["std_per_channel"]), atol=1e-3, rtol=0)
        torch.testing.assert_close(normalised[:, 0, :3], torch.tensor(row["t[:,0,:3]"]), atol=level, rtol=0)
        torch.testing.assert_close(
            normalised[:, size // 2, size // 2], torch.tensor(row["t[:,n//2,n//2]"]), atol=level, rtol=0
        )
        torch.testing.assert_close(normalised[:, -1, -3:], torch.tensor(row["t[:,-1,-3:]"]), atol=level, rtol=0)


def test_train_transform_is_the_crop_resized_as_pil_does() -> None:
    photo = np.asarray(Image.fromarray(noise(3, 9, 7)).resize((140, 180), Image.Resampling.BICUBIC))
    image = torch.from_numpy(photo.copy()).permute(2, 0, 1)
    for seed in range(5):
        top, left, height, width = sample_crop(180, 140, (0.5, 1.0), (3 / 4, 4 / 3), generator(seed))
        box = (left, top, left + width, top + height)
        expected = Image.fromarray(photo).resize((32, 32), Image.Resampling.BICUBIC, box=box)
        found = TrainTransform(spec(32), horizontal_flip=False)(image, generator(seed)).permute(1, 2, 0)
        # PIL's `box` lets the filter see over the crop's edge: compare inside
        difference = np.abs(found.numpy().astype(int) - np.asarray(expected).astype(int))[2:-2, 2:-2]
        assert difference.max() <= 2


def test_flip_mirrors_half_of_the_images() -> None:
    image = torch.zeros(3, 16, 16, dtype=torch.uint8)
    image[:, :, 8:] = 255
    transform = TrainTransform(spec(16), scale=(1.0, 1.0))
    flipped = sum(int(transform(image, generator(seed))[0, 0, 0]) > 127 for seed in range(400))
    assert 160 < flipped < 240
    kept = TrainTransform(spec(16), scale=(1.0, 1.0), horizontal_flip=False)
    assert all(int(kept(image, generator(seed))[0, 0, 0]) < 128 for seed in range(50))


def test_crops_stay_inside_and_keep_area_and_aspect() -> None:
    shared, boxes = generator(0), []
    for _ in range(2000):
        top, left, height, width = sample_crop(300, 400, (0.5, 1.0), (3 / 4, 4 / 3), shared)
        assert 0 <= top <= 300 - height and 0 <= left <= 400 - width
        boxes.append((top, left, height, width))
    areas = np.array([height * width / 120000 for _, _, height, width in boxes])
    aspects = np.array([width / height for _, _, height, width in boxes])
    assert areas.min() > 0.495 and areas.max() <= 1.0
    assert aspects.min() > 0.74 and aspects.max() < 1.345


def test_crops_are_distributed_as_in_torchvision() -> None:
    image, shared = torch.zeros(3, 300, 400), generator(1)
    ours = np.array([sample_crop(300, 400, (0.5, 1.0), (3 / 4, 4 / 3), shared) for _ in range(3000)], float)
    torch.manual_seed(0)
    theirs = np.array([RandomResizedCrop.get_params(image, [0.5, 1.0], [3 / 4, 4 / 3]) for _ in range(3000)], float)
    error = 5 * theirs.std(0) * math.sqrt(2 / 3000)
    assert (np.abs(ours.mean(0) - theirs.mean(0)) < error).all()
    assert (np.abs(ours.std(0) / theirs.std(0) - 1) < 0.1).all()


def test_an_image_too_narrow_for_any_crop_gives_the_central_one() -> None:
    assert sample_crop(10, 400, (1.0, 1.0), (3 / 4, 4 / 3), generator(0)) == (0, 193, 10, 13)
    assert sample_crop(400, 10, (1.0, 1.0), (3 / 4, 4 / 3), generator(0)) == (193, 0, 13, 10)
    assert sample_crop(1, 1, (0.5, 1.0), (3 / 4, 4 / 3), generator(0)) == (0, 0, 1, 1)


def test_augmentation_depends_on_the_generator_alone() -> None:
    image = torch.from_numpy(noise(0, 50, 60)).permute(2, 0, 1)
    transform = TrainTransform(spec(24))
    before = torch.get_rng_state()
    first, again, other = (transform(image, generator(seed)) for seed in (5, 5, 6))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert first.shape == (3, 24, 24) and first.dtype == torch.uint8
    assert torch.equal(torch.get_rng_state(), before)


def test_an_image_of_the_right_size_passes_the_eval_transform_untouched() -> None:
    image = torch.from_numpy(noise(0, 16, 16)).permute(2, 0, 1)
    assert torch.equal(EvalTransform(spec(16))(image), image)


def test_wrong_settings_name_the_choices() -> None:
    with pytest.raises(ConfigError, match="bicubic"):
        EvalTransform(spec(16, "cubic"))
    with pytest.raises(ConfigError, match="scale"):
        TrainTransform(spec(16), scale=(0.0, 1.0))


@pytest.mark.parametrize("mode", ["bicubic", "bilinear", "nearest"])
@pytest.mark.parametrize("size", [[24, 24], [90, 70]])
def test_resizing_equals_torchvision_whatever_the_layout(mode: str, size: list[int]) -> None:
    filter_ = InterpolationMode(mode)
    image = torch.randint(0, 256, (3, 60, 50), dtype=torch.uint8, generator=generator(1))
    expected = F.resize(image, size, interpolation=filter_, antialias=True)
    side_by_side = image.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    for given in (image, side_by_side):
        assert torch.equal(resize(given, size, filter_), expected)
