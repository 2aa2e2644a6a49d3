"""Forward passes against numbers that unmodified LAVIS computed on the same weights (tests/lavis_parity.py)."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from lavis_parity import LavisRun, build_stage1, build_stage2, load_run, our_name

from blip2train.batch import IGNORE_INDEX, Stage2Batch


@pytest.fixture(scope="module")
def stage1_run(shared_data: Path) -> LavisRun:
    return load_run(shared_data, "stage1_six_captions")


def test_every_trained_lavis_parameter_has_one_of_ours_of_the_same_shape(stage1_run: LavisRun) -> None:
    model = build_stage1(stage1_run)
    trainable = {name: tensor.shape for name, tensor in model.named_parameters() if tensor.requires_grad}
    assert {name: tensor.shape for name, tensor in stage1_run.ours("grads").items()} == trainable


def test_matching_logits_give_lavis_loss_on_its_own_negatives(stage1_run: LavisRun) -> None:
    model = build_stage1(stage1_run).eval()
    ids, mask = stage1_run.tensors["input_ids"], stage1_run.tensors["attention_mask"].bool()
    negative_image = torch.tensor(stage1_run.facts["neg_image_for_text"])
    negative_text = torch.tensor(stage1_run.facts["neg_text_for_image"])
    own = torch.arange(len(ids))
    texts, images = torch.cat([own, own, negative_text]), torch.cat([own, negative_image, own])
    labels = (torch.arange(3 * len(ids)) < len(ids)).long()
    with torch.no_grad():
        image_tokens = model.image_tokens(stage1_run.tensors["image"])
        logits = model.matching_logits(image_tokens[images], ids[texts], mask[texts])
        reused = model.matching_logits(model.encode_image(image_tokens).image, ids[texts], mask[texts], images)
    assert F.cross_entropy(logits, labels).item() == pytest.approx(stage1_run.facts["loss_itm"], abs=1e-6)
    torch.testing.assert_close(reused, logits, rtol=0, atol=1e-6)


def test_contrastive_features_give_lavis_loss(stage1_run: LavisRun) -> None:
    model = build_stage1(stage1_run).eval()
    ids, mask = stage1_run.tensors["input_ids"], stage1_run.tensors["attention_mask"].bool()
    with torch.no_grad():
        query = model.encode_image(model.image_tokens(stage1_run.tensors["image"]))
        image_features, text_features = model.image_features(query.hidden), model.text_features(ids, mask)
        similarity = torch.einsum("bqe,ge->bgq", image_features, text_features).amax(-1) / model.temperature
        own = torch.arange(len(ids))
        loss = sum(F.cross_entropy(s, own, label_smoothing=0.1) for s in (similarity, similarity.T)) / 2
    assert float(loss) == pytest.approx(stage1_run.facts["loss_itc"], abs=1e-5)


def test_generation_logits_give_lavis_loss(stage1_run: LavisRun) -> None:
    model = build_stage1(stage1_run).eval()
    ids, mask = stage1_run.tensors["input_ids"].clone(), stage1_run.tensors["attention_mask"].bool()
    ids[:, 0] = stage1_run.facts["bos"]
    with torch.no_grad():
        query = model.encode_image(model.image_tokens(stage1_run.tensors["image"]))
        logits = model.generation_logits(ids, mask, query)
    targets = ids.masked_fill(~mask, IGNORE_INDEX)[:, 1:]
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), targets.flatten(), label_smoothing=0.1)
    assert loss.item() == pytest.approx(stage1_run.facts["loss_lm"], abs=1e-5)


def test_stage2_with_opt_gives_lavis_loss_and_gradients(shared_data: Path) -> None:
    run = load_run(shared_data, "stage2_opt")
    model = build_stage2(run).train()
    ids, mask = run.tensors["text/input_ids"], run.tensors["text/attention_mask"].bool()
    nothing = ids.new_zeros(len(ids), 0)
    batch = Stage2Batch(
        run.tensors["image"], nothing, nothing.bool(), ids, mask, keys=[str(i) for i in range(len(ids))]
    )
    output = model(batch)
    loss = F.cross_entropy(output.logits.flatten(0, 1), output.targets.flatten(), ignore_index=IGNORE_INDEX)
    loss.backward()
    assert loss.item() == pytest.approx(run.facts["loss"], abs=1e-5)
    grads = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    expected = run.ours("grads")
    assert set(expected) == set(grads)
    for name, gradient in expected.items():
        torch.testing.assert_close(grads[name], gradient, rtol=1e-3, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_an_unknown_lavis_name_is_refused() -> None:
    with pytest.raises(KeyError, match="no rename"):
        our_name("Qformer.bert.pooler.dense.weight")
