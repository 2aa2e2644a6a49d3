"""Forward passes against numbers that unmodified LAVIS computed on the same weights (tests/lavis_parity.py)."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from lavis_comparison import assert_hidden_states
from lavis_parity import RECORDINGS, TIED, LavisRun, build_stage1, load_run, our_name, shared_run
from torch import Tensor, nn

from blip2train.batch import IGNORE_INDEX
from blip2train.model.blip2_stage1 import Blip2Stage1
from blip2train.model.blip2_stage2 import Blip2Stage2
from blip2train.model.qformer.qformer import QFormer

KEYS = Path(__file__).parent.parent / "data" / "lavis_keys"


@pytest.fixture(scope="module")
def stage1_run(shared_data: Path) -> LavisRun:
    return shared_run(shared_data, "stage1_six_captions")


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


def test_hidden_states_of_all_four_passes() -> None:
    """float64, a cross-attention in every third layer, and mostly padding: one text among [CLS] [SEP] and the like."""
    run = load_run(RECORDINGS, "stage1_short_texts")
    assert sorted(run.tensors["attention_mask"].sum(dim=1).tolist())[:2] == [2, 2]
    assert_hidden_states(build_stage1(run), run)


class _NoImages(nn.Module):
    """A vision encoder of a given width without parameters, so that a full-size model is only the trained part."""

    image, num_tokens, trainable = None, 257, False

    def __init__(self, embed_dim: int) -> None:
        super().__init__()
        self.embed_dim = embed_dim


class _NoWords(_NoImages):
    """A language model of a given width, likewise."""


def _full_size(name: str) -> dict[str, Tensor]:
    widths = {"vitg": 1408, "vitl": 1024, "opt_2_7b": 2560, "flan_t5_xl": 2048}
    image_dim = widths["vitl" if "vitl" in name else "vitg"]
    with torch.device("meta"):
        qformer = QFormer(768, 12, 12, 32, 2, image_dim, 30523, 3072, 512, 0.1)
        if name.startswith("stage1"):
            return Blip2Stage1(_NoImages(image_dim), qformer).state_dict()
        language_model = _NoWords(widths[name.split("vitg_")[1]])
        return Blip2Stage2(_NoImages(image_dim), qformer, language_model).state_dict()


@pytest.mark.parametrize("name", ["stage1_vitg", "stage1_vitl", "stage2_vitg_opt_2_7b", "stage2_vitg_flan_t5_xl"])
def test_what_lavis_saves_at_the_papers_sizes_is_what_ours_trains(name: str) -> None:
    """Names and shapes from LAVIS's real classes (scripts/parity/dump_lavis_keys.py), the LLM's tied tensors aside."""
    saved = json.loads((KEYS / f"{name}.json").read_text())
    trained = {key: shape for key, shape in saved.items() if key not in TIED and "_model." not in key}
    ours = {key: list(tensor.shape) for key, tensor in _full_size(name).items()}
    assert {our_name(key): shape for key, shape in trained.items()} == ours


def test_an_unknown_lavis_name_is_refused() -> None:
    with pytest.raises(KeyError, match="no rename"):
        our_name("Qformer.bert.pooler.dense.weight")
