"""LoRA: only the adapter trains, what it adds is what its two matrices say, and a checkpoint holds it."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_model import GPT_NEOX, LLAMA, OPT, QWEN3, T5, stage2_batch, tiny_stage1, tiny_stage2
from torch import Tensor

from blip2train.checkpoint.io import STAGE1_ONLY, STAGE2_ONLY, load_weights, save_checkpoint
from blip2train.errors import ConfigError
from blip2train.model.freezing import trainable_state_dict
from blip2train.model.language_model.base import GenerationSettings
from blip2train.model.language_model.decoder_only import DecoderOnly
from blip2train.model.language_model.encoder_decoder import EncoderDecoder

Adapter = DecoderOnly | EncoderDecoder
BUILD = {
    "opt": (DecoderOnly, OPT),
    "llama": (DecoderOnly, LLAMA),
    "qwen3": (DecoderOnly, QWEN3),
    "gpt_neox": (DecoderOnly, GPT_NEOX),
    "t5": (EncoderDecoder, T5),
}
SETTINGS = {"r": 4, "alpha": 8}
BATCH = stage2_batch([4, 0, 2], [5, 3, 4])
BEAMS = GenerationSettings(max_new_tokens=6, num_beams=5, length_penalty=-1.0)


def build(kind: str, lora: dict[str, Any] | None = SETTINGS, **options: Any) -> Adapter:
    torch.manual_seed(4)
    adapter, config = BUILD[kind]
    return adapter(config, lora=lora, **options)


def visual_prompt() -> Tensor:
    return torch.randn(3, 4, 32, generator=torch.Generator().manual_seed(8))


def loss(adapter: Adapter) -> Tensor:
    output = adapter(visual_prompt(), BATCH)
    return F.cross_entropy(output.logits.flatten(0, 1), output.targets.flatten())


def train(adapter: Adapter, steps: int = 3) -> None:
    adapter.train()
    optimizer = torch.optim.AdamW([p for p in adapter.parameters() if p.requires_grad], lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(adapter).backward()
        optimizer.step()
    adapter.eval()


@pytest.mark.parametrize("kind", BUILD)
def test_only_the_adapter_trains_and_the_model_stays_bit_identical(kind: str) -> None:
    adapter = build(kind)
    trainable = {name for name, parameter in adapter.named_parameters() if parameter.requires_grad}
    assert trainable and all("lora_" in name for name in trainable)
    before = {name: tensor.clone() for name, tensor in adapter.state_dict().items()}
    first = loss(adapter).item()
    train(adapter, steps=6)
    changed = {name for name, tensor in adapter.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == trainable
    assert loss(adapter).item() < first


@pytest.mark.parametrize("kind", BUILD)
def test_a_new_adapter_changes_nothing_and_gradients_reach_the_visual_prompt(kind: str) -> None:
    adapter, plain = build(kind), build(kind, lora=None)
    base = {name.replace(".base_layer", ""): tensor for name, tensor in adapter.state_dict().items()}
    plain.load_state_dict({name: tensor for name, tensor in base.items() if "lora_" not in name})
    visual = visual_prompt().requires_grad_()
    logits = adapter(visual, BATCH).logits
    assert torch.equal(logits, plain(visual, BATCH).logits)
    logits.sum().backward()
    assert visual.grad is not None and visual.grad.abs().amax(dim=-1).gt(0).all()


@pytest.mark.parametrize("kind", BUILD)
def test_a_trained_adapter_is_the_product_of_its_matrices(kind: str) -> None:
    """Added by hand to a plain model's weights, it gives the same logits and the same answers."""
    adapter, plain = build(kind), build(kind, lora=None)
    train(adapter)
    state = adapter.state_dict()
    merged = {n.replace(".base_layer", ""): t.clone() for n, t in state.items() if "lora_" not in n}
    for name, down in state.items():
        if "lora_A" in name:
            up = state[name.replace("lora_A", "lora_B")]
            merged[name.replace(".lora_A.default", "")] += 8 / 4 * up @ down
    untouched = {n: t for n, t in merged.items() if torch.equal(t, state.get(n, t + 1))}
    assert 0 < len(untouched) < len(merged)
    plain.load_state_dict(merged)
    torch.testing.assert_close(
        adapter(visual_prompt(), BATCH).logits, plain(visual_prompt(), BATCH).logits, rtol=0, atol=5e-5
    )
    answers = [a.generate(visual_prompt(), BATCH.prompt_ids, BATCH.prompt_mask, BEAMS) for a in (adapter, plain)]
    assert torch.equal(*answers)
    fresh = build(kind).generate(visual_prompt(), BATCH.prompt_ids, BATCH.prompt_mask, BEAMS)
    assert not torch.equal(fresh, answers[0]), "the training changed the answers"


