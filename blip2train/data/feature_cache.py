"""A folder of stored image tokens: what it says of itself, and which of its shards are whole.

Implements the frozen encoder's output as data: a frozen tower gives the same tokens for the same picture in every
epoch (paper, section 3.1). LAVIS computes them anew each time.

    folder/features.json             encoder, weights, image, layer and codec; written first
    folder/<dataset>/shard-*.tar     one per source shard, with its records in its order (see `data/stored_tokens.py`)
    folder/<dataset>/shard-*.json    source, size, checksum and drops of one finished shard
    folder/<dataset>/index.json      written last: the dataset is whole
    folder/<dataset>/sources.json    the urls that the dataset had
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from blip2train.data.remote import is_remote
from blip2train.data.shards import INDEX_NAME, Shard, ShardEntry, write_index
from blip2train.errors import ConfigError, DataError
from blip2train.nested import differences
from blip2train.run_dir import read_json, write_json

FEATURES_NAME = "features.json"
FORMAT = 1
_SOURCES_NAME = "sources.json"


@dataclass(frozen=True, slots=True)
class FeatureFacts:
    """What `features.json` says.

    Args:
        encoder: everything that decides the tokens, by name; equal facts, equal tokens.
        codec: how values are stored.
        num_tokens: P per image.
        embed_dim: width I.
        token_bytes: C per token.
        computed_in: weights and autocast of the run that made the cache, and the checksum of its encoder.
        max_pixels: larger pictures have no tokens; None in caches that did not note it.
    """

    encoder: Mapping[str, Any]
    codec: str
    num_tokens: int
    embed_dim: int
    token_bytes: int
    computed_in: Mapping[str, Any]
    max_pixels: int | None = None

    @property
    def bytes_per_image(self) -> int:
        """Of the tokens alone."""
        return self.num_tokens * self.token_bytes


@dataclass(frozen=True, slots=True)
class FinishedShard:
    """What the file beside a finished shard says.

    Args:
        entry: the shard.
        source: file name of the shard whose tokens it holds.
        source_records: how many that one had.
        dropped: records without tokens, by cause.
        source_bytes: size of the source, None where nobody knew it.
        source_sha256: of the source, None where no index said it.
    """

    entry: ShardEntry
    source: str
    source_records: int
    dropped: Mapping[str, int]
    source_bytes: int | None = None
    source_sha256: str | None = None


def read_facts(folder: Path) -> FeatureFacts:
    """The facts of a cache.

    Raises:
        ConfigError: there is none, or it is of a newer format.
    """
    path = folder / FEATURES_NAME
    if not path.is_file():
        raise ConfigError(
            f"no feature cache in {folder} (no {FEATURES_NAME} there)",
            where="features",
            fix="make one: blip2train data cache-features experiment=... out=FOLDER",
        )
    stored = read_json(path)
    if stored.pop("format", None) != FORMAT:
        raise ConfigError(
            f"a feature cache of another format than {FORMAT}",
            where=str(path),
            fix="make it anew, or upgrade blip2train",
        )
    try:
        return FeatureFacts(**stored)
    except TypeError as error:
        raise ConfigError(
            f"not a feature cache's facts ({error})", where=str(path), fix="make the cache anew"
        ) from error


def claim_folder(folder: Path, facts: FeatureFacts) -> None:
    """Make `folder` the cache of these facts, or find that it is.

    Raises:
        DataError: another cache, or something else, lies there.
    """
    path = folder / FEATURES_NAME
    if folder.exists() and not folder.is_dir():
        raise DataError("a file where a folder is meant", where=str(folder), fix="choose another out=")
    # hidden: what another process of this call is just writing
    others = [found for found in folder.iterdir() if found.name[0] != "."] if folder.is_dir() else []
    if not path.is_file():
        if others:
            raise DataError("a folder with other files in it", where=str(folder), fix="choose another out=")
        write_json(path, {"format": FORMAT, **asdict(facts)})
    changed = describe_differences(asdict(read_facts(folder)), asdict(facts))
    if changed:
        raise DataError(
            f"another feature cache: {'; '.join(changed)}",
            where=str(folder),
            fix="choose another out=, give the settings of that cache to continue it, or delete it",
        )


def describe_differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Every value that is not the same, as "name OLD there, NEW here"."""
    return [f"{name} {old!r} there, {new!r} here" for name, (old, new) in differences(before, now).items()]


