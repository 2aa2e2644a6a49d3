"""A small micro-world and tiny trainings on it, through the same functions as the command line."""

from pathlib import Path

import pytest

from blip2train.cli.config import compose
from blip2train.cli.train import TrainOutcome, train
from blip2train.microworld.pack import build_world
from blip2train.microworld.scene import WorldSpec
from blip2train.run_dir import RunDir

TRAIN_IMAGES, VAL_IMAGES = 64, 12


class Laboratory:
    """One data folder; `train` composes an experiment over it and runs a few steps."""

    def __init__(self, data: Path) -> None:
        self.data = data

    def compose(self, experiment: str, run: Path, *overrides: str):
        small = ["trainer.max_steps=4", "optim.warmup_steps=1", "data.batch_size=8", "data.num_workers=0"]
        small += ["log_every_steps=1", "checkpoint.every_steps=0", "num_threads=1"]
        own = [f"experiment={experiment}", f"paths.data={self.data}", f"run_dir={run}"]
        return compose("train", own + small + list(overrides))

    def train(self, experiment: str, run: Path, *overrides: str) -> TrainOutcome:
        return train(self.compose(experiment, run, *overrides), RunDir(run))


@pytest.fixture(scope="session")
def laboratory(tmp_path_factory: pytest.TempPathFactory) -> Laboratory:
    data = tmp_path_factory.mktemp("data")
    build_world(WorldSpec(seed=5), data / "microworld", TRAIN_IMAGES, VAL_IMAGES, samples_per_shard=32)
    return Laboratory(data)


@pytest.fixture(scope="session")
def stage1_run(laboratory: Laboratory, tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    return laboratory.train("microworld_stage1", tmp_path_factory.mktemp("runs") / "stage1").run


@pytest.fixture(scope="session")
def stage2_run(laboratory: Laboratory, stage1_run: RunDir) -> RunDir:
    folder = stage1_run.path.parent / "stage2"
    return laboratory.train("microworld_stage2_opt", folder, f"init_from={stage1_run.path}").run
