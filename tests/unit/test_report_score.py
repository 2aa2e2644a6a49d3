"""What a report says about numbers: reference points, chance levels, names, tables, published numbers."""

import json
from pathlib import Path

from blip2train.report.collect import Evaluation, Run, collect_runs
from blip2train.report.paper import PAPER
from blip2train.report.score import held_out_pairs, scores_by_kind, scores_of
from blip2train.report.table import comparison, paper_rows, paper_table, score_table
from blip2train.run_dir import RunDir


def _run(name: str, **evaluations: dict[str, float]) -> Run:
    return Run(name, {}, "", [], [Evaluation(key, metrics, [], {}) for key, metrics in evaluations.items()])


def test_scores_carry_the_reference_points_that_were_measured_and_no_others() -> None:
    run = _run(
        "a",
        vqa={"vqa_accuracy": 80.0, "vqa_blind": 30.0, "chance": 12.0, "vqa_oracle": 86.0},
        search={"image_recall@1": 70.0, "image_recall@1_itm": 72.0, "chance": 0.5, "image_recall@1_ceiling": 83.0},
    )
    found = {score.metric: score for score in scores_of(run)}
    assert dict(found["vqa_accuracy"].references) == {"chance": 12.0, "blind": 30.0, "oracle": 86.0}
    assert dict(found["image_recall@1"].references) == {"chance": 0.5, "re-ranked": 72.0, "ceiling": 83.0}
    assert found["image_recall@1_itm"].references["ceiling"] == 83.0
    assert found["vqa_accuracy"].text == "80.0 %"


def test_scale_of_cider_leaves_room_above_every_bar() -> None:
    (score,) = scores_of(_run("a", caption={"caption_cider": 4.9, "caption_cider_shuffled": 5.5}))
    assert score.full > 5.5
    assert score.text == "4.90"


def test_held_out_benchmarks_are_paired_with_their_familiar_partners() -> None:
    run = _run("a", vqa={"vqa_accuracy": 80.0}, vqa_out={"vqa_accuracy": 75.0}, other={"vqa_accuracy": 1.0})
    ((inside, outside),) = held_out_pairs(scores_of(run))
    assert (inside.value, outside.value) == (80.0, 75.0)
    assert outside.held_out
    assert not inside.held_out


def test_kinds_of_question_have_their_own_reference_points() -> None:
    metrics = {"vqa_accuracy": 70.0, "vqa_accuracy/color": 90.0, "vqa_oracle/color": 95.0, "chance/color": 20.0}
    run = _run("a", vqa=metrics)
    (score,) = scores_by_kind(run, run.evaluations[0])
    assert (score.label, score.value) == ("color", 90.0)
    assert dict(score.references) == {"chance": 20.0, "oracle": 95.0}


def test_runs_are_compared_where_at_least_two_have_the_number() -> None:
    runs = [
        _run("a", vqa={"vqa_accuracy": 80.0}),
        _run("b", vqa={"vqa_accuracy": 70.0}, caption={"caption_cider": 1.0}),
    ]
    ((benchmark, label, scores),) = comparison(runs)
    assert (benchmark, label) == ("vqa", "Questions answered")
    assert [score.value for score in scores if score is not None] == [80.0, 70.0]


def test_published_numbers_are_complete_and_ordered_as_recalls_must_be() -> None:
    for rows in PAPER.values():
        for row in rows:
            assert row.source.startswith("Table ")
            assert row.values
            for side in ("text", "image"):
                recalls = [row.values[key] for k in (1, 5, 10) if (key := f"{side}_recall@{k}_itm") in row.values]
                assert recalls == sorted(recalls)
    best = next(row for row in PAPER["flickr30k_retrieval"] if row.model == "BLIP-2 ViT-g")
    assert (best.values["text_recall@1_itm"], best.values["image_recall@1_itm"]) == (97.6, 89.7)
    assert max(row.values["caption_cider"] for row in PAPER["coco_caption"]) == 1.458
    assert max(row.values["vqa_accuracy"] for row in PAPER["vqav2"]) == 65.2


def test_our_score_stands_above_the_papers_in_the_same_unit() -> None:
    runs = [_run("mine", vqav2={"vqa_accuracy": 51.0}, microworld_vqa={"vqa_accuracy": 80.0})]
    ((benchmark, _, unit, rows),) = paper_rows(runs)
    assert (benchmark, unit, rows[0]) == ("vqav2", "%", ("mine", 51.0, "this report"))
    assert len(rows) == 1 + len(PAPER["vqav2"])
    assert "| mine | 51.0 % | this report |" in paper_table(runs)


def test_markdown_table_has_one_line_per_score_and_equal_columns() -> None:
    run = _run("a", vqa={"vqa_accuracy": 80.0, "vqa_blind": 30.0}, caption={"caption_cider": 4.0})
    lines = score_table([run]).splitlines()
    assert lines[0] == "| run | benchmark | metric | score | blind |"
    assert lines[2] == "| a | vqa | Questions answered | **80.0 %** | 30.0 % |"
    assert {line.count("|") for line in lines} == {6}


def test_folders_are_read_as_they_are_and_named_by_what_tells_them_apart(tmp_path: Path) -> None:
    runs = [RunDir(tmp_path / "one" / "stage1"), RunDir(tmp_path / "two" / "stage1")]
    runs[0].write_eval("b", {"chance": 1.0, "broken": float("nan"), "note": "text"}, [{"key": "k"}])
    steps = (
        '{"step": 1, "train/loss": 2.0}',
        '{"step": 2, "train/loss": NaN}',
        '{"step": 3}',
        '{"step": 4, "train/loss": 1}',
    )
    runs[0].metrics_path.write_text("\n".join(steps))
    first, second = collect_runs(runs)
    assert (first.name, second.name) == ("one/stage1", "two/stage1")
    assert first.evaluations[0].metrics == {"chance": 1.0}
    assert first.curve("train/loss") == ([1, 4], [2.0, 1])
    assert (second.evaluations, second.steps, second.config) == ([], [], "")
    assert json.loads(json.dumps(second.manifest)) == {}