def note_sources(folder: Path, urls: str | Sequence[str]) -> None:
    """Say in a dataset's folder what it is made from."""
    write_json(folder / _SOURCES_NAME, {"urls": [urls] if isinstance(urls, str) else list(urls)})


def read_sources(folder: Path) -> list[str] | None:
    """The urls that a dataset had when its tokens were made; None where nobody noted them."""
    path = folder / _SOURCES_NAME
    return list(read_json(path)["urls"]) if path.is_file() else None


def shard_path(folder: Path, index: int) -> Path:
    """Where the tokens of source shard number `index` lie."""
    return folder / f"shard-{index:06d}.tar"


def note_finished(folder: Path, index: int, finished: FinishedShard) -> None:
    """Say beside a shard that it is whole."""
    write_json(_note_path(folder, index), asdict(finished))


def read_finished(folder: Path, index: int, source: Shard) -> FinishedShard | None:
    """What is known of source shard number `index`, if its tokens are all there.

    Raises:
        DataError: they were made of another source shard.
    """
    path = _note_path(folder, index)
    if not path.is_file() or not shard_path(folder, index).is_file():
        return None
    note = read_json(path)
    finished = FinishedShard(**(note | {"entry": ShardEntry(**note["entry"])}))
    now = describe_source(source)
    # what one of the two does not know says nothing
    before = {name: note[name] for name in now if note.get(name) is not None and now[name] is not None}
    changed = describe_differences(before, {name: now[name] for name in before})
    if changed:
        raise DataError(
            f"tokens of another shard than {source.url} ({'; '.join(changed)}): the dataset's shards have changed",
            where=str(folder),
            fix="delete this folder, or give the old shards",
        )
    return finished


def describe_source(source: Shard) -> dict[str, Any]:
    """What tells a source shard from another one, named as in `FinishedShard`; None for what nobody knows.

    A local file tells its size itself: an index may be older than it.
    """
    path = None if is_remote(source.url) else Path(source.url)
    return {
        "source": Path(source.url).name,
        "source_records": source.num_records,
        "source_bytes": path.stat().st_size if path is not None and path.is_file() else source.num_bytes,
        "source_sha256": source.sha256,
    }


def finish_dataset(folder: Path, sources: Sequence[Shard]) -> bool:
    """Write `index.json` if all shards are there, whoever made them; False if other processes are still at work.

    Raises:
        DataError: there are more shards than sources.
    """
    notes = [read_finished(folder, index, source) for index, source in enumerate(sources)]
    extra = len(list(folder.glob("shard-*.tar"))) - len(sources)
    if extra > 0:
        raise DataError(
            f"{extra} shards more than the dataset has", where=str(folder), fix="delete this folder: its dataset shrank"
        )
    if not all(notes):
        return False
    write_index(folder, [note.entry for note in notes if note is not None])
    return True


def find_dataset(folder: Path, name: str) -> str:
    """The shards of one dataset of a cache, as a glob.

    Raises:
        ConfigError: the cache lacks this dataset, or all of its shards.
    """
    if (folder / name / INDEX_NAME).is_file():
        return str(folder / name / "shard-*.tar")
    known = sorted(path.parent.name for path in folder.glob(f"*/{INDEX_NAME}"))
    found = f"only a part of dataset {name}" if (folder / name).is_dir() else f"no dataset {name}"
    raise ConfigError(
        f"the feature cache holds {found}",
        where=f"features={folder}",
        fix=f"repeat `blip2train data cache-features ... out={folder}` with it; whole: {', '.join(known) or 'none'}",
    )


def _note_path(folder: Path, index: int) -> Path:
    return shard_path(folder, index).with_suffix(".json")
