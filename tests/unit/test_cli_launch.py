"""What Hydra, Lightning and torchrun would pass over at the start is refused with what to do instead."""

import pytest
from omegaconf import OmegaConf

from blip2train.cli import launch
from blip2train.cli.config import compose, run_id
from blip2train.cli.launch import check_launcher, check_sweep, check_torchrun
from blip2train.errors import ConfigError


def test_slurm_without_a_sweep_would_train_on_the_login_node() -> None:
    with pytest.raises(ConfigError, match="without -m"):
        check_launcher(["launcher=slurm", "experiment=microworld_stage1"])
    check_launcher(["launcher=slurm", "--cfg", "job"])
    check_launcher(["experiment=microworld_stage1"])


def test_slurm_needs_its_plugin_and_a_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch.shutil, "which", lambda name: None)
    with pytest.raises(ConfigError, match="no srun on PATH"):
        check_launcher(["-m", "launcher=slurm"])
    monkeypatch.setattr(launch.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"blip2train\[slurm\]"):
        check_launcher(["--multirun", "launcher=slurm"])


def test_a_sweep_of_several_devices_needs_processes_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    config = OmegaConf.create({"trainer": {"devices": 2}})
    with pytest.raises(ConfigError, match="trainer.devices=2"):
        check_sweep(config)
    check_sweep(OmegaConf.create({"trainer": {"devices": 1}}))
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "slurm")
    check_sweep(config)


def test_torchruns_restarts_with_the_store_of_the_processes_before_are_refused() -> None:
    restarts = {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_MAX_RESTARTS": "3"}
    with pytest.raises(ConfigError, match="TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"):
        check_torchrun(restarts)
    check_torchrun(restarts | {"TORCHELASTIC_USE_AGENT_STORE": "False"})
    check_torchrun(restarts | {"TORCHELASTIC_MAX_RESTARTS": "0"})
    check_torchrun({})


def test_processes_of_torchrun_without_a_name_in_common_have_no_run_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each would take the time of its own start."""
    for name in ("BLIP2TRAIN_RUN_ID", "SLURM_JOB_ID"):
        monkeypatch.setenv(name, "")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="--rdzv-id=NAME"):
        run_id()
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "night7")
    assert run_id() == "night7"


def test_a_config_for_slurm_is_the_config_of_the_run() -> None:
    config = compose("train", ["launcher=slurm", "experiment=microworld_stage1", "paths.data=/x"])
    assert "launcher" not in config, "a run's config holds nothing of where it was started"
