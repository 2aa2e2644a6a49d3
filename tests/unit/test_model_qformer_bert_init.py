"""The Q-Former from BERT: our text passes equal transformers' BERT, and every tensor on both sides is explained."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_model import random_text, tiny_qformer
from transformers import BertConfig, BertForMaskedLM, BertForPreTraining, PreTrainedModel

from blip2train.data.tokenizer import QFormerTokenizer
from blip2train.errors import CheckpointError, ConfigError
from blip2train.model.qformer.bert_checkpoint import read_bert
from blip2train.model.qformer.bert_init import init_from_bert
from blip2train.model.qformer.qformer import QFormer

SIZES = {
    "vocab_size": 39, "hidden_size": 24, "num_hidden_layers": 4, "num_attention_heads": 3, "intermediate_size": 48,
    "max_position_embeddings": 16,
}  # fmt: skip
IDS, MASK = random_text([6, 4, 1], vocab_size=39)
IMAGE = torch.randn(3, 7, 24, generator=torch.Generator().manual_seed(3))


def tiny_bert(kind: type[PreTrainedModel] = BertForPreTraining, **changes: object) -> PreTrainedModel:
    """A BERT whose every tensor is random, biases and norms included, so that a forgotten one shows."""
    torch.manual_seed(8)
    model = kind(BertConfig(**(SIZES | changes))).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def saved(model: PreTrainedModel, folder: Path, **options: object) -> Path:
    model.save_pretrained(folder, **options)
    return folder


@pytest.fixture(scope="module")
def bert_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tiny_bert(), tmp_path_factory.mktemp("bert"))


def without_token_types(model: PreTrainedModel) -> PreTrainedModel:
    model.get_submodule("bert" if hasattr(model, "bert") else "").embeddings.token_type_embeddings.weight.data.zero_()
    return model


@torch.no_grad()
def test_text_states_equal_berts(bert_folder: Path) -> None:
    ours = tiny_qformer().eval()
    init_from_bert(ours, bert_folder)
    theirs = without_token_types(tiny_bert()).bert
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-13)):
        expected = theirs.to(dtype)(IDS, MASK.long()).last_hidden_state
        torch.testing.assert_close(ours.to(dtype).encode_text(IDS, MASK)[MASK], expected[MASK], rtol=0, atol=tolerance)
    assert expected.std() > 0.3


@torch.no_grad()
def test_lm_head_logits_equal_berts(tmp_path: Path) -> None:
    ours = tiny_qformer().double().eval()
    init_from_bert(ours, saved(tiny_bert(BertForMaskedLM), tmp_path))
    expected = without_token_types(tiny_bert(BertForMaskedLM)).double()(IDS, MASK.long()).logits
    logits = ours.lm_logits(ours.encode_text(IDS, MASK))
    # saved and read in float32, so float64 differs by the rounding of the file alone: none
    torch.testing.assert_close(logits[MASK][:, :39], expected[MASK], rtol=0, atol=1e-12)


def test_query_ffn_is_a_copy_and_not_shared(bert_folder: Path) -> None:
    qformer = tiny_qformer()
    report = init_from_bert(qformer, bert_folder)
    for block in qformer.blocks:
        pairs = list(zip(block.query_ffn.parameters(), block.text_ffn.parameters(), strict=True))
        assert len(pairs) == 6 and all(torch.equal(query, text) for query, text in pairs)
    before = {name: value.detach().clone() for name, value in qformer.named_parameters() if "text_ffn" in name}
    optimizer = torch.optim.SGD([p for n, p in qformer.named_parameters() if "query_ffn" in n], lr=0.1)
    qformer.encode_image(IMAGE).hidden.square().sum().backward()
    optimizer.step()
    assert all(torch.equal(value, qformer.get_parameter(name)) for name, value in before.items())
    assert not torch.equal(qformer.blocks[0].query_ffn.expand.weight, qformer.blocks[0].text_ffn.expand.weight)
    assert report.names("copied") == sorted(name for name, _ in qformer.named_parameters() if "query_ffn" in name)


def test_what_bert_does_not_have_keeps_its_random_values(bert_folder: Path) -> None:
    fresh, qformer = tiny_qformer(), tiny_qformer()
    report = init_from_bert(qformer, bert_folder)
    for name in report.names("random"):
        assert torch.equal(qformer.get_parameter(name), fresh.get_parameter(name))
        assert name == "query_tokens" or "cross_attention" in name
    assert len(report.names("random")) == 1 + 2 * 10
    dec = qformer.text_embeddings.word.weight[39]
    assert torch.equal(dec, fresh.text_embeddings.word.weight[39]) and dec.abs().sum() > 0
    assert torch.equal(qformer.text_embeddings.word.weight[0], tiny_bert().bert.embeddings.word_embeddings.weight[0])
    assert "39 of 40 rows" in report.notes["text_embeddings.word.weight"]


def test_every_tensor_of_both_sides_is_explained(bert_folder: Path) -> None:
    qformer = tiny_qformer()
    report = init_from_bert(qformer, bert_folder)
    assert set(report.origins) == {name for name, _ in qformer.named_parameters()}
    assert set(report.dropped) == {
        "embeddings.token_type_embeddings.weight", "pooler.dense.weight", "pooler.dense.bias",
        "cls.seq_relationship.weight", "cls.seq_relationship.bias",
    }  # fmt: skip
    text = report.summary()
    assert "blocks.query_ffn" in text and "token types" in text and str(bert_folder) in text


def as_bare_model(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    trunk = {name.removeprefix("bert."): value for name, value in state.items() if name.startswith("bert.")}
    save_file(trunk, folder / "model.safetensors")


def as_old_pickle(folder: Path) -> None:
    """google's bert-base-uncased: LayerNorms with gamma and beta, tied decoder and position_ids saved, a .bin file."""
    state = load_file(folder / "model.safetensors")
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): value
        for name, value in state.items()
    }
    old["cls.predictions.decoder.weight"] = old["bert.embeddings.word_embeddings.weight"]
    old["bert.embeddings.position_ids"] = torch.arange(16)[None]
    torch.save(old, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def as_decoder_bias(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    state["cls.predictions.decoder.bias"] = state.pop("cls.predictions.bias")
    save_file(state, folder / "model.safetensors")


def as_shards(folder: Path) -> None:
    tiny_bert().save_pretrained(folder, max_shard_size="20KB")
    (folder / "model.safetensors").unlink(missing_ok=True)
    assert len(list(folder.glob("*.safetensors"))) > 2


@pytest.mark.parametrize("layout", [as_bare_model, as_old_pickle, as_decoder_bias, as_shards])
def test_layouts_of_the_same_bert_give_the_same_weights(
    bert_folder: Path, tmp_path: Path, layout: Callable[[Path], None]
) -> None:
    saved(tiny_bert(), tmp_path)
    layout(tmp_path)
    expected, qformer = tiny_qformer(), tiny_qformer()
    init_from_bert(expected, bert_folder)
    report = init_from_bert(qformer, tmp_path)
    for name, value in expected.state_dict().items():
        if layout is as_bare_model and name.startswith("lm_head."):
            assert report.origins[name] == "random"
        else:
            assert torch.equal(qformer.state_dict()[name], value), name


def test_a_shallower_qformer_takes_the_first_layers(bert_folder: Path) -> None:
    qformer = tiny_qformer(num_layers=3)
    report = init_from_bert(qformer, bert_folder)
    expected = tiny_bert().bert.encoder.layer[2].attention.self.query.weight
    assert torch.equal(qformer.blocks[2].self_attention.query.weight, expected)
    above = [name for name in report.dropped if name.startswith("encoder.layer.3.")]
    assert len(above) == 16 and report.dropped[above[0]] == "layers above the Q-Former's 3"


def test_without_its_text_branch_the_query_ffn_still_gets_berts(bert_folder: Path) -> None:
    qformer = tiny_qformer()
    qformer.drop_text_branch()
    report = init_from_bert(qformer, bert_folder)
    expected = tiny_bert().bert.encoder.layer[1].intermediate.dense.weight
    assert torch.equal(qformer.blocks[1].query_ffn.expand.weight, expected)
    assert "stage 2" in report.dropped["embeddings.word_embeddings.weight"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 48, "num_heads": 3}, "hidden_size is 48, BERT's is 24"),
        ({"num_layers": 5}, "num_hidden_layers is 5, BERT's is 4"),
        ({"num_heads": 4}, "num_attention_heads is 4, BERT's is 3"),
        ({"intermediate_size": 64}, "intermediate_size is 64, BERT's is 48"),
        ({"max_positions": 20}, "max_position_embeddings is 20, BERT's is 16"),
        ({"layer_norm_eps": 1e-5}, "layer_norm_eps is 1e-05, BERT's is 1e-12"),
        ({"vocab_size": 38}, "BERT knows 39 words, the Q-Former 38"),
    ],
)
def test_other_sizes_name_both_numbers_and_write_nothing(bert_folder: Path, changes: dict, message: str) -> None:
    qformer = tiny_qformer(**changes)
    before = {name: value.clone() for name, value in qformer.state_dict().items()}
    with pytest.raises(CheckpointError, match=message):
        init_from_bert(qformer, bert_folder)
    assert all(torch.equal(value, before[name]) for name, value in qformer.state_dict().items())