def test_its_dropout_is_active_in_training_alone_and_the_frozen_model_stays_in_eval_mode() -> None:
    adapter = build("opt", SETTINGS | {"dropout": 0.5})
    train(adapter)
    assert not any(module.training for module in adapter.modules())
    assert torch.equal(loss(adapter), loss(adapter))
    adapter.train()
    assert not torch.equal(loss(adapter), loss(adapter))
    assert not [name for name, module in adapter.named_modules() if module.training and "lora_" not in name]


@pytest.mark.parametrize(("kind", "dtype"), [("opt", "float16"), ("llama", "bfloat16"), ("t5", "bfloat16")])
def test_beside_half_precision_weights_the_adapter_is_float32(kind: str, dtype: str) -> None:
    adapter = build(kind, dtype=dtype)
    formats = {(p.requires_grad, str(p.dtype)) for p in adapter.parameters()}
    assert formats == {(True, "torch.float32"), (False, f"torch.{dtype}")}
    loss(adapter).backward()
    up = [p for name, p in adapter.named_parameters() if "lora_B" in name]
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in up)


@pytest.mark.parametrize("kind", ["opt", "t5"])
def test_a_stage_2_checkpoint_holds_the_adapter_and_not_the_model(kind: str, tmp_path: Path) -> None:
    model = tiny_stage2(build(kind)).train()
    train(model.language_model)
    names = set(trainable_state_dict(model))
    assert {name.split(".")[0] for name in names} == {"ln_vision", "qformer", "projection", "language_model"}
    weights = save_checkpoint(model, tmp_path / "lora", {})
    other = tiny_stage2(build(kind))
    assert set(load_weights(other, weights).names("checkpoint")) == names
    assert all(torch.equal(t, model.state_dict()[name]) for name, t in other.state_dict().items() if "lora_" in name)


def test_stage_2_with_an_adapter_starts_from_stage_1_and_from_stage_2_without_one(tmp_path: Path) -> None:
    starts = {"stage 1": tiny_stage1(), "stage 2": tiny_stage2(build("opt", lora=None))}
    for name, start in starts.items():
        weights = save_checkpoint(start, tmp_path / name, {})
        report = load_weights(tiny_stage2(build("opt")), weights, leave=STAGE1_ONLY, fresh=STAGE2_ONLY)
        assert all("lora_" in key or key.startswith("projection.") for key in report.names("random"))
        assert sum("lora_" in key for key in report.names("random")) == 8, "two matrices, query and value, two layers"


def test_the_layers_it_sits_on_are_a_setting() -> None:
    everywhere = build("opt", SETTINGS | {"target_modules": ["q_proj", "fc1"]})
    owners = {name.split(".lora_")[0].split(".")[-1] for name in trainable_state_dict(everywhere)}
    assert owners == {"q_proj", "fc1"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": 4}, "no alpha"),
        ({"r": 4, "alpha": 8, "rank": 4}, "unknown 'rank'"),
        ({"r": 0, "alpha": 8}, "should be a positive integer"),
        ({"r": 4, "alpha": 8, "target_modules": ["query"]}, r"not found(.|\n)*fc1, fc2, k_proj"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build("opt", settings)


def test_without_peft_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    assert not trainable_state_dict(build("opt", lora=None))
    with pytest.raises(ConfigError, match=r"pip install 'blip2train\[lora\]'"):
        build("opt")
