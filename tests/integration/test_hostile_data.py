"""Shards with one of each defect, a tenth of the records: training goes on, every record is accounted for by cause,
nothing is written outside the run folder, and past the budget the run stops with a report."""

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from hostile_world import DEFECTS, ODDITIES, HostileWorld, build_hostile_world

from blip2train.batch import Sample
from blip2train.data.collate import Stage1Collator, Stage2Collator
from blip2train.data.drop import DROP_CAUSES, Drop
from blip2train.data.keyed import keyed_generator
from blip2train.data.sample import to_eval_item, to_sample
from blip2train.data.shards import read_shard
from blip2train.data.tokenizer import LanguageModelTokenizer, QFormerTokenizer
from blip2train.run_dir import read_json, read_jsonl

NAME = "microworld"
BATCH = 8


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> HostileWorld:
    return build_hostile_world(tmp_path_factory.mktemp("hostile") / "shards")


def train(world: HostileWorld, home: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    """Train for one epoch from a folder of its own, with a home and a temporary folder of its own."""
    # Lightning imports matplotlib, which keeps a list of the machine's fonts
    folders = {"HOME": "home", "TMPDIR": "tmp", "MPLCONFIGDIR": "fonts", "PWD": "work"}
    for name in folders.values():
        (home / name).mkdir(parents=True, exist_ok=True)
    arguments = ["experiment=microworld_stage1", f"run_dir={home / 'run'}", f"data.datasets.{NAME}.urls={world.urls}"]
    arguments += [f"data.batch_size={BATCH}", f"trainer.max_steps={world.num_records // BATCH}"]
    arguments += ["optim.warmup_steps=1", "checkpoint.every_steps=0", "num_threads=1", "data.num_workers=2"]
    return subprocess.run(
        [sys.executable, "-m", "blip2train.cli.train", *arguments, *overrides],
        cwd=home / "work",
        capture_output=True,
        text=True,
        timeout=240,
        env=os.environ | {name: str(home / folder) for name, folder in folders.items()} | {"OMP_NUM_THREADS": "1"},
    )


def listing(folder: Path) -> dict[str, bytes | None]:
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


def test_the_set_is_one_tenth_bad_and_holds_every_cause(world: HostileWorld) -> None:
    assert world.num_dropped == world.num_records / 10
    assert set(world.planned) == set(DROP_CAUSES)
    assert len(DEFECTS) > 30 and len(ODDITIES) > 25


def test_training_goes_on_and_every_record_is_accounted_for(world: HostileWorld, tmp_path: Path) -> None:
    shards_before = listing(world.folder)
    done = train(world, tmp_path, "data.max_dropped_share=0.3")
    assert done.returncode == 0, done.stderr[-3000:]
    counts = read_json(tmp_path / "run" / "manifest.json")["data"][NAME]
    # every record comes once per epoch
    assert counts == {"used": world.num_records - world.num_dropped, **world.planned}
    rows = read_jsonl(tmp_path / "run" / "dropped.jsonl")
    assert Counter(row["cause"] for row in rows) == world.planned
    assert all(row["dataset"] == NAME and row["url"] in world.urls and row["detail"] for row in rows)
    assert set(world.dropped_keys.items()) <= {(row["key"], row["cause"]) for row in rows}
    assert f"{NAME}: {world.num_dropped} of {world.num_records} records dropped (10.0%)" in done.stdout
    assert "key bad-" in done.stdout and "hostile-00000" in done.stdout
    # nothing beside the run: not where it ran, not where its shards lie, not at the paths that are keys
    assert listing(world.folder) == shards_before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fonts", "home", "run", "tmp", "work"]
    assert all(not listing(tmp_path / name) for name in ("home", "tmp", "work"))
    assert not Path("/tmp/hostile_absolute.jpg").exists()


@pytest.mark.slow
def test_past_the_budget_the_run_stops_with_a_report(world: HostileWorld, tmp_path: Path) -> None:
    done = train(world, tmp_path, "data.max_dropped_share=0.02")
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    assert f"records of {NAME} cannot be used; allowed share is 0.02" in done.stderr
    report = read_json(tmp_path / "run" / "data_report.json")["datasets"][NAME]
    assert report["drawn"] >= 100 and report["dropped_share"] > 0.02
    assert report["counts"]["used"] + report["dropped"] == report["drawn"]
    rows = Counter(row["cause"] for row in read_jsonl(tmp_path / "run" / "dropped.jsonl"))
    assert rows == {cause: number for cause, number in report["counts"].items() if number and cause != "used"}
    # the same run again, from its beginning: it never reached a checkpoint
    again = train(world, tmp_path, "data.max_dropped_share=0.02")
    assert again.returncode != 0
    assert rows == Counter(row["cause"] for row in read_jsonl(tmp_path / "run" / "dropped.jsonl"))
    for cause, number in rows.items():
        assert f"{number} {cause}  e.g. {world.folder}" in done.stderr
        assert report["examples"][cause][0]["key"]


@pytest.mark.slow
def test_a_killed_run_resumes_with_every_drop_counted_and_named_once(world: HostileWorld, tmp_path: Path) -> None:
    settings = ("data.max_dropped_share=0.3", "checkpoint.every_steps=20", "checkpoint.keep_last=3")
    assert train(world, tmp_path, *settings).returncode == 0
    # as if it had been killed after step 50, with the drops of thirty more steps in the log than in its checkpoint
    for later in ("step-0000040", "step-0000050"):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / later)
    done = train(world, tmp_path, *settings, "data.num_workers=0")
    assert done.returncode == 0, done.stderr
    assert "resuming" in done.stdout
    assert read_json(tmp_path / "run" / "manifest.json")["data"][NAME] == {
        "used": world.num_records - world.num_dropped,
        **world.planned,
    }
    rows = read_jsonl(tmp_path / "run" / "dropped.jsonl")
    assert Counter(row["cause"] for row in rows) == world.planned
    assert len({row["sample"] for row in rows}) == len(rows) == world.num_dropped