def change_state(folder: Path, change: Callable[[dict], None]) -> Path:
    saved(tiny_bert(), folder)
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("bert.encoder.layer.2.output.dense.bias"), "missing: encoder.layer.2.output.dense.bias"),
        (lambda s: s.pop("cls.predictions.bias"), "missing: cls.predictions.bias"),
        (lambda s: s.update({"bert.encoder.layer.0.adapter.weight": torch.zeros(2)}), "none of a BERT's: .*adapter"),
        (lambda s: s.update({"cls.predictions.decoder.weight": torch.zeros(39, 24)}), "is not tied"),
        (lambda s: s.update({"embeddings.LayerNorm.weight": torch.zeros(24)}), "occurs twice"),
        (lambda s: s.update({"bert.encoder.layer.1.output.dense.bias": torch.zeros(9)}), r"is \(9,\)"),
    ],
    ids=["missing", "part of the head", "unexpected", "untied", "twice", "misshapen"],
)
def test_surprises_are_errors_that_name_the_tensor(tmp_path: Path, change: Callable, message: str) -> None:
    qformer = tiny_qformer()
    before = qformer.blocks[0].text_ffn.expand.weight.clone()
    with pytest.raises(CheckpointError, match=message):
        init_from_bert(qformer, change_state(tmp_path, change))
    assert torch.equal(qformer.blocks[0].text_ffn.expand.weight, before)


