"""Decoding of every kind of image file against PIL; bombs known by their header; broken files never more than an error.

Pixels are compared with `ImageOps.exif_transpose(Image.open(...)).convert("RGB")`: exact, but where torchvision's and
PIL's own copies of a codec may differ.
"""

import io
import random
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from shard_factory import noise

from blip2train.data.image_file import ImageTooLargeError, plain_size
from blip2train.data.image_transform import decode_image
from blip2train.errors import DataError


def picture(mode: str = "RGB", width: int = 48, height: int = 32) -> Image.Image:
    smooth = Image.fromarray(noise(0, 8, 12)).resize((width, height), Image.Resampling.BICUBIC)
    return smooth.convert(mode)


def save(image: Image.Image, kind: str, **settings: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **settings)
    return buffer.getvalue()


def by_pil(data: bytes) -> np.ndarray:
    return np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))


def assert_decodes_as_pil(data: bytes) -> None:
    found = decode_image(data)
    assert found.dtype == torch.uint8
    np.testing.assert_array_equal(found.permute(1, 2, 0).numpy(), by_pil(data))


FILES = {
    **{f"{mode} {kind}": save(picture(mode), kind) for mode in ("L", "RGB", "CMYK") for kind in ("JPEG", "TIFF")},
    **{f"{mode} PNG": save(picture(mode), "PNG") for mode in ("1", "L", "LA", "P", "RGB", "RGBA")},
    **{f"{mode} WEBP": save(picture(mode), "WEBP") for mode in ("L", "RGB", "RGBA")},
    "lossless WEBP": save(picture(), "WEBP", lossless=True),
    "progressive JPEG": save(picture(), "JPEG", progressive=True),
    "P GIF": save(picture("P"), "GIF"),
    "BMP": save(picture(), "BMP"),
    "AVIF": save(picture(), "AVIF"),
    "JPEG2000": save(picture(), "JPEG2000"),
    "P PNG with transparency": save(picture("P"), "PNG", transparency=3),
    "RGB PNG with transparency": save(picture(), "PNG", transparency=(1, 2, 3)),
}


@pytest.mark.parametrize("name", FILES)
def test_decoding_equals_pil_in_every_format_and_colour_mode(name: str) -> None:
    assert_decodes_as_pil(FILES[name])


def test_cmyk_without_adobes_marker_decodes_as_pil_does() -> None:
    data = save(picture("CMYK"), "JPEG")
    at = data.index(b"\xff\xee" + struct.pack(">H", 14) + b"Adobe")
    without = data[:at] + data[at + 16 :]
    assert_decodes_as_pil(without)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = save(picture(), kind, exif=exif, **({"quality": 95} if kind == "JPEG" else {}))
    assert_decodes_as_pil(data)
    assert decode_image(data).shape == ((3, 32, 48) if orientation < 5 else (3, 48, 32))


@pytest.mark.parametrize(
    "exif", [b"Exif\0\0", b"Exif\0\0MM\0*\0\0\xff\xff", b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0"]
)
def test_broken_exif_leaves_the_picture_as_it_is(exif: bytes) -> None:
    assert decode_image(save(picture(), "JPEG", exif=exif)).shape == (3, 32, 48)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bit_grey_keeps_its_high_byte(kind: str) -> None:
    values = (np.arange(64 * 64) * 16).reshape(64, 64).astype(np.uint16)
    found = decode_image(save(Image.fromarray(values), kind))
    assert found.shape == (3, 64, 64)
    for channel in found:
        np.testing.assert_array_equal(channel.numpy(), values >> 8)


def png(width: int, height: int, bit_depth: int, colour: int, rows: bytes) -> bytes:
    """A PNG written by hand: PIL writes no 16-bit colour."""
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, bit_depth, colour, 0, 0, 0)),
        (b"IDAT", rows),
        (b"IEND", b""),
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)) for name, body in chunks
    )


