"""The page about shards: what it says is true, what people wrote is text, and a real browser shows and filters it."""

import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import Page, open_browser
from shard_factory import encode, noise, write_tar

from blip2train.cli.config import compose
from blip2train.cli.data_view import choose_shards, run
from blip2train.data.pack import pack_records
from blip2train.data.shards import Shard
from blip2train.microworld.pack import build_world
from blip2train.microworld.scene import WorldSpec
from blip2train.report.histogram import NUM_BARS, draw_histogram, group_sources, quantile, to_bars

NASTY = "<script>document.title = 'taken'</script><img src=x onerror=alert(1)> & \"quotes\" </script>"
LOADED = "Promise.all([...document.images].map(image => (image.loading = 'eager', image.decode().catch(() => 0))))"
NUM_SHOWN = "[...document.querySelectorAll('#gallery > article')].filter(card => !card.hidden).length"


def view(urls: Path, out: Path, *overrides: str) -> str:
    run(compose("data_view", [f"urls={urls}", f"out={out}", "workers=1", *overrides]))
    return out.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sources; captions that are markup, CapFilt's scores, a broken image, no caption, a long caption, odd keys."""
    folder = tmp_path_factory.mktemp("hostile")
    image = encode(noise(1, 40, 60), "jpg")
    fields = {
        "nasty": {"captions": [NASTY, "second"], "note<i>": NASTY, "questions": [_question(NASTY)]},
        "scored": {
            "captions": ["web text", "made up"],
            "caption_scores": [0.25, 0.31],
            "caption_origins": ["web", "syn"],
        },
        "many": {"captions": [f"caption {n}" for n in range(9)]},
        "long": {"captions": ["x" * 5000]},
    }
    files = [pair for key, row in fields.items() for pair in ((f"{key}.jpg", image), (f"{key}.json", _json(row)))]
    write_tar(
        folder / "a-000.tar", [*files, ("broken.jpg", b"no image"), ("broken.json", _json({"captions": ["gone"]}))]
    )
    write_tar(folder / "b-000.tar", [("<b>key.jpg", image), ("<b>key.json", _json({"captions": ["umbrella"]}))])
    return folder


def _json(fields: object) -> bytes:
    return json.dumps(fields).encode()


def _question(text: str) -> dict[str, object]:
    return {"question_id": "1", "question": text, "answers": ["yes", "yes", "no"]}


@pytest.fixture(scope="module")
def hostile_page(hostile: Path) -> Path:
    view(hostile, hostile / "view.html")
    return hostile / "view.html"


@pytest.fixture(scope="module")
def browser() -> Iterator[Page]:
    with open_browser() as page:
        yield page


def test_page_needs_no_other_file_and_escapes_everything(hostile_page: Path) -> None:
    html = hostile_page.read_text(encoding="utf-8")
    sources = re.findall(r'(?:src|href)="([^"#][^"]*)"', html)
    assert all(source.startswith("data:image/jpeg;base64,") for source in sources)
    assert html.count("<script>") == 1
    assert "<img src=x" not in html and "<b>key" not in html and "note<i>" not in html
    assert "x" * 401 not in html and "(5,000 characters)" in html


def test_sample_is_seeded_and_over_all_shards(tmp_path: Path) -> None:
    for shard in range(4):
        keys = [f"k{shard}{n}" for n in range(5)]
        image = encode(noise(shard, 40, 40), "jpg")
        files = [(f"{key}.{end}", data) for key in keys for end, data in (("jpg", image), ("txt", b"text"))]
        write_tar(tmp_path / f"s-{shard:03d}.tar", files)

    def keys_of(seed: int, number: int) -> list[str]:
        html = view(tmp_path, tmp_path / "view.html", f"seed={seed}", f"num_images={number}")
        return re.findall(r'<p class="key">(\w+)<br>', html)

    assert len(keys_of(0, 100)) == 20
    assert keys_of(0, 8) == keys_of(0, 8) != keys_of(1, 8)
    assert len({key[1] for key in keys_of(0, 8)}) > 2
    assert keys_of(0, 0) == []


def test_large_data_is_read_in_whole_shards_drawn_by_seed() -> None:
    shards = [Shard(f"s{n}", 100) for n in range(50)]
    chosen = choose_shards(shards, 450, seed=1)
    assert len(chosen) == 5 and chosen == sorted(chosen, key=lambda shard: shards.index(shard))
    assert chosen == choose_shards(shards, 450, seed=1) != choose_shards(shards, 450, seed=2)
    assert choose_shards(shards, None, seed=1) == choose_shards(shards, 5000, seed=1) == shards


def test_browser_shows_every_picture_and_runs_nothing_that_captions_say(browser: Page, hostile_page: Path) -> None:
    browser.open(hostile_page)
    browser.evaluate(LOADED)
    assert browser.evaluate("[...document.images].filter(image => image.naturalWidth > 0).length") == 5
    assert browser.evaluate("document.images.length") == 5
    assert browser.evaluate("document.querySelectorAll('.nothing').length") == 1
    assert browser.evaluate("document.title") != "taken"
    assert NASTY in browser.evaluate("document.querySelector('.says').textContent")
    assert browser.evaluate("[...document.images].every(image => image.alt.length > 0)")
    assert browser.evaluate("document.body.textContent.includes('syn 0.310')")
    assert browser.errors == []


