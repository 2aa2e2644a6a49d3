"""Backbones: the shipped ones are small, belong to this world and score what `world.json` says; the maker works."""

import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from blip2train.errors import ConfigError
from blip2train.microworld import backbone, oracle
from blip2train.microworld.backbone import ASSETS, check_backbones, load, pretrain
from blip2train.microworld.scene import WorldSpec
from blip2train.microworld.training import Plan
from blip2train.microworld.vocabulary import world_hash
from blip2train.run_dir import read_json

SPEC = WorldSpec()
WORLD = read_json(ASSETS / "world.json")


def test_all_assets_together_stay_under_three_million_bytes() -> None:
    assert sum(path.stat().st_size for path in ASSETS.rglob("*") if path.is_file()) < 3_000_000


def test_they_were_made_for_this_world_by_a_noted_command() -> None:
    assert WORLD["world_hash"] == world_hash(SPEC)
    assert set(WORLD["parts"]) == {"vit", "opt", "t5", "qformer_tokenizer"}
    for part, entry in WORLD["parts"].items():
        assert entry["command"].startswith(f"blip2train microworld pretrain part={part}")
        assert {"torch", "transformers", "timm"} <= set(entry["versions"])


def test_data_of_another_world_is_refused(tmp_path: Path) -> None:
    check_backbones(world_hash(SPEC))
    with pytest.raises(ConfigError, match="another|know world"):
        check_backbones(world_hash(WorldSpec(size=96)))
    with pytest.raises(ConfigError, match="no backbones"):
        check_backbones(world_hash(SPEC), tmp_path)


@pytest.mark.parametrize("part", ["opt", "t5"])
def test_language_models_load_as_ordinary_transformers_folders_in_half_size(part: str) -> None:
    loader = AutoModelForCausalLM if part == "opt" else AutoModelForSeq2SeqLM
    model = loader.from_pretrained(ASSETS / part, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / part)
    assert model.config.vocab_size == len(tokenizer) == 67
    assert model.config.eos_token_id == tokenizer.eos_token_id and model.config.pad_token_id == tokenizer.pad_token_id
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    assert all(tensor.dtype == torch.float16 for tensor in load_file(ASSETS / part / "model.safetensors").values())


@pytest.mark.parametrize("part", ["opt", "t5"])
def test_the_text_oracle_scores_what_world_json_says(part: str) -> None:
    model, tokenizer = load(part, SPEC, ASSETS / part)
    noted = WORLD["parts"][part]["scores"]["two_objects"]
    scenes = oracle.scenes_for(SPEC, 2, 60)
    assert oracle.text_oracle(model, tokenizer, scenes)["all"] == pytest.approx(noted["all"], abs=0.05)
    assert oracle.caption_truth(model, tokenizer, scenes) == pytest.approx(noted["caption_true"], abs=0.15)


def test_the_text_oracle_is_beyond_the_plateau_with_one_and_two_objects() -> None:
    scores = WORLD["parts"]["opt"]["scores"]
    assert scores["one_object"]["all"] >= 0.95 and scores["two_objects"]["all"] >= 0.95
    assert min(scores["two_objects"].values()) >= 0.85


def test_without_the_description_the_language_model_can_only_guess() -> None:
    model, tokenizer = load("opt", SPEC, ASSETS / "opt")
    questions = ["what color is the ring", "what shape is the red object", "where is the star", "what size is the ring"]
    given = oracle.continue_texts(model, tokenizer, [f"question: {text} answer:" for text in questions], 3)
    assert len(given) == 4 and all(len(answer.split()) == 1 for answer in given)


def test_the_vit_probe_scores_what_world_json_says() -> None:
    vit, _ = load("vit", SPEC, ASSETS / "vit")
    noted = WORLD["parts"]["vit"]["scores"]["probe"]
    scores = oracle.probe_vit(vit, SPEC, num_train=300, num_test=100)
    assert set(scores) == set(noted)
    for name, score in scores.items():
        assert score == pytest.approx(noted[name], abs=0.06)
        assert noted[name] >= 0.95


def test_a_small_vit_is_made_saved_and_measured_by_the_command(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        entry = pretrain("vit", SPEC, tmp_path, steps=60, command="blip2train microworld pretrain part=vit steps=60")
    assert entry["scores"]["probe"]["color"] >= 0.60 and entry["scores"]["probe"]["where"] >= 0.90
    assert "60 of 60" in caplog.text and "steps/s" in caplog.text
    assert read_json(tmp_path / "world.json")["parts"]["vit"] == entry
    assert sorted(path.name for path in tmp_path.iterdir()) == ["vit", "world.json"]


def test_a_small_opt_learns_which_words_answer_which_question(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backbone, "PLANS", {"opt": Plan(steps=9000, batch_size=6, lr=3e-3)})
    losses: list[float] = []
    entry = pretrain(
        "opt", SPEC, tmp_path, steps=120, num_scenes=20, progress=lambda _done, _total, loss: losses.append(loss)
    )
    assert losses[0] > 3.5 and sum(losses[-10:]) / 10 < 1.6  # log(67) = 4.2 at the start
    assert entry["scores"]["one_object"]["size"] >= 0.40 and entry["plan"]["steps"] == 120
    assert (tmp_path / "opt" / "tokenizer.json").is_file()


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("part", "objects", "bar"), [("opt", "two_objects", 0.70), ("t5", "one_object", 0.70)])
def test_a_longer_run_reads_descriptions(part: backbone.Part, objects: str, bar: float, tmp_path: Path) -> None:
    entry = pretrain(part, SPEC, tmp_path, steps=1500, num_scenes=100)
    assert entry["scores"][objects]["all"] >= bar


def test_an_unknown_part_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="gpt"):
        pretrain("gpt", SPEC, tmp_path)  # type: ignore[arg-type]
