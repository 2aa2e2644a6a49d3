"""Token ids against the published vocabularies' expected ids; special tokens, truncation and padding by hand."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerFast

from blip2train.data.tokenizer import LanguageModelTokenizer, QFormerTokenizer
from blip2train.errors import ConfigError


@pytest.fixture(scope="module")
def rows(shared_data: Path) -> list[dict[str, object]]:
    return json.loads((shared_data / "tokenizers" / "expected_ids.json").read_text())["rows"]


@pytest.fixture(scope="module")
def qformer(shared_data: Path) -> QFormerTokenizer:
    return QFormerTokenizer.load(shared_data / "tokenizers" / "bert")


@pytest.fixture(scope="module")
def opt_folder(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, source = tmp_path_factory.mktemp("opt"), shared_data / "tokenizers" / "gpt2_opt"
    shutil.copy(source / "opt_vocab.json", folder / "vocab.json")
    shutil.copy(source / "opt_merges.txt", folder / "merges.txt")
    names = {"bos_token": "</s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer", **names}))
    return folder


@pytest.fixture(scope="module")
def opt(opt_folder: Path) -> LanguageModelTokenizer:
    return LanguageModelTokenizer.load(opt_folder, end_token="\n")


@pytest.fixture(scope="module")
def t5(shared_data: Path) -> LanguageModelTokenizer:
    return LanguageModelTokenizer.load(shared_data / "tokenizers" / "t5")


def test_qformer_ids_equal_bert(qformer: QFormerTokenizer, rows: list[dict[str, object]]) -> None:
    ids, mask = qformer([str(row["text"]) for row in rows], max_length=512)
    found = [row_ids[row_mask].tolist() for row_ids, row_mask in zip(ids, mask, strict=True)]
    assert found == [row["bert_ids_with_cls_sep"] for row in rows]


def test_opt_ids_equal_the_published_ones(opt: LanguageModelTokenizer, rows: list[dict[str, object]]) -> None:
    ids, mask = opt.encode([str(row["text"]) for row in rows], max_length=512, add_start=True)
    found = [row_ids[row_mask].tolist() for row_ids, row_mask in zip(ids, mask, strict=True)]
    assert found == [row["opt_ids_with_bos"] for row in rows]


def test_t5_ids_equal_the_published_ones(t5: LanguageModelTokenizer, rows: list[dict[str, object]]) -> None:
    ids, mask = t5.encode([str(row["text"]) for row in rows], max_length=512, add_end=True)
    found = [row_ids[row_mask].tolist() for row_ids, row_mask in zip(ids, mask, strict=True)]
    assert found == [row["t5_ids_with_eos"] for row in rows]


def test_dec_token_is_one_more_than_bert(qformer: QFormerTokenizer) -> None:
    assert (qformer.vocab_size, qformer.dec_id, qformer.cls_id, qformer.pad_id) == (30523, 30522, 101, 0)


def test_a_saved_qformer_tokenizer_loads_again_without_a_second_dec(qformer: QFormerTokenizer, tmp_path: Path) -> None:
    qformer._tokenizer.save_pretrained(tmp_path)
    again = QFormerTokenizer.load(tmp_path)
    assert (again.vocab_size, again.dec_id) == (30523, 30522)
    assert torch.equal(again(["a dog"], 8)[0], qformer(["a dog"], 8)[0])


def test_truncated_qformer_text_keeps_cls_and_sep(qformer: QFormerTokenizer) -> None:
    ids, mask = qformer(["a dog and a cat and a bird", "dog", ""], max_length=6)
    assert ids.shape == (3, 6)
    assert ids[:, 0].tolist() == [101] * 3
    assert [int(row[row_mask][-1]) for row, row_mask in zip(ids, mask, strict=True)] == [102] * 3
    assert mask.sum(1).tolist() == [6, 3, 2]
    assert mask.dtype == torch.bool and ids.dtype == torch.int64


def test_end_token_survives_truncation(opt: LanguageModelTokenizer, t5: LanguageModelTokenizer) -> None:
    for tokenizer, end in ((opt, 50118), (t5, 1)):
        assert tokenizer.end_id == end
        ids, mask = tokenizer.encode(["a dog and a cat and a bird and a fish"], max_length=5, add_end=True)
        assert ids.shape == (1, 5) and bool(mask.all())
        assert int(ids[0, -1]) == end


def test_padding_side_is_an_argument_and_leaves_no_trace(opt: LanguageModelTokenizer) -> None:
    texts = ["a dog", "a dog and a cat"]
    right, right_mask = opt.encode(texts, 16, side="right")
    left, left_mask = opt.encode(texts, 16, side="left")
    assert right_mask[0].tolist() == sorted(right_mask[0].tolist(), reverse=True)
    assert left_mask[0].tolist() == sorted(left_mask[0].tolist())
    assert right[0][right_mask[0]].tolist() == left[0][left_mask[0]].tolist()
    assert set(right[0][~right_mask[0]].tolist()) == {opt.pad_id}
    assert torch.equal(opt.encode(texts, 16)[0], right)


def test_nothing_to_encode_gives_zero_width(opt: LanguageModelTokenizer) -> None:
    ids, mask = opt.encode(["", ""], 8)
    assert ids.shape == mask.shape == (2, 0)
    assert opt.encode(["", ""], 8, add_start=True)[0].tolist() == [[2], [2]]


def test_a_model_without_start_token_gets_none(t5: LanguageModelTokenizer) -> None:
    assert t5.start_id is None
    assert torch.equal(t5.encode(["a dog"], 8, add_start=True)[0], t5.encode(["a dog"], 8)[0])


def test_the_start_token_can_be_left_out(opt_folder: Path) -> None:
    without = LanguageModelTokenizer.load(opt_folder, start_token=False)
    assert without.start_id is None
    assert torch.equal(without.encode(["a dog"], 8, add_start=True)[0], without.encode(["a dog"], 8)[0])


def test_text_in_two_pieces_is_spelled_as_in_one(opt: LanguageModelTokenizer, t5: LanguageModelTokenizer) -> None:
    for tokenizer in (opt, t5):
        pieces = [tokenizer.encode([text], 16)[0] for text in ("a photo of", f"{tokenizer.word_separator}a dog")]
        assert torch.equal(torch.cat(pieces, dim=1), tokenizer.encode(["a photo of a dog"], 16)[0])


def test_decoding_stops_at_the_end_token(opt: LanguageModelTokenizer, t5: LanguageModelTokenizer) -> None:
    for tokenizer in (opt, t5):
        ids, _ = tokenizer.encode(["a dog", "a dog and a cat"], 16, add_end=True)
        tail, _ = tokenizer.encode(["never seen"] * 2, 16)
        assert tokenizer.decode(torch.cat([ids, tail], dim=1)) == ["a dog", "a dog and a cat"]
    start, _ = opt.encode(["a dog"], 16, add_start=True, add_end=True)
    assert opt.decode(start) == ["a dog"]
    assert opt.decode(torch.tensor([[opt.end_id, opt.pad_id, opt.pad_id]])) == [""]


def test_text_cannot_smuggle_control_tokens_into_opt(opt: LanguageModelTokenizer) -> None:
    ids, _ = opt.encode(["before </s> after <pad>"], 32)
    assert not {2, opt.pad_id} & set(ids[0].tolist())
    assert opt.decode(ids) == ["before </s> after <pad>"]


def test_an_end_token_of_several_tokens_is_refused(opt_folder: Path) -> None:
    with pytest.raises(ConfigError, match="is 2 tokens"):
        LanguageModelTokenizer.load(opt_folder, end_token="the end")


def test_a_missing_tokenizer_names_the_place(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nowhere"):
        QFormerTokenizer.load(tmp_path / "nowhere")


@pytest.mark.parametrize("kind", ["opt", "qwen2", "t5", "bert"])
def test_a_model_folder_without_tokenizer_files_is_refused(kind: str, tmp_path: Path) -> None:
    """transformers makes an empty tokenizer of it, and a training on empty texts would begin."""
    AutoConfig.for_model(kind).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="vocabulary of special tokens alone"):
        LanguageModelTokenizer.load(tmp_path)


def test_a_tokenizer_without_cls_is_refused_with_what_it_has(opt_folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"without cls_token, sep_token .*eos_token"):
        QFormerTokenizer.load(opt_folder)


def test_a_prompt_is_opened_and_closed_as_the_model_reads_it(shared_data: Path) -> None:
    """T5's own tokenizer ends every input with </s>, as LAVIS and transformers feed it; Flan-T5's yaml does too."""
    theirs = AutoTokenizer.from_pretrained(str(shared_data / "tokenizers" / "t5"))
    ours = LanguageModelTokenizer(theirs, close_prompt=True)
    texts = ["a dog on a beach", "", "question: what is this? answer:"]
    ids, mask = ours.encode_prompt(texts, 32)
    assert [row[keep].tolist() for row, keep in zip(ids, mask, strict=True)] == theirs(texts)["input_ids"]
    assert ours.encode_prompt(["a dog on a beach"], 3)[0].tolist()[0][-1] == theirs.eos_token_id


def test_an_empty_prompt_is_opened_even_where_others_are_not(shared_data: Path) -> None:
    bare = PreTrainedTokenizerFast(
        tokenizer_file=str(shared_data / "tokenizers" / "t5" / "tokenizer.json"), bos_token="<pad>", eos_token="</s>"
    )
    bare.backend_tokenizer.post_processor = None
    ids, mask = LanguageModelTokenizer(bare, open_prompt=False).encode_prompt(["", "dog"], 8, side="left")
    assert ids[0][mask[0]].tolist() == [bare.bos_token_id]
    assert ids[1][mask[1]].tolist() == bare("dog")["input_ids"]
    assert LanguageModelTokenizer(bare).encode_prompt(["dog"], 8)[0][0, 0] == bare.bos_token_id
