"""Every operation against what LAVIS 1.0.2 recorded (tests/data), auto-contrast against PIL, the draws by counting."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torch import Tensor

from blip2train.batch import ImageSpec
from blip2train.data import rand_augment
from blip2train.data.image_transform import TrainTransform
from blip2train.data.rand_augment import OPERATIONS, RandAugment, apply_operation
from blip2train.errors import ConfigError

RECORDED = json.loads((Path(__file__).parents[1] / "data" / "lavis_randaugment.json").read_text(encoding="utf-8"))
MOVES = {"shear_x", "shear_y", "rotate"}
TOLERANCE = dict.fromkeys(MOVES, 2) | {"auto_contrast_lavis": 1}
"""Grey levels: OpenCV rounds positions to 1/32 pixel, and torchvision cuts 254.99 down; all else is equal."""


def pixels(text: str) -> Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8).view(RECORDED["shape"])


@pytest.mark.parametrize(
    "row", RECORDED["rows"], ids=lambda row: f"{row['name']}-{row['magnitude']}{'-negative' * row['negative']}"
)
def test_operation_gives_the_pixels_that_lavis_gives(row: dict) -> None:
    image, expected = pixels(RECORDED["image"]), pixels(row["pixels"])
    before = image.clone()
    found = apply_operation(image, row["name"], row["magnitude"], negative=row["negative"])
    difference = (found.int() - expected.int()).abs()
    assert found.dtype == torch.uint8
    assert int(difference.max()) <= TOLERANCE.get(row["name"], 0)
    assert float(difference.float().mean()) < 0.15
    assert torch.equal(image, before)


def test_the_recording_covers_every_operation_and_both_directions() -> None:
    rows = Counter((row["name"], row["negative"]) for row in RECORDED["rows"])
    assert {name for name, _ in rows} == {*OPERATIONS, "auto_contrast_lavis"} - {"auto_contrast"}
    assert all((name, True) in rows for name in (*MOVES, "translate_x", "translate_y"))


def test_auto_contrast_is_that_of_pil() -> None:
    image = pixels(RECORDED["image"])
    expected = np.asarray(ImageOps.autocontrast(Image.fromarray(image.permute(1, 2, 0).numpy())))
    found = apply_operation(image, "auto_contrast", 5).permute(1, 2, 0).numpy()
    assert np.abs(found.astype(int) - expected.astype(int)).max() <= 1  # PIL multiplies by the rounded scale


def test_auto_contrast_of_lavis_turns_a_plane_without_black_white_and_leaves_a_flat_one() -> None:
    image = torch.stack([torch.arange(16).view(4, 4) + low for low in (0, 1, 100)]).to(torch.uint8)
    found = apply_operation(image, "auto_contrast_lavis", 5)
    assert int((found[0].int() - torch.arange(16).view(4, 4) * 17).abs().max()) <= 1
    assert (found[1:] == 255).all()
    flat = torch.full((3, 4, 4), 7, dtype=torch.uint8)
    assert torch.equal(apply_operation(flat, "auto_contrast_lavis", 5), flat)


def test_grey_moves_in_from_outside_without_a_seam() -> None:
    """A grey picture stays grey under every move: the fill is not blended twice into the pixels at the edge."""
    image = torch.full((3, 30, 40), 128, dtype=torch.uint8)
    for name in (*MOVES, "translate_x", "translate_y"):
        assert torch.equal(apply_operation(image, name, 7), image), name


def test_two_draws_each_applied_with_one_half(monkeypatch: pytest.MonkeyPatch) -> None:
    applied: list[tuple[str, float, bool]] = []

    def spy(image: Tensor, name: str, magnitude: float, *, negative: bool) -> Tensor:
        applied.append((name, magnitude, negative))
        return image

    monkeypatch.setattr(rand_augment, "apply_operation", spy)
    augment, shared = RandAugment(), torch.Generator().manual_seed(0)
    image, images = torch.zeros(3, 4, 4, dtype=torch.uint8), 4000
    for _ in range(images):
        augment(image, shared)
    assert abs(len(applied) / (2 * images) - 0.5) < 0.03
    names = Counter(name for name, _, _ in applied)
    assert set(names) == set(OPERATIONS)
    assert all(abs(count / len(applied) - 0.1) < 0.025 for count in names.values())
    assert abs(sum(negative for _, _, negative in applied) / len(applied) - 0.5) < 0.04
    assert {magnitude for _, magnitude, _ in applied} == {5.0}


def test_the_number_of_draws_is_fixed_and_only_the_generator_counts() -> None:
    image = pixels(RECORDED["image"])
    augment, states = RandAugment(num_ops=3), set()
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        first = augment(image, generator)
        reference = torch.Generator().manual_seed(seed)
        torch.rand(3, 3, generator=reference)
        states.add(torch.equal(generator.get_state(), reference.get_state()))
        torch.manual_seed(seed + 1)  # the global generator must not matter
        assert torch.equal(first, augment(image, torch.Generator().manual_seed(seed)))
    assert states == {True}


def test_the_train_transform_augments_after_crop_and_flip() -> None:
    spec = ImageSpec(16, (0.5,) * 3, (0.5,) * 3)
    image = torch.randint(0, 256, (3, 20, 30), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    seen: list[Tensor] = []

    def invert(cropped: Tensor, generator: torch.Generator) -> Tensor:
        seen.append(cropped)
        return 255 - cropped

    plain = TrainTransform(spec)(image, torch.Generator().manual_seed(4))
    changed = TrainTransform(spec, augment=invert)(image, torch.Generator().manual_seed(4))
    assert torch.equal(seen[0], plain) and torch.equal(changed, 255 - plain)
    augmented = [
        TrainTransform(spec, augment=RandAugment(2, 9))(image, torch.Generator().manual_seed(seed)) for seed in range(8)
    ]
    assert all(item.shape == (3, 16, 16) and item.dtype == torch.uint8 for item in augmented)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"num_ops": 0}, "num_ops 0"),
        ({"magnitude": 11}, "magnitude 11"),
        ({"magnitude": -1}, "magnitude -1"),
        ({"operations": ["solarize"]}, "choose from identity"),
        ({"operations": []}, "operations none"),
    ],
)
def test_wrong_settings_name_the_choices(change: dict, word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        RandAugment(**change)
