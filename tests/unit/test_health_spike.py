"""The spike detector finds jumps, not noise and not the fall of a young loss, and goes on alike after a resume."""

import math
import random

from blip2train.health.spike import LEAST, STUCK, SpikeDetector


def noisy(steps: int, seed: int = 0) -> list[float]:
    """A loss that falls as real ones do, with noise of 5 percent."""
    draw = random.Random(seed)
    return [(2.0 + 8.0 * math.exp(-step / 40)) * draw.gauss(1.0, 0.05) for step in range(steps)]


def found(losses: list[float], detector: SpikeDetector | None = None) -> list[int]:
    detector = detector or SpikeDetector(10.0)
    return [step for step, loss in enumerate(losses) if detector.add(loss)]


def test_a_falling_noisy_loss_has_no_spike() -> None:
    assert not [step for seed in range(20) for step in found(noisy(1000, seed))]


def test_a_jump_is_found_at_its_step_with_its_size() -> None:
    losses = noisy(300)
    detector = SpikeDetector(10.0)
    assert not found(losses, detector)
    spike = detector.add(6.0)
    assert spike is not None and not spike.lasting
    assert spike.loss == 6.0 and abs(spike.usual - 2.0) < 0.2 and spike.size > 15


def test_a_jump_among_the_first_steps_is_no_spike() -> None:
    losses = noisy(LEAST - 1)
    losses[20] = 100.0
    assert not found(losses)


def test_a_spike_does_not_hide_the_next_one() -> None:
    losses = noisy(300)
    losses[250] = losses[260] = 50.0
    assert found(losses) == [250, 260]


def test_a_row_of_high_steps_is_told_once_and_once_more_when_it_lasts() -> None:
    losses = [*noisy(300), *[20.0] * (STUCK + 10)]
    detector = SpikeDetector(10.0)
    spikes = {step: spike for step, loss in enumerate(losses) if (spike := detector.add(loss))}
    assert {step: spike.lasting for step, spike in spikes.items()} == {300: False, 300 + STUCK - 1: True}


def test_what_is_not_finite_is_left_to_others_and_raises_no_bar() -> None:
    losses = noisy(300)
    losses[100], losses[200], losses[250] = math.nan, math.inf, 50.0
    assert found(losses) == [250]


def test_a_resumed_detector_finds_what_the_uninterrupted_one_finds() -> None:
    losses = noisy(300)
    losses[210] = losses[211] = 50.0
    first = SpikeDetector(10.0)
    assert found(losses[:211], first) == [210]
    resumed = SpikeDetector(10.0)
    resumed.load_state_dict(first.state_dict())
    assert found(losses[211:], resumed) == found(losses[211:], first) == []


def test_a_constant_loss_needs_a_visible_jump() -> None:
    assert found([2.0] * 100 + [2.1]) == []
    assert found([2.0] * 100 + [2.3]) == [100]


def test_size_zero_looks_for_nothing() -> None:
    assert not found([*noisy(300), 1e6], SpikeDetector(0))
