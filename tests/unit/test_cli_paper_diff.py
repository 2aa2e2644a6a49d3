"""The comparison itself: a changed value shows on the right side, and what is silent differs from nothing."""

import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from blip2train.cli.config import compose
from blip2train.cli.paper_diff import PUBLISHED, Comparison, Published, compare, show_paper_diff
from blip2train.errors import ConfigError


def rows(*overrides: str) -> dict[str, Comparison]:
    return {row.setting: row for row in compare(compose("train", [*overrides, "run_dir=outputs/x"]))}


@pytest.mark.parametrize(
    ("override", "setting", "paper", "lavis"),
    [
        ("optim.lr=2e-4", "peak learning rate", True, True),
        ("optim.betas=[0.9,0.999]", "AdamW betas", True, False),
        ("trainer.gradient_clip_val=null", "gradient clipping", False, False),
        ("model.vision_encoder.layer=-1", "layer of the encoder", True, True),
        ("model.qformer.num_queries=64", "queries", True, True),
        ("trainer.accumulate_grad_batches=2 data.batch_size=105", "global batch", True, True),
        ("expected_global_batch=null data.batch_size=100", "global batch", True, False),
        ("trainer.accumulate_grad_batches=5", "global batch", False, True),
        ("trainer.accumulate_grad_batches=5", "pairs that ITC contrasts", True, True),
        ("trainer.devices=8", "pairs that ITC contrasts", False, True),
        ("~objective@stage.objectives.itg", "weight of ITG", False, True),
        ("~objective@stage.objectives.itg", "losses", True, True),
        ("stage.objectives.itm.weight=0", "losses", True, True),
        ("init_qformer=null", "Q-Former starts from", True, True),
        ("init_qformer=models/bert-base-uncased", "Q-Former starts from", False, False),
        ("data.datasets.coco.transform.horizontal_flip=false", "horizontal flip", True, True),
        ("+data/augment@data.datasets.coco.transform.augment=rand_augment", "further augmentation", True, True),
        ("model/vision_encoder=siglip", "vision encoder", True, True),
        ("optim.min_lr=0", "minimum learning rate", True, True),
        ("stage.gather_gradients=false", "gradient through gathered features", False, False),
        ("data.datasets.coco.weight=1000", "mixture", False, True),
    ],
)
def test_a_changed_setting_shows_where_it_differs(override: str, setting: str, paper: bool, lavis: bool) -> None:
    row = rows("experiment=paper/stage1_vitg", *override.split())[setting]
    assert (row.differs("paper"), row.differs("lavis")) == (paper, lavis)


def test_values_that_depend_on_the_backbone_are_silent_for_others() -> None:
    """The paper has a batch for ViT-g and ViT-L, for OPT and T5; for another encoder it has none."""
    assert rows("experiment=paper/stage1_vitl")["global batch"].paper == Published(2320)
    assert rows("experiment=paper/stage1_vitg", "model/vision_encoder=siglip")["global batch"].paper is None
    assert rows("experiment=paper/stage2_vitg_flan_t5_xl")["global batch"].paper == Published(1520)
    other = rows("experiment=paper/stage2_vitg_opt_2_7b", "model/language_model=qwen3_8b")
    assert other["global batch"].paper is None and other["language model"].differs("paper")


def test_stage_two_from_scratch_differs_and_an_unnamed_run_does_not() -> None:
    preset = "experiment=paper/stage2_vitg_opt_2_7b"
    assert not rows(preset)["Q-Former starts from"].differs("paper")
    assert rows(preset, "init_from=scratch")["Q-Former starts from"].differs("paper")


def test_stages_show_their_own_settings() -> None:
    first, second = rows("experiment=microworld_stage1"), rows("experiment=microworld_stage2_opt")
    assert "initial temperature" in first and "initial temperature" not in second
    assert "end of a caption" in second and "end of a caption" not in first


def test_the_table_prints_both_sides_and_counts(capsys: pytest.CaptureFixture[str]) -> None:
    show_paper_diff(compose("train", ["experiment=microworld_stage2_t5", "run_dir=outputs/x"]))
    out = capsys.readouterr().out
    assert "microworld_stage2_t5" in out and "≠ 80,000" in out and "≠ 13,550" in out
    assert "Question: {question} Short answer:" in out.replace("\n", " ").replace("│", " ") or "≠ Question" in out
    assert "differs from the paper in" in out and "differs from LAVIS in" in out


def test_values_that_wait_for_another_are_none_and_no_stage_is_an_error() -> None:
    config = compose("train", ["experiment=microworld_stage1", "trainer=ddp", "run_dir=outputs/x"])  # devices: ???
    assert {row.setting: row.found for row in compare(config)}["global batch"] is None
    with pytest.raises(ConfigError, match="no stage chosen"):
        compare(compose("train", ["run_dir=outputs/x"]))


def test_every_published_row_has_a_source_a_value_and_a_key_that_a_preset_has() -> None:
    table = OmegaConf.to_container(OmegaConf.load(PUBLISHED))
    for row in table:
        assert row["source"] and {"paper", "lavis"} & row.keys(), row["setting"]
        assert set(row) <= {"setting", "key", "stage", "by", "one_of", "paper", "lavis", "source"}, row
    may_be_absent = {"llm.model.lora", "llm.model.overrides.dense_act_fn"}  # absent is off
    for stage, preset in ((1, "paper/stage1_vitg"), (2, "lavis/stage2_vitg_flan_t5_xl")):
        config = compose("train", [f"experiment={preset}", "run_dir=outputs/x"])
        keys = [row["key"] for row in table if row.get("stage", stage) == stage and row["key"][0] != "<"]
        for key in set(keys) - may_be_absent:
            parent, leaf = key.rpartition(".")[::2]
            assert leaf in (OmegaConf.select(config, parent) if parent else config), key


def test_the_command_prints_the_table_for_a_preset_that_waits_for_values(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "blip2train.cli.show", "paper-diff", "experiment=lavis/stage2_vitg_opt_2_7b"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "differs from LAVIS in 0 of" in done.stdout and "differs from the paper in 8 of" in done.stdout
    assert not list(tmp_path.iterdir())


def test_it_needs_no_torch() -> None:
    code = "import sys, blip2train.cli.paper_diff; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
