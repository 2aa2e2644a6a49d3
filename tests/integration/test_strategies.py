"""Two gloo processes under every strategy: one loss curve, and runs that go on where, and how, they were cut.

Equal to float32 rounding: the norm by which gradients are clipped is added up shard by shard, AdamW's vector
instructions end where a shard does, and ZeRO-3 adds biases apart. A resumed run is always bit-equal to the whole one of
its strategy.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from blip2train.cli.resume import CONTINUED_FROM
from blip2train.run_dir import RunDir
from tests.strategy_world import train_on_two_ranks

SMALL = [
    *("trainer.accelerator=cpu", "trainer.devices=2", "trainer.precision=32-true", "trainer.max_steps=4"),
    *("optim.warmup_steps=1", "data.batch_size=4", "data.num_workers=0", "num_threads=1", "log_every_steps=1"),
    *("checkpoint.every_steps=2", "checkpoint.keep_last=0"),
]
ROUNDING = {"rel": 5e-6}
"""Of the losses of these few steps, some forty units in the last place."""


class Runs:
    """Trainings by name, all made in one pair of processes."""

    def __init__(self, folder: Path, base: list[str]) -> None:
        self._folder, self._base = folder, base
        self._jobs: dict[str, list[str]] = {}

    def add(self, name: str, *overrides: str, resume: str | None = None) -> None:
        """A training; `resume` names an earlier one whose checkpoint of step 2 it starts from."""
        start = [] if resume is None else [f"resume={self.run(resume).checkpoints / 'step-0000002'}"]
        self._jobs[name] = [*self._base, f"run_dir={self.run(name).path}", *start, *overrides]

    def make(self) -> None:
        train_on_two_ranks(self._folder / "processes", list(self._jobs.values()))
        for name, overrides in self._jobs.items():
            resumed = any(item.startswith("resume=") for item in overrides)
            note = self.run(name).read_manifest().get(CONTINUED_FROM, {})
            assert note.get("checkpoint") == ("step-0000002" if resumed else None)

    def run(self, name: str) -> RunDir:
        return RunDir(self._folder / name)

    def losses(self, name: str) -> list[float]:
        """Of all steps; a continued run has taken over those before it."""
        return [row["train/loss"] for row in self.run(name).read_metrics()]

    def weights(self, name: str, step: int = 4) -> dict[str, torch.Tensor]:
        return load_file(self.run(name).checkpoints / f"step-{step:07}" / "model.safetensors")

    def optimizer(self, name: str, step: int = 4) -> dict:
        file = self.run(name).checkpoints / f"step-{step:07}" / "trainer.ckpt"
        return torch.load(file, weights_only=True)["optimizer_states"][0]

    def check_equal(self, name: str, other: str) -> None:
        """Same losses, weights and optimizer state, bit for bit."""
        assert self.losses(name) == self.losses(other)
        ours, theirs = self.weights(name), self.weights(other)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
        ours, theirs = self.optimizer(name)["state"], self.optimizer(other)["state"]
        assert ours.keys() == theirs.keys() and len(theirs) > 10
        assert all(torch.equal(ours[place][key], theirs[place][key]) for place in theirs for key in theirs[place])

    def check_close(self, name: str, other: str) -> None:
        """Same losses to rounding; same optimizer state, in the same places, to the rounding of gradients near 1."""
        assert self.losses(name) == pytest.approx(self.losses(other), **ROUNDING)
        ours, theirs = self.optimizer(name), self.optimizer(other)
        assert ours["param_groups"] == theirs["param_groups"]
        assert ours["state"].keys() == theirs["state"].keys()
        for place, entries in theirs["state"].items():
            for key, tensor in entries.items():
                torch.testing.assert_close(ours["state"][place][key], tensor, rtol=1e-3, atol=1e-6)


SHARDED = ["fsdp2", "deepspeed_zero1", "deepspeed_zero2", "deepspeed_zero3", "deepspeed_zero2_offload"]
ABLATIONS = {
    "no_itg": ["~objective@stage.objectives.itg"],
    "itc_alone": ["~objective@stage.objectives.itm", "~objective@stage.objectives.itg"],
    "itm_alone": ["~objective@stage.objectives.itc", "~objective@stage.objectives.itg"],
    "itg_alone": ["~objective@stage.objectives.itc", "stage.objectives.itm.weight=0"],
    "last_block": ["model.vision_encoder.trainable_blocks=1"],
}


@pytest.fixture(scope="module")
def few(laboratory, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    runs = Runs(tmp_path_factory.mktemp("few"), [*stage(1, laboratory), *SMALL])
    runs.add("ddp", "trainer=ddp")
    runs.add("fsdp2", "trainer=fsdp2")
    runs.add("zero2", "trainer=deepspeed_zero2")
    runs.add("zero2_again", "trainer=deepspeed_zero2", resume="zero2")
    runs.make()
    return runs


def stage(number: int, laboratory) -> list[str]:
    name = "microworld_stage1" if number == 1 else "microworld_stage2_opt"
    return [f"experiment={name}", f"paths.data={laboratory.data}", *([] if number == 1 else ["init_from=scratch"])]


def test_fsdp2_computes_what_ddp_does(few: Runs) -> None:
    few.check_close("fsdp2", "ddp")


def test_zero2_computes_what_ddp_does(few: Runs) -> None:
    few.check_close("zero2", "ddp")


def test_a_resumed_zero2_run_is_the_whole_one_bit_for_bit(few: Runs) -> None:
    few.check_equal("zero2_again", "zero2")


@pytest.mark.slow
@pytest.mark.parametrize("number", [1, 2])
def test_every_strategy_trains_resumes_and_hands_over(laboratory, tmp_path: Path, number: int) -> None:
    runs = Runs(tmp_path, [*stage(number, laboratory), *SMALL])
    for name in ["ddp", *SHARDED]:
        runs.add(name, f"trainer={name}")
        runs.add(f"{name}_again", f"trainer={name}", resume=name)
    for name in SHARDED:
        runs.add(f"ddp_then_{name}", f"trainer={name}", resume="ddp")
        runs.add(f"{name}_then_ddp", "trainer=ddp", resume=name)
    runs.make()
    runs.check_equal("ddp_again", "ddp")
    for name in SHARDED:
        runs.check_close(name, "ddp")
        runs.check_equal(f"{name}_again", name)
        runs.check_close(f"ddp_then_{name}", "ddp")
        runs.check_close(f"{name}_then_ddp", "ddp")


@pytest.mark.slow
def test_fsdp2_has_the_gradients_of_ddp_where_none_is_clipped(laboratory, tmp_path: Path) -> None:
    """To the last bit or two, by weights and moments after two steps."""
    runs = Runs(tmp_path, [*stage(1, laboratory), *SMALL, "trainer.gradient_clip_val=null"])
    runs.add("ddp", "trainer=ddp")
    runs.add("fsdp2", "trainer=fsdp2")
    runs.make()
    assert runs.losses("fsdp2")[:3] == runs.losses("ddp")[:3]
    ours, theirs = runs.optimizer("fsdp2", step=2)["state"], runs.optimizer("ddp", step=2)["state"]
    for place, entries in theirs.items():
        torch.testing.assert_close(ours[place], entries, rtol=3e-7, atol=0)
    torch.testing.assert_close(runs.weights("fsdp2", step=2), runs.weights("ddp", step=2), rtol=3e-7, atol=0)


@pytest.mark.slow
def test_no_ablation_leaves_a_parameter_without_gradient(laboratory, tmp_path: Path) -> None:
    """DDP stops at one; ZeRO would let weight decay shrink it."""
    runs = Runs(tmp_path, [*stage(1, laboratory), *SMALL, "trainer.max_steps=2"])
    for name, overrides in ABLATIONS.items():
        runs.add(name, "trainer=ddp", *overrides)
        runs.add(f"{name}_zero2", "trainer=deepspeed_zero2", *overrides)
    runs.make()
    for name in ABLATIONS:
        assert runs.losses(f"{name}_zero2") == pytest.approx(runs.losses(name), **ROUNDING)


@pytest.mark.slow
def test_half_precision_under_autocast_is_the_same_everywhere(laboratory, tmp_path: Path) -> None:
    """To three digits: bfloat16 has no more. ZeRO-3 rounds a linear layer's product before it adds the bias."""
    runs = Runs(tmp_path, [*stage(2, laboratory), *SMALL, "trainer.precision=bf16-mixed"])
    for name in ["ddp", "fsdp2", "deepspeed_zero2", "deepspeed_zero3"]:
        runs.add(name, f"trainer={name}")
    runs.make()
    for name in ["fsdp2", "deepspeed_zero2"]:
        assert runs.losses(name) == pytest.approx(runs.losses("ddp"), rel=2e-3)
    assert runs.losses("deepspeed_zero3")[0] == pytest.approx(runs.losses("ddp")[0], rel=5e-3)
    for name in ["fsdp2", "deepspeed_zero2", "deepspeed_zero3"]:
        assert all(tensor.dtype == torch.float32 for tensor in runs.weights(name).values())


@pytest.mark.slow
def test_zero3_in_micro_batches_computes_what_ddp_does(laboratory, tmp_path: Path) -> None:
    """In seconds per step: DeepSpeed's look-ahead for weights to keep takes the square of a step's modules."""
    runs = Runs(tmp_path, [*stage(1, laboratory), *SMALL, "trainer.max_steps=2", "stage.micro_batch_size=2"])
    runs.add("ddp", "trainer=ddp")
    runs.add("zero3", "trainer=deepspeed_zero3")
    runs.add("zero3_sharding_all", "trainer=deepspeed_zero3", "trainer.strategy.persistent_elements=0")
    runs.make()
    assert runs.losses("zero3") == pytest.approx(runs.losses("ddp"), **ROUNDING)
    assert runs.losses("zero3_sharding_all") == pytest.approx(runs.losses("ddp"), **ROUNDING)
    ddp, zero3 = ([row["step_seconds"] for row in runs.run(name).read_metrics()] for name in ("ddp", "zero3"))
    assert zero3[-1] < 20 * ddp[-1]
