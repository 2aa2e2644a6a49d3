"""Folders of transformers as users have them: shards, pickles, half precision, broken or foreign; the real sizes."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_world import assert_bit_equal, save_generation, save_retrieval, saved_tensors
from omegaconf import OmegaConf
from PIL import Image
from safetensors.torch import load_file, save_file
from test_convert_huggingface import our_model, pixels, run_convert
from torch import nn
from transformers import (
    AutoProcessor,
    AutoTokenizer,
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2ForImageTextRetrieval,
    OPTConfig,
    T5Config,
)

from blip2train.checkpoint.find import find_checkpoint
from blip2train.checkpoint.huggingface import NOT_HELD, fuse_qkv_bias, split_qkv_bias, to_ours, to_theirs
from blip2train.checkpoint.huggingface_config import qformer_settings, vision_settings
from blip2train.checkpoint.huggingface_text import tokenizer_settings
from blip2train.cli.config import build, compose
from blip2train.cli.evaluate import evaluate, load_run_config
from blip2train.cli.train import train
from blip2train.data.shards import ShardWriter
from blip2train.errors import Blip2TrainError, CheckpointError, ConfigError
from blip2train.run_dir import RunDir


@pytest.fixture(scope="module")
def opt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("opt") / "source"
    save_generation(folder, "opt")
    return folder


def refused(source: Path, tmp_path: Path, match: str, *overrides: str) -> Blip2TrainError:
    """The error of a conversion that leaves nothing behind."""
    with pytest.raises((CheckpointError, ConfigError), match=match) as caught:
        run_convert("huggingface", "blip2train", source, tmp_path / "run", *overrides)
    assert not (tmp_path / "run").exists()
    assert not list(tmp_path.glob("*.partial"))
    return caught.value


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    raw = json.loads(path.read_text())
    for key, value in changes.items():
        part = raw[key] if isinstance(raw.get(key), dict) else raw
        part |= value if isinstance(value, dict) else {key: value}
    path.write_text(json.dumps(raw))


def test_shards_are_read_and_a_missing_one_is_named(tmp_path: Path) -> None:
    whole = save_generation(tmp_path / "whole", "opt").state_dict()
    save_generation(tmp_path / "source", "opt", shard="50KB")
    shards = sorted((tmp_path / "source").glob("model-*.safetensors"))
    assert len(shards) > 1
    run_convert("huggingface", "blip2train", tmp_path / "source", tmp_path / "fine")
    assert_bit_equal(saved_tensors(tmp_path / "source"), saved_tensors(tmp_path / "whole"))
    model, _ = our_model(tmp_path / "fine")
    assert torch.equal(model.qformer.query_tokens, whole["query_tokens"])
    shards[1].unlink()
    error = refused(tmp_path / "source", tmp_path, "1 of .* shards are missing")
    assert shards[1].name in str(error)


def test_a_tensor_that_no_shard_holds_is_named(tmp_path: Path) -> None:
    save_generation(tmp_path / "source", "opt", shard="50KB")
    shard = next(
        path for path in (tmp_path / "source").glob("model-*.safetensors") if "query_tokens" in load_file(path)
    )
    save_file({k: v for k, v in load_file(shard).items() if k != "query_tokens"}, shard, metadata={"format": "pt"})
    refused(tmp_path / "source", tmp_path, "lacks 1 tensors that the index places in it: query_tokens")


class _Harm:
    def __init__(self, sentinel: Path) -> None:
        self.sentinel = sentinel

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.sentinel),))


def test_a_pickle_is_read_without_running_code(opt: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "processor_config.json"):
        (source / name).write_bytes((opt / name).read_bytes())
    tensors = saved_tensors(opt)
    torch.save(tensors, source / "pytorch_model.bin")
    run_convert("huggingface", "blip2train", source, tmp_path / "fine")
    model, _ = our_model(tmp_path / "fine")
    assert torch.equal(model.qformer.query_tokens, tensors["query_tokens"])
    sentinel = tmp_path / "code_was_run"
    torch.save(tensors | {"query_tokens": _Harm(sentinel)}, source / "pytorch_model.bin")
    refused(source, tmp_path, "no code of it was run")
    (source / "pytorch_model.bin").write_bytes(pickle.dumps(_Harm(sentinel)))
    refused(source, tmp_path, "no code of it was run")
    assert not sentinel.exists()


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"architectures": ["InstructBlipForConditionalGeneration"], "model_type": "instructblip"}, "instructblip"),
        ({"architectures": ["Blip2Model"]}, "Blip2Model"),
        ({"vision_config": {"hidden_act": "quick_gelu"}, "qformer_config": {"hidden_act": "relu"}}, "2 unsupported"),
        ({"vision_config": {"hidden_size": "wide"}}, "not a config that transformers reads"),
        ({"vision_config": {"image_size": [28, 14]}}, "image_size is .*not one number"),
        ({"qformer_config": {"num_hidden_layers": 3}}, "num_layers: the file has 4, the config 3"),
        ({"qformer_config": {"hidden_size": 27}}, "hidden_size: the file has 24, the config 27"),
        ({"vision_config": {"num_hidden_layers": 3}}, "vision encoder: missing: blocks.2"),
        ({"text_config": {"num_hidden_layers": 3}}, "language model: missing: model.decoder.layers.2"),
    ],
)
def test_settings_and_weights_that_do_not_fit(opt: Path, tmp_path: Path, changes: dict[str, Any], match: str) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for path in opt.iterdir():
        (source / path.name).write_bytes(path.read_bytes())
    edit_config(source, **changes)
    refused(source, tmp_path, match)


def test_a_surplus_tensor_is_named(opt: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for path in opt.iterdir():
        (source / path.name).write_bytes(path.read_bytes())
    tensors = saved_tensors(opt) | {"qformer.added_by_hand": torch.zeros(2)}
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    refused(source, tmp_path, "qformer.added_by_hand")


def test_an_experiment_of_another_width_is_refused_and_both_are_named(opt: Path, tmp_path: Path) -> None:
    refused(opt, tmp_path, "hidden_size: the source has 24, the experiment 96", "experiment=microworld_stage2_opt")
    refused(opt, tmp_path, "of stage 1", "experiment=microworld_stage1")


@pytest.mark.parametrize("experiment", ["microworld_stage2_opt", "paper/stage2_vitg_opt_2_7b"])
def test_an_experiment_of_this_model_lends_its_settings(opt: Path, tmp_path: Path, experiment: str) -> None:
    """Sizes from the source, the rest from the experiment; what is resolved twice points to the folder's own parts."""
    sizes = {"hidden_size": 24, "num_layers": 4, "num_heads": 3, "num_queries": 4, "intermediate_size": 40}
    own = [f"model.qformer.{key}={value}" for key, value in sizes.items()] + ["model.vision_encoder.embed_dim=24"]
    run_convert("huggingface", "blip2train", opt, tmp_path / "run", f"experiment={experiment}", *own, "optim.lr=0.5")
    model, config = our_model(tmp_path / "run")
    assert config.optim.lr == 0.5 and config.name == experiment.replace("/", "_")
    parts = str(tmp_path / "run" / "parts")
    for path in (config.llm.path, config.data.collator.tokenizer.path, config.model.language_model.path_or_config):
        assert path == f"{parts}/language_model"
    assert model.vision_encoder.image.size == 28


