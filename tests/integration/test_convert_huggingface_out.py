"""A run trained here -> transformers: `from_pretrained` and `AutoProcessor` alone give our logits and ids; and back."""

from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_world import (
    SIZE,
    TEXT,
    WORDS,
    assert_bit_equal,
    language_model_tokenizer,
    qformer_tokenizer,
    randomise,
    save_retrieval,
    saved_tensors,
)
from omegaconf import OmegaConf
from PIL import Image
from safetensors.torch import load_file, save_file
from test_convert_huggingface import our_model, pixels, run_convert
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoProcessor,
    Blip2ForConditionalGeneration,
    Blip2ForImageTextRetrieval,
)

from blip2train.batch import Stage2Batch
from blip2train.checkpoint.io import save_checkpoint
from blip2train.cli.config import build, compose, resolved_yaml
from blip2train.cli.convert import convert
from blip2train.cli.evaluate import load_run_config
from blip2train.data.image_transform import EvalTransform, decode_image
from blip2train.errors import ConfigError
from blip2train.model.language_model.base import GenerationSettings
from blip2train.run_dir import RunDir

PROMPTS = ["a photo of", "question w3 w4 w5 answer"]
VIT = ["model.vision_encoder.pretrained=false", "model.vision_encoder.dtype=float32", "model/qformer=tiny"]
EVA = ["model.vision_encoder.layer=-1", "model.vision_encoder.embed_dim=24", f"model.vision_encoder.image.size={SIZE}"]
EVA += ["+model.vision_encoder.model_args={embed_dim:24,depth:2,num_heads:3,mlp_ratio:2.0}"]


def save_language_model(folder: Path, text: str, rows: int, *, framed: bool) -> None:
    """A tiny language model of `rows` embeddings with its tokenizer, as a folder of transformers."""
    auto: Any = AutoModelForSeq2SeqLM if text == "t5" else AutoModelForCausalLM
    torch.manual_seed(3)
    model = auto.from_config(AutoConfig.for_model(**(TEXT[text] | {"vocab_size": rows})))
    if text == "t5":
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.clone())
    randomise(model, seed=3)
    model.save_pretrained(folder)
    language_model_tokenizer(text, framed=framed).save_pretrained(folder)


def write_run(folder: Path, stage: int, *overrides: str) -> Any:
    """A run folder as `train` writes it, of a model with random weights; returns its config."""
    groups = [f"stage=stage{stage}", f"model=blip2_stage{stage}", f"data=stage{stage}", "data/tokenizer=microworld"]
    groups += [f"optim=adamw_stage{stage}", "trainer.max_steps=10", "name=tried", f"run_dir={folder}", *VIT, *EVA]
    config = compose("train", [*groups, *overrides])
    model = build(config.model)
    trained = nn.ParameterDict({name.replace(".", "/"): p for name, p in model.named_parameters() if p.requires_grad})
    randomise(trained, seed=5)
    if stage == 1:
        model.temperature.data.fill_(0.05)
    folder.mkdir(parents=True)
    RunDir(folder).config_path.write_text(resolved_yaml(config))
    save_checkpoint(model, RunDir(folder).checkpoints / "step-0000010", {"stage": stage, "name": "tried", "step": 10})
    # the encoder of a run trained here lies outside its folder
    randomise(model.vision_encoder.backbone, seed=6)
    weights = folder.with_name("vision.safetensors")
    state = model.vision_encoder.backbone.state_dict()
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, weights)
    config.model.vision_encoder.weights = str(weights)
    RunDir(folder).config_path.write_text(resolved_yaml(config))
    return config


def checkpoint(folder: Path) -> dict[str, Tensor]:
    return load_file(next(RunDir(folder).checkpoints.iterdir()) / "model.safetensors")


# rows: as many as tokens, so that <image> needs a row of its own; or some to spare
@pytest.fixture(scope="module", params=[("opt", 64), ("opt", 51), ("t5", 64), ("t5", 51), ("llama", 51)])
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, int, Path]:
    text, rows = request.param
    assert len(language_model_tokenizer(text)) == 51
    folder = tmp_path_factory.mktemp(f"{text}{rows}")
    save_language_model(folder / "llm", text, rows, framed=False)
    kind = "flan_t5_xl" if text == "t5" else "opt_2_7b"
    own = [f"model/language_model={kind}", f"llm.path={folder / 'llm'}", "llm.model.dtype=float32"]
    own += ["llm.tokenizer.end_token=null", "model.ln_vision_eps=1e-6"]
    write_run(folder / "run", 2, *own)
    report = run_convert("blip2train", "huggingface", folder / "run", folder / "out")
    assert any("row 51 was added" in note for note in report.notes) == (rows == 51)
    return text, rows, folder


