"""Each rule speaks when its figures are wrong, and is silent when one entry of five is right or the run is young."""

import math
from collections.abc import Callable
from typing import Any

import pytest

from blip2train.health.rule import PATIENCE, Setting, find, learning_rate_stands, matching_chance
from blip2train.objective.chance import chance_level

SETTING = Setting(settle_steps=100, max_data_wait=0.3, min_temperature=1e-3)
HEALTHY = {
    "train/loss": 4.0,
    "train/itc_loss": 2.0,
    "train/itm_loss": 0.4,
    "train/itm_accuracy": 0.8,
    "train/itg_loss": 2.0,
    "train/itc_temperature": 0.05,
    "train/itc_query_similarity": 0.5,
    "gradient_norm": 1.0,
    "data_wait_fraction": 0.01,
    "chance/itc_loss": math.log(48),
    "chance/itm_loss": chance_level("itm"),
    "chance/itg_loss": math.log(160),
}
WRONG = {
    "itc_at_chance": {"train/itc_loss": math.log(48) - 0.01},
    "itm_at_chance": {"train/itm_loss": 0.6365},
    "itg_at_chance": {"train/itg_loss": math.log(160) + 1.0},
    "itm_always_no": {"train/itm_accuracy": 0.6667},
    "query_collapse": {"train/itc_query_similarity": 0.999},
    "temperature_at_clamp": {"train/itc_temperature": 5e-4},
    "gradient_zero": {"gradient_norm": 0.0},
    "loss_constant": {"train/loss": 3.25},
    "data_starvation": {"data_wait_fraction": 0.4},
}
YOUNG = {"itc_at_chance", "itm_at_chance", "itg_at_chance", "itm_always_no", "query_collapse"}


def history(change: Callable[[int], dict[str, Any]], last: int = 500, count: int = PATIENCE) -> list[Any]:
    """`count` entries, ten steps apart, whose loss falls; `change` gives what differs in the entry of that number."""
    return [
        (last - 10 * (count - 1 - number), HEALTHY | {"train/loss": 4.0 - 0.01 * number} | change(number))
        for number in range(count)
    ]


def causes(*args: Any, **kwargs: Any) -> set[str]:
    return {finding.cause for finding in find(history(*args, **kwargs), SETTING)}


def test_a_healthy_run_is_left_alone() -> None:
    assert causes(lambda number: {}) == set()


@pytest.mark.parametrize("cause", WRONG)
def test_the_rule_speaks_of_its_cause_alone(cause: str) -> None:
    assert causes(lambda number: WRONG[cause]) == {cause}


@pytest.mark.parametrize("cause", WRONG)
def test_one_good_entry_among_the_last_keeps_the_rule_silent(cause: str) -> None:
    assert causes(lambda number: {} if number == 2 else WRONG[cause]) == set()


@pytest.mark.parametrize("cause", WRONG)
def test_a_run_too_short_for_five_entries_is_not_judged(cause: str) -> None:
    assert causes(lambda number: WRONG[cause], count=PATIENCE - 1) == set()


@pytest.mark.parametrize("cause", sorted(YOUNG))
def test_what_a_young_run_may_show_is_not_held_against_it(cause: str) -> None:
    assert causes(lambda number: WRONG[cause], last=99) == set()


@pytest.mark.parametrize("cause", sorted(set(WRONG) - YOUNG))
def test_what_no_run_should_show_is_said_at_any_age(cause: str) -> None:
    assert causes(lambda number: WRONG[cause], last=60) == {cause}


def test_the_language_models_loss_is_judged_like_the_others() -> None:
    entries = [(500 + number, {"train/lm_loss": 6.0, "chance/lm_loss": 5.0}) for number in range(PATIENCE)]
    assert [finding.cause for finding in find(entries, SETTING)] == ["lm_at_chance"]


def test_every_finding_says_what_is_likely_and_where_to_look() -> None:
    for wrong in WRONG.values():
        (finding,) = find(history(lambda number, wrong=wrong: wrong), SETTING)
        assert len(finding.likely) > 20 and len(finding.look) > 10 and any(sign.isdigit() for sign in finding.seen)


def test_the_matching_loss_knows_its_chance_where_negatives_are_missing() -> None:
    assert matching_chance(0.0) == pytest.approx(0.636514, abs=1e-6) == pytest.approx(chance_level("itm"))
    assert matching_chance(0.5) == pytest.approx(math.log(2))  # one true pair to one false one
    assert matching_chance(1.0) == 0.0
    # 0.65 is worse than any constant answer, and yet better than one where half of the negatives are missing
    missing = {"train/itm_loss": 0.65, "train/itm_missing_negatives": 0.5}
    assert causes(lambda number: missing) == set()


def rates(*values: float) -> list[tuple[int, float]]:
    return [(10 * number, value) for number, value in enumerate(values)]


def test_a_rate_that_stays_while_its_schedule_moves_is_told() -> None:
    finding = learning_rate_stands(rates(*[1e-4] * PATIENCE), [0.1, 0.2, 0.3, 0.4, 0.5])
    assert finding is not None and finding.cause == "learning_rate_still"


def test_a_rate_that_stays_with_its_schedule_is_none_of_our_business() -> None:
    assert learning_rate_stands(rates(*[1e-4] * PATIENCE), [0.5] * PATIENCE) is None  # an epoch of LAVIS's staircase
    assert learning_rate_stands(rates(*[1e-4] * PATIENCE), []) is None


def test_a_rate_of_zero_is_told_whatever_its_schedule_says() -> None:
    finding = learning_rate_stands(rates(*[0.0] * PATIENCE), [0.0] * PATIENCE)
    assert finding is not None and finding.cause == "learning_rate_zero"


def test_a_moving_rate_and_a_young_run_are_left_alone() -> None:
    assert learning_rate_stands(rates(1, 2, 3, 4, 5), [1, 2, 3, 4, 5]) is None
    assert learning_rate_stands(rates(*[0.0] * (PATIENCE - 1)), []) is None
