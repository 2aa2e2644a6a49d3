"""The disk check of a run: each way out that its error names makes the need smaller."""

from blip2train.callback.checkpoint import estimated_bytes


def test_weights_and_two_moments_for_each_kept_checkpoint_and_the_one_being_written() -> None:
    assert estimated_bytes(1_000_000, kept=2, trainer_state=True) == 3 * 12_000_000


def test_keeping_fewer_and_leaving_the_trainers_state_out_both_help() -> None:
    assert estimated_bytes(1_000_000, kept=1, trainer_state=True) == 2 * 12_000_000
    assert estimated_bytes(1_000_000, kept=2, trainer_state=False) == 3 * 4_000_000
