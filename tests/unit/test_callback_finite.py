"""A step that is not finite never reaches the weights, on any rank; it is reported, and there may be only so many."""

import math
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins import MixedPrecision
from tiny_training import TinyModule, fit
from torch import Tensor
from two_ranks import on_two_ranks

from blip2train import distributed
from blip2train.batch_file import load_batch
from blip2train.callback.bad_step import KEPT, BadStepRecorder
from blip2train.callback.finite import FiniteCallback, NonFiniteError
from blip2train.callback.warning_log import WarningLog
from blip2train.run_dir import RunDir, read_json


class Weights(pl.Callback):
    """Keeps all weights after every step."""

    def __init__(self) -> None:
        self.after: dict[int, Tensor] = {}

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        self.after[trainer.global_step] = torch.cat([p.detach().flatten().clone() for p in pl_module.parameters()])


def guard(run: Path, budget: int = 10, **changes: Any) -> FiniteCallback:
    return FiniteCallback(BadStepRecorder(RunDir(run)), WarningLog(RunDir(run)), budget, **changes)


def nan_at(*indices: int, rank: int = 0, value: float = math.nan) -> Any:
    """Spoils one hidden value of the batches of these indices, on one rank."""

    def spoil(hidden: Tensor, index: int) -> Tensor:
        if index not in indices or distributed.rank() != rank:
            return hidden
        return hidden.index_fill(0, torch.tensor([2]), value)

    return spoil


def report_of(run: Path, step: int) -> dict[str, Any]:
    return read_json(run / "bad_steps" / f"step-{step:07d}" / "report.json")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_the_weights_skip_the_step_and_go_on(tmp_path: Path, value: float) -> None:
    weights, finite = Weights(), guard(tmp_path)
    # a NaN in the loss alone; tanh would make infinity finite, so that one is given to the loss itself
    loss = lambda loss, index: loss * value if index == 2 else loss  # noqa: E731
    trainer = fit(TinyModule(clip_loss=loss), [finite, weights], max_steps=6)
    assert trainer.global_step == 6
    assert torch.equal(weights.after[3], weights.after[2])
    assert all(not torch.equal(weights.after[step], weights.after[step - 1]) for step in (2, 4, 5, 6))
    assert all(torch.isfinite(state).all() for state in weights.after.values())
    assert finite.progress()["skipped_steps"] == 1


def test_moments_of_the_optimizer_stay_clean_too(tmp_path: Path) -> None:
    trainer = fit(TinyModule(spoil=nan_at(2)), [guard(tmp_path)], max_steps=6)
    states = trainer.optimizers[0].state.values()
    assert all(torch.isfinite(value).all() for state in states for value in state.values())
    assert {int(state["step"]) for state in states} == {5}  # and do not count the step


def test_the_report_names_module_keys_and_randomness_and_the_batch_can_be_read(tmp_path: Path) -> None:
    fit(TinyModule(spoil=nan_at(2)), [guard(tmp_path)], max_steps=4)
    report = report_of(tmp_path, 3)
    (facts,) = report["ranks"]
    assert "hidden (Linear) gave NaN on rank 0, from an input that was so already" in report["found"]
    assert facts["keys"] == ["2-0", "2-1", "2-2", "2-3"] and facts["batch_index"] == 2
    assert facts["losses"] == {"train/loss": "nan"} and not facts["loss_finite"]
    assert set(facts["gradient"]["norms"]) == {"hidden", "head"} and facts["gradient"]["num_not_finite"] == 4
    assert report["gradient_norm"] == "nan" and report["precision"] == "32-true" and report["seed"] == 0
    batch, about = load_batch(tmp_path / "bad_steps" / "step-0000003" / "batch-rank0.pt")
    assert batch.keys == facts["keys"] and about == {"step": 3, "batch_index": 2, "rank": 0}
    (row,) = RunDir(tmp_path).read_warnings()
    assert row["step"] == 3 and row["cause"] == "step_left_out" and "in 1 of 4 rows, keys 2-2;" in row["seen"]


def test_running_the_batch_again_leaves_the_training_as_it_was(tmp_path: Path) -> None:
    weights, undisturbed = Weights(), Weights()
    spoiled = [nan_at(2), lambda hidden, index: hidden]
    fit(TinyModule(spoil=spoiled[0]), [guard(tmp_path), weights], max_steps=6)

    class Skip(pl.Callback):
        """Does by hand what the guard does."""

        def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
            if trainer.global_step == 2:
                optimizer.zero_grad()

    fit(TinyModule(spoil=spoiled[1]), [Skip(), undisturbed], max_steps=6)
    assert torch.equal(weights.after[6], undisturbed.after[6])


