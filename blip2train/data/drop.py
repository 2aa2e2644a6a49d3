"""Records that cannot be used -> counts by source and cause, a log of each, and a stop when they are too many.

Implements the accounts of the data path: used + dropped = drawn, for every dataset. LAVIS swallows broken records
(`warn_and_continue`, or it draws another index at random), so nobody knows what a run has seen.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from blip2train.errors import DataError
from blip2train.run_dir import append_text, write_json, write_text

logger = logging.getLogger(__name__)

DropCause = Literal[
    "no_image",
    "corrupt_image",
    "image_too_large",
    "bad_json",
    "bad_text",
    "no_caption",
    "empty_caption",
    "duplicate_key",
    "truncated_shard",
    "unreadable_shard",
]
DROP_CAUSES: tuple[DropCause, ...] = get_args(DropCause)
"""Every cause, in the order of the checks' depth: image, JSON, text, shard."""

REPORT_NAME = "data_report.json"

_LOGGED_DROPS = 10
_EXAMPLES = 3
_MAX_DETAIL = 300
_MAX_LOG_ROWS = 10_000


@dataclass(frozen=True, slots=True)
class Drop:
    """One record that cannot be used.

    Args:
        dataset: the source it came from.
        cause: one of `DROP_CAUSES`; every defect has exactly one.
        detail: what was found, for a person.
        url: its shard.
        key: its key in the shard.
        sample: global number of the sample whose place it had, where there is one; orders the log on resume.
    """

    dataset: str
    cause: DropCause
    detail: str
    url: str
    key: str
    sample: int | None = None

    def __post_init__(self) -> None:
        # names and texts of broken records go to logs and JSON, where not every character can
        for name in ("detail", "url", "key"):
            object.__setattr__(self, name, shorten(getattr(self, name)))


