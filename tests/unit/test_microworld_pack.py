"""Shards of the world: read back through the ordinary data path, repeatable, held-out pairs kept out."""

import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from blip2train.data.shards import expand_urls, read_shard
from blip2train.errors import DataError
from blip2train.microworld.judge import judge_caption
from blip2train.microworld.pack import MANIFEST, build_world, to_record
from blip2train.microworld.render import render
from blip2train.microworld.scene import Scene, WorldSpec, held_out_pairs, sample_scene

SPEC = WorldSpec()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("world")
    build_world(SPEC, out, train_images=120, val_images=30, samples_per_shard=50)
    return out


def _records(world: Path, split: str) -> list[tuple[bytes, dict[str, object]]]:
    urls = expand_urls(str(world / f"{split}-*.tar"))
    return [(record["jpg"], json.loads(record["json"])) for url in urls for record in read_shard(url)]


def test_splits_have_the_asked_sizes_and_disjoint_ids(world: Path) -> None:
    ids = {
        split: {fields["image_id"] for _, fields in _records(world, split)} for split in ("train", "val_in", "val_out")
    }
    assert [len(found) for found in ids.values()] == [120, 30, 30]
    assert len(set.union(*ids.values())) == 180
    assert sorted(path.name for path in world.glob("*.tar")) == [
        "train-000000.tar", "train-000001.tar", "train-000002.tar", "val_in-000000.tar", "val_out-000000.tar",
    ]  # fmt: skip


def test_no_training_caption_names_a_held_out_pair_and_every_out_image_shows_one(world: Path) -> None:
    held_out = held_out_pairs(SPEC)
    for split in ("train", "val_in"):
        text = " ".join(caption for _, fields in _records(world, split) for caption in fields["captions"])  # type: ignore[attr-defined]
        assert not any(f"{color} {shape}" in text for shape, color in held_out)
    for _, fields in _records(world, "val_out"):
        scene = Scene.from_json(fields["scene"])  # type: ignore[arg-type]
        assert any((item.shape, item.color) in held_out for item in scene.objects)


def test_captions_are_true_and_there_is_one_per_template(world: Path) -> None:
    for split in ("train", "val_in", "val_out"):
        for _, fields in _records(world, split):
            assert len(fields["captions"]) == SPEC.captions  # type: ignore[arg-type]
            assert all(judge_caption(caption, fields)["true"] == 1.0 for caption in fields["captions"])  # type: ignore[attr-defined]


def test_stored_images_are_the_rendered_scenes(world: Path) -> None:
    for data, fields in _records(world, "val_in")[:10]:
        stored = np.asarray(Image.open(io.BytesIO(data)), dtype=int)
        drawn = render(Scene.from_json(fields["scene"]), SPEC).astype(int)  # type: ignore[arg-type]
        assert stored.shape == drawn.shape
        assert np.abs(stored - drawn).mean() < 4.0


def test_building_again_reuses_the_folder_and_another_world_is_refused(world: Path) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in world.iterdir()}
    manifest = build_world(SPEC, world, train_images=120, val_images=30, samples_per_shard=50)
    assert {path.name: path.stat().st_mtime_ns for path in world.iterdir()} == before
    assert manifest["images"] == {"train": 120, "val_in": 30, "val_out": 30}
    with pytest.raises(DataError, match="another micro-world"):
        build_world(replace(SPEC, noise=5), world, train_images=120, val_images=30, samples_per_shard=50)


def test_two_builds_give_equal_bytes(world: Path, tmp_path: Path) -> None:
    build_world(SPEC, tmp_path, train_images=120, val_images=30, samples_per_shard=50)
    for path in sorted(world.iterdir()):
        assert path.read_bytes() == (tmp_path / path.name).read_bytes(), path.name


def test_an_interrupted_build_is_finished_by_the_next_call(world: Path, tmp_path: Path) -> None:
    def stop(done: int, _total: int | None) -> None:
        if done == 70:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_world(SPEC, tmp_path, train_images=120, val_images=30, samples_per_shard=50, progress=stop)
    build_world(SPEC, tmp_path, train_images=120, val_images=30, samples_per_shard=50)
    assert (tmp_path / MANIFEST).read_bytes() == (world / MANIFEST).read_bytes()


def test_a_world_without_held_out_pairs_has_no_out_split(tmp_path: Path) -> None:
    manifest = build_world(replace(SPEC, held_out=0), tmp_path, train_images=3, val_images=2)
    assert manifest["images"]["val_out"] == 0 and not list(tmp_path.glob("val_out*"))


def test_a_record_follows_from_its_scene_alone() -> None:
    scene = sample_scene(SPEC, "in", 11)
    first, second = (to_record(scene, SPEC, image_id=11, domain="in") for _ in range(2))
    assert first == second
    assert {question["kind"] for question in first["questions"]} >= {"color", "shape", "where", "bg", "count", "exist"}
