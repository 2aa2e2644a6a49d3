"""Documents: one masked pass equals one plain pass per passage, computed by unmodified transformers models."""

import random

import pytest
import torch
import torch.nn.functional as F

from blip2train.microworld.document import (
    Document,
    Passage,
    causal_batch,
    seq2seq_batch,
    write_document,
)
from blip2train.microworld.language import QUESTION_PROMPT, describe, questions
from blip2train.microworld.pretrain_text import build_opt, build_t5, causal_loss, documents_of_step, seq2seq_loss
from blip2train.microworld.scene import WorldSpec, sample_scene
from blip2train.microworld.training import Plan
from blip2train.microworld.vocabulary import language_model_ids

IDS = language_model_ids()
SPEC = WorldSpec(objects=(1, 2, 3))


def _documents(count: int, stacked_share: float) -> list[Document]:
    rng = random.Random(0)
    scenes = [sample_scene(SPEC, "all", index) for index in range(count)]
    return [write_document(scene, rng, stacked_share=stacked_share) for scene in scenes]


def test_one_masked_pass_equals_a_plain_pass_per_passage() -> None:
    torch.manual_seed(0)
    model = build_opt().double().eval()
    documents = _documents(6, stacked_share=0.0)
    total, weights = 0.0, 0.0
    for document in documents:
        description = [IDS[words[0]] for words in document.description]
        for passage in document.passages:
            text = [IDS[word] for word in (*passage.prompt, *passage.target)]
            weight = [0.02] * len(passage.prompt) + [passage.weight] * len(passage.target)
            logits = model(input_ids=torch.tensor([[*description, *text]])).logits[0].log_softmax(dim=1)
            for offset, token in enumerate(text):
                source = len(description) + offset - 1
                if source >= 0:
                    total -= weight[offset] * float(logits[source, token])
                    weights += weight[offset]
    packed = float(causal_loss(model, causal_batch(documents, IDS, IDS["<pad>"])))
    assert packed == pytest.approx(total / weights, rel=1e-6)


def test_a_stacked_position_is_the_sum_of_its_words_embeddings() -> None:
    torch.manual_seed(0)
    model = build_opt().double().eval()
    stacked = Document((("red", "ring"), ("black",)), (Passage(("question:", "what"), ("red", "</s>"), 1.0),))
    table = model.get_input_embeddings().weight
    rows = [
        table[IDS["red"]] + table[IDS["ring"]],
        *(table[IDS[word]] for word in ("black", "question:", "what", "red")),
    ]
    logits = model(inputs_embeds=torch.stack(rows)[None]).logits[0]
    weight = torch.tensor([0.02, 0.02, 1.0, 1.0], dtype=torch.float64)
    targets = torch.tensor([IDS[word] for word in ("question:", "what", "red", "</s>")])
    losses = F.cross_entropy(logits[1:], targets, reduction="none")
    packed = float(causal_loss(model, causal_batch([stacked], IDS, IDS["<pad>"])))
    assert packed == pytest.approx(float((losses * weight).sum() / weight.sum()), rel=1e-6)


def test_encoder_decoder_batches_equal_one_plain_call_per_passage() -> None:
    torch.manual_seed(0)
    model = build_t5().double().eval()
    documents = _documents(5, stacked_share=0.0)
    batch = seq2seq_batch(documents, IDS, IDS["<pad>"], random.Random(1))
    total, weights = 0.0, 0.0
    for ids, mask, labels, weight in zip(
        batch.input_ids, batch.attention_mask, batch.labels, batch.weights.tolist(), strict=True
    ):
        kept = labels[labels >= 0]
        if len(kept):
            loss = float(model(input_ids=ids[mask][None], labels=kept[None]).loss)
            total += weight * loss * len(kept)
            weights += weight * len(kept)
    assert float(seq2seq_loss(model, batch)) == pytest.approx(total / weights, rel=1e-6)


def test_prefix_splits_lose_no_word_and_leave_some_captions_whole() -> None:
    documents = [document for document in _documents(150, stacked_share=0.0) if document.description]
    batch = seq2seq_batch(documents, IDS, IDS["<pad>"], random.Random(1))
    rows = zip(batch.input_ids, batch.attention_mask, batch.labels, strict=True)
    prefixes = []
    for document in documents:
        description = [IDS[words[0]] for words in document.description]
        for passage in document.passages:
            ids, mask, labels = next(rows)
            read = [*ids[mask].tolist(), *labels[labels >= 0].tolist()]
            assert read == [*description, *(IDS[word] for word in (*passage.prompt, *passage.target))]
            if not passage.prompt:
                prefixes.append(int(mask.sum()) - len(description))
    assert 0.35 < sum(length == 0 for length in prefixes) / len(prefixes) < 0.65
    assert max(prefixes) > 5


def test_nothing_is_asked_that_the_description_does_not_settle() -> None:
    words_of = {"texture": {"plain", "striped", "checkered", "dotted"}, "size": {"small", "large"}}
    for document in _documents(300, stacked_share=0.5):
        told = {word for position in document.description for word in position}
        if not told:
            continue
        for passage in document.passages:
            for words in words_of.values():
                claimed = words & set(passage.target)
                assert not claimed or claimed <= told


def test_spread_descriptions_read_like_the_text_oracle() -> None:
    scene = sample_scene(SPEC, "all", 3)
    told = {
        " ".join(words[0] for words in write_document(scene, random.Random(seed), stacked_share=0.0).description)
        for seed in range(60)
    }
    full = [text for text in told if len(text.split()) == len(describe(scene, random.Random(0)).split())]
    assert len(full) > 20
    prompt = QUESTION_PROMPT.format(questions(scene, random.Random(0))[0].question)
    assert set(prompt.split()) <= set(IDS)


def test_the_curriculum_starts_stacked_and_ends_mostly_spread() -> None:
    plan = Plan(steps=60, batch_size=50, lr=1e-3)
    first, last = documents_of_step(SPEC, plan, 0), documents_of_step(SPEC, plan, 59)
    assert all(len(document.description) <= 4 for document in first)
    is_stacked = [any(len(words) > 1 for words in document.description) for document in last]
    assert 0.05 < sum(is_stacked) / len(is_stacked) < 0.4
    assert documents_of_step(SPEC, plan, 7) == documents_of_step(SPEC, plan, 7)