def test_without_an_experiment_what_is_given_still_counts(tmp_path: Path) -> None:
    """A name, a step count, the tokenizer that the source lacks: none is dropped in silence."""
    save_retrieval(tmp_path / "source")
    for path in (tmp_path / "source").glob("tokenizer*"):
        path.unlink()
    tokenizer = ["+tokenizer.path=my-bert", "+tokenizer.vocab_size=60", "+tokenizer.dec_id=3"]
    given = ["name=mine", "trainer.max_steps=9", "trainer.devices=2", *tokenizer]
    run_convert("huggingface", "blip2train", tmp_path / "source", tmp_path / "run", *given)
    config = load_run_config(RunDir(tmp_path / "run"))
    assert (config.name, config.trainer.max_steps, config.trainer.devices) == ("mine", 9, 2)
    assert config.tokenizer.path == config.data.collator.tokenizer.path == "my-bert"
    assert config.tokenizer.dec_id == config.stage.objectives.itg.dec_id == 3
    assert "from" not in config and "source_checkpoint" not in config


def test_a_target_in_use_and_a_folder_of_nothing(opt: Path, tmp_path: Path) -> None:
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").touch()
    with pytest.raises(ConfigError, match="in use"):
        run_convert("huggingface", "blip2train", opt, tmp_path / "used")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", tmp_path, "no readable config.json")