def test_a_tensor_that_the_table_does_not_know_is_a_surprise(bert_folder: Path) -> None:
    qformer = tiny_qformer()
    qformer.gate = torch.nn.Parameter(torch.zeros(3))
    with pytest.raises(CheckpointError, match="no origin: gate"):
        init_from_bert(qformer, bert_folder)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("model_type", "roberta", "a roberta, not a BERT"),
        ("hidden_act", "gelu_new", "hidden_act is 'gelu_new'"),
        ("position_embedding_type", "relative_key", "position_embedding_type is 'relative_key'"),
    ],
)
def test_networks_that_only_look_like_bert_are_refused(tmp_path: Path, field: str, value: str, message: str) -> None:
    saved(tiny_bert(), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {field: value}))
    with pytest.raises(CheckpointError, match=message):
        read_bert(tmp_path)


class RunsCode:
    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (Path("executed"),))


def test_a_pickle_with_code_is_refused_and_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    saved(tiny_bert(), tmp_path / "bert")
    (tmp_path / "bert" / "model.safetensors").unlink()
    torch.save({"weights": RunsCode()}, tmp_path / "bert" / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="no code of it was run"):
        read_bert(tmp_path / "bert")
    assert not (tmp_path / "executed").exists()


def test_a_missing_shard_is_named_with_its_size(tmp_path: Path) -> None:
    saved(tiny_bert(), tmp_path, max_shard_size="20KB")
    lost = sorted(tmp_path.glob("*.safetensors"))[1]
    lost.unlink()
    with pytest.raises(CheckpointError, match=rf"1 of \d+ shards are missing: {lost.name}"):
        read_bert(tmp_path)


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no BERT in"):
        read_bert(tmp_path)
    with pytest.raises(ConfigError, match="no BERT"):
        read_bert("no-such-owner/no-such-bert")
    saved(tiny_bert(), tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="no weights"):
        read_bert(tmp_path)


