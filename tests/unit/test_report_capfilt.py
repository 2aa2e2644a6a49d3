"""CapFilt's page, and the sums and drawings on it; opened in a real browser where there is one."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
from browser import find_browser, open_browser
from shard_factory import encode, noise, write_tar
from torch import Tensor

from blip2train.capfilt.candidate import Candidate
from blip2train.capfilt.finish import finish
from blip2train.capfilt.job import Job
from blip2train.capfilt.ranker import Ranking
from blip2train.capfilt.shard import ShardSettings, process_shard
from blip2train.capfilt.statistics import Statistics, add_up, summarise
from blip2train.data.shards import open_shards
from blip2train.report.capfilt import write_page
from blip2train.report.outline import draw_outlines, tick_step

HOSTILE = "<script>document.title='broken'</script> a <b>dog</b> & a \"cat\""


def captions(images: Sequence[Tensor], keys: Sequence[str]) -> list[list[str]]:
    return [[HOSTILE, f"a dog {key}", "a very " + "long" * 60] for key in keys]


def by_hash(images: Sequence[Tensor], texts: Sequence[Sequence[str]]) -> Ranking:
    return Ranking([[(sum(map(ord, text)) % 97) / 97 - 0.4 for text in row] for row in texts], 0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished job over two shards, one record of which has no image."""
    root = tmp_path_factory.mktemp("capfilt")
    for place in range(2):
        files: list[tuple[str, bytes]] = []
        for number in range(9):
            image = b"" if place == number == 1 else encode(noise(number, 60, 90), "jpg")
            fields = {"captions": [f"IMG {number} & co, by the web"]} if number % 3 else {}
            files += [(f"k{place}{number}.jpg", image), (f"k{place}{number}.json", json.dumps(fields).encode())]
        write_tar(root / "in" / f"{place}.tar", files)
    identity = {"captioner": {"model": "scripted"}, "ranker": {"model": "by hash"}}
    job = Job(open_shards(str(root / "in")), root / "out", identity)
    job.prepare()
    job.work(
        lambda shard, out, progress: process_shard(shard, out, captions, by_hash, ShardSettings()), 0, 1, lambda: None
    )
    finish(job, 1.0)
    write_page(root / "out")
    return root / "out"


def test_the_page_shows_counts_drawings_and_every_example_with_its_picture(folder: Path) -> None:
    html = (folder / "report.html").read_text()
    report = json.loads((folder / "report.json").read_text())
    shown = [row for rows in report["examples"].values() for row in rows]
    assert len(shown) == 24
    assert html.count("data:image/jpeg;base64,") == len(shown)
    assert html.count('<svg viewBox="0 0 460') == 4
    assert "1 corrupt_image" in html
    assert "17 images" in html
    assert "<script>document" not in html
    assert not re.findall(r'(?:src|href)="(?!data:)', html), "it needs no other file"


def test_examples_are_the_highest_and_lowest_scores_over_all_shards(folder: Path) -> None:
    report = json.loads((folder / "report.json").read_text())["examples"]
    best, worst = [[row["score"] for row in report[kind]] for kind in ("best", "worst")]
    assert best == sorted(best, reverse=True)
    assert worst == sorted(worst)
    assert min(best) >= max(worst)
    assert {row["shard"] for row in report["random"]} == {"shard-000000.tar", "shard-000001.tar"}


def test_a_browser_shows_it_without_errors_on_a_wide_and_on_a_narrow_screen(folder: Path, tmp_path: Path) -> None:
    find_browser()
    with open_browser() as page:
        for width, dark in ((1280, False), (390, True)):
            page.open(folder / "report.html", width=width, dark=dark)
            assert page.evaluate("document.title") == "CapFilt: out"
            assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), f"{width} px: too wide"
            page.evaluate("document.querySelectorAll('img').forEach(image => image.loading = 'eager')")
            loaded = "Promise.all([...document.images].map(image => image.decode())).then(() => document.images.length)"
            assert page.evaluate(loaded) == 24
            colours = "new Set([...document.querySelectorAll('.area')].map(area => getComputedStyle(area).fill)).size"
            assert page.evaluate(colours) == 2
        page.screenshot(tmp_path / "page.png", whole=True)
        assert page.errors == []


def test_sums_do_not_depend_on_how_the_records_were_dealt_out() -> None:
    images = [
        [Candidate("a dog", "web", 0.31, True), Candidate("a cat", "synthetic", -0.12, False)],
        [Candidate("two", "synthetic", 0.2, True)],
        [],
        [Candidate("a b c", "synthetic", 0.2, True), Candidate("x", "web", 0.1, True)],
    ]
    whole, parts = Statistics(), [Statistics() for _ in range(3)]
    for number, image in enumerate(images):
        whole.add(image)
        parts[number % 3].add(image)
    texts = [json.loads(json.dumps(part.as_dict())) for part in parts]
    assert add_up(texts[::-1]).as_dict() == whole.as_dict()
    assert summarise(whole) == {
        "web_captions_kept_share": 1.0,
        "synthetic_captions_kept_share": round(2 / 3, 5),
        "images_that_keep_a_web_caption_share": 1.0,
        "images_whose_best_is_web_share": 0.5,
        "captions_kept_per_image": 1.0,
        "duplicate_texts_share": None,
        "mean_score_web": pytest.approx(0.205, abs=0.003),
        "mean_score_synthetic": pytest.approx(0.28 / 3, abs=0.003),
        "mean_score_kept": pytest.approx(0.81 / 4, abs=0.003),
        "mean_score_dropped": pytest.approx(-0.12, abs=0.003),
    }


def test_a_group_is_drawn_as_shares_of_itself() -> None:
    few, many = Counter({0: 1, 1: 1}), Counter({0: 500, 1: 500})
    points = re.findall(r'points="([^"]+)"', draw_outlines({"few": few, "many": many}, 1.0, "words"))
    assert points[0] == points[1]


def test_wide_distributions_are_drawn_in_fewer_bars_and_lose_nothing() -> None:
    svg = draw_outlines({"all": Counter(dict.fromkeys(range(-300, 300), 1))}, 0.005, "score")
    (points,) = re.findall(r'points="([^"]+)"', svg)
    levels = {point.split(",")[1] for point in points.split()[1:-1]}
    assert len(points.split()) == 2 * 60 + 2
    assert len(levels) == 1, "a flat distribution is a flat line"


def test_nothing_to_draw_is_no_drawing() -> None:
    assert draw_outlines({"none": Counter()}, 1.0, "words") == ""


@pytest.mark.parametrize(("span", "step"), [(1.0, 0.2), (0.35, 0.1), (60, 10), (7, 2), (0.06, 0.01)])
def test_ticks_are_round_numbers(span: float, step: float) -> None:
    assert tick_step(span) == pytest.approx(step)
