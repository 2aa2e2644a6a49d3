"""Weights and configs from outside: what loads is what was saved, what is damaged or does not fit is named."""

import json
import logging
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_model import LLAMA, OPT, T5, T5_TIED, stage2_batch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, GenerationConfig

from blip2train.errors import CheckpointError, ConfigError
from blip2train.model.language_model.base import GenerationSettings, check_vocabulary
from blip2train.model.language_model.decoder_only import DecoderOnly
from blip2train.model.language_model.encoder_decoder import EncoderDecoder

GREEDY = GenerationSettings(max_new_tokens=6)


def visual_prompt() -> Tensor:
    return torch.randn(3, 4, 32, generator=torch.Generator().manual_seed(8))


def opt() -> DecoderOnly:
    torch.manual_seed(4)
    return DecoderOnly(OPT)


def sharded(folder: Path) -> Path:
    """A LLaMA in several shards, as `save_pretrained` cuts it; returns the index."""
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**LLAMA)).save_pretrained(folder, max_shard_size="20KB")
    return folder / "model.safetensors.index.json"


def test_a_saved_model_loads_and_its_generation_defaults_are_not_used(tmp_path: Path) -> None:
    adapter, batch, visual = opt(), stage2_batch([2, 2, 2], [5, 3, 4]), visual_prompt()
    adapter.model.generation_config = GenerationConfig(do_sample=True, temperature=9.0, num_beams=4, max_length=3)
    adapter.model.save_pretrained(tmp_path)
    loaded = DecoderOnly(str(tmp_path))
    assert torch.equal(loaded(visual, batch).logits, adapter(visual, batch).logits)
    answers = [m.generate(visual, batch.prompt_ids, batch.prompt_mask, GREEDY) for m in (opt(), loaded)]
    assert torch.equal(*answers)
    random = DecoderOnly(tmp_path, weights=False)
    assert not torch.equal(random(visual, batch).logits, adapter(visual, batch).logits)


def test_the_format_is_the_one_asked_for_not_the_file_s(tmp_path: Path) -> None:
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**OPT)).bfloat16().save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    assert {tensor.dtype for tensor in DecoderOnly(tmp_path).parameters()} == {torch.float32}
    assert {tensor.dtype for tensor in DecoderOnly(tmp_path, dtype="float16").parameters()} == {torch.float16}


def test_overrides_change_single_fields_of_the_config() -> None:
    assert AutoConfig.for_model(**T5).dense_act_fn == "gelu_new"
    assert EncoderDecoder(T5, overrides={"dense_act_fn": "gelu"}).model.config.dense_act_fn == "gelu"


@pytest.mark.parametrize(("config", "own_head"), [(T5, True), (T5_TIED, False)])
def test_a_t5_has_an_output_layer_of_its_own_where_its_config_says_so(config: dict[str, Any], own_head: bool) -> None:
    """transformers 5.23 ties it in any case; the input embeddings of both stacks are one table either way."""
    model = EncoderDecoder(config).model
    tables = {id(module.weight) for module in (model.shared, model.encoder.embed_tokens, model.decoder.embed_tokens)}
    assert len(tables) == 1
    assert (model.lm_head.weight is not model.shared.weight) == own_head
    forced = EncoderDecoder(config, overrides={"tie_word_embeddings": own_head}).model
    assert (forced.lm_head.weight is not forced.shared.weight) != own_head
    assert forced.encoder.embed_tokens.weight is forced.shared.weight


