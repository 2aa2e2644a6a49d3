"""A resumed training run sees the same batches and reaches the same weights as an uninterrupted one."""

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
    settings = {"batch_size": 3, "seed": 1, "num_streams": 2, "shuffle_buffer": 5, "max_dropped_share": 0.3} | options
    return BlipDataModule(datasets, collate, num_workers=num_workers, **settings)


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


def test_the_state_is_one_counter_and_what_gives_it_meaning(folder: Path, tmp_path: Path) -> None:
    data = make(folder)
    train(folder, tmp_path, data, 4, accumulate=2)
    state = data.state_dict()
    assert state["batches"] == 8
    assert {name: state[name] for name in ("world_size", "batch_size", "num_streams", "seed")} == {
        "world_size": 1, "batch_size": 3, "num_streams": 2, "seed": 1,
    }  # fmt: skip


@pytest.mark.parametrize(("name", "value"), [("batch_size", 4), ("seed", 2), ("num_streams", 1), ("shuffle_buffer", 6)])
def test_a_changed_setting_stops_the_resume(folder: Path, name: str, value: int) -> None:
    state = make(folder).state_dict()
    said = "datasets" if name == "shuffle_buffer" else name
    with pytest.raises(ConfigError, match=f"{said} was"):
        make(folder, **{name: value}).load_state_dict(state)


def test_another_world_size_stops_the_resume(folder: Path) -> None:
    state = make(folder).state_dict() | {"world_size": 8}
    with pytest.raises(ConfigError, match="world_size was 8 in the checkpoint, is 1 now"):
        make(folder).load_state_dict(state)


def test_the_number_of_workers_may_change_on_resume(folder: Path) -> None:
    make(folder, 2).load_state_dict(make(folder, 0).state_dict())


def test_without_a_trainer_the_loader_starts_where_the_state_says(folder: Path) -> None:
    first = make(folder)
    iterator = iter(first.train_dataloader())
    expected = [next(iterator).keys for _ in range(5)][3:]
    second = make(folder)
    second.load_state_dict(first.state_dict() | {"batches": 3})
    iterator = iter(second.train_dataloader())
    assert [next(iterator).keys for _ in range(2)] == expected


def test_epochs_of_limited_length_go_on_through_the_data(folder: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Tiny()
    trainer = pl.Trainer(
        default_root_dir=tmp_path, accelerator="cpu", max_epochs=3, limit_train_batches=2, logger=False,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
    )  # fmt: skip
    trainer.fit(model, datamodule=make(folder))
    iterator = iter(make(folder).train_dataloader())
    assert model.seen == [next(iterator).keys for _ in range(6)]


def test_counters_are_readable_after_training_with_workers(folder: Path, tmp_path: Path) -> None:
    data = make(folder, 2)
    train(folder, tmp_path, data, 6)
    counters = data.counters()
    assert set(counters) == {"x", "y"}
    assert counters["x"]["used"] + counters["y"]["used"] >= 17
    assert counters["y"]["corrupt_image"] >= 1


def test_a_bad_shard_stops_training_with_a_data_error(tmp_path: Path) -> None:
    paths = write_shards(tmp_path / "x", [9, 9], index=False)
    paths[0].write_bytes(b"")
    paths[1].write_bytes(b"")
    datasets = {"x": Dataset("x", str(tmp_path / "x"), plain)}
    for num_workers in (0, 2):
        with pytest.raises(DataError) as caught:
            train(tmp_path, tmp_path / "out", BlipDataModule(datasets, collate, 2, num_workers), 2)
        assert ".tar" in caught.value.where


def test_ranks_take_their_place_when_the_process_group_appears(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = make(folder)
    assert data.mixture().world_size == 1
    seen = []
    for rank in range(2):
        monkeypatch.setattr("blip2train.distributed.rank", lambda rank=rank: rank)
        monkeypatch.setattr("blip2train.distributed.world_size", lambda: 2)
        iterator = iter(data.train_dataloader())
        seen.append({key for _ in range(3) for key in next(iterator).keys if key.startswith("x")})
    assert seen[0] and seen[1] and not seen[0] & seen[1]


def test_starting_the_loader_leaves_the_global_generator_alone(folder: Path) -> None:
    """Otherwise the dropout of a resumed run differs from the uninterrupted one's."""
    state = torch.get_rng_state()
    next(iter(make(folder, 2).train_dataloader()))
    assert torch.equal(torch.get_rng_state(), state)
