"""Under autocast, what decides the losses stays float32: norms, softmax, heads, logits, temperature, draws, losses.

Each is held to a float64 computation from the very states that autocast produced, so that the rounding of the layers
below does not count, and to a bound that half precision would break.
"""

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from tiny_model import T5, random_images, random_text, stage2_batch, tiny_stage1
from torch import Tensor, nn

from blip2train.batch import Stage1Batch
from blip2train.model.blip2_stage1 import Blip2Stage1
from blip2train.model.language_model.base import GenerationSettings
from blip2train.model.language_model.encoder_decoder import EncoderDecoder
from blip2train.objective import matching
from blip2train.objective.context import Stage1Context, build_context
from blip2train.objective.contrastive import ContrastiveObjective
from blip2train.objective.grounded_generation import GroundedGenerationObjective
from blip2train.objective.matching import MatchingObjective

GPU = pytest.param("cuda", marks=pytest.mark.gpu)
HALF = [torch.bfloat16, torch.float16]
B = 4


@pytest.fixture(params=["cpu", GPU])
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


@pytest.fixture(params=HALF, ids=str)
def mixed(request: pytest.FixtureRequest, device: torch.device) -> Iterator[Stage1Context]:
    """A context whose every pass runs under autocast."""
    model = tiny_stage1().to(device).eval()
    ids, mask = random_text([6, 4, 3, 5])
    tensors = [tensor.to(device) for tensor in (random_images(B), ids, mask, torch.arange(B))]
    batch = Stage1Batch(*tensors, keys=[str(row) for row in range(B)])
    with torch.no_grad(), torch.autocast(device.type, request.param):
        yield build_context(model, batch, gather_gradients=True)


def linear(layer: nn.Linear, hidden: Tensor) -> Tensor:
    """The layer in float64."""
    return hidden.double() @ layer.weight.double().T + layer.bias.double()


def exact_features(context: Stage1Context) -> tuple[Tensor, Tensor]:
    """Unit vectors in float64 of the states that autocast gave."""
    model, batch = context.model, context.batch
    text = model.qformer.encode_text(batch.input_ids, batch.attention_mask, rows=1)[:, 0]
    with torch.autocast(text.device.type, enabled=False):
        image_BQE = linear(model.vision_proj, context.query.hidden)
        text_BE = linear(model.text_proj, text)
        return image_BQE / image_BQE.norm(dim=-1, keepdim=True), text_BE / text_BE.norm(dim=-1, keepdim=True)


def exact_similarities(context: Stage1Context) -> Tensor:
    """(image, text): a naive loop over pairs in float64, divided by the temperature."""
    images, texts = exact_features(context)
    temperature = context.model.temperature.double()
    rows = [torch.stack([(image * text).sum(dim=-1).max() / temperature for text in texts]) for image in images]
    return torch.stack(rows)


def test_features_and_contrastive_logits(mixed: Stage1Context) -> None:
    assert {mixed.image_features.dtype, mixed.text_features.dtype, mixed.temperature.dtype} == {torch.float32}
    assert {mixed.similarity_i2t.dtype, mixed.similarity_t2i.dtype} == {torch.float32}
    exact = exact_similarities(mixed).float()
    torch.testing.assert_close(mixed.similarity_i2t, exact, rtol=0, atol=2e-5)
    torch.testing.assert_close(mixed.similarity_t2i, exact.T, rtol=0, atol=2e-5)


def test_contrastive_loss(mixed: Stage1Context) -> None:
    loss = ContrastiveObjective(label_smoothing=0.1)(mixed).loss
    exact = exact_similarities(mixed)
    own = torch.arange(B, device=exact.device)
    expected = 0.5 * sum(F.cross_entropy(logits, own, label_smoothing=0.1) for logits in (exact, exact.T))
    assert loss.dtype == torch.float32 and abs(float(loss) - float(expected)) < 5e-6


def test_matching_logits_loss_and_draws(mixed: Stage1Context, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Tensor] = []
    fused: list[Tensor] = []
    sample, fuse = matching.sample_hard_negatives, type(mixed.model.qformer).fuse

    def watch_draw(similarity: Tensor, *arguments: object) -> Tensor:
        drawn.append(similarity)
        return sample(similarity, *arguments)

    def watch_fuse(*arguments: object) -> Tensor:
        fused.append(fuse(*arguments))
        return fused[-1]

    monkeypatch.setattr(matching, "sample_hard_negatives", watch_draw)
    monkeypatch.setattr(type(mixed.model.qformer), "fuse", watch_fuse)
    loss = MatchingObjective()(mixed).loss
    assert [similarity.dtype for similarity in drawn] == [torch.float32] * 2 and len(fused) == 1
    logits = linear(mixed.model.itm_head, fused[0]).mean(dim=1)
    labels = torch.tensor([1] * B + [0] * 2 * B, device=logits.device)
    assert loss.dtype == torch.float32 and abs(float(loss) - float(F.cross_entropy(logits, labels))) < 2e-6