def test_the_output_layer_of_a_released_t5_is_read_without_a_false_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As the Flan-T5 files are: the config says "not tied", the file has one input table and an output layer."""
    theirs = AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model(**T5))
    state = {name: tensor.clone() for name, tensor in theirs.state_dict().items() if "embed_tokens" not in name}
    state["lm_head.weight"] = torch.randn_like(state["lm_head.weight"])
    theirs.config.save_pretrained(tmp_path)
    stated = json.loads((tmp_path / "config.json").read_text()) | {"tie_word_embeddings": False}
    (tmp_path / "config.json").write_text(json.dumps(stated))
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    library = logging.getLogger("transformers")  # it does not hand its records on to the root
    library.addHandler(caplog.handler)
    model = EncoderDecoder(tmp_path).model
    library.removeHandler(caplog.handler)
    assert "tie_word_embeddings" not in caplog.text
    assert torch.equal(model.lm_head.weight, state["lm_head.weight"])
    assert torch.equal(model.decoder.embed_tokens.weight, state["shared.weight"])
    assert EncoderDecoder(T5).model.all_tied_weights_keys == model.all_tied_weights_keys, "a random one is built alike"
    del state["lm_head.weight"]
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="output layer of its own.*the weights have none"):
        EncoderDecoder(tmp_path)


def test_a_t5_with_its_own_output_layer_survives_a_save(tmp_path: Path) -> None:
    adapter, batch, visual = EncoderDecoder(T5), stage2_batch([2, 2, 2], [5, 3, 4]), visual_prompt()
    adapter.model.save_pretrained(tmp_path)
    assert torch.equal(EncoderDecoder(tmp_path)(visual, batch).logits, adapter(visual, batch).logits)


def test_weights_that_leave_parts_out_are_refused(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**LLAMA))
    kept = {name: tensor for name, tensor in model.state_dict().items() if "layers.1" not in name}
    model.save_pretrained(tmp_path, state_dict=kept)
    with pytest.raises(CheckpointError, match=r"lack 9 tensors.*layers\.1"):
        DecoderOnly(tmp_path)


def test_weights_of_other_sizes_are_refused(tmp_path: Path) -> None:
    opt().model.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="the weights do not fit opt"):
        DecoderOnly(tmp_path, overrides={"ffn_dim": 48})


def test_a_sharded_checkpoint_loads_and_a_missing_shard_is_named_before_any_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = sorted(set(json.loads(sharded(tmp_path).read_text())["weight_map"].values()))
    assert len(shards) > 2
    whole = {name: tensor for shard in shards for name, tensor in load_file(tmp_path / shard).items()}
    loaded = DecoderOnly(tmp_path).model.state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in whole.items())
    (tmp_path / shards[1]).unlink()
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("weights were read"))
    with pytest.raises(CheckpointError, match=f"1 of {len(shards)} shards are missing: {shards[1]}"):
        DecoderOnly(tmp_path)


def test_a_shard_that_is_cut_short_or_of_another_checkpoint_is_named(tmp_path: Path) -> None:
    index = sharded(tmp_path)
    shard = tmp_path / min(json.loads(index.read_text())["weight_map"].values())
    content = shard.read_bytes()
    save_file({"something.else": torch.zeros(1)}, shard)
    with pytest.raises(CheckpointError, match=f"{shard.name} lacks"):
        DecoderOnly(tmp_path)
    shard.write_bytes(content[:-10])
    with pytest.raises(CheckpointError, match=rf"not a readable weights file(.|\n)*{shard.name}"):
        DecoderOnly(tmp_path)
    index.write_text("{}")
    with pytest.raises(CheckpointError, match="not a shard index"):
        DecoderOnly(tmp_path)


def test_a_folder_without_weights_says_what_it_looked_for(tmp_path: Path) -> None:
    AutoConfig.for_model(**OPT).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"no weights: (.|\n)*pytorch_model\.bin"):
        DecoderOnly(tmp_path)
    assert DecoderOnly(tmp_path, weights=False).embed_dim == 32


def test_pickled_weights_load(tmp_path: Path) -> None:
    adapter = opt()
    adapter.model.config.save_pretrained(tmp_path)
    torch.save(adapter.model.state_dict(), tmp_path / "pytorch_model.bin")
    loaded = DecoderOnly(tmp_path).model.state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in adapter.model.state_dict().items())


class Malicious:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("shards", [1, 2])
def test_a_pickle_with_code_in_it_is_refused_and_the_code_does_not_run(tmp_path: Path, shards: int) -> None:
    sentinel, model = tmp_path / "the code ran", opt().model
    model.config.save_pretrained(tmp_path)
    state = model.state_dict() | {"model.decoder.final_layer_norm.bias": Malicious(sentinel)}
    if shards == 1:
        torch.save(state, tmp_path / "pytorch_model.bin")
    else:
        files = {name: f"pytorch_model-0000{1 + index % 2}-of-00002.bin" for index, name in enumerate(state)}
        for file in set(files.values()):
            torch.save({name: state[name] for name in state if files[name] == file}, tmp_path / file)
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    with pytest.raises(CheckpointError, match="a pickle with more than tensors in it was not read"):
        DecoderOnly(tmp_path)
    assert not sentinel.exists()
    for file in tmp_path.glob("*.bin"):
        torch.load(file, weights_only=False)
    assert sentinel.exists(), "the pickle does what the test says"


@pytest.mark.parametrize(
    ("adapter", "source", "options", "message"),
    [
        (DecoderOnly, "no/such/folder", {}, "no language model from 'no/such/folder'"),
        (DecoderOnly, "facebook/opt-2.7b", {}, r"no language model from 'facebook/opt-2\.7b'"),  # offline
        (DecoderOnly, {"model_type": "nothing"}, {}, "no language model from"),
        (DecoderOnly, T5, {}, "t5 cannot be built by AutoModelForCausalLM"),
        (EncoderDecoder, OPT, {}, "opt cannot be built by AutoModelForSeq2SeqLM"),
        (DecoderOnly, OPT, {"dtype": "half"}, "unknown dtype 'half'"),
        (DecoderOnly, OPT, {"overrides": {"dropuot": 0.0}}, "opt has no setting 'dropuot'"),
    ],
)
def test_what_cannot_be_built_is_refused(adapter: type, source: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        adapter(source, **options)


def test_a_folder_of_the_other_kind_is_refused(tmp_path: Path) -> None:
    EncoderDecoder(T5).model.save_pretrained(tmp_path / "t5")
    opt().model.save_pretrained(tmp_path / "opt")
    with pytest.raises(ConfigError, match="t5 cannot be built by AutoModelForCausalLM"):
        DecoderOnly(tmp_path / "t5")
    with pytest.raises(ConfigError, match="opt cannot be built by AutoModelForSeq2SeqLM"):
        EncoderDecoder(tmp_path / "opt")


def test_a_model_that_reads_in_both_directions_is_refused_unless_it_is_made_causal() -> None:
    bert = {"model_type": "bert", "vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 1, "pad_token_id": 1}
    bert |= {"num_attention_heads": 4, "intermediate_size": 32}
    with pytest.raises(ConfigError, match="bert reads in both directions"):
        DecoderOnly(bert)
    causal, batch = DecoderOnly(bert | {"is_decoder": True}), stage2_batch([2, 2, 2], [5, 5, 5])
    before = causal(visual_prompt(), batch).logits
    batch.target_ids[:, 3] = 7
    torch.testing.assert_close(causal(visual_prompt(), batch).logits[:, :4], before[:, :4])


def test_a_tokenizer_with_more_tokens_than_embeddings_is_refused() -> None:
    adapter = opt()
    check_vocabulary(adapter, 60)
    with pytest.raises(ConfigError, match="the tokenizer has 61 tokens, the language model 60 embeddings"):
        check_vocabulary(adapter, 61)


def test_a_text_longer_than_the_models_positions_is_refused_with_both_numbers() -> None:
    """An embedding without such a row would end in torch's index error, after the benchmark has run for a while."""
    model = DecoderOnly(OPT | {"max_position_embeddings": 12})
    prompt = torch.ones(1, 4, dtype=torch.long)
    visual = torch.zeros(1, 6, model.embed_dim)
    model.generate(visual, prompt, prompt.bool(), GenerationSettings(max_new_tokens=2))
    with pytest.raises(ConfigError, match="10 tokens long, 3 may follow, but opt has 12 positions"):
        model.generate(visual, prompt, prompt.bool(), GenerationSettings(max_new_tokens=3))
