"""The shuffled control shows every record a picture that is not its own."""

from blip2train.benchmark.shuffle import other_image


def test_nobody_keeps_their_own_image_and_every_image_is_used_once() -> None:
    for size in range(2, 40):
        others = other_image(list(range(size)), seed=size)
        assert sorted(others) == list(range(size))
        assert all(other != row for row, other in enumerate(others))


def test_rows_of_one_image_get_the_same_other_image() -> None:
    image_ids = [7, 7, 8, 9, 8]
    others = other_image(image_ids)
    assert all(image_ids[other] != image_id for other, image_id in zip(others, image_ids, strict=True))
    assert others[0] == others[1]
    assert others[2] == others[4]


def test_a_single_image_has_no_other() -> None:
    assert other_image([5, 5]) == [0, 0]
    assert other_image([]) == []


def test_same_seed_same_partners_other_seed_others() -> None:
    image_ids = list(range(50))
    assert other_image(image_ids, 3) == other_image(image_ids, 3)
    assert other_image(image_ids, 3) != other_image(image_ids, 4)