@pytest.mark.parametrize("text", ["opt", "t5"])
def test_half_precision_comes_back_bit_equal(tmp_path: Path, text: str) -> None:
    """Saved as released: backbones and projection in float16, the Q-Former in float32."""
    save_generation(tmp_path / "source", text, dtype=torch.float16)
    report = run_convert("huggingface", "blip2train", tmp_path / "source", tmp_path / "run")
    model, config = our_model(tmp_path / "run")
    assert model.projection.weight.dtype == torch.float32
    assert next(model.vision_encoder.backbone.parameters()).dtype == torch.float16
    assert config.llm.model.dtype == ("float16" if text == "opt" else "float32")
    assert any("overflows" in note for note in report.notes) == (text == "t5")
    run_convert("blip2train", "huggingface", tmp_path / "run", tmp_path / "back")
    assert_bit_equal(saved_tensors(tmp_path / "source"), saved_tensors(tmp_path / "back"))
    raw = [json.loads((tmp_path / name / "config.json").read_text())["dtype"] for name in ("source", "back")]
    assert raw[0] == raw[1]


def test_a_k_bias_and_another_epsilon_are_kept(tmp_path: Path) -> None:
    """EVA has no k bias; a source that has one becomes a plain ViT, with the source's epsilon in every norm."""
    model = save_generation(tmp_path / "source", "opt", vision={"layer_norm_eps": 1e-3})
    with torch.no_grad():
        for layer in model.vision_model.encoder.layers:
            nn.init.normal_(layer.self_attn.qkv.bias, std=0.5)
    model.save_pretrained(tmp_path / "source")
    run_convert("huggingface", "blip2train", tmp_path / "source", tmp_path / "run")
    ours, config = our_model(tmp_path / "run")
    assert config.model.vision_encoder.name.startswith("vit_")
    inputs = AutoProcessor.from_pretrained(tmp_path / "source")(images=list(pixels()), return_tensors="pt")
    with torch.no_grad():
        expected = model.get_image_features(inputs["pixel_values"], return_dict=True).pooler_output
        torch.testing.assert_close(ours.visual_prompt(pixels()), expected, rtol=1e-5, atol=1e-5)
    run_convert("blip2train", "huggingface", tmp_path / "run", tmp_path / "back")
    assert_bit_equal(saved_tensors(tmp_path / "source"), saved_tensors(tmp_path / "back"))


def test_text_networks_of_a_generation_model_are_kept_aside(tmp_path: Path) -> None:
    save_generation(tmp_path / "source", "opt", qformer={"use_qformer_text_input": True})
    report = run_convert("huggingface", "blip2train", tmp_path / "source", tmp_path / "run")
    assert len(report.kept_aside) == 4 * 6
    run_convert("blip2train", "huggingface", tmp_path / "run", tmp_path / "back")
    assert_bit_equal(saved_tensors(tmp_path / "source"), saved_tensors(tmp_path / "back"))


@pytest.mark.parametrize("kind", ["generation", "retrieval"])
def test_every_tensor_of_the_released_sizes_has_a_name(kind: Any) -> None:
    """The classes at their default (released ViT-g, OPT-2.7B) sizes on the meta device: there and back, all of them."""
    config = Blip2Config(qformer_config={"use_qformer_text_input": kind == "retrieval", "vocab_size": 30523})
    with torch.device("meta"):
        model = (Blip2ForConditionalGeneration if kind == "generation" else Blip2ForImageTextRetrieval)(config)
    theirs = {name: tensor.to("meta") for name, tensor in model.state_dict().items()}
    ours = to_ours(theirs, kind, "meta", eva=True)
    again = to_theirs(ours, kind, "meta")
    assert {name: tensor.shape for name, tensor in again.items()} == {n: t.shape for n, t in theirs.items()}
    assert len(ours.vision) == 39 * 13 + 4
    with torch.device("meta"):
        encoder = build(vision_settings(config, {}, "float16", eva=True))
        qformer = build({"_target_": "blip2train.model.qformer.qformer.QFormer", **qformer_settings(config)})
    assert {n: t.shape for n, t in encoder.backbone.state_dict().items()} == {
        n: t.shape for n, t in ours.vision.items()
    }
    assert sum(tensor.numel() for tensor in ours.vision.values()) == 985_894_528, "the paper's ViT-g, frozen"
    shapes = {f"qformer.{name}": tensor.shape for name, tensor in qformer.state_dict().items()}
    assert all(shapes[name] == tensor.shape for name, tensor in ours.trained.items() if name.startswith("qformer."))
    assert not set(ours.trained) & set(NOT_HELD)


