"""Every language model that ships is one yaml: it composes, and its stated architecture has the released size."""

from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from transformers import AutoConfig

from blip2train.cli.config import compose, config_dir, register_resolvers
from blip2train.cli.meta import build_meta
from blip2train.model.freezing import count_parameters

FOLDER = config_dir() / "model" / "language_model"
SHIPPED = sorted(path.stem for path in FOLDER.glob("*.yaml"))
PARAMETERS = {
    "flan_t5_xl": 2_849_757_184,
    "flan_t5_xxl": 11_135_332_352,
    "llama_2_7b": 6_738_415_616,
    "mistral_7b": 7_241_732_096,
    "opt_2_7b": 2_651_596_800,
    "opt_6_7b": 6_658_473_984,
    "pythia_2_8b": 2_775_208_960,
    "qwen2_7b": 7_615_616_512,
    "qwen3_8b": 8_190_735_360,
    "tiny_opt": 463_392,
    "tiny_t5": 511_840,
    "vicuna_7b": 6_738_415_616,
}
EXPERIMENT = ["experiment=microworld_stage2_opt", "init_from=scratch", "run_dir=outputs/x"]


def opt_size(a: dict[str, Any]) -> int:
    d, f = a["hidden_size"], a["ffn_dim"]
    block = 4 * (d * d + d) + 2 * d * f + f + d + 2 * 2 * d
    return (a["vocab_size"] + a["max_position_embeddings"] + 2) * d + a["num_hidden_layers"] * block + 2 * d


def llama_size(a: dict[str, Any]) -> int:
    d, f, heads = a["hidden_size"], a["intermediate_size"], a["num_attention_heads"]
    k = a.get("head_dim", d // heads)
    queries, keys = heads * k, a["num_key_value_heads"] * k
    extra = {"qwen2": queries + 2 * keys, "qwen3": 2 * k}.get(a["model_type"], 0)  # biases; norms of query and key
    block = 2 * d * queries + 2 * d * keys + extra + 3 * d * f + 2 * d
    return 2 * a["vocab_size"] * d + a["num_hidden_layers"] * block + d


def gpt_neox_size(a: dict[str, Any]) -> int:
    d, f = a["hidden_size"], a["intermediate_size"]
    block = 4 * (d * d + d) + 2 * d * f + f + d + 2 * 2 * d
    return 2 * a["vocab_size"] * d + a["num_hidden_layers"] * block + 2 * d


def t5_size(a: dict[str, Any]) -> int:
    d, inner = a["d_model"], a["d_kv"] * a["num_heads"]
    matrices, tables = (3, 2) if a["feed_forward_proj"] == "gated-gelu" else (2, 1)  # v1.1 has its own output layer
    block = 4 * d * inner + matrices * d * a["d_ff"] + 2 * d
    positions = 2 * a["relative_attention_num_buckets"] * a["num_heads"]
    cross = a["num_decoder_layers"] * (4 * d * inner + d)
    return (
        tables * a["vocab_size"] * d + (a["num_layers"] + a["num_decoder_layers"]) * block + cross + positions + 2 * d
    )


SIZE = {"opt": opt_size, "gpt_neox": gpt_neox_size, "t5": t5_size}


def test_every_shipped_language_model_has_its_size_below() -> None:
    assert sorted(PARAMETERS) == SHIPPED


@pytest.mark.parametrize("name", SHIPPED)
def test_the_architecture_has_the_size_of_the_released_model(name: str) -> None:
    """As arithmetic on the yaml, and as transformers' class on the meta device in the yaml's number format."""
    config = compose("train", [*EXPERIMENT, f"model/language_model={name}"])
    architecture = OmegaConf.to_container(config.llm.architecture, resolve=True)
    size = SIZE.get(architecture["model_type"], llama_size)
    assert size(architecture) == PARAMETERS[name]
    model = build_meta(config).get_submodule("language_model")
    assert count_parameters(model) == (0, PARAMETERS[name])
    assert {tensor.dtype for tensor in model.parameters()} == {getattr(torch, config.llm.model.dtype)}
    assert "{question}" in config.llm.question_prompt
    assert config.llm.model.lora is None and config.llm.model.dropout is False


@pytest.mark.parametrize("name", ["tiny_opt", "tiny_t5"])
def test_the_architecture_of_a_shipped_model_is_that_of_its_folder(name: str) -> None:
    register_resolvers()
    llm = OmegaConf.load(FOLDER / f"{name}.yaml")
    OmegaConf.resolve(llm.architecture)
    stated = AutoConfig.for_model(**llm.architecture).to_dict()
    folder = AutoConfig.from_pretrained(OmegaConf.create({"path": llm.path}).path).to_dict()
    # how it was initialised and saved; the rest decides what it computes
    history = {"init_std", "dtype", "architectures", "transformers_version", "_name_or_path"}
    assert {key: folder[key] for key in set(folder) - history} == {
        key: stated.get(key) for key in set(folder) - history
    }


@pytest.mark.parametrize("name", ["qwen2_7b", "qwen3_8b"])
def test_rotary_positions_have_qwen_s_base_and_not_the_default(name: str) -> None:
    llm = OmegaConf.load(FOLDER / f"{name}.yaml")
    assert AutoConfig.for_model(**llm.architecture).rope_parameters["rope_theta"] == 1e6


def test_mistral_attends_within_its_window_and_pythia_rotates_a_quarter() -> None:
    mistral, pythia = (
        AutoConfig.for_model(**OmegaConf.load(FOLDER / f"{name}.yaml").architecture)
        for name in ("mistral_7b", "pythia_2_8b")
    )
    assert mistral.sliding_window == 4096
    assert pythia.rope_parameters["partial_rotary_factor"] == 0.25
