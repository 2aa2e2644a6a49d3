"""What a check of shards can find: each kind with its severity, what it means and what to do; counts with examples.

Implements the vocabulary of `blip2train data check`. LAVIS has no check: what is wrong with a data set shows in the
middle of a run, or never.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from blip2train.data.drop import shorten

Severity = Literal["error", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")
"""The worst first."""

Unit = Literal["records", "captions", "questions", "shards", "folders"]

NUM_EXAMPLES = 5


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of finding.

    Args:
        severity: error: lost, wrong or misleading in training; warning: probably not meant; note: good to know.
        unit: what is counted, and what the share is a share of.
        meaning: what it is and does, for a person.
        fix: what to do about it.
    """

    severity: Severity
    unit: Unit
    meaning: str
    fix: str


_REPACK = "repair the source and pack it again"

KINDS: Mapping[str, Kind] = {
    # a record that training leaves out: the causes of data/drop.py
    "no_image": Kind("error", "records", "no image among the record's files", _REPACK),
    "corrupt_image": Kind("error", "records", "an image that does not decode, or ends early", _REPACK),
    "image_too_large": Kind("error", "records", "more pixels than the cap allows", "shrink it, or raise max_pixels"),
    "bad_json": Kind("error", "records", "JSON that does not parse, or with a field of the wrong type", _REPACK),
    "bad_text": Kind("error", "records", "text that is no UTF-8 or cannot be encoded", _REPACK),
    "no_caption": Kind("error", "records", "neither caption nor question", _REPACK),
    "empty_caption": Kind("error", "records", "nothing left of any caption after cleaning", _REPACK),
    "duplicate_key": Kind("error", "records", "a key that another record of the folder has", "give every image a key"),
    "truncated_shard": Kind("error", "records", "cut off: the tar ends inside or before it", "copy the shard again"),
    "unreadable_shard": Kind("error", "records", "of a tar that cannot be read at all", "copy or pack the shard again"),
    "unreachable_shard": Kind("error", "shards", "remote, and not to be had after all retries", "repeat the check"),
    "damaged_shard": Kind("warning", "shards", "does not end as a tar should", "copy the shard again"),
    # shards against index.json and manifest.json
    "missing_shard": Kind("error", "shards", "in the index, but not there", "copy it again, or pack again"),
    "extra_shard": Kind("warning", "shards", "there, but not in the index", "run `blip2train data index`"),
    "changed_shard": Kind("error", "shards", "not the bytes that the index describes", "copy it, or index it, again"),
    "wrong_count": Kind("error", "shards", "not as many records as the index says", "run `blip2train data index`"),
    "manifest_mismatch": Kind("error", "shards", "manifest.json and index.json contradict each other", _REPACK),
    "empty_shard": Kind("warning", "shards", "a tar without a record", "delete it and index the folder again"),
    "no_index": Kind("note", "folders", "no index: nothing to compare with", "run `blip2train data index`"),
    # identity
    "image_id_conflict": Kind(
        "error",
        "records",
        "an image_id that a different image of the folder has: the two are taken for one image and never contrasted",
        "give different images different ids",
    ),
    "duplicate_image": Kind(
        "warning", "records", "the same image again, under the same image_id", "pack its captions as one record"
    ),
    "duplicate_image_other_id": Kind(
        "warning",
        "records",
        "the same image again under another image_id: the copies are each other's negatives",
        "drop the copies, or give them one id",
    ),
    # text
    "duplicate_caption": Kind("note", "captions", "equal to an earlier caption after cleaning", "none needed if few"),
    "unusable_caption": Kind("warning", "captions", "empty or no text, beside usable captions", "leave it out"),
    "long_caption": Kind("warning", "captions", "more words than are kept; the rest is cut", "raise max_words"),
    "long_caption_tokens": Kind("warning", "captions", "more tokens than are kept; the rest is cut", "shorten it"),
    "bad_questions": Kind("error", "records", "questions of the wrong form, which no benchmark reads", _REPACK),
    "blank_question": Kind("warning", "questions", "a question without a word", "leave it out"),
    "question_without_answer": Kind("warning", "questions", "nothing to score against", "fine for a test set"),
    # images and files
    "tiny_image": Kind("warning", "records", "a side shorter than min_side: it will be blown up", "leave it out"),
    "odd_aspect": Kind(
        "warning", "records", "far longer than wide, or the reverse: a crop sees little", "leave it out"
    ),
    "several_images": Kind("warning", "records", "more than one image; only the first is used", "give each a key"),
    "wrong_extension": Kind("note", "records", "the bytes are of another format than the name says", "none needed"),
    "unknown_member": Kind("note", "records", "a file beside the image that nothing reads", "none needed"),
}


@dataclass
class Findings:
    """Counts by kind, and where the first of each were found."""

    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def add(self, kind: str, *examples: str, count: int = 1) -> None:
        """Count something; an example is a shard, or shard and key, and what was found there."""
        assert kind in KINDS, kind
        if not count:
            return
        self.counts[kind] += count
        found = self.examples.setdefault(kind, [])
        found += [shorten(example) for example in examples[: NUM_EXAMPLES - len(found)]]

    def merge(self, other: Findings) -> None:
        self.counts.update(other.counts)
        for kind, examples in other.examples.items():
            found = self.examples.setdefault(kind, [])
            found += examples[: NUM_EXAMPLES - len(found)]
