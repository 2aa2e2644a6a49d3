"""The settings of `data pack` -> the reader of one data set, or what that data set needs.

Implements the choice of source: its name, and for some what kind of file was given (an official one, Karpathy's, or a
list of BLIP's and LAVIS's).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from omegaconf import DictConfig, ListConfig

from blip2train.errors import ConfigError

if TYPE_CHECKING:
    from blip2train.data.source.base import Source

_KEYS = ("annotations", "split", "image_column", "captions_column")


@dataclass(frozen=True, slots=True)
class Given:
    """What the user gave.

    Args:
        input: folder.
        annotations: files, none or some.
        split: name or None.
        image_column: likewise.
        captions_column: likewise.
        out: folder of the shards, which may lie below `input`.
    """

    input: Path
    annotations: tuple[Path, ...]
    split: str | None
    image_column: str | None
    captions_column: str | None
    out: Path

    def file(self) -> Path:
        """The one file."""
        return self.annotations[0]


@dataclass(frozen=True, slots=True)
class _Kind:
    """One source: what it must be given besides `input`, what it may be given, how many files, and its reader."""

    make: Callable[[Given], Source]
    needs: tuple[str, ...] = ("annotations",)
    takes: tuple[str, ...] = ()
    max_files: int = 1


def open_source(config: DictConfig) -> Source:
    """The reader that `source` names.

    Args:
        config: data_pack.yaml.

    Raises:
        ConfigError: no such source, a setting that it needs is missing, or it was given one that it does not read.
        DataError: a file or folder is missing, or is of another kind.
    """
    name = str(config.source)
    if name not in SOURCES:
        raise ConfigError(f"unknown source {name!r}", where="source", fix=f"one of {', '.join(SOURCES)}")
    kind = SOURCES[name]
    found = {key: config[key] for key in _KEYS if config[key] is not None and config[key] != []}
    missing = [key for key in kind.needs if key not in found]
    unread = [key for key in found if key not in (*kind.needs, *kind.takes)]
    if missing or unread:
        wrong = [f"{key} is not set" for key in missing] + [f"{key}={found[key]} is not read" for key in unread]
        reads = ", ".join(["input", *kind.needs, *(f"{key} (optional)" for key in kind.takes)])
        raise ConfigError(f"source={name}: {'; '.join(wrong)}", where=f"source={name}", fix=f"it reads {reads}")
    files = found.get("annotations", [])
    names: Sequence[str] = list(files) if isinstance(files, list | ListConfig) else [files]
    paths = tuple(Path(path).expanduser() for path in names)
    if len(paths) > kind.max_files:
        raise ConfigError(
            f"source={name} with {len(paths)} files", where="annotations", fix=f"give at most {kind.max_files}"
        )
    folder, out = Path(config.input).expanduser(), Path(config.out).expanduser()
    if folder.resolve() == out.resolve():
        raise ConfigError(
            "shards among the files they are made of", where=f"input={folder} out={out}", fix=f"give out={out}/shards"
        )
    texts = {key: None if config[key] is None else str(config[key]) for key in _KEYS[1:]}
    return kind.make(Given(folder, paths, **texts, out=out))


def _folder(given: Given) -> Source:
    from blip2train.data.source.folder import FolderSource, TextBesideSource, find_captions

    captions = given.file() if given.annotations else find_captions(given.input)
    columns = {"image_column": given.image_column, "captions_column": given.captions_column}
    if captions is not None:
        return FolderSource(given.input, captions, **columns, ignored=[given.out])
    unread = [key for key, value in columns.items() if value is not None]
    if unread:
        raise ConfigError(f"{', '.join(unread)} without a file", where="annotations", fix="give annotations=FILE")
    return TextBesideSource(given.input, ignored=[given.out])


def _lavis(given: Given, kind: str, **arguments: Any) -> Source | None:
    """The reader of a list that BLIP and LAVIS made of the data set, if that is what was given."""
    from blip2train.data.source.lavis import LavisSource, is_lavis_list

    if len(given.annotations) != 1 or not given.file().is_file() or not is_lavis_list(given.file()):
        return None
    if given.split is not None:
        raise ConfigError(f"split={given.split} with a list of one split", where="split", fix="leave it out")
    return LavisSource(given.input, given.file(), kind=kind, **arguments)


def _coco(given: Given) -> Source:
    from blip2train.data.source.coco import COCO_FOLDERS, CocoSource

    return _lavis(given, "coco", subfolders=COCO_FOLDERS) or CocoSource(given.input, given.file())


def _karpathy(given: Given) -> Source:
    from blip2train.data.source.coco import COCO_FOLDERS
    from blip2train.data.source.karpathy import KarpathySource

    lavis = _lavis(given, "karpathy", subfolders=COCO_FOLDERS)
    return lavis or KarpathySource(given.input, given.file(), split=given.split)


def _flickr30k(given: Given) -> Source:
    from blip2train.data.source.flickr30k import Flickr30kTokenSource
    from blip2train.data.source.karpathy import FLICKR_FOLDERS, KarpathySource

    lavis = _lavis(given, "flickr30k", subfolders=FLICKR_FOLDERS)
    if lavis is not None:
        return lavis
    if given.file().suffix == ".json":
        return KarpathySource(given.input, given.file(), split=given.split, kind="flickr30k")
    if given.split is not None:
        raise ConfigError(
            f"split={given.split}, which {given.file().name} does not know",
            where="split",
            fix="leave it out to pack all images, or give annotations=dataset_flickr30k.json",
        )
    return Flickr30kTokenSource(given.input, given.file())


def _nocaps(given: Given) -> Source:
    from blip2train.data.source.coco import NOCAPS_FOLDERS, CocoSource

    lavis = _lavis(given, "nocaps", subfolders=NOCAPS_FOLDERS)
    return lavis or CocoSource(given.input, given.file(), kind="nocaps", subfolders=NOCAPS_FOLDERS)


def _visual_genome(part: Literal["regions", "qas"]) -> Callable[[Given], Source]:
    def make(given: Given) -> Source:
        from blip2train.data.source.visual_genome import VISUAL_GENOME_FOLDERS, VISUAL_GENOME_ID, VisualGenomeSource

        kind = "visual_genome" if part == "regions" else "vg_qa"
        lavis = _lavis(given, kind, subfolders=VISUAL_GENOME_FOLDERS, id_prefix=VISUAL_GENOME_ID)
        return lavis or VisualGenomeSource(given.input, given.file(), part=part)

    return make


def _vqa(kind: str) -> Callable[[Given], Source]:
    def make(given: Given) -> Source:
        from blip2train.data.source.coco import COCO_FOLDERS
        from blip2train.data.source.vqa import VqaSource

        return _lavis(given, kind, subfolders=COCO_FOLDERS) or VqaSource(given.input, given.annotations, kind=kind)

    return make


def _gqa(given: Given) -> Source:
    from blip2train.data.source.gqa import GqaSource
    from blip2train.data.source.visual_genome import VISUAL_GENOME_ID

    lavis = _lavis(given, "gqa", subfolders=("images",), id_prefix=VISUAL_GENOME_ID)
    return lavis or GqaSource(given.input, given.annotations)


def _sbu(given: Given) -> Source:
    from blip2train.data.source.sbu import SbuSource

    if not given.annotations:
        return _img2dataset("sbu")(given)
    return _lavis(given, "sbu", subfolders=("dataset", "images")) or SbuSource(given.input, given.annotations)


def _img2dataset(kind: str) -> Callable[[Given], Source]:
    def make(given: Given) -> Source:
        from blip2train.data.source.img2dataset import Img2DatasetSource

        return Img2DatasetSource(given.input, kind=kind, ignored=[given.out])

    return make


SOURCES: Mapping[str, _Kind] = {
    "folder": _Kind(_folder, needs=(), takes=("annotations", "image_column", "captions_column")),
    "coco": _Kind(_coco),
    "karpathy": _Kind(_karpathy, takes=("split",)),
    "flickr30k": _Kind(_flickr30k, takes=("split",)),
    "nocaps": _Kind(_nocaps),
    "visual_genome": _Kind(_visual_genome("regions")),
    "vg_qa": _Kind(_visual_genome("qas")),
    "vqav2": _Kind(_vqa("vqav2"), max_files=2),
    "okvqa": _Kind(_vqa("okvqa"), max_files=2),
    "gqa": _Kind(_gqa, max_files=10),
    "sbu": _Kind(_sbu, needs=(), takes=("annotations",), max_files=2),
    **{name: _Kind(_img2dataset(name), needs=()) for name in ("cc3m", "cc12m", "laion", "coyo", "img2dataset")},
}
"""By the name that `source=` takes."""
