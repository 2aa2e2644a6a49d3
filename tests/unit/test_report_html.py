"""The page: needs no other file and no torch, shows what a folder holds, and escapes what people wrote."""

import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

from blip2train.benchmark.thumbnail import thumbnail
from blip2train.report.collect import Run
from blip2train.report.curve import MAX_POINTS, _top, draw_curves
from blip2train.report.html import build_report, format_seconds
from blip2train.run_dir import RunDir, write_json, write_jsonl

VOID = {"meta", "img", "br", "link", "input"}
PICTURE = thumbnail(torch.full((3, 8, 8), 200, dtype=torch.uint8))
NASTY = '<script>alert("1")</script> & a "square"'


class Page(HTMLParser):
    """Collects tags and attributes, and checks that tags nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def ids(self) -> list[str]:
        return [attributes["id"] or "" for _, attributes in self.found if "id" in attributes]


def _stage1(path: Path, recall: float = 70.0) -> RunDir:
    run = RunDir(path)
    write_json(run.manifest_path, {"seed": 0, "command": "blip2train train", "chance_levels": {"train/itc_loss": 3.87}})
    run.config_path.write_text("seed: 0  # <config>\n")
    write_jsonl(run.metrics_path, [{"step": step, "train/itc_loss": 4.0 / step} for step in range(1, 30)])
    ranked = [{"key": "b", "right": False, "score": 1.0}, {"key": "a", "right": True, "score": 0.5}]
    texts = [{"text": "right text", "right": True, "score": 1.0}, {"text": NASTY, "right": False, "score": 0.0}]
    rows: list[dict[str, Any]] = [
        {"direction": "text_to_image", "key": "a", "text": NASTY, "rank": 2, "retrieved": ranked, "shown": True},
        {
            "direction": "image_to_text",
            "key": "a",
            "captions": ["right text"],
            "rank": 1,
            "retrieved": texts,
            "shown": True,
        },
        {"direction": "text_to_image", "key": "zz", "text": "never shown", "rank": 1, "retrieved": ranked},
    ]
    metrics = {"text_recall@1": recall, "image_recall@1": 60.0, "chance": 0.5, "image_recall@1_ceiling": 83.0}
    run.write_eval("photos_retrieval", metrics, rows, {"a": PICTURE, "b": PICTURE})
    return run


def _stage2(path: Path) -> RunDir:
    run = RunDir(path)
    write_jsonl(run.metrics_path, [{"step": step, "train/lm_loss": 2.0} for step in range(5)])
    for suffix in ("", "_out"):
        caption = {"key": "a", "prediction": NASTY, "references": ["short", "the longest reference"], "cider": 2.0}
        caption |= {"verdict": {"true": 0.0}, "shown": True}
        run.write_eval(
            f"world_caption{suffix}", {"caption_cider": 4.9, "caption_cider_shuffled": 1.0}, [caption], {"a": PICTURE}
        )
        asked = {
            "key": "a",
            "question": "what color?",
            "answers": ["red"],
            "prediction": "",
            "prediction_accuracy": 0.0,
        }
        asked |= {"kind": "color", "blind": "blue", "shown": True}
        metrics = {"vqa_accuracy": 85.0, "vqa_blind": 30.0, "vqa_accuracy/color": 90.0, "vqa_accuracy/shape": 50.0}
        run.write_eval(f"world_vqa{suffix}", metrics, [asked], {"a": PICTURE})
    return run


def _page(runs: list[RunDir], out: Path, **options: Any) -> Page:
    path = build_report(runs, out, "A <title>", **options)
    return Page(path.read_text(encoding="utf-8"))


def test_report_imports_no_torch_and_no_network() -> None:
    code = "import sys, blip2train.report.html, blip2train.report.summary; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_page_of_two_stages_shows_every_part_and_needs_no_other_file(tmp_path: Path) -> None:
    runs = [_stage1(tmp_path / "s1"), _stage2(tmp_path / "s2")]
    page = _page(runs, tmp_path, phases={"stage 1": 120.0, "stage 2": 40.5})
    sections = {"scores", "held-out", "kinds", "curves", "examples", "numbers", "time", "facts"}
    assert sections <= set(page.ids())
    for tag, attributes in page.found:
        assert tag not in {"link", "script", "iframe", "object"}
        for name in ("src", "href"):
            value = attributes.get(name) or "#"
            assert value.startswith(("#", "data:image/jpeg;base64,")), value
        if tag == "img":
            assert attributes["alt"]
    raw = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "url(http" not in raw
    assert "@import" not in raw
    assert (tmp_path / "report.md").read_text(encoding="utf-8").startswith("# A <title>")


def test_every_link_of_the_page_leads_somewhere_and_ids_are_unique(tmp_path: Path) -> None:
    page = _page([_stage1(tmp_path / "s1"), _stage2(tmp_path / "s2")], tmp_path)
    ids = page.ids()
    assert len(ids) == len(set(ids))
    targets = {attributes["href"] for tag, attributes in page.found if tag == "a"}
    assert {f"#{name}" for name in ids} >= targets


def test_what_people_and_models_wrote_is_shown_not_run(tmp_path: Path) -> None:
    page = _page([_stage1(tmp_path / "s1"), _stage2(tmp_path / "s2")], tmp_path)
    assert NASTY in page.text
    assert "# <config>" in page.text
    assert "(nothing)" in page.text
    assert "the longest reference" in page.text
    assert "never shown" not in page.text


def test_numbers_stand_beside_their_baselines(tmp_path: Path) -> None:
    text = _page([_stage1(tmp_path / "s1"), _stage2(tmp_path / "s2")], tmp_path).text
    for expected in ("70.0 %", "chance 0.5 %", "ceiling 83.0 %", "85.0 %", "blind 30.0 %", "4.90", "shuffled 1.00"):
        assert expected in text


def test_a_stage1_run_alone_has_curves_and_retrieval_but_no_empty_sections(tmp_path: Path) -> None:
    page = _page([_stage1(tmp_path / "s1")], tmp_path)
    assert {"scores", "curves", "examples", "numbers", "facts"} <= set(page.ids())
    assert not {"held-out", "kinds", "comparison", "time"} & set(page.ids())


def test_bars_stay_within_their_track_whatever_the_number(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "s2")
    run.write_eval(
        "vqa", {"vqa_accuracy": 20.0, "vqa_blind": 30.0, "bridging_efficiency": -0.2, "caption_cider": 0.0}, []
    )
    page = _page([run], tmp_path)
    styles = [attributes["style"] or "" for tag, attributes in page.found if tag == "i" and "style" in attributes]
    widths = [float(width) for width in re.findall(r"width: (-?[\d.]+)%", " ".join(styles))]
    assert len(widths) == 4
    assert all(0 <= width <= 100 for width in widths)
    assert "-0.20" in page.text


def test_warnings_of_a_training_are_shown_and_of_many_the_latest(tmp_path: Path) -> None:
    run = _stage1(tmp_path / "s1")
    assert "warnings" not in _page([run], tmp_path).ids()
    rows = [
        {"step": step, "cause": "x", "seen": f"seen{step}. {NASTY}", "likely": "why", "look": "where"}
        for step in range(100, 140)
    ]
    write_jsonl(run.warnings_path, rows)
    page = _page([run], tmp_path)
    assert "warnings" in page.ids() and "#warnings" in {attributes.get("href") for _, attributes in page.found}
    assert "the last 30 of 40" in page.text and NASTY in page.text
    assert any(tag == "table" and attributes.get("class") == "words" for tag, attributes in page.found)  # lines wrap
    assert "seen139." in page.text and "seen110." in page.text and "seen109." not in page.text


def test_an_empty_folder_still_gives_a_page(tmp_path: Path) -> None:
    page = _page([RunDir(tmp_path / "nothing")], tmp_path)
    assert "facts" in page.ids()
    assert "scores" not in page.ids()


def test_runs_of_one_benchmark_are_compared_and_the_best_is_marked(tmp_path: Path) -> None:
    page = _page([_stage1(tmp_path / "s1", 70.0), _stage1(tmp_path / "s2", 75.0)], tmp_path)
    assert "comparison" in page.ids()
    raw = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert '<td class="n own">75.0 %</td>' in raw
    assert '<td class="n ">70.0 %</td>' in raw


def test_curves_draw_the_chance_level_of_the_manifest_and_say_it_in_words() -> None:
    steps = [{"step": step, "train/itc_loss": 4.0 - step / 100} for step in range(100)]
    (curve,) = draw_curves([Run("run", {"chance_levels": {"train/itc_loss": 3.871}}, "", steps)])
    assert "chance 3.87" in curve.svg
    assert "run from 4 to 3.01 at step 99; chance is 3.87" in curve.svg
    assert "stroke-dasharray" in curve.svg
    (plain,) = draw_curves([Run("run", {}, "", steps)])
    assert "chance" not in plain.svg


def test_the_health_of_a_run_is_drawn_beside_its_losses_where_it_was_logged() -> None:
    keys = ("train/itc_i2t_accuracy", "gradient_norm", "learning_rate", "data_wait_fraction", "mfu")
    steps = [{"step": step} | dict.fromkeys(keys, 1e-4 * step) for step in range(3)]
    curves = draw_curves([Run("run", {"chance_levels": {keys[0]: 1 / 8}}, "", steps)])
    assert [curve.title.split(",")[0] for curve in curves] == [
        "Recall@1 in the batch", "Gradient norm before clipping", "Learning rate",
        "Waiting for data", "Model FLOPs utilization",
    ]  # fmt: skip
    assert ["chance" in curve.svg for curve in curves] == [True, False, False, False, False]


@pytest.mark.parametrize(
    ("values", "top"),
    [([1.0, 3.0, 2.0], 3.0), ([*[2.0] * 14, 3.0], 3.0), ([*[2.0] * 14, 90.0], 2.0), ([0.0, 0.0], 0.0)],
)
def test_a_peak_is_shown_and_one_far_above_all_others_flattens_none(values: list[float], top: float) -> None:
    assert _top(values) == top
    steps = [{"step": step, "gradient_norm": value} for step, value in enumerate(values)]
    assert draw_curves([Run("run", {}, "", steps)])


def test_runs_with_different_chance_levels_share_no_line() -> None:
    steps = [{"step": step, "train/itc_loss": 1.0} for step in range(3)]
    runs = [Run(str(level), {"chance_levels": {"train/itc_loss": level}}, "", steps) for level in (2.0, 3.0)]
    (curve,) = draw_curves(runs)
    assert "chance" not in curve.svg


def test_drawings_leave_colours_to_the_page_and_are_the_same_every_time() -> None:
    steps = [
        {"step": step, "train/loss": 1.0, "train/itm_accuracy": 0.5 + step / 1e4} for step in range(5 * MAX_POINTS)
    ]
    first, second = (draw_curves([Run("a", {}, "", steps), Run("b", {}, "", steps)]) for _ in range(2))
    assert [curve.svg for curve in first] == [curve.svg for curve in second]
    assert "var(--series-1)" in first[0].svg
    assert not re.search(r"#0f0f|font-family|<metadata", first[0].svg)
    points = max(len(path.split(" L ")) for path in re.findall(r' d="([^"]+)"', first[0].svg.replace("\n", " ")))
    assert points <= MAX_POINTS


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.42, "0.4 s"), (59.6, "60 s"), (119, "119 s"), (187, "3.1 min"), (7260, "2 h 01 min")]
)
def test_seconds_are_written_as_people_read_them(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


def _luminance(color: str) -> float:
    channels = [int(color[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _contrast(first: str, second: str) -> float:
    light, dark = sorted((_luminance(first), _luminance(second)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_text_and_curves_have_the_contrast_that_wcag_asks_for(tmp_path: Path, scheme: int) -> None:
    raw = build_report([RunDir(tmp_path)], tmp_path, "colors").read_text(encoding="utf-8")
    block = re.findall(r":root \{(.*?)\}", raw, flags=re.DOTALL)[scheme]
    color = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", block))
    for ground in ("paper", "card"):
        for text in ("ink", "muted", "accent", "good", "bad"):
            assert _contrast(color[text], color[ground]) >= 4.5, (text, ground)
        for index in range(6):
            assert _contrast(color[f"series-{index}"], color[ground]) >= 3.0, (index, ground)
    assert _contrast(color["good"], color["good-wash"]) >= 4.5
    assert _contrast(color["bad"], color["bad-wash"]) >= 4.5