def test_a_gradient_that_overflows_where_the_loss_does_not_names_its_parameter(tmp_path: Path) -> None:
    class Sqrt(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            return gradient * torch.inf

    loss = lambda loss, index: Sqrt.apply(loss) if index == 1 else loss  # noqa: E731
    weights = Weights()
    fit(TinyModule(clip_loss=loss), [guard(tmp_path), weights], max_steps=3)
    assert torch.equal(weights.after[2], weights.after[1])
    report = report_of(tmp_path, 2)
    assert report["found"] == "the forward pass is finite, the gradient of hidden.weight (4 in all) is not"
    assert report["ranks"][0]["loss_finite"] and math.isfinite(report["ranks"][0]["losses"]["train/loss"])


def test_too_many_skipped_steps_end_the_run_with_the_last_report_kept(tmp_path: Path) -> None:
    weights = Weights()
    with pytest.raises(NonFiniteError, match="health.max_skipped_steps=6") as caught:
        fit(TinyModule(spoil=nan_at(*range(3, 100))), [guard(tmp_path, budget=6), weights], max_steps=50)
    assert "step 10" in caught.value.where and "bad_steps/step-0000010/report.json" in caught.value.where
    assert max(weights.after) == 9 and torch.equal(weights.after[9], weights.after[3])
    kept = sorted(path.name for path in (tmp_path / "bad_steps").iterdir())
    assert kept == [f"step-{step:07d}" for step in (4, 5, 6, 7, 10)] and len(kept) == KEPT


def test_a_budget_of_none_stops_at_the_first_one(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError):
        fit(TinyModule(spoil=nan_at(2)), [guard(tmp_path, budget=0)], max_steps=5)


def test_a_weight_that_is_not_finite_ends_the_run_at_once(tmp_path: Path) -> None:
    def poison(module: TinyModule, index: int) -> None:
        if index == 2:
            with torch.no_grad():
                module.model.frozen.bias[0] = torch.nan

    with pytest.raises(NonFiniteError, match=r"weights are not finite \(frozen.bias\)"):
        fit(TinyModule(disturb=poison), [guard(tmp_path)], max_steps=5)
    assert "frozen (Linear) gave NaN on rank 0, its bias is not finite" in report_of(tmp_path, 3)["found"]


def test_a_report_that_cannot_be_written_does_not_end_the_run(tmp_path: Path) -> None:
    (tmp_path / "bad_steps").write_text("in the way")
    (tmp_path / "warnings.jsonl").mkdir()
    weights = Weights()
    fit(TinyModule(spoil=nan_at(2)), [guard(tmp_path), weights], max_steps=4)
    assert torch.equal(weights.after[3], weights.after[2]) and not torch.equal(weights.after[4], weights.after[3])


def test_old_skips_leave_the_budget_and_it_survives_a_resume(tmp_path: Path) -> None:
    finite = guard(tmp_path, budget=3)
    finite.load_state_dict({"skipped": [1, 2, 3, 995], "num_skipped": 40, "scaler_skips": 0})
    with pytest.raises(NonFiniteError, match="4 of the last 1000 steps"):  # 995, and three of this run
        fit(TinyModule(spoil=nan_at(0, 1, 2)), [finite, _StartAt(1100)], max_steps=1110)
    assert finite.state_dict()["skipped"] == [995, 1101, 1102, 1103] and finite.progress()["skipped_steps"] == 43


class _StartAt(pl.Callback):
    """Makes a training believe that it has made so many steps."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        trainer.fit_loop.epoch_loop.automatic_optimization.optim_progress.optimizer.step.total.completed = self.step


def test_the_micro_batch_at_fault_is_found_among_those_of_a_step(tmp_path: Path) -> None:
    weights = Weights()
    fit(TinyModule(spoil=nan_at(4)), [guard(tmp_path), weights], max_steps=3, accumulate_grad_batches=3)
    assert torch.equal(weights.after[2], weights.after[1])
    (facts,) = report_of(tmp_path, 2)["ranks"]
    assert facts["batch_index"] == 4 and facts["keys"][0] == "4-0"
    assert load_batch(tmp_path / "bad_steps" / "step-0000002" / "batch-rank0.pt")[0].keys == facts["keys"]


def test_every_step_that_is_taken_is_told_with_its_mean_loss(tmp_path: Path) -> None:
    seen: list[tuple[int, float, float]] = []
    note = lambda trainer, step: seen.append((step.number, step.loss, step.norm))  # noqa: E731
    module = TinyModule(clip_loss=lambda loss, index: loss * 0 + index, spoil=nan_at(4, 5))
    fit(module, [guard(tmp_path, on_step=note)], max_steps=4, accumulate_grad_batches=2)
    assert [(number, loss) for number, loss, _ in seen] == [(1, 0.5), (2, 2.5), (4, 6.5)]


def test_the_share_of_clipped_steps_is_counted(tmp_path: Path) -> None:
    finite = guard(tmp_path)
    loss = lambda loss, index: loss * (1e6 if index < 2 else 1e-6)  # noqa: E731
    fit(TinyModule(clip_loss=loss), [finite], max_steps=8, gradient_clip_val=1.0)
    assert finite.progress() == {"skipped_steps": 0.0, "gradient_clipped": 0.25}
    assert finite.progress() == {"skipped_steps": 0.0}  # counted anew


def scaled(growth: float = 2.0**15) -> MixedPrecision:
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=growth, growth_interval=100))


def test_overflows_of_the_loss_scaling_are_not_counted_but_a_nan_is(tmp_path: Path) -> None:
    class Overflow(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            return torch.where(gradient > 100, torch.inf, gradient)  # as float16 has a largest number

    weights, finite = Weights(), guard(tmp_path)
    module = TinyModule(clip_loss=lambda loss, index: Overflow.apply(loss) * (torch.nan if index == 25 else 1.0))
    trainer = fit(module, [finite, weights], max_steps=30, plugins=[scaled()])
    assert trainer.precision_plugin.scaler.get_scale() <= 128
    assert torch.equal(weights.after[5], weights.after[1])  # the scale still too large
    assert not torch.equal(weights.after[20], weights.after[10])
    assert torch.equal(weights.after[26], weights.after[25])
    assert finite.progress()["skipped_steps"] == 1
    assert [row["step"] for row in RunDir(tmp_path).read_warnings()] == [26]
    assert all(torch.isfinite(state).all() for state in weights.after.values())


def test_a_scale_that_never_fits_is_said_and_then_counted(tmp_path: Path) -> None:
    class Infinite(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            return gradient * torch.inf

    with pytest.raises(NonFiniteError, match="max_skipped_steps=2"):
        module = TinyModule(clip_loss=lambda loss, index: Infinite.apply(loss))
        fit(module, [guard(tmp_path, budget=2)], max_steps=60, plugins=[scaled()])
    causes = [(row["step"], row["cause"]) for row in RunDir(tmp_path).read_warnings()]
    assert causes == [(10, "loss_scaling"), (16, "step_left_out"), (17, "step_left_out"), (18, "stopped")]


CASES = ("batch", "loss", "weight")


def two_rank_runs(rank: int, folder: str) -> list[dict[str, Any]]:
    return [two_rank_run(rank, Path(folder) / case, case) for case in CASES]


def two_rank_run(rank: int, run: Path, case: str) -> dict[str, Any]:
    def poison(module: TinyModule, index: int) -> None:
        if case == "weight" and index == 2 and rank == 1:
            with torch.no_grad():
                module.model.hidden.weight[0, 0] = torch.nan

    weights, finite, error = Weights(), guard(run), ""
    spoil = nan_at(2, rank=1) if case == "batch" else nan_at()
    # of "loss" no gradient tells: one rank adds a constant that is not finite
    loss = lambda loss, index: loss + (torch.nan if case == "loss" and index == 2 and rank == 1 else 0.0)  # noqa: E731
    try:
        fit(TinyModule(poison, spoil, clip_loss=loss), [finite, weights], max_steps=5, strategy="ddp", num_nodes=2)
    except NonFiniteError as stopped:
        error = f"{stopped.found} {stopped.where}"
    return {"after": weights.after, "skipped": finite.progress()["skipped_steps"], "error": error}


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[dict[str, Any]]]]:
    """Folder of the runs, and what each rank says of each case."""
    folder = tmp_path_factory.mktemp("two_ranks")
    (folder / "ranks").mkdir()
    said = on_two_ranks(two_rank_runs, folder / "ranks", str(folder))
    return folder, {case: [of_rank[place] for of_rank in said] for place, case in enumerate(CASES)}


@pytest.mark.parametrize("case", ["batch", "loss"])
def test_what_goes_wrong_on_one_rank_is_left_out_on_both(two_ranks: Any, case: str) -> None:
    folder, (zero, one) = two_ranks[0] / case, two_ranks[1][case]
    assert not zero["error"] and zero["skipped"] == one["skipped"] == 1
    assert max(zero["after"]) == max(one["after"]) == 5
    assert all(torch.equal(zero["after"][step], one["after"][step]) for step in range(1, 6))
    assert torch.equal(zero["after"][3], zero["after"][2]) and not torch.equal(zero["after"][4], zero["after"][3])
    assert torch.isfinite(zero["after"][5]).all()
    report = report_of(folder, 3)
    assert [facts["loss_finite"] for facts in report["ranks"]] == [True, False]
    assert [path.name for path in (folder / "bad_steps" / "step-0000003").glob("*.pt")] == ["batch-rank1.pt"]
    assert report["ranks"][1]["keys"] == ["2-0", "2-1", "2-2", "2-3"]


def test_a_broken_weight_of_one_rank_ends_all_ranks(two_ranks: Any) -> None:
    folder, (zero, one) = two_ranks[0] / "weight", two_ranks[1]["weight"]
    assert "weights are not finite (hidden.weight)" in zero["error"] and zero["error"] == one["error"]
    assert max(zero["after"]) == max(one["after"]) == 2
    assert "hidden (Linear) gave NaN on rank 1, its weight is not finite" in report_of(folder, 3)["found"]