def test_generation_loss_from_the_logits_of_autocast(mixed: Stage1Context, monkeypatch: pytest.MonkeyPatch) -> None:
    """The vocabulary's logits are the one large product of the heads and follow autocast; softmax and sum do not."""
    seen: list[Tensor] = []
    genuine = Blip2Stage1.generation_logits

    def watch(*arguments: object) -> Tensor:
        seen.append(genuine(*arguments))
        return seen[-1]

    monkeypatch.setattr(Blip2Stage1, "generation_logits", watch)
    loss = GroundedGenerationObjective(dec_id=39, label_smoothing=0.1)(mixed).loss
    ids, mask = mixed.batch.input_ids, mixed.batch.attention_mask
    targets = ids[:, 1:].masked_fill(~mask[:, 1:], -100)
    logits = seen[0][:, : targets.shape[1]].double().flatten(0, 1)
    expected = F.cross_entropy(logits, targets.flatten(), label_smoothing=0.1)
    assert seen[0].element_size() == 2
    assert loss.dtype == torch.float32 and abs(float(loss) - float(expected)) < 1e-5


def test_the_residual_stream_and_its_norms_are_float32(mixed: Stage1Context) -> None:
    dtypes: dict[str, set[torch.dtype]] = {}

    def watch(name: str) -> object:
        return lambda _, inputs, output: dtypes.setdefault(name, set()).update({inputs[0].dtype, output.dtype})

    norms = [(name, module) for name, module in mixed.model.qformer.named_modules() if isinstance(module, nn.LayerNorm)]
    handles = [module.register_forward_hook(watch(name)) for name, module in norms if not name.startswith("lm_head")]
    assert {mixed.similarity_i2t.dtype, mixed.query.hidden.dtype} == {torch.float32}
    mixed.model.matching_logits(mixed.query.image, mixed.batch.input_ids, mixed.batch.attention_mask)
    for handle in handles:
        handle.remove()
    assert len(dtypes) == len(handles) > 10 and set().union(*dtypes.values()) == {torch.float32}


@pytest.mark.parametrize("half", HALF, ids=str)
def test_softmax_of_attention_is_not_rounded_to_half_precision(half: torch.dtype, device: torch.device) -> None:
    """One strong key and many weak ones of one value: in half precision the weak weights would not add up."""
    keys = 4096
    query = torch.zeros(1, 1, 1, 8, device=device, dtype=half)
    query[..., 0] = 1
    key = torch.zeros(1, 1, keys, 8, device=device, dtype=half)
    key[0, 0, 0, 0] = 16.0
    value = torch.ones(1, 1, keys, 8, device=device, dtype=half)
    value[0, 0, 0] = -1.0
    output = F.scaled_dot_product_attention(query, key, value)
    weights = (query.double() @ key.double().transpose(-1, -2) / 8**0.5).softmax(dim=-1)
    expected = weights @ value.double()
    assert (output.double() - expected).abs().max() <= torch.finfo(half).eps * expected.abs().max()


@pytest.mark.parametrize("mode", ["forward", "generate"])
def test_a_float32_t5_never_computes_in_float16(mode: str, device: torch.device) -> None:
    torch.manual_seed(0)
    model, batch = EncoderDecoder(T5).to(device), stage2_batch([2, 0, 1], [3, 2, 3])
    visual = torch.randn(3, 5, 32, device=device)
    dtypes: set[torch.dtype] = set()
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda _, __, output: dtypes.add(output.dtype))

    def run() -> Tensor:
        ids, mask = batch.prompt_ids.to(device), batch.prompt_mask.to(device)
        if mode == "generate":
            return model.generate(visual, ids, mask, GenerationSettings(max_new_tokens=4, min_new_tokens=3))
        tensors = {name: getattr(batch, name) for name in type(batch).__dataclass_fields__}
        moved = {name: item.to(device) if isinstance(item, Tensor) else item for name, item in tensors.items()}
        return model(visual, type(batch)(**moved)).logits

    with torch.no_grad():
        expected = run()
        with torch.autocast(device.type, torch.float16):
            under_autocast = run()
    assert torch.equal(under_autocast, expected) and dtypes == {torch.float32}
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
        run()
    assert torch.bfloat16 in dtypes, "bfloat16 autocast is what float32 weights are for"