@pytest.fixture(scope="module")
def samples(world: HostileWorld) -> list[Sample]:
    found = []
    for url in world.urls:
        for record in read_shard(url):
            sample = to_sample(
                record, NAME, lambda image, _: image[:, :1, :1].contiguous(), keyed_generator(record["__key__"])
            )
            if isinstance(sample, Sample):
                found.append(sample)
    return found


def test_odd_records_are_used_under_their_own_names(world: HostileWorld, samples: list[Sample]) -> None:
    keys = {sample.key for sample in samples}
    odd = {key for key in world.used_keys if key.isascii()}
    assert odd <= keys and len(odd) > 30
    assert "caf\\xe9" in keys  # a byte that is no UTF-8 is written out


def language_model_tokenizer(name: str, shared_data: Path, folder: Path) -> LanguageModelTokenizer:
    source = shared_data / "tokenizers"
    if name == "t5":
        return LanguageModelTokenizer.load(source / "t5")
    for part in ("vocab.json", "merges.txt"):
        (folder / part).write_bytes((source / "gpt2_opt" / f"opt_{part}").read_bytes())
    config = {"tokenizer_class": "GPT2Tokenizer", "bos_token": "</s>", "eos_token": "</s>", "unk_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return LanguageModelTokenizer.load(folder, end_token="\n")


@pytest.mark.parametrize("name", ["opt", "t5"])
@pytest.mark.parametrize("clean", [True, False])
def test_no_odd_text_crashes_a_real_tokenizer(
    samples: list[Sample], shared_data: Path, tmp_path: Path, name: str, clean: bool
) -> None:
    collate = Stage2Collator(language_model_tokenizer(name, shared_data, tmp_path), prefix_split=True, clean=clean)
    batch = collate(samples)
    assert batch.target_ids.shape[1] <= 32 and bool(batch.target_mask.any(dim=1).all())
    bert = QFormerTokenizer.load(shared_data / "tokenizers" / "bert")
    first = Stage1Collator(bert, clean=clean)(samples)
    assert first.input_ids.shape[1] <= 32 and bool((first.attention_mask.sum(dim=1) > 2).all())


def test_a_benchmark_reads_what_training_reads_and_needs_no_caption(world: HostileWorld) -> None:
    causes: Counter[str] = Counter()
    for url in world.urls:
        for record in read_shard(url):
            item = to_eval_item(record, "set", lambda image, _: image)
            if isinstance(item, Drop):
                causes[item.cause] += 1
                json.dumps(item.detail).encode()
            else:
                assert item.image.dtype == torch.uint8
    assert causes["no_caption"] == causes["empty_caption"] == 0
    same = ("no_image", "corrupt_image", "image_too_large", "duplicate_key")
    assert {cause: causes[cause] for cause in same} == {cause: world.planned[cause] for cause in same}