@pytest.mark.parametrize(("colour", "channels"), [(2, 3), (4, 2), (6, 4)])
def test_sixteen_bit_colour_keeps_its_high_byte(colour: int, channels: int) -> None:
    values = np.random.default_rng(0).integers(0, 1 << 16, (5, 7, channels)).astype(">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in values)
    found = decode_image(png(7, 5, 16, colour, zlib.compress(rows))).permute(1, 2, 0).numpy()
    expected = (values >> 8).astype(np.uint8)[..., :3] if channels > 2 else (values[..., :1] >> 8).repeat(3, -1)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF", "AVIF"])
def test_an_animation_gives_its_first_frame(kind: str) -> None:
    frames = [Image.fromarray(np.full((8, 8, 3), level, np.uint8)) for level in (0, 255, 128)]
    data = save(frames[0], kind, save_all=True, append_images=frames[1:])
    found = decode_image(data)
    assert found.shape == (3, 8, 8)
    assert int(found.max()) < 4


def test_a_bomb_is_refused_by_its_header_before_memory_is_taken() -> None:
    jpeg = bytearray(FILES["RGB JPEG"])
    at = jpeg.index(b"\xff\xc0") + 5
    jpeg[at : at + 4] = struct.pack(">HH", 65000, 65000)
    gif = b"GIF89a" + struct.pack("<HHBBB", 60000, 60000, 0, 0, 0)
    gif += b"\x2c" + struct.pack("<HHHHB", 0, 0, 60000, 60000, 0) + b"\x02\x00\x3b"
    webp = bytearray(FILES["RGB WEBP"])
    webp[26:30] = struct.pack("<HH", 16000, 16000)
    bombs = {
        "JPEG": bytes(jpeg),
        "PNG": png(60000, 60000, 8, 2, b""),
        "WEBP": bytes(webp),
        "GIF": gif,
        "GIF below PIL's own limit": gif.replace(struct.pack("<HH", 60000, 60000), struct.pack("<HH", 10000, 10000)),
        "BMP": save(Image.new("1", (9500, 9500)), "BMP"),
        "TIFF": save(Image.new("1", (9500, 9500)), "TIFF", compression="group4"),
    }
    for name, data in bombs.items():
        tracemalloc.start()
        with pytest.raises(ImageTooLargeError, match="pixels"):
            decode_image(data)
        assert tracemalloc.get_traced_memory()[1] < 2e6 + 3 * len(data), name
        tracemalloc.stop()


def test_the_limit_is_on_width_times_height() -> None:
    for data in (FILES["RGB JPEG"], FILES["RGB PNG"], FILES["RGB WEBP"], FILES["P GIF"], FILES["BMP"]):
        assert decode_image(data, max_pixels=48 * 32).shape == (3, 32, 48)
        with pytest.raises(ImageTooLargeError, match="48 x 32"):
            decode_image(data, max_pixels=48 * 32 - 1)


@pytest.mark.parametrize("name", [name for name in FILES if "JPEG" in name or "PNG" in name or "WEBP" in name])
def test_the_header_gives_the_size_that_pil_finds(name: str) -> None:
    expected = None if name == "JPEG2000" else (48, 32)
    assert plain_size(FILES[name]) == expected


@pytest.mark.parametrize("progressive", [False, True])
def test_a_truncated_jpeg_is_found_wherever_it_is_cut(progressive: bool) -> None:
    data = save(picture(width=200, height=150), "JPEG", progressive=progressive)
    for cut in [*range(0, len(data) - 40, 97), *range(len(data) - 40, len(data))]:
        with pytest.raises(DataError, match="do not decode"):
            decode_image(data[:cut])


@pytest.mark.parametrize("name", [name for name in FILES if name not in ("RGB JPEG", "progressive JPEG")])
def test_truncated_files_of_every_kind_are_data_errors(name: str) -> None:
    with pytest.raises(DataError, match="do not decode"):
        decode_image(FILES[name][: len(FILES[name]) // 2])


@pytest.mark.parametrize(
    "data", [b"", b"\x00", b"this is no image" * 20, b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"RIFF\0\0\0\0WEBPVP8 ",
             b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", b"<svg xmlns='http://www.w3.org/2000/svg'/>"]
)  # fmt: skip
def test_bytes_that_are_no_image_are_data_errors(data: bytes) -> None:
    with pytest.raises(DataError, match="do not decode"):
        decode_image(data)


def test_damaged_files_decode_or_are_data_errors_and_nothing_else() -> None:
    rng = random.Random(0)
    for _ in range(40):
        for data in FILES.values():
            damaged = bytearray(data)
            for _ in range(rng.choice((1, 3, 20))):
                damaged[rng.randrange(min(len(damaged), rng.choice((60, 1 << 20))))] = rng.randrange(256)
            try:
                image = decode_image(bytes(damaged), max_pixels=1 << 20)
            except DataError:
                continue
            assert image.dtype == torch.uint8 and image.shape[0] == 3 and image.numel() <= 3 << 20
