"""What becomes of an image on its way into a shard."""

import io

import numpy as np
import pytest
from PIL import Image
from shard_factory import encode, noise

from blip2train.data.image_transform import decode_image
from blip2train.data.pack_worker import PackSettings, ShardReport, prepare_image
from blip2train.data.shards import ShardEntry

SHRINK = PackSettings(resize_short_side=20)
CHECK = PackSettings(validate_images=True)


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def smooth(height: int, width: int) -> Image.Image:
    """A gradient in every channel, which JPEG keeps nearly exactly."""
    y, x = np.mgrid[:height, :width]
    pixels = np.stack([255 * y / height, 255 * x / width, 128 + 0 * x], axis=-1)
    return Image.fromarray(pixels.astype(np.uint8))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF"])
def test_a_file_that_need_not_change_keeps_its_bytes(kind: str) -> None:
    data = saved(smooth(12, 20), kind)
    extension = {"JPEG": "jpg"}.get(kind, kind.lower())
    assert prepare_image(data, PackSettings()) == (data, extension, None)
    assert prepare_image(data, CHECK) == (data, extension, 12)
    assert prepare_image(data, SHRINK) == (data, extension, 12)


@pytest.mark.parametrize(
    ("kind", "reencode", "extension"),
    [("JPEG", None, "jpg"), ("PNG", None, "png"), ("PNG", "jpeg", "jpg"), ("WEBP", None, "jpg"), ("GIF", None, "jpg")],
)
def test_a_large_image_shrinks_as_pil_shrinks_it(kind: str, reencode: str | None, extension: str) -> None:
    options = {"quality": 95} if kind in ("JPEG", "WEBP") else {}
    data = saved(smooth(60, 90), kind, **options)
    image = prepare_image(data, PackSettings(resize_short_side=20, reencode=reencode))  # type: ignore[arg-type]
    assert isinstance(image, tuple) and image[1:] == (extension, 20)
    opened = Image.open(io.BytesIO(image[0]))
    assert opened.format == {"jpg": "JPEG", "png": "PNG"}[extension]
    expected = Image.open(io.BytesIO(data)).convert("RGB").resize((30, 20), Image.Resampling.BICUBIC)
    difference = np.abs(np.asarray(opened.convert("RGB")).astype(int) - np.asarray(expected).astype(int))
    assert difference.mean() < 4


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_reencoding_makes_everything_a_jpeg_of_the_same_size(kind: str) -> None:
    image = prepare_image(saved(smooth(12, 20), kind), PackSettings(reencode="jpeg"))
    assert isinstance(image, tuple) and image[1:] == ("jpg", 12)
    assert Image.open(io.BytesIO(image[0])).size == (20, 12)


def test_a_jpeg_is_not_encoded_twice() -> None:
    data = encode(noise(0), "jpg")
    assert prepare_image(data, PackSettings(reencode="jpeg")) == (data, "jpg", None)


def test_what_shards_have_no_extension_for_becomes_jpeg() -> None:
    image = prepare_image(saved(smooth(12, 20), "TIFF"), PackSettings())
    assert isinstance(image, tuple) and image[1:] == ("jpg", 12)


def test_the_quality_is_that_of_the_setting() -> None:
    data = encode(noise(0, 40, 60), "png")
    low, high = (prepare_image(data, PackSettings(reencode="jpeg", jpeg_quality=quality)) for quality in (30, 95))
    assert isinstance(low, tuple) and isinstance(high, tuple) and 2 * len(low[0]) < len(high[0])


def test_a_photograph_taken_upright_is_stored_upright_when_it_is_written_again() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    data = saved(smooth(60, 90), "JPEG", quality=95, exif=exif)
    image = prepare_image(data, SHRINK)
    assert isinstance(image, tuple)
    opened = Image.open(io.BytesIO(image[0]))
    assert opened.size == (20, 30) and 0x0112 not in opened.getexif()
    np.testing.assert_allclose(
        decode_image(image[0]).float().mean((1, 2)), decode_image(data).float().mean((1, 2)), atol=3
    )
    assert prepare_image(data, CHECK) == (data, "jpg", 60)


def test_what_cannot_be_packed_has_a_cause() -> None:
    whole = encode(noise(0, 40, 60), "jpg")
    assert prepare_image(whole[:300], CHECK) == "corrupt_image"
    assert prepare_image(b"not pixels", PackSettings()) == "not_an_image"
    assert prepare_image(whole, PackSettings(validate_images=True, max_pixels=40 * 60 - 1)) == "image_too_large"
    assert prepare_image(saved(smooth(12, 20), "BMP"), PackSettings(max_pixels=239)) == "image_too_large"


def test_a_report_survives_the_log() -> None:
    report = ShardReport(
        3, 7, 4, ShardEntry("a.tar", 2, 99, "ff"), 0.5, 5, 1, [("x", "y")], {"jpg": 2}, {3: 5}, {64: 2}
    )
    assert ShardReport.from_json(report.to_json()) == report