class DropLedger:
    """Counts used and dropped records by dataset and cause, and stops the run when too many are dropped.

    Args:
        datasets: names, in the order of the report.
        max_dropped_share: DataError when a dataset drops more than this share of its records.
        minimum_records: seen of a dataset before its share is judged.
        log: JSONL file that takes every drop, one object per line (the first 10,000 of each dataset and cause; the
            counts go on). Its folder also takes `data_report.json` when the run is stopped.
        setting: config key of the share, for the error; None where there is none to raise.
    """

    def __init__(
        self,
        datasets: Sequence[str],
        max_dropped_share: float = 0.1,
        minimum_records: int = 100,
        log: Path | None = None,
        setting: str | None = "data.max_dropped_share",
    ) -> None:
        self._max_dropped_share = max_dropped_share
        self._minimum_records = minimum_records
        self._log, self._setting = log, setting
        self._counts: dict[str, Counter[str]] = {name: Counter() for name in datasets}
        self._last: dict[str, str] = {}
        self._examples: dict[tuple[str, str], list[Drop]] = {}

    def add(self, drawn: Mapping[str, int], drops: Sequence[Drop]) -> None:
        """Count records that had their own turn.

        Args:
            drawn: records taken in their own turn, by dataset, usable or not.
            drops: those of them that cannot be used.

        Raises:
            DataError: the dropped share of a dataset is above the limit; carries the table of `report`.
        """
        for name, number in drawn.items():
            self._counts[name]["used"] += number
        rows = []
        for drop in drops:
            counts = self._counts[drop.dataset]
            counts["used"] -= 1
            counts[drop.cause] += 1
            self._name(drop)
            if counts[drop.cause] <= _MAX_LOG_ROWS:
                rows.append(drop)
        self._append(rows)
        for name in drawn:
            self._judge(name)

    def counts(self) -> dict[str, dict[str, int]]:
        """`{"coco": {"used": n, "corrupt_image": m, ...}}`: every cause, zeros included."""
        return {
            name: {column: counts[column] for column in ("used", *DROP_CAUSES)} for name, counts in self._counts.items()
        }

    def load(self, counts: Mapping[str, Mapping[str, int]], num_samples: int | None = None) -> None:
        """Continue from the counts of a checkpoint; datasets that are not in it start at zero.

        Args:
            counts: of `counts()`.
            num_samples: global number of samples consumed then. Rows of the log behind it are taken out: they come
                again.
        """
        for name, own in self._counts.items():
            own.clear()
            own.update(counts.get(name, {}))
        if num_samples is not None and self._log is not None and self._log.is_file():
            _keep_rows(self._log, num_samples)

    def report(self) -> dict[str, Any]:
        """Counts, shares and examples by dataset and cause, ready for JSON."""
        return {
            "max_dropped_share": self._max_dropped_share,
            "datasets": {
                name: {
                    "drawn": sum(counts.values()),
                    "dropped": _num_dropped(counts),
                    "dropped_share": _share(counts),
                    "counts": counts,
                    "examples": {
                        cause: [asdict(drop) for drop in self._examples[name, cause]]
                        for cause in DROP_CAUSES
                        if (name, cause) in self._examples
                    },
                }
                for name, counts in self.counts().items()
            },
        }

    def table(self) -> str:
        """The report for a person: one line per dataset and cause, each with its first example."""
        lines = []
        for name, counts in self.counts().items():
            lines.append(
                f"{name}: {sum(counts.values())} drawn, {counts['used']} used, {_num_dropped(counts)} dropped "
                f"({_share(counts):.1%})"
            )
            for cause in DROP_CAUSES:
                if counts[cause]:
                    found = self._examples.get((name, cause), [])
                    example = f"  e.g. {found[0].url} key {found[0].key}: {found[0].detail}" if found else ""
                    lines.append(f"  {counts[cause]:>8} {cause}{example}")
        return "\n".join(lines)

    def _name(self, drop: Drop) -> None:
        examples = self._examples.setdefault((drop.dataset, drop.cause), [])
        self._last[drop.dataset] = f"{drop.url} key {drop.key} ({drop.cause}: {drop.detail})"
        if len(examples) < _EXAMPLES:
            examples.append(drop)
        num_dropped = _num_dropped(self._counts[drop.dataset])
        if num_dropped <= _LOGGED_DROPS:
            logger.warning("%s: dropped (%s: %s) %s key %s", drop.dataset, drop.cause, drop.detail, drop.url, drop.key)
        if num_dropped == _LOGGED_DROPS:
            where = f" and named in {self._log}" if self._log else ""
            logger.warning("%s: further drops are counted%s", drop.dataset, where)

    def _append(self, drops: Sequence[Drop]) -> None:
        if self._log is None or not drops:
            return
        try:
            self._log.parent.mkdir(parents=True, exist_ok=True)
            append_text(self._log, "".join(json.dumps(asdict(drop)) + "\n" for drop in drops))
        except OSError as error:  # a full disk is no reason to end a training
            logger.error("%d dropped records are counted, but not named in %s (%s)", len(drops), self._log, error)

    def _judge(self, name: str) -> None:
        counts = self._counts[name]
        num_seen, num_dropped = counts.total(), _num_dropped(counts)
        if num_seen < self._minimum_records or num_dropped <= self._max_dropped_share * num_seen:
            return
        if self._log is not None:
            write_json(self._log.with_name(REPORT_NAME), self.report())
        raise DataError(
            f"{num_dropped} of {num_seen} records of {name} cannot be used; allowed share is "
            f"{self._max_dropped_share:g}\n{self.table()}",
            where=self._last.get(name, f"dataset {name}"),
            fix="repair or repack the data (`blip2train data check` names every defect)"
            + (f", or raise {self._setting} and resume" if self._setting else ""),
        )


def _keep_rows(log: Path, num_samples: int) -> None:
    """Leave the rows of the first `num_samples` samples; the last line may be half written."""
    kept = []
    for line in log.read_text(encoding="ascii").splitlines():
        try:
            sample = json.loads(line)["sample"]
        except (ValueError, KeyError):
            continue
        if sample is None or sample < num_samples:
            kept.append(f"{line}\n")
    write_text(log, "".join(kept))


def summary(counts: Mapping[str, Mapping[str, int]]) -> list[str]:
    """One line for each dataset that lost records, for the end of a run; `counts` as `DropLedger.counts` gives them."""
    return [
        f"{name}: {_num_dropped(row)} of {sum(row.values())} records dropped ({_share(row):.1%}): "
        + ", ".join(f"{number} {cause}" for cause, number in row.items() if number and cause != "used")
        for name, row in counts.items()
        if _num_dropped(row)
    ]


def shorten(text: str) -> str:
    """A detail for logs: one line, printable, of bounded length."""
    line = ascii(text)[1:-1] if not text.isprintable() else text
    return line if len(line) <= _MAX_DETAIL else f"{line[: _MAX_DETAIL - 3]}..."


def _num_dropped(counts: Mapping[str, int]) -> int:
    return sum(number for column, number in counts.items() if column != "used")


def _share(counts: Mapping[str, int]) -> float:
    return _num_dropped(counts) / max(1, sum(counts.values()))
