"""Layout of one run folder: the contract between train, evaluate and report. Imports no torch.

config.yaml                          the resolved config
manifest.json                        versions, git commit, seed, shard hash, exact command
init.json                            where the first value of every trained tensor came from
metrics.jsonl                        one object per logged step: "step", "train/loss", ...
metrics.csv                          the same as a table; a quantity that a step does not have is an empty cell
wandb_id                             under which wandb knows the run, where it is told of it
warnings.jsonl                       one object per warning: "step", "cause", "seen", "likely", "look"
bad_steps/step-<N>/                  of a step with a loss or gradient that is not finite: report.json and its batches
ranks/rank-<N>.json                  each process's last heartbeat; rank-<N>.stack.txt: where it hung, if the run hung
stuck.json                           of a run that went on no more: which rank kept the others waiting; the next start
                                     renames it and the stacks to stuck.before.json and rank-<N>.stack.before.txt
dropped.jsonl                        one object per record that could not be used: dataset, cause, shard, key
data_report.json                     where too many of them stopped the run: counts and examples by source and cause
checkpoints/step-N/                  trainable weights (safetensors), the optimizer state, metadata.json with checksums
checkpoints/superseded-N/            those that a resume at an older one left behind; damaged-N/: those passed over
eval/<benchmark>/metrics.json        name -> number
eval/<benchmark>/predictions.jsonl   one object per prediction
eval/<benchmark>/images/<key>.jpg    small pictures of the records that the report may show (key percent-encoded)
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from blip2train.errors import ConfigError, DataError

_AS_JSON = "backslashreplace"
"""A lone surrogate, of a file name that is no UTF-8, becomes the escape that JSON has for it, and is read as it was."""


@dataclass(frozen=True, slots=True)
class RunDir:
    """Paths and JSON access of one run folder; nothing is created before something is written."""

    path: Path

    @classmethod
    def open(cls, path: str | Path, where: str = "run=") -> RunDir:
        """Open an existing run folder; `ConfigError` if there is no run in it, which names `where` it was asked for."""
        run = cls(Path(path))
        if not run.config_path.is_file():
            known = sorted(str(found.parent) for found in Path("outputs").glob("**/config.yaml"))[-8:]
            raise ConfigError(
                f"no run in {run.path} (no config.yaml there)",
                where=where,
                fix=f"give the folder that `blip2train train` wrote; known here: {', '.join(known) or 'none'}",
            )
        return run

    @property
    def config_path(self) -> Path:
        return self.path / "config.yaml"

    @property
    def manifest_path(self) -> Path:
        return self.path / "manifest.json"

    @property
    def init_path(self) -> Path:
        return self.path / "init.json"

    @property
    def metrics_path(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def metrics_table_path(self) -> Path:
        return self.path / "metrics.csv"

    @property
    def wandb_id_path(self) -> Path:
        return self.path / "wandb_id"

    @property
    def warnings_path(self) -> Path:
        return self.path / "warnings.jsonl"

    @property
    def bad_steps(self) -> Path:
        return self.path / "bad_steps"

    @property
    def ranks(self) -> Path:
        return self.path / "ranks"

    @property
    def stuck_path(self) -> Path:
        return self.path / "stuck.json"

    @property
    def dropped_path(self) -> Path:
        return self.path / "dropped.jsonl"

    @property
    def data_report_path(self) -> Path:
        return self.path / "data_report.json"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def eval_dir(self, benchmark: str) -> Path:
        return self.path / "eval" / benchmark

    def read_metrics(self) -> list[dict[str, Any]]:
        """All logged steps in order; empty if none were logged. A last line that a kill has cut short is left out.

        Raises:
            DataError: another line is broken.
        """
        return _read_appended(self.metrics_path)

    def read_warnings(self) -> list[dict[str, Any]]:
        """All warnings about the training in order; empty if there were none. Raises as `read_metrics` does."""
        return _read_appended(self.warnings_path)

    def read_manifest(self) -> dict[str, Any]:
        return read_json(self.manifest_path) if self.manifest_path.is_file() else {}

    def write_eval(
        self,
        benchmark: str,
        metrics: Mapping[str, Any],
        predictions: Iterable[Mapping[str, Any]],
        images: Mapping[str, bytes] | None = None,
    ) -> Path:
        """Write one benchmark's metrics, predictions and small pictures (JPEG, by record key); returns the folder.

        Pictures of an earlier evaluation under the same name are removed, so that none is shown beside new predictions.
        """
        folder = self.eval_dir(benchmark)
        for stale in self.eval_images(benchmark).values():
            stale.unlink()
        if images:
            (folder / "images").mkdir(parents=True, exist_ok=True)
        for key, data in (images or {}).items():
            (folder / "images" / f"{quote(key, safe='')}.jpg").write_bytes(data)
        write_jsonl(folder / "predictions.jsonl", predictions)
        write_json(folder / "metrics.json", metrics)
        return folder

    def eval_images(self, benchmark: str) -> dict[str, Path]:
        """Saved pictures of one benchmark by record key."""
        found = sorted((self.eval_dir(benchmark) / "images").glob("*.jpg"))
        return {unquote(path.stem): path for path in found}

    def read_eval(self, benchmark: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        folder = self.eval_dir(benchmark)
        return read_json(folder / "metrics.json"), read_jsonl(folder / "predictions.jsonl")

    def benchmarks(self) -> list[str]:
        """Names of the benchmarks evaluated in this run."""
        return sorted(found.parent.name for found in self.path.glob("eval/*/metrics.json"))


def free_bytes(folder: Path) -> int:
    """Free disk space where `folder` is or will be."""
    existing = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    return shutil.disk_usage(existing).free


def check_writable(path: Path, where: str) -> None:
    """Try whether `write_json` and its like could write this file, so that long work does not end in nothing.

    Args:
        path: of the file; its folder is made.
        where: the setting that asked for it, for the message.

    Raises:
        ConfigError: it is no file, or its folder cannot be made or written to.
    """
    try:
        if path.exists() and not path.is_file():
            what = "a folder" if path.is_dir() else "a device or pipe"
            raise ConfigError(f"{what} where a file is to be written: {path}", where=where, fix="name a file")
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = _partial(path)
        partial.touch()
        partial.unlink()
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be written ({error.strerror})", where=where, fix="name a file in a folder you may write to"
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return loaded


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write atomically: a reader never sees half a file."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n", errors=_AS_JSON)


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines if line.strip()]


def append_text(path: Path, text: str) -> None:
    """Add all of `text` to a file or, on an OSError, none of it: a full disk leaves no half line in its midst."""
    size = path.stat().st_size if path.is_file() else 0
    try:
        with path.open("a", encoding="utf-8", newline="") as file:
            file.write(text)
    except OSError:
        with contextlib.suppress(OSError):
            os.truncate(path, size)
        raise


def _read_appended(path: Path) -> list[dict[str, Any]]:
    """Rows of a file that a training appends to; a last line that a kill has cut short is left out."""
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    lines = text.split("\n")
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            if line.strip():
                rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number < len(lines):  # more follows: this was no kill while writing
                raise DataError(
                    f"line {number} is no JSON: {line[:60]!r}", where=str(path), fix="take the line out"
                ) from error
    return rows


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), errors=_AS_JSON)


def write_text(path: Path, text: str, errors: str = "strict") -> None:
    """Write UTF-8 atomically: a reader never sees half a file.

    Args:
        path: of the file; its folder is made.
        text: all of it.
        errors: what becomes of what UTF-8 cannot say (lone surrogates), as `str.encode` takes it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = _partial(path)
    partial.write_text(text, encoding="utf-8", errors=errors)
    partial.replace(path)


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.partial")
