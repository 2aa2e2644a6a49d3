"""Each third-party library has its doors; everything else of the package works, and is tested, without it."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "blip2train"
DOORS = {
    "hydra": ("cli/",),
    "omegaconf": ("cli/",),
    "torch.distributed": (
        *("distributed.py", "peers.py", "model/sharding.py"),
        *("cli/doctor/launch.py", "cli/doctor/ring.py", "checkpoint/sharded_dcp.py"),
    ),
    "webdataset": ("data/shards.py", "data/shard_table.py", "data/shard_writer.py"),
    "fsspec": ("data/transfer.py",),
    "aiohttp": ("data/transfer.py",),
    "pyarrow": ("data/source/table.py",),
    "timm": ("model/vision_encoder/", "microworld/"),
    "transformers": (
        *("model/language_model/", "model/qformer/bert_checkpoint.py", "data/tokenizer.py"),
        *("checkpoint/huggingface", "microworld/", "cli/quickstart.py"),
        *("capfilt/captioner_transformers.py", "capfilt/ranker_transformers.py"),
    ),
    "pytorch_lightning": (
        *("stage/", "data/datamodule.py", "callback/", "strategy/"),
        *("cli/train.py", "cli/guard.py", "cli/run_log.py", "cli/quickstart.py", "cli/doctor/launch.py"),
    ),
    "huggingface_hub": ("cli/doctor/hub.py", "checkpoint/huggingface_config.py"),
    "pycocoevalcap": ("metric/caption.py",),
    "matplotlib": ("report/curve.py", "cli/show.py"),
    "jinja2": ("report/page.py",),
    "peft": ("model/language_model/",),
    "open_clip": ("capfilt/ranker_open_clip.py",),
    "wandb": ("callback/wandb_logger.py",),
    "deepspeed": ("strategy/", "checkpoint/sharded_deepspeed.py"),
    "lightning": (),
}
LONGEST_FUNCTION = 60


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module


@pytest.mark.parametrize("library", DOORS)
def test_library_is_imported_only_at_its_doors(library: str) -> None:
    elsewhere = [
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*.py")
        if not path.relative_to(PACKAGE).as_posix().startswith(DOORS[library] or ("-",))
        and any(name == library or name.startswith(f"{library}.") for name in imports(path))
    ]
    assert not elsewhere


def test_no_function_is_longer_than_sixty_lines() -> None:
    long = [
        f"{path.relative_to(PACKAGE)}:{node.lineno} {node.name} {node.end_lineno - node.lineno + 1}"
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef) and node.end_lineno and node.end_lineno - node.lineno >= LONGEST_FUNCTION
    ]
    assert not long


def test_package_folders_have_empty_inits() -> None:
    full = [path for path in PACKAGE.rglob("__init__.py") if path.parent != PACKAGE and path.read_text().strip()]
    assert not full
