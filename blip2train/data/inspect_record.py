"""One record -> what a check wants to know of it: defects, sizes, and 8-byte hashes of its key, image and captions.

Implements the record part of `blip2train data check`. What training would drop is judged by the code that training
drops with (data/sample.py), so a check and a run cannot disagree. LAVIS has no counterpart.
"""

from __future__ import annotations

import hashlib
import io
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from PIL import Image

from blip2train.data.caption import clean_caption
from blip2train.data.drop import DROP_CAUSES, Drop
from blip2train.data.image_file import MAX_PIXELS, ImageTooLargeError, check_size, plain_size
from blip2train.data.image_transform import decode_image
from blip2train.data.sample import RecordText, read_text
from blip2train.data.shards import IMAGE_EXTENSIONS, RawRecord
from blip2train.data.stored_tokens import TOKENS
from blip2train.errors import DataError

Level = Literal["fast", "full"]

_FORMATS = {"jpg": "JPEG", "jpeg": "JPEG", "png": "PNG", "webp": "WEBP", "gif": "GIF"}
_READ = {*IMAGE_EXTENSIONS, "json", "txt", TOKENS}
_ORIENTATION = 0x0112
_TURNED = (5, 6, 7, 8)


@dataclass(frozen=True, slots=True)
class CheckSettings:
    """What a check looks at.

    Args:
        level: "fast" reads everything but decodes no image; "full" decodes every image as training does.
        max_words: captions of more words (after cleaning) are cut in training.
        max_tokens: as `max_words`, in tokens with the special ones; judged where there is a tokenizer.
        min_side: of an image in pixels.
        max_aspect: longer side / shorter side.
        max_pixels: width x height that is still decoded.
        checksums: compare the sha256 of local shards with the index.
    """

    level: Level = "full"
    max_words: int = 50
    max_tokens: int = 32
    min_side: int = 32
    max_aspect: float = 4.0
    max_pixels: int = MAX_PIXELS
    checksums: bool = True


@dataclass(slots=True)
class RecordFacts:
    """What was found in one record.

    Args:
        defects: (kind, what was found), each kind at most once, an error first.
        text_defects: the same for its captions and questions, one entry for each.
        captions: those that training draws from.
        num_questions: of the record.
        image_hash: of the encoded bytes, None without an image.
        image_id: as training sees it.
        size: (width, height) in pixels, None where it cannot be read.
        num_bytes: of the encoded image.
    """

    defects: list[tuple[str, str]] = field(default_factory=list)
    text_defects: list[tuple[str, str]] = field(default_factory=list)
    captions: Sequence[str] = ()
    num_questions: int = 0
    image_hash: int | None = None
    image_id: int | None = None
    size: tuple[int, int] | None = None
    num_bytes: int = 0

    @property
    def usable(self) -> bool:
        """Whether the record would be taken, for training or, without captions, for its questions."""
        return not any(kind in DROP_CAUSES for kind, _ in self.defects)


def inspect_record(record: RawRecord, settings: CheckSettings) -> RecordFacts:
    """Look at one record; it is never changed and nothing of it is kept but hashes, sizes and captions."""
    facts = RecordFacts()
    found = read_text(record, "check")
    if isinstance(found, Drop):
        facts.defects.append((found.cause, found.detail))
        if "__broken__" in record:
            return facts
    else:
        _judge_text(found, facts, settings)
    _look_at_image(record, facts, settings)
    names = [name for name in record if not name.startswith("__")]
    images = [name for name in names if name in IMAGE_EXTENSIONS]
    if len(images) > 1:
        facts.defects.append(("several_images", ", ".join(images)))
    unread = [name for name in names if name not in _READ]
    if unread:
        facts.defects.append(("unknown_member", ", ".join(unread)))
    return facts


def hash8(data: bytes) -> int:
    """The first eight bytes of the sha256, as an unsigned number."""
    return int.from_bytes(hashlib.sha256(data).digest()[:8], "big")


def caption_hash(caption: str) -> int:
    """Equal for captions that are equal after cleaning."""
    return hash8(clean_caption(caption).encode("utf-8", "surrogatepass"))


def _judge_text(text: RecordText, facts: RecordFacts, settings: CheckSettings) -> None:
    facts.captions, facts.num_questions, facts.image_id = text.captions, len(text.questions), text.image_id
    if not text.captions and not text.questions and not text.bad_questions:
        facts.defects.append(("no_caption", "neither captions nor questions in the JSON, and no txt file"))
    facts.text_defects += [("unusable_caption", detail) for detail in text.refused]
    if text.bad_questions:
        facts.defects.append(("bad_questions", text.bad_questions))
    for caption in text.captions:
        num_words = len(clean_caption(caption, max_words=len(caption) + 1).split())
        if num_words > settings.max_words:
            facts.text_defects.append(("long_caption", f"{num_words} words: {caption!r}"))
    for question in text.questions:
        if not question.question.strip():
            facts.text_defects.append(("blank_question", f"question {question.question_id}"))
        elif not any(answer.strip() for answer in question.answers):
            facts.text_defects.append(("question_without_answer", repr(question.question)))


def _look_at_image(record: RawRecord, facts: RecordFacts, settings: CheckSettings) -> None:
    extension = next((extension for extension in IMAGE_EXTENSIONS if extension in record), None)
    usable = facts.usable
    if extension is None:
        if usable and TOKENS not in record:
            names = ", ".join(name for name in record if not name.startswith("__"))
            facts.defects.append(("no_image", f"files of the record: {names or 'none'}"))
        return
    data: bytes = record[extension]
    facts.image_hash, facts.num_bytes = hash8(data), len(data)
    if not usable:
        return
    try:
        kind, facts.size = _read_header(data, settings.max_pixels)
        if settings.level == "full":
            height, width = decode_image(data, settings.max_pixels).shape[1:]
            facts.size = (width, height)
    except ImageTooLargeError as error:
        facts.defects.append(("image_too_large", error.found))
        return
    except DataError as error:
        facts.defects.append(("corrupt_image", error.found))
        return
    short, long = sorted(facts.size)
    if short < settings.min_side:
        facts.defects.append(("tiny_image", f"{facts.size[0]} x {facts.size[1]} pixels"))
    elif long > settings.max_aspect * short:
        facts.defects.append(("odd_aspect", f"{facts.size[0]} x {facts.size[1]} pixels"))
    if kind is not None and kind != _FORMATS[extension]:
        facts.defects.append(("wrong_extension", f".{extension} holds {kind}"))


def _read_header(data: bytes, max_pixels: int) -> tuple[str | None, tuple[int, int]]:
    """(format, (width, height) as seen upright) from the first bytes; nothing is decoded.

    Raises:
        ImageTooLargeError: more pixels than that.
        DataError: no header of a known format.
    """
    check_size(plain_size(data) or (0, 0), max_pixels)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on odd metadata, and on sizes, which are checked here
        try:
            with Image.open(io.BytesIO(data)) as image:
                kind, size = image.format, image.size
                turned = image.getexif().get(_ORIENTATION, 1) in _TURNED
        except Image.DecompressionBombError as error:
            raise ImageTooLargeError(str(error), where="check", fix="make it smaller, or raise max_pixels") from error
        except Exception as error:  # broken bytes make PIL raise nearly anything
            reason = type(error).__name__
            raise DataError(f"no image header ({reason})", where="check", fix="repair or remove it") from error
    check_size(size, max_pixels)
    return kind, (size[1], size[0]) if turned else size