def test_an_old_config_without_image_token_and_other_dropouts(opt: Path, tmp_path: Path) -> None:
    """What ours needs not, or only training reads, is a note; the source's values return."""
    source = tmp_path / "source"
    source.mkdir()
    for path in opt.iterdir():
        (source / path.name).write_bytes(path.read_bytes())
    edit_config(source, image_token_index=None, qformer_config={"attention_probs_dropout_prob": 0.3})
    report = run_convert("huggingface", "blip2train", source, tmp_path / "run")
    assert len(report.notes) == 2
    run_convert("blip2train", "huggingface", tmp_path / "run", tmp_path / "back")
    raw = json.loads((tmp_path / "back" / "config.json").read_text())
    assert raw["qformer_config"]["attention_probs_dropout_prob"] == 0.3
    assert raw.get("image_token_index") is None


def test_opt_ends_by_a_line_break_and_t5_closes_prompts(shared_data: Path, tmp_path: Path) -> None:
    """On the published tokenizers: the released OPT models' eos is a line break, T5's tokenizer ends every text."""
    names = {"vocab.json": "opt_vocab.json", "merges.txt": "opt_merges.txt"}
    for name, stored in names.items():
        (tmp_path / name).write_bytes((shared_data / "tokenizers" / "gpt2_opt" / stored).read_bytes())
    specials = {"bos_token": "</s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "</s>"}
    settings = {"tokenizer_class": "GPT2Tokenizer", "add_bos_token": True, **specials}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    opt = AutoTokenizer.from_pretrained(tmp_path)
    found = tokenizer_settings(opt, OPTConfig(eos_token_id=50118))
    assert found["end_token"] == "\n" and not found["close_prompt"]
    assert found["open_prompt"] == (opt("a")["input_ids"][0] == 2)
    t5 = AutoTokenizer.from_pretrained(shared_data / "tokenizers" / "t5")
    expected = {"end_token": None, "open_prompt": False, "close_prompt": True}
    assert tokenizer_settings(t5, T5Config(eos_token_id=1)) == expected


def test_an_end_id_without_a_spelling_still_ends_a_text(opt: Path, tmp_path: Path) -> None:
    """transformers stops at text_config.eos_token_id, whatever the tokenizer can spell; so does ours, and says so."""
    shutil.copytree(opt, tmp_path / "source")
    edit_config(tmp_path / "source", text_config={"eos_token_id": 60})  # a row of the model without a token
    report = run_convert("huggingface", "blip2train", tmp_path / "source", tmp_path / "run")
    assert any("eos_token_id is 60" in note and "own eos is 1." in note for note in report.notes)
    tokenizer = build(load_run_config(RunDir(tmp_path / "run")).llm.tokenizer)
    assert tokenizer.end_id == 60
    assert tokenizer.encode(["w3"], 8, add_end=True)[0].tolist()[0][-1] == 60
    assert tokenizer.decode(torch.tensor([[4, 60, 5]])) == ["w0"]
    assert not any(
        "eos_token_id" in note for note in run_convert("huggingface", "blip2train", opt, tmp_path / "b").notes
    )


def test_a_config_of_another_width_is_named_by_its_settings(opt: Path, tmp_path: Path) -> None:
    shutil.copytree(opt, tmp_path / "source")
    edit_config(tmp_path / "source", qformer_config={"hidden_size": 48, "num_hidden_layers": 6})
    error = refused(tmp_path / "source", tmp_path, "model.qformer.hidden_size: the file has 24, the config 48")
    assert "model.qformer.num_layers: the file has 4, the config 6" in str(error)
    assert "config.json and the weights" in str(error) and "self_attention" not in str(error)


def test_biases_split_and_fuse() -> None:
    bias = torch.tensor([1.0, 2.0, 0.0, 0.0, 3.0, 4.0])
    split = split_qkv_bias({"blocks.0.attn.qkv.bias": bias, "cls_token": bias})
    assert split["blocks.0.attn.q_bias"].tolist() == [1.0, 2.0]
    assert split["blocks.0.attn.v_bias"].tolist() == [3.0, 4.0]
    assert torch.equal(fuse_qkv_bias(split)["blocks.0.attn.qkv.bias"], bias)


def test_convert_then_evaluate_says_what_transformers_says(opt: Path, tmp_path: Path) -> None:
    """Through the verbs' functions: convert, move the folder, evaluate; the captions are transformers' own."""
    images = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in pixels(5)]
    with ShardWriter(tmp_path / "shards", "val", samples_per_shard=5) as writer:
        for number, image in enumerate(images):
            image.save(tmp_path / "image.png")
            record = json.dumps({"captions": ["a red square"]}).encode()
            writer.write(str(number), (tmp_path / "image.png").read_bytes(), "png", record)
    target = tmp_path / "run"
    run_convert("huggingface", "blip2train", opt, target)
    target = target.rename(tmp_path / "moved")
    settings = ["max_new_tokens=8", "min_new_tokens=0", "num_beams=5"]
    overrides = [f"benchmarks.nocaps.settings.{item}" for item in settings]
    overrides += [f"benchmarks.nocaps.urls=[{tmp_path}/shards/val-000000.tar]", "benchmarks.nocaps.prompt=a photo of"]
    config = compose("evaluate", [f"run={target}", "benchmark=nocaps", "device=cpu", *overrides])
    evaluate(config, RunDir.open(target))
    _, rows = RunDir.open(target).read_eval("nocaps")
    processor = AutoProcessor.from_pretrained(opt)
    theirs = Blip2ForConditionalGeneration.from_pretrained(opt).eval()
    inputs = processor(images=images, text=["a photo of"] * 5, return_tensors="pt")
    ids = theirs.generate(**inputs, max_new_tokens=8, num_beams=5)[:, inputs["input_ids"].shape[1] :]
    expected = [text.strip() for text in processor.batch_decode(ids, skip_special_tokens=True)]
    assert [row["prediction"] for row in rows] == expected
    assert len(set(expected)) > 1