@torch.no_grad()
@pytest.mark.parametrize("num_beams", [1, 5])
def test_transformers_says_what_ours_says(exported: tuple[str, int, Path], num_beams: int) -> None:
    """`generate` with its defaults: ours opens and ends texts by its yaml, transformers by the files alone."""
    text, _, folder = exported
    theirs = Blip2ForConditionalGeneration.from_pretrained(folder / "out").eval()
    processor = AutoProcessor.from_pretrained(folder / "out")
    model, config = our_model(folder / "run")
    tokenizer = build(config.llm.tokenizer)
    settings = GenerationSettings(max_new_tokens=8, num_beams=num_beams, end_id=tokenizer.end_id)
    for rows in ([0], [1], [0, 1]):
        images, prompts = pixels()[rows], [PROMPTS[row] for row in rows]
        ours = model.generate(images, *tokenizer.encode_prompt(prompts, 32, side="left"), settings)
        inputs = processor(images=list(images), text=prompts, padding=True, return_tensors="pt")
        whole = theirs.generate(**inputs, max_new_tokens=8, num_beams=num_beams)
        expected = whole[:, 1:] if text == "t5" else whole[:, inputs["input_ids"].shape[1] :]
        assert ours.tolist() == expected.tolist()
        assert [processor.decode(row, skip_special_tokens=True) for row in expected] == [
            processor.decode(row, skip_special_tokens=True) for row in ours
        ]


@torch.no_grad()
def test_prompt_embeddings_and_logits(exported: tuple[str, int, Path]) -> None:
    """Visual prompt to 1e-5, and next-token logits after a prompt; an added row is one more column, nothing else."""
    text, rows, folder = exported
    theirs = Blip2ForConditionalGeneration.from_pretrained(folder / "out").eval()
    processor = AutoProcessor.from_pretrained(folder / "out")
    model, config = our_model(folder / "run")
    inputs = processor(images=list(pixels()), text=[PROMPTS[0]] * 2, return_tensors="pt")
    visual = theirs.get_image_features(inputs["pixel_values"], return_dict=True).pooler_output
    torch.testing.assert_close(model.visual_prompt(pixels()), visual, rtol=1e-5, atol=1e-5)
    ids, mask = build(config.llm.tokenizer).encode_prompt([PROMPTS[0]] * 2, 32)
    target = torch.tensor([[7], [9]])
    ours = model(Stage2Batch(pixels(), ids, mask, target, target > 0, ["0", "1"])).logits[:, 0]
    starts = {"decoder_input_ids": torch.zeros(2, 1, dtype=torch.int64)} if text == "t5" else {}
    expected = theirs(**inputs, **starts).logits[:, -1]
    assert expected.shape[1] == rows + (rows == 51)
    torch.testing.assert_close(ours, expected[:, :rows], rtol=1e-5, atol=1e-5)


def test_a_run_comes_back_bit_equal(exported: tuple[str, int, Path], tmp_path: Path) -> None:
    """ours -> transformers -> ours: trained tensors, encoder, language model and prompts."""
    _, rows, folder = exported
    run_convert("huggingface", "blip2train", folder / "out", tmp_path / "back")
    assert_bit_equal(checkpoint(folder / "run"), checkpoint(tmp_path / "back"))
    parts = tmp_path / "back" / "parts"
    assert_bit_equal(load_file(folder / "vision.safetensors"), load_file(parts / "vision_encoder.safetensors"))
    before, after = our_model(folder / "run"), our_model(tmp_path / "back")
    first, second = (pair[0].language_model.model.state_dict() for pair in (before, after))
    assert_bit_equal(first, second)
    tokenizers = [build(pair[1].llm.tokenizer) for pair in (before, after)]
    prompts = [tokenizer.encode_prompt([*PROMPTS, ""], 16)[0].tolist() for tokenizer in tokenizers]
    assert prompts[0] == prompts[1]
    assert tokenizers[1].vocab_size <= rows
    assert next((tmp_path / "back" / "checkpoints").iterdir()).name == "step-0000010"