def test_browser_filters_by_words_source_and_findings_from_the_keyboard(browser: Page, hostile_page: Path) -> None:
    browser.open(hostile_page)
    assert browser.evaluate(NUM_SHOWN) == 6
    browser.type("/")
    browser.type("Umbrella key")
    assert browser.evaluate("document.activeElement.id") == "filter"
    assert browser.evaluate("document.getElementById('filter').value") == "Umbrella key"
    assert browser.evaluate(NUM_SHOWN) == 1
    assert browser.evaluate("document.getElementById('shown').value") == "1 of 6 records"
    browser.type("zzz")
    assert browser.evaluate(NUM_SHOWN) == 0
    assert not browser.evaluate("document.getElementById('none').hidden")
    browser.press("Escape")
    assert browser.evaluate(NUM_SHOWN) == 6
    browser.evaluate("source.selectedIndex = 2, source.dispatchEvent(new Event('input'))")
    assert browser.evaluate(NUM_SHOWN) == 1
    browser.press("Escape")
    browser.evaluate("document.getElementById('flagged').click()")
    flagged = browser.evaluate(NUM_SHOWN)
    assert flagged == 1
    assert browser.errors == []


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [390, 1280])
def test_browser_needs_no_sideways_scrolling_and_keeps_text_readable(
    browser: Page, hostile_page: Path, width: int, dark: bool
) -> None:
    browser.open(hostile_page, width=width, dark=dark)
    assert browser.evaluate("document.documentElement.scrollWidth") == width
    assert browser.evaluate("innerWidth") == width
    for selector in ("body", ".key", ".note", ".says li", ".severity-error", ".severity-warning", "figcaption"):
        assert browser.evaluate(CONTRAST % selector) >= 4.5, selector
    assert browser.errors == []


CONTRAST = """(() => {
  const light = color => {
    const canvas = document.createElement("canvas").getContext("2d");
    canvas.fillStyle = color; canvas.fillRect(0, 0, 1, 1);
    const part = value => (value /= 255) <= 0.03928 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4;
    const [red, green, blue] = canvas.getImageData(0, 0, 1, 1).data;
    return 0.2126 * part(red) + 0.7152 * part(green) + 0.0722 * part(blue);
  };
  const element = document.querySelector("%s");
  let behind = element;
  while (getComputedStyle(behind).backgroundColor === "rgba(0, 0, 0, 0)") behind = behind.parentElement;
  const ink = light(getComputedStyle(element).color), paper = light(getComputedStyle(behind).backgroundColor);
  return (Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05);
})()"""


def test_browser_shows_photographs_and_the_micro_world(browser: Page, shared_data: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in (shared_data / "photos" / "captions.jsonl").read_text().splitlines()]
    records = (
        {
            "key": str(row["coco_id"]),
            "image_bytes": (shared_data / "photos" / row["image"]).read_bytes(),
            "extension": "jpg",
            "json": {"captions": row["captions"], "image_id": row["coco_id"]},
        }
        for row in rows
    )
    pack_records(records, tmp_path / "photos")
    build_world(WorldSpec(seed=3), tmp_path / "world", 30, 10)
    for name, number in (("photos", len(rows)), ("world", 50)):
        html = view(tmp_path / name, tmp_path / f"{name}.html")
        browser.open(tmp_path / f"{name}.html", width=390)
        browser.evaluate(LOADED)
        assert browser.evaluate("[...document.images].filter(image => image.naturalWidth > 0).length") == number
        assert browser.evaluate("document.documentElement.scrollWidth") == 390
        assert browser.evaluate("document.querySelectorAll('figure svg rect').length") > 20
        assert "severity-error" not in html.split("<body>")[1]
        assert browser.errors == []


def test_histogram_counts_every_value_once_in_few_round_bars() -> None:
    first, second = Counter({n: 1 + n % 3 for n in range(500)}), Counter({700: 4})
    bars = to_bars({"a": first, "b": second})
    assert len(bars) <= NUM_BARS
    assert sum(bar.counts[0] for bar in bars) == first.total()
    assert sum(bar.counts[1] for bar in bars) == 4 == bars[-1].counts[1]
    for bar in bars[:-1]:
        assert bar.counts[0] == sum(count for value, count in first.items() if bar.low <= value < bar.high)
    assert to_bars({"a": Counter({64: 3})})[0].counts == (3,)
    assert draw_histogram("nothing", {"a": Counter()}, "words") is None


@pytest.mark.parametrize("share", [0.05, 0.5, 0.95, 1.0])
def test_quantile_is_numpys_inverted_cdf(share: float) -> None:
    import numpy as np

    values = np.random.default_rng(0).integers(0, 40, 997)
    expected = np.quantile(values, share, method="inverted_cdf")
    assert quantile(Counter(values.tolist()), share) == expected


def test_many_sources_keep_their_colours_in_every_drawing() -> None:
    by_source = {f"s{n}": Counter({n: 10 - n}) for n in range(9)}
    grouped = group_sources(by_source, ["s0", "s4"])
    assert list(grouped) == ["s0", "s4", "all others"]
    assert grouped["all others"].total() == sum(10 - n for n in range(9) if n not in (0, 4))