@pytest.mark.slow
def test_the_command_line_converts_and_says_what_it_did(opt: Path, tmp_path: Path) -> None:
    """A process of its own: exit status, summary, and a broken source that leaves nothing."""
    command = [sys.executable, "-m", "blip2train.cli.convert", "from=huggingface", "to=blip2train"]
    for source, code, said in ((opt, 0, "language model"), (tmp_path, 2, "no readable config.json")):
        target = tmp_path / f"run{code}"
        done = subprocess.run(
            [*command, f"source={source}", f"target={target}"],
            capture_output=True,
            text=True,
            check=False,
            cwd=tmp_path,
        )
        assert done.returncode == code, done.stderr
        assert said in done.stderr + done.stdout
        assert target.exists() == (code == 0)


def test_a_converted_stage1_model_starts_a_stage2_run(laboratory: Any, tmp_path: Path) -> None:
    """`init_from=` of the folder: two steps of stage 2 from transformers' Q-Former, on its encoder in parts/."""
    theirs = save_retrieval(tmp_path / "source")
    run_convert("huggingface", "blip2train", tmp_path / "source", tmp_path / "run")
    source = load_run_config(RunDir.open(tmp_path / "run"))
    own = [f"init_from={tmp_path / 'run'}", "trainer.max_steps=2", "optim.lr=1e-6", "optim.min_lr=0.0"]
    config = laboratory.compose("microworld_stage2_opt", tmp_path / "stage2", *own)
    for part in ("vision_encoder", "qformer"):
        config.model[part] = OmegaConf.create(OmegaConf.to_container(source.model[part], resolve=True))
    train(config, RunDir(tmp_path / "stage2"))
    trained = load_file(find_checkpoint(RunDir(tmp_path / "stage2")) / "model.safetensors")
    torch.testing.assert_close(trained["qformer.query_tokens"], theirs.query_tokens.detach(), rtol=0, atol=1e-4)
    norm = theirs.vision_model.post_layernorm.weight.detach()
    torch.testing.assert_close(trained["ln_vision.weight"], norm, rtol=0, atol=1e-4)