@pytest.fixture(scope="module")
def exported_stage1(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stage1")
    qformer_tokenizer().save_pretrained(folder / "tokenizer")
    own = [f"tokenizer.path={folder / 'tokenizer'}", f"tokenizer.vocab_size={len(WORDS) + 5}", "tokenizer.dec_id=3"]
    write_run(folder / "run", 1, *own, "model.ln_vision_eps=1e-6", "model.contrastive_dim=16")
    report = run_convert("blip2train", "huggingface", folder / "run", folder / "out")
    assert any("temperature" in item for item in report.not_held)
    assert len([item for item in report.not_held if "lm_head" in item]) == 1, "one head, one line"
    return folder


@torch.no_grad()
def test_retrieval_of_an_exported_run(exported_stage1: Path) -> None:
    """Matching logits equal ours; similarities are ours times the temperature, which transformers does not have."""
    theirs = Blip2ForImageTextRetrieval.from_pretrained(exported_stage1 / "out").eval()
    processor = AutoProcessor.from_pretrained(exported_stage1 / "out")
    model, config = our_model(exported_stage1 / "run")
    texts = ["a red square", "w5"]
    inputs = processor(images=list(pixels()), text=texts, padding=True, return_tensors="pt")
    ids, mask = build(config.tokenizer)(texts, 32)
    tokens = model.image_tokens(pixels())
    matching = theirs(**inputs, use_image_text_matching_head=True).logits_per_image
    torch.testing.assert_close(model.matching_logits(tokens, ids, mask), matching, rtol=1e-5, atol=1e-5)
    features = model.image_features(model.encode_image(tokens).hidden)
    cosines = torch.einsum("iqe,te->itq", features, model.text_features(ids, mask)).amax(dim=-1)
    torch.testing.assert_close(cosines, theirs(**inputs).logits_per_image, rtol=1e-5, atol=1e-5)


def test_stage1_comes_back_with_temperature_and_head(exported_stage1: Path, tmp_path: Path) -> None:
    run_convert("huggingface", "blip2train", exported_stage1 / "out", tmp_path / "back")
    assert_bit_equal(checkpoint(exported_stage1 / "run"), checkpoint(tmp_path / "back"))
    assert float(checkpoint(tmp_path / "back")["temperature"]) == pytest.approx(0.05)


def test_a_trained_encoder_is_exported_and_comes_back(tmp_path: Path) -> None:
    """A plain ViT that trains: its tensors are in the checkpoint, and are what transformers sees."""
    own = ["model.vision_encoder.name=vit_base_patch16_224", "+model.vision_encoder.model_args.patch_size=14"]
    own += ["model.vision_encoder.trainable_blocks=all", "model.ln_vision_eps=1e-6"]
    write_run(tmp_path / "run", 1, *own)
    run_convert("blip2train", "huggingface", tmp_path / "run", tmp_path / "out")
    qkv = "vision_encoder.backbone.blocks.1.attn.qkv.bias"
    theirs = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(theirs["vision_model.encoder.layers.1.self_attn.qkv.bias"], checkpoint(tmp_path / "run")[qkv])
    assert theirs["vision_model.encoder.layers.1.self_attn.qkv.bias"].chunk(3)[1].abs().min() > 0, "a k bias, too"
    run_convert("huggingface", "blip2train", tmp_path / "out", tmp_path / "back")
    assert_bit_equal(checkpoint(tmp_path / "run"), checkpoint(tmp_path / "back"))


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("vit_large_patch14_clip_quickgelu_224", "ln_pre"),
        ("vit_base_patch16_siglip_224", "no class token"),
        ("vit_small_patch14_dinov2", "without a place"),
    ],
)
def test_other_encoders_are_refused_with_the_reason(tmp_path: Path, name: str, reason: str) -> None:
    args = "+model.vision_encoder.model_args={patch_size:14,embed_dim:24,depth:2,num_heads:3}"
    overrides = [f"model.vision_encoder.name={name}", "model.vision_encoder.embed_dim=24", args]
    own = [item for item in EVA if "model_args" not in item]
    config = compose("train", ["stage=stage1", "model=blip2_stage1", "data=stage1", "data/tokenizer=microworld",
                               "optim=adamw_stage1", "trainer.max_steps=9", *VIT, *own, *overrides])  # fmt: skip
    run = RunDir(tmp_path / "run")
    save_checkpoint(build(config.model), run.checkpoints / "step-0000000", {"stage": 1, "name": "x", "step": 0})
    run.config_path.write_text(resolved_yaml(config))
    with pytest.raises(ConfigError, match=reason):
        run_convert("blip2train", "huggingface", run.path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob("*.partial"))