def test_another_vocabulary_is_refused_by_its_first_other_word(tmp_path: Path) -> None:
    saved(tiny_bert(), tmp_path)
    words = [f"word{index}" for index in range(39)]
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n")
    init_from_bert(tiny_qformer(), tmp_path, words=[*words, "[DEC]"])
    with pytest.raises(ConfigError, match="word 7 is 'other' to the tokenizer and 'word7' to BERT"):
        init_from_bert(tiny_qformer(), tmp_path, words=[*words[:7], "other", *words[8:], "[DEC]"])


def test_the_words_of_bert_base_uncased_are_those_of_our_tokenizer(shared_data: Path, tmp_path: Path) -> None:
    """The real vocabulary, [DEC] added behind it, against the vocab.txt beside real weights."""
    words = QFormerTokenizer.load(shared_data / "tokenizers" / "bert").words
    assert len(words) == 30_523 and words[101] == "[CLS]" and words[-1] == "[DEC]"
    saved(tiny_bert(vocab_size=30_522), tmp_path)
    shutil.copy(shared_data / "tokenizers" / "bert" / "vocab.txt", tmp_path)
    report = init_from_bert(tiny_qformer(vocab_size=30_523), tmp_path, words)
    assert "30522 of 30523 rows" in report.notes["text_embeddings.word.weight"]
    with pytest.raises(ConfigError, match="word 2999 is"):
        init_from_bert(tiny_qformer(vocab_size=30_523), tmp_path, [*words[:2999], *words[3000:], "[DEC]"])


def test_padded_word_embeddings_give_only_the_rows_of_words(tmp_path: Path) -> None:
    """A vocabulary of 35 words in 39 rows: the rows after it mean nothing, and [DEC] must not start from one."""
    saved(tiny_bert(), tmp_path)
    (tmp_path / "vocab.txt").write_text("".join(f"word{index}\n" for index in range(35)))
    fresh, qformer = tiny_qformer(vocab_size=36), tiny_qformer(vocab_size=36)
    init_from_bert(qformer, tmp_path)
    assert torch.equal(qformer.text_embeddings.word.weight[35], fresh.text_embeddings.word.weight[35])
    assert torch.equal(
        qformer.text_embeddings.word.weight[:35], read_bert(tmp_path).state["embeddings.word_embeddings.weight"][:35]
    )


def test_half_precision_bert_gives_float32_weights(tmp_path: Path) -> None:
    qformer: QFormer = tiny_qformer()
    init_from_bert(qformer, saved(tiny_bert().half(), tmp_path))
    assert {parameter.dtype for parameter in qformer.parameters()} == {torch.float32}


@pytest.mark.parametrize("text", ["{oops", "3"])
def test_a_damaged_config_is_named(text: str, tmp_path: Path) -> None:
    saved(tiny_bert(), tmp_path)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"not a model's config(.|\n)*config\.json"):
        read_bert(tmp_path)
