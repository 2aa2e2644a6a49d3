"""A language model that nobody prepared joins by one yaml of the user's own, and LoRA by one setting."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from blip2train.checkpoint.find import find_checkpoint
from blip2train.checkpoint.io import WEIGHTS
from blip2train.cli.config import PACKAGE_DIR, build, compose
from blip2train.cli.evaluate import evaluate, load_model, load_run_config
from blip2train.errors import ConfigError
from blip2train.model.freezing import trainable_state_dict
from blip2train.run_dir import RunDir

WORLD = PACKAGE_DIR / "microworld" / "assets"
MODELS = {
    "gemma": "num_hidden_layers: 2, num_attention_heads: 4, num_key_value_heads: 1, head_dim: 8, intermediate_size: 64",
    "phi": "num_hidden_layers: 2, num_attention_heads: 4, intermediate_size: 64",
    "bloom": "n_layer: 2, n_head: 4",
}
YAML = """# @package llm
# My own model: random weights, the micro-world's words.
path: {tokenizer}
architecture: {{model_type: {kind}, vocab_size: 67, hidden_size: 32, {sizes}, {ids}}}
model:
  _target_: blip2train.model.language_model.decoder_only.DecoderOnly
  path_or_config: ${{llm.architecture}}
tokenizer:
  _target_: blip2train.data.tokenizer.LanguageModelTokenizer.load
  path: ${{llm.path}}
caption_prompt: ""
question_prompt: "question: {{question}} answer:"
prefix_split: false
"""
IDS = "pad_token_id: 0, bos_token_id: 1, eos_token_id: 1"
LORA = "llm.model.lora={r: 2, alpha: 4, dropout: 0.1}"


def own_yaml(folder: Path, kind: str) -> Path:
    """A config folder of a user's with one language model in it."""
    group = folder / "model" / "language_model"
    group.mkdir(parents=True)
    text = YAML.format(kind=kind, sizes=MODELS[kind], ids=IDS, tokenizer=WORLD / "opt")
    (group / f"my_{kind}.yaml").write_text(text)
    return folder


def caption(laboratory, run: RunDir) -> dict[str, float]:
    """Metrics of a few generated captions."""
    choice = ["benchmark=microworld_caption", f"run={run.path}", f"paths.data={laboratory.data}", "limit=4"]
    return evaluate(compose("evaluate", choice), run)["microworld_caption"]


@pytest.mark.parametrize("kind", MODELS)
def test_a_model_type_without_a_yaml_of_ours_trains_and_is_evaluated(laboratory, tmp_path: Path, kind: str) -> None:
    mine = [f"hydra.searchpath=[file://{own_yaml(tmp_path / 'mine', kind)}]", f"model/language_model=my_{kind}"]
    settings = ["init_from=scratch", "trainer.max_steps=2", *mine]
    run = laboratory.train("microworld_stage2_opt", tmp_path / "run", *settings).run
    model = load_model(load_run_config(run), run)
    assert model.language_model.model.config.model_type == kind
    fresh = build(load_run_config(run).model)
    assert not torch.equal(model.projection.weight, fresh.projection.weight)
    assert "caption_cider" in caption(laboratory, run)


@pytest.mark.slow
def test_the_command_line_takes_a_config_folder(laboratory, tmp_path: Path) -> None:
    done = subprocess.run(
        [
            *(sys.executable, "-m", "blip2train.cli.train", "--config-dir", str(own_yaml(tmp_path / "mine", "gemma"))),
            *("experiment=microworld_stage2_opt", "model/language_model=my_gemma", "init_from=scratch"),
            *(f"paths.data={laboratory.data}", f"run_dir={tmp_path}/run", "trainer.max_steps=2"),
            *("optim.warmup_steps=1", "data.batch_size=8", "data.num_workers=0"),
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=240,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert load_run_config(RunDir(tmp_path / "run")).llm.architecture.model_type == "gemma"
    assert find_checkpoint(RunDir(tmp_path / "run")).name == "step-0000002"


def test_a_run_with_lora_resumes_bit_equal_and_is_evaluated_with_its_adapter(
    laboratory, stage1_run: RunDir, tmp_path: Path
) -> None:
    settings = [f"init_from={stage1_run.path}", "checkpoint.every_steps=2", "checkpoint.keep_last=0", LORA]
    whole = laboratory.train("microworld_stage2_opt", tmp_path / "whole", *settings).run
    state = load_file(find_checkpoint(whole) / WEIGHTS)
    adapter = {name: tensor for name, tensor in state.items() if name.startswith("language_model.")}
    assert len(adapter) == 16, "two matrices, query and value, four layers"
    assert all("lora_" in name for name in adapter)
    assert all(tensor.any() for tensor in adapter.values()), "the second matrix began at zero and was trained"

    shutil.copytree(whole.path, tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed" / "checkpoints" / "step-0000004")
    resumed = laboratory.train("microworld_stage2_opt", tmp_path / "resumed", *settings).run
    assert (find_checkpoint(resumed) / WEIGHTS).read_bytes() == (find_checkpoint(whole) / WEIGHTS).read_bytes()

    model = load_model(load_run_config(whole), whole)
    assert all(torch.equal(trainable_state_dict(model)[name], tensor) for name, tensor in adapter.items())
    assert "caption_cider" in caption(laboratory, whole)


def test_a_tokenizer_of_another_model_is_refused_before_the_first_step(laboratory, tmp_path: Path) -> None:
    settings = ["init_from=scratch", "llm.model.path_or_config={model_type: opt, vocab_size: 40, hidden_size: 32, "]
    settings[1] += "word_embed_proj_dim: 32, num_hidden_layers: 1, num_attention_heads: 2, ffn_dim: 32}"
    with pytest.raises(ConfigError, match="the tokenizer has 67 tokens, the language model 40 embeddings"):
        laboratory.train("microworld_stage2_opt", tmp_path / "run", *settings)
