import itertools
import json
from pathlib import Path

import numpy as np
import pytest

from blip2train.errors import DataError
from blip2train.metric.retrieval import recall_at_k


@pytest.mark.parametrize("case", ["random_200x1000", "variable_captions_150"])
def test_recall_equals_lavis_and_clip_benchmark(shared_data: Path, case: str) -> None:
    folder = shared_data / "retrieval"
    expected = json.loads((folder / "expected.json").read_text())[case]
    arrays = np.load(folder / f"{case}.npz")
    two = recall_at_k(arrays["scores_i2t"], arrays["txt2img"], scores_t2i=arrays["scores_t2i"])
    for k in (1, 5, 10):
        assert two[f"text_recall@{k}"] == pytest.approx(expected["expected_lavis"][f"txt_r{k}"], abs=1e-9)
        assert two[f"image_recall@{k}"] == pytest.approx(expected["expected_lavis"][f"img_r{k}"], abs=1e-9)
        assert two[f"text_recall@{k}"] == pytest.approx(expected["clip_benchmark"][f"txt_r{k}"], abs=1e-4)
        assert two[f"image_recall@{k}"] == pytest.approx(expected["clip_benchmark"][f"img_r{k}"], abs=1e-4)


def test_one_matrix_serves_both_directions(shared_data: Path) -> None:
    arrays = np.load(shared_data / "retrieval" / "random_200x1000.npz")
    one = recall_at_k(arrays["scores_i2t"], arrays["txt2img"])
    assert one == recall_at_k(arrays["scores_i2t"], arrays["txt2img"], scores_t2i=arrays["scores_i2t"].T)


def test_ties_have_the_published_bounds_and_the_expectation_lies_between(shared_data: Path) -> None:
    folder = shared_data / "retrieval"
    expected = json.loads((folder / "expected.json").read_text())["ties_40x200"]
    arrays = np.load(folder / "ties_40x200.npz")
    scored = {
        ties: recall_at_k(arrays["scores_i2t"], arrays["txt2img"], scores_t2i=arrays["scores_t2i"], ties=ties)
        for ties in ("optimistic", "pessimistic", "expected")
    }
    for ties, (ours, theirs), k in itertools.product(
        ("optimistic", "pessimistic"), (("text", "txt"), ("image", "img")), (1, 5, 10)
    ):
        assert scored[ties][f"{ours}_recall@{k}"] == pytest.approx(expected[f"{theirs}_{ties}"][f"r{k}"], abs=1e-9)
    for key, value in scored["expected"].items():
        assert scored["pessimistic"][key] <= value <= scored["optimistic"][key]


def _sorted_recall(scores: np.ndarray, truth: list[set[int]], k: int) -> float:
    """Share of rows whose k best candidates, by Python's sort, hold a true one."""
    hits = [
        bool(truth[row] & set(sorted(range(len(values)), key=lambda c, v=values: -v[c])[:k]))
        for row, values in enumerate(scores)
    ]
    return 100 * sum(hits) / len(hits)


def test_the_expectation_is_the_mean_over_every_order_of_the_data() -> None:
    scores = np.array([[2.0, 1.0, 1.0, 1.0, 0.0], [3.0, 3.0, 3.0, 1.0, 3.0]])
    text_to_image = np.array([1, 0, 0, 1, 1])
    sums: dict[str, float] = {}
    orders = list(itertools.permutations(range(5)))
    for order in orders:
        columns = list(order)
        truth = [{column for column in range(5) if text_to_image[columns[column]] == image} for image in range(2)]
        for k in (1, 2, 3):
            key = f"text_recall@{k}"
            sums[key] = sums.get(key, 0.0) + _sorted_recall(scores[:, columns], truth, k)
    recall = recall_at_k(scores, text_to_image, ks=(1, 2, 3))
    for key, total in sums.items():
        assert recall[key] == pytest.approx(total / len(orders), abs=1e-9)


def test_a_constant_matrix_scores_chance() -> None:
    recall = recall_at_k(np.zeros((20, 20)), np.arange(20), ks=(1, 5, 10))
    for k in (1, 5, 10):
        assert recall[f"text_recall@{k}"] == pytest.approx(100 * k / 20)
        assert recall[f"image_recall@{k}"] == pytest.approx(100 * k / 20)


def test_nan_ranks_last_and_unscored_pairs_lose() -> None:
    scores = np.array([[np.nan, 0.1], [0.9, -np.inf]])
    assert recall_at_k(scores, [0, 1], ks=(1,)) == {"text_recall@1": 0.0, "image_recall@1": 0.0}
    everything_nan = recall_at_k(np.full((4, 4), np.nan), np.arange(4), ks=(1,))
    assert everything_nan["text_recall@1"] == pytest.approx(25.0)


def test_an_image_without_texts_asks_nothing_but_stays_a_candidate() -> None:
    scores = np.array([[1.0, 0.0], [0.0, 1.0], [2.0, 0.0]])
    assert recall_at_k(scores, [0, 1], ks=(1,)) == {"text_recall@1": 100.0, "image_recall@1": 50.0}


def test_more_places_than_candidates_finds_everything() -> None:
    assert recall_at_k(np.zeros((1, 1)), [0]) == {
        f"{side}_recall@{k}": 100.0 for side in ("text", "image") for k in (1, 5, 10)
    }


@pytest.mark.parametrize("truth", [[0], [0, 2], [-1, 0], []])
def test_truth_that_does_not_fit_the_scores_is_an_error(truth: list[int]) -> None:
    with pytest.raises(DataError):
        recall_at_k(np.zeros((2, 2)), truth)


def test_a_second_matrix_of_the_wrong_shape_is_an_error() -> None:
    with pytest.raises(DataError, match="scores_t2i"):
        recall_at_k(np.zeros((2, 3)), [0, 1, 1], scores_t2i=np.zeros((2, 3)))
