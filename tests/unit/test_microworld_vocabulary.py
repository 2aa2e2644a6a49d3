"""Tokenizers load with transformers and know every word; the world's hash guards what backbones take for granted."""

from dataclasses import replace
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from blip2train.data.tokenizer import LanguageModelTokenizer, QFormerTokenizer
from blip2train.microworld import vocabulary
from blip2train.microworld.language import VOCABULARY
from blip2train.microworld.scene import WorldSpec
from blip2train.microworld.vocabulary import (
    LANGUAGE_MODEL_TOKENS,
    QFORMER_TOKENS,
    language_model_ids,
    save_tokenizer,
    world_hash,
)


def test_the_default_worlds_hash_is_the_one_the_shipped_weights_were_made_for() -> None:
    assert world_hash(WorldSpec()) == "79bff260e9fdb77f"


def test_the_hash_ignores_dials_and_sees_size_words_and_drawing(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = WorldSpec()
    assert world_hash(replace(spec, noise=30, objects=(3,), held_out=0, seed=9)) == world_hash(spec)
    assert world_hash(replace(spec, size=96)) != world_hash(spec)
    monkeypatch.setattr(vocabulary, "VOCABULARY", (*VOCABULARY, "another"))
    changed = world_hash(spec)
    monkeypatch.undo()
    monkeypatch.setattr(vocabulary, "PALETTE", {"red": (1, 2, 3)})
    assert len({changed, world_hash(spec), world_hash(WorldSpec(size=96))}) == 3


def test_every_word_is_one_known_token_in_both_tokenizers(tmp_path: Path) -> None:
    for name, special in (("lm", LANGUAGE_MODEL_TOKENS), ("qformer", QFORMER_TOKENS)):
        save_tokenizer(special, tmp_path / name)
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / name)
        text = " ".join(VOCABULARY)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert len(tokenizer) == len(VOCABULARY) + len(special)
        assert len(ids) == len(VOCABULARY) and tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids) == text


def test_marks_and_capitals_do_not_matter(tmp_path: Path) -> None:
    save_tokenizer(LANGUAGE_MODEL_TOKENS, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    plain = tokenizer("where is the ring")["input_ids"]
    assert tokenizer("Where is the ring?")["input_ids"] == plain
    assert tokenizer("where is the dog")["input_ids"][-1] == tokenizer.unk_token_id
    assert plain == [language_model_ids()[word] for word in ("where", "is", "the", "ring")]


def test_the_projects_tokenizer_doors_open_them(tmp_path: Path) -> None:
    save_tokenizer(QFORMER_TOKENS, tmp_path / "q")
    save_tokenizer(LANGUAGE_MODEL_TOKENS, tmp_path / "l")
    qformer, language_model = QFormerTokenizer.load(tmp_path / "q"), LanguageModelTokenizer.load(tmp_path / "l")
    ids, _ = qformer(["a red ring"], max_length=8)
    assert ids[0, 0] == qformer.cls_id and qformer.dec_id == 4 and qformer.decode(ids) == ["a red ring"]
    assert language_model.start_id is None
    ids, _ = language_model.encode(["a red ring"], max_length=8, add_end=True, add_start=True)
    assert ids.tolist() == [[language_model_ids()[word] for word in ("a", "red", "ring", "</s>")]]
