"""Quickstart in the folder of an earlier one: another seed makes its own data, the same one uses what is there."""

from pathlib import Path

from blip2train.cli.config import compose
from blip2train.cli.quickstart import _build_data
from blip2train.run_dir import read_json


def test_another_seed_replaces_the_data_of_an_earlier_quickstart(tmp_path: Path) -> None:
    small = [f"out={tmp_path}", "limit=smoke", "sizes.smoke.train_images=6", "sizes.smoke.val_images=3"]
    manifest = tmp_path / "data" / "microworld" / "microworld.json"
    made = []
    for seed in (0, 1, 1):
        _build_data(compose("quickstart", [*small, f"seed={seed}"]), tmp_path)
        made.append((read_json(manifest)["world"]["seed"], manifest.stat().st_mtime_ns))
    assert [seed for seed, _ in made] == [0, 1, 1]
    assert made[1] == made[2], "the same world is not made twice"
