"""A resumed training run sees the same batches and reaches the same weights as an uninterrupted one."""

import json
from itertools import chain, islice
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from shard_factory import plain, write_shards
from torch import Tensor, nn

from blip2train.batch import Sample, Stage1Batch
from blip2train.data.datamodule import BlipDataModule
from blip2train.data.mixture import Dataset
from blip2train.errors import ConfigError, DataError


def collate(samples: list[Sample]) -> Stage1Batch:
    return Stage1Batch(
        pixel_values=torch.stack([sample.image for sample in samples]),
        input_ids=torch.zeros(len(samples), 1, dtype=torch.int64),
        attention_mask=torch.ones(len(samples), 1, dtype=torch.bool),
        image_ids=torch.tensor([sample.image_id for sample in samples]),
        keys=[sample.key for sample in samples],
    )


class Tiny(pl.LightningModule):
    """One linear layer with dropout, and a memory of the batches it saw after the first `num_seen_before`."""

    def __init__(self, num_seen_before: int = 0) -> None:
        super().__init__()
        self.num_seen_before = num_seen_before
        self.net = nn.Sequential(nn.Dropout(0.3), nn.Linear(3 * 12 * 10, 1))
        self.seen: list[list[str]] = []

    def training_step(self, batch: Stage1Batch, _: int) -> Tensor:
        # dropout keyed by the step, as a stand-in for a restored generator
        torch.manual_seed(len(self.seen) + self.num_seen_before)
        self.seen.append(batch.keys)
        return self.net(batch.pixel_values.flatten(1) / 255).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("shards")
    write_shards(path / "x", [9, 8, 7], name="x")
    write_shards(path / "y", [6, 6], name="y", broken={2: b"broken"})
    return path


def make(folder: Path, num_workers: int = 0, **options: Any) -> BlipDataModule:
    datasets = {name: Dataset(name, str(folder / name), plain, weight) for name, weight in (("x", 2.0), ("y", 1.0))}
    settings = {"batch_size": 3, "seed": 1, "num_streams": 4, "shuffle_window": 5, "max_dropped_share": 0.3} | options
    return BlipDataModule(datasets, collate, num_workers=num_workers, **settings)


def keys(data: BlipDataModule, count: int) -> list[list[str]]:
    return [batch.keys for batch in islice(data.train_dataloader(), count)]


def flat(batches: list[list[str]]) -> list[str]:
    return list(chain.from_iterable(batches))


def train(
    folder: Path, out: Path, data: BlipDataModule, max_steps: int, *, accumulate: int = 1, resume: Path | None = None
) -> Tiny:
    torch.manual_seed(0)
    model = Tiny(0 if resume is None else torch.load(resume, weights_only=True)["BlipDataModule"]["batches"])
    trainer = pl.Trainer(
        default_root_dir=out,
        accelerator="cpu",
        max_steps=max_steps,
        accumulate_grad_batches=accumulate,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[ModelCheckpoint(out, filename="{step}", every_n_train_steps=2, save_top_k=-1)],
    )
    trainer.fit(model, datamodule=data, ckpt_path=resume, weights_only=True)
    return model