def test_one_epsilon_in_transformers(tmp_path: Path) -> None:
    """LAVIS's ln_vision has 1e-5, its blocks 1e-6; transformers has one: said in the report, kept for the way back."""
    write_run(tmp_path / "run", 1, "model.ln_vision_eps=1e-5")
    report = run_convert("blip2train", "huggingface", tmp_path / "run", tmp_path / "out")
    assert any("epsilon is 1e-05" in note for note in report.notes)
    run_convert("huggingface", "blip2train", tmp_path / "out", tmp_path / "back")
    assert OmegaConf.load(tmp_path / "back" / "config.yaml").model.ln_vision_eps == 1e-5


def test_the_micro_world_is_refused_with_every_reason(tmp_path: Path) -> None:
    """Its encoder has a stem of convolutions and a final norm: no Blip2VisionModel computes that."""
    config = compose("train", ["experiment=microworld_stage1"])
    run = RunDir(tmp_path / "run")
    save_checkpoint(build(config.model), run.checkpoints / "step-0000000", {"stage": 1, "name": "x", "step": 0})
    run.config_path.write_text(resolved_yaml(config))
    with pytest.raises(ConfigError, match=r"(?s)final norm besides ln_vision.*ConvStem"):
        run_convert("blip2train", "huggingface", run.path, tmp_path / "out")


def test_a_lora_run_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    save_language_model(tmp_path / "llm", "opt", 64, framed=True)
    own = ["model/language_model=opt_2_7b", f"llm.path={tmp_path / 'llm'}", "llm.model.dtype=float32"]
    write_run(tmp_path / "run", 2, *own, "llm.tokenizer.end_token=null", "llm.model.lora={r:2,alpha:4}")
    with pytest.raises(ConfigError, match="LoRA"):
        run_convert("blip2train", "huggingface", tmp_path / "run", tmp_path / "out")


def test_by_way_of_lavis(tmp_path: Path) -> None:
    """transformers -> LAVIS's file -> transformers, each through our form: every tensor bit-equal."""
    save_retrieval(tmp_path / "source")
    run_convert("huggingface", "blip2train", tmp_path / "source", tmp_path / "run")
    run_convert("huggingface", "lavis", tmp_path / "source", tmp_path / "model.pth")
    described = load_run_config(RunDir.open(tmp_path / "run"))
    config = compose("convert", ["experiment=microworld_stage1", "from=lavis", "to=huggingface",
                                 f"source={tmp_path / 'model.pth'}", f"target={tmp_path / 'back'}"])  # fmt: skip
    for part in ("model", "tokenizer"):
        config[part] = OmegaConf.create(OmegaConf.to_container(described[part], resolve=True))
    convert(config)
    assert_bit_equal(saved_tensors(tmp_path / "source"), saved_tensors(tmp_path / "back"))


def test_the_processor_makes_our_pixels(exported_stage1: Path, shared_data: Path) -> None:
    """Photographs of any size: transformers' processor and our transform agree within one grey level."""
    processor = AutoProcessor.from_pretrained(exported_stage1 / "out")
    model, _ = our_model(exported_stage1 / "run")
    encoder = model.vision_encoder
    photos = sorted((shared_data / "photos").rglob("*.jpg"))[:6]
    assert photos
    for path in photos:
        ours = EvalTransform(encoder.image)(decode_image(path.read_bytes()), None)
        theirs = processor(images=Image.open(path).convert("RGB"), return_tensors="pt")["pixel_values"]
        grey = (theirs * encoder.std + encoder.mean).round()
        assert (grey - ours).abs().max() <= 1
        assert (theirs - (ours - encoder.mean) / encoder.std).abs().max() < 0.02


def test_a_frozen_encoder_without_weights_is_not_exported(tmp_path: Path) -> None:
    """The run says `pretrained: false` and carries no encoder: what it would export nobody has trained."""
    config = write_run(tmp_path / "run", 1)
    config.model.vision_encoder.weights = None
    RunDir(tmp_path / "run").config_path.write_text(resolved_yaml(config))
    with pytest.raises(ConfigError, match="has no weights(.|\n)*model.vision_encoder in (.|\n)*pretrained: true"):
        run_convert("blip2train", "huggingface", tmp_path / "run", tmp_path / "out")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob("*.partial"))