@pytest.mark.parametrize(("before", "after"), [(0, 0), (2, 2), (0, 2), (2, 0)])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_resume_equals_the_uninterrupted_run(
    folder: Path, tmp_path: Path, before: int, after: int, accumulate: int
) -> None:
    whole = train(folder, tmp_path / "whole", make(folder, before), 6, accumulate=accumulate)
    resume = tmp_path / "whole" / "step=4.ckpt"
    rest = train(folder, tmp_path / "rest", make(folder, after), 6, accumulate=accumulate, resume=resume)
    assert len(whole.seen) == 6 * accumulate and len(rest.seen) == 2 * accumulate
    assert rest.seen == whole.seen[4 * accumulate :]
    for ours, expected in zip(rest.parameters(), whole.parameters(), strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize(("workers", "size"), [(2, 6), (4, 2), (0, 1)])
def test_resume_in_another_shape_goes_on_at_the_next_sample(
    folder: Path, tmp_path: Path, workers: int, size: int
) -> None:
    whole = train(folder, tmp_path / "whole", make(folder), 12)
    resume = tmp_path / "whole" / "step=4.ckpt"
    other = make(folder, workers, batch_size=size)
    rest = train(folder, tmp_path / "rest", other, 10, resume=resume)
    samples, expected = flat(rest.seen), flat(whole.seen)[4 * 3 :]
    assert len(samples) == 6 * size and samples[: len(expected)] == expected[: len(samples)]
    assert other.state_dict()["samples"] == 12 + 6 * size
    again = make(folder, batch_size=3)
    again.load_state_dict(other.state_dict())
    assert again.num_samples_consumed == 12 + 6 * size


def test_the_state_is_the_number_of_samples_and_what_gives_it_meaning(folder: Path, tmp_path: Path) -> None:
    data = make(folder)
    train(folder, tmp_path, data, 4, accumulate=2)
    state = torch.load(tmp_path / "step=4.ckpt", weights_only=True)["BlipDataModule"]
    assert state == data.state_dict()
    assert state["samples"] == 24 == sum(sum(row.values()) for row in state["counters"].values())
    assert {name: state[name] for name in ("seed", "num_streams", "shuffle_window", "temperature", "weights")} == {
        "seed": 1, "num_streams": 4, "shuffle_window": 5, "temperature": 1.0, "weights": {"x": 2.0, "y": 1.0},
    }  # fmt: skip


@pytest.mark.parametrize("num_workers", [0, 2, 4])
def test_counters_are_those_of_the_trained_batches_alone(folder: Path, tmp_path: Path, num_workers: int) -> None:
    """Workers have read ahead, and Lightning holds one batch more than it has trained on."""
    data = make(folder, num_workers)
    seen = flat(train(folder, tmp_path / str(num_workers), data, 21).seen)
    counters = data.counters()
    assert sum(counters["x"].values()) == sum(key.startswith("x") for key in seen)
    assert sum(counters["y"].values()) == sum(key.startswith("y") for key in seen)
    assert counters["y"]["corrupt_image"] > 0 == counters["x"]["corrupt_image"]
    saved = torch.load(tmp_path / str(num_workers) / "step=4.ckpt", weights_only=True)["BlipDataModule"]["counters"]
    assert sum(sum(row.values()) for row in saved.values()) == 12


def test_progress_is_counted_in_samples_epochs_and_causes(folder: Path) -> None:
    data = make(folder)
    keys(data, 40)
    counters, progress = data.counters(), data.progress()
    assert progress["data/x/samples"] == counters["x"]["used"]
    assert progress["data/x/epochs"] == counters["x"]["used"] / 24
    assert progress["data/y/dropped/corrupt_image"] == counters["y"]["corrupt_image"]
    assert progress["data/x/samples"] + progress["data/y/samples"] == 120
    assert not any(name.startswith("data/x/dropped") for name in progress)


def test_counters_go_on_after_a_resume_and_the_log_names_each_drop_once(folder: Path, tmp_path: Path) -> None:
    log = tmp_path / "dropped.jsonl"
    first = make(folder, drop_log=str(log))
    train(folder, tmp_path, first, 60)
    state = torch.load(tmp_path / "step=40.ckpt", weights_only=True)["BlipDataModule"]
    rest = make(folder, 2, drop_log=str(log))
    train(folder, tmp_path / "rest", rest, 60, resume=tmp_path / "step=40.ckpt")
    assert rest.counters() == first.counters()
    named = [json.loads(line)["sample"] for line in log.read_text().splitlines()]
    assert len(named) == len(set(named)) == rest.counters()["y"]["corrupt_image"]
    assert sum(sample < state["samples"] for sample in named) == state["counters"]["y"]["corrupt_image"]


@pytest.mark.parametrize(
    ("name", "value"), [("seed", 2), ("num_streams", 8), ("shuffle_window", 6), ("temperature", 2.0)]
)
def test_a_changed_setting_stops_the_resume(folder: Path, name: str, value: int) -> None:
    state = make(folder).state_dict()
    with pytest.raises(ConfigError, match=f"{name} was"):
        make(folder, **{name: value}).load_state_dict(state)


def test_a_shape_that_cannot_go_on_stops_the_resume(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = make(folder).state_dict() | {"samples": 21}
    with pytest.raises(ConfigError, match="4 streams cannot be shared evenly by 1 ranks x 3 workers"):
        make(folder, 3).load_state_dict(state)
    monkeypatch.setattr("blip2train.distributed.world_size", lambda: 2)
    with pytest.raises(ConfigError, match="21 samples were consumed, which is no multiple of 2 ranks"):
        make(folder).load_state_dict(state)


def test_ranks_that_would_read_differently_are_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = make(folder, batch_size=4)
    settings = {**other.mixture.settings(), "batch size": 4, "workers": 0}
    monkeypatch.setattr("blip2train.distributed.gather_objects", lambda local: [*local, settings])
    make(folder, batch_size=4).train_dataloader()
    with pytest.raises(ConfigError, match="ranks 0 and 1 differ: batch size is 3 and 4"):
        make(folder).train_dataloader()


def test_the_global_batch_is_shared_by_the_ranks(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = make(folder, batch_size=None, global_batch_size=6)
    assert data.shape().batch_size == 6
    monkeypatch.setattr("blip2train.distributed.world_size", lambda: 2)
    assert data.shape().batch_size == 3


def test_without_a_trainer_what_was_handed_out_counts_as_consumed(folder: Path) -> None:
    whole = keys(make(folder), 5)
    first = make(folder, 2)
    assert keys(first, 3) == whole[:3]
    state = first.state_dict()
    assert (state["samples"], state["batches"]) == (9, 3)
    second = make(folder)
    second.load_state_dict(state)
    assert keys(second, 2) == whole[3:]


def test_epochs_of_limited_length_go_on_through_the_data(folder: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Tiny()
    trainer = pl.Trainer(
        default_root_dir=tmp_path, accelerator="cpu", max_epochs=3, limit_train_batches=2, logger=False,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
    )  # fmt: skip
    data = make(folder)
    trainer.fit(model, datamodule=data)
    assert model.seen == keys(make(folder), 6)
    assert sum(sum(row.values()) for row in data.counters().values()) == 18


@pytest.mark.parametrize("num_workers", [0, 2])
def test_too_many_broken_records_stop_the_run_with_all_three_parts(tmp_path: Path, num_workers: int) -> None:
    write_shards(tmp_path / "x", [10, 10], broken=dict.fromkeys(range(5), b"broken"))
    datasets = {"x": Dataset("x", str(tmp_path / "x"), plain)}
    data = BlipDataModule(datasets, collate, 4, num_workers, max_dropped_share=0.2)
    with pytest.raises(DataError, match="records of x cannot be used") as caught:
        keys(data, 200)
    assert "key r00000" in caught.value.where and "max_dropped_share" in caught.value.fix


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_error_in_a_worker_arrives_with_all_three_parts(tmp_path: Path, num_workers: int) -> None:
    write_shards(tmp_path / "x", [4], broken=dict.fromkeys(range(4), b"broken"))
    datasets = {"x": Dataset("x", str(tmp_path / "x"), plain)}
    with pytest.raises(DataError, match="none of 4 records of dataset x can be used") as caught:
        train(tmp_path, tmp_path / "out", BlipDataModule(datasets, collate, 2, num_workers), 2)
    assert ".tar" in caught.value.where and "data check" in caught.value.fix


def test_ranks_take_their_place_when_the_process_group_appears(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = make(folder)
    expected = flat(keys(make(folder), 4))
    monkeypatch.setattr("blip2train.distributed.world_size", lambda: 2)
    monkeypatch.setattr("blip2train.distributed.gather_objects", lambda local: local)
    for rank in range(2):
        monkeypatch.setattr("blip2train.distributed.rank", lambda rank=rank: rank)
        assert flat(keys(make(folder), 2)) == expected[rank::2]
    assert data.shape().world_size == 2


def test_starting_the_loader_leaves_the_global_generator_alone(folder: Path) -> None:
    """Otherwise the dropout of a resumed run differs from the uninterrupted one's."""
    state = torch.get_rng_state()
    next(iter(make(folder, 2).train_dataloader()))
    assert torch.equal(torch.get_rng_state(), state)
