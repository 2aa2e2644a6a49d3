"""Several gloo processes, averaged as DDP does, against one process with the whole batch: float64, every parameter.

Ranks bring different numbers of pairs and of tokens, in another order, and draw their negatives as in training.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_stage1 import DEC_ID, fake_batch, fake_model
from tiny_model import OPT, T5, random_images, random_text, stage2_batch, tiny_stage1, tiny_stage2
from torch import Tensor, nn
from two_ranks import on_ranks

from blip2train.batch import Stage1Batch, Stage2Batch
from blip2train.model.language_model.decoder_only import DecoderOnly
from blip2train.model.language_model.encoder_decoder import EncoderDecoder
from blip2train.objective.context import build_context
from blip2train.objective.contrastive import ContrastiveObjective, contrastive_loss
from blip2train.objective.draw import Draw
from blip2train.objective.grounded_generation import GroundedGenerationObjective, generation_inputs
from blip2train.objective.language_modeling import LanguageModelingObjective, count_tokens, next_token_loss
from blip2train.objective.matching import MatchingObjective
from blip2train.objective.similarity import query_text_similarity

LENGTHS = [5, 3, 4, 7, 2, 3]
IMAGE_IDS = [0, 1, 2, 1, 3, 1]  # image 1 lives on both ranks
SHARES = {2: [[4, 1, 2, 5], [0, 3]], 3: [[4, 1, 2], [5], [0, 3]]}
"""Rows of the whole batch that each rank brings, by the number of ranks."""
ORDER = [4, 1, 2, 5, 0, 3]
ATOL = 1e-10


@dataclass(frozen=True)
class Case:
    """What is compared; `model` by its name in `build`."""

    model: str
    gather_gradients: bool = True
    global_means: bool = True
    multi_positive: bool = True
    hard_share: float = 1.0
    micro_batch_size: int | None = None


CASES = {
    "fake": Case("fake"),
    "fake, own pair alone": Case("fake", multi_positive=False),
    "fake, one-sided": Case("fake", gather_gradients=False),
    "fake, half of the negatives easy": Case("fake", hard_share=0.5),
    "real": Case("real"),
    "real, trained encoder": Case("trained"),
    "real, in twos": Case("real", micro_batch_size=2),
    "real, in ones, so that a rank has empty chunks": Case("real", micro_batch_size=1),
    "trained encoder, in threes": Case("trained", micro_batch_size=3),
}
LAVIS = Case("real", gather_gradients=False, global_means=False, multi_positive=False)
STAGE2 = {"opt": DecoderOnly, "t5": EncoderDecoder}


def build(name: str) -> Any:
    if name == "fake":
        return fake_model()
    return tiny_stage1(vision={"trainable_blocks": 1} if name == "trained" else {}).double().eval()


def whole_batch(model: str) -> Stage1Batch:
    if model == "fake":
        batch = fake_batch(6, length=7, image_ids=IMAGE_IDS)
        mask_BT = torch.arange(7)[None, :] < torch.tensor(LENGTHS)[:, None]
        ids_BT = torch.randint(1, DEC_ID, (6, 7), generator=torch.Generator().manual_seed(5)) * mask_BT
        return replace(batch, input_ids=ids_BT, attention_mask=mask_BT)
    return Stage1Batch(random_images(6), *random_text(LENGTHS), torch.tensor(IMAGE_IDS), [str(row) for row in range(6)])


def share(batch: Stage1Batch, rows: list[int]) -> Stage1Batch:
    """A rank's rows, with texts as long as its longest."""
    longest = max(LENGTHS[row] for row in rows)
    return Stage1Batch(
        pixel_values=batch.images[rows],
        input_ids=batch.input_ids[rows, :longest],
        attention_mask=batch.attention_mask[rows, :longest],
        image_ids=batch.image_ids[rows],
        keys=[batch.keys[row] for row in rows],
    )


def step(case: Case, batch: Stage1Batch) -> dict[str, Any]:
    model = build(case.model)
    context = build_context(
        model,
        batch,
        gather_gradients=case.gather_gradients,
        global_means=case.global_means,
        micro_batch_size=case.micro_batch_size,
        draw=Draw(7, 3),
    )
    matching = MatchingObjective(
        same_image_matches=case.multi_positive, hard_share=case.hard_share, same_text_matches=True
    )
    objectives = {
        "itc": ContrastiveObjective(multi_positive=case.multi_positive),
        "itm": matching,
        "itg": GroundedGenerationObjective(dec_id=4 if case.model != "fake" else DEC_ID),
    }
    outputs = {name: objective(context) for name, objective in objectives.items()}
    torch.stack([output.loss for output in outputs.values()]).sum().backward()
    metrics = {name: float(value) for output in outputs.values() for name, value in output.metrics.items()}
    return {
        "values": metrics | {name: output.loss.item() for name, output in outputs.items()},
        "gradients": gradients(model),
        "negatives": torch.stack(matching._negatives(context)),
        "own_column": context.own_column.tolist(),
    }


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {name: item.grad for name, item in model.named_parameters() if item.requires_grad}
    assert None not in found.values()
    return found


def stage2_step(name: str, rows: list[int]) -> dict[str, Any]:
    torch.manual_seed(0)
    model = tiny_stage2(STAGE2[name]({"opt": OPT, "t5": T5}[name])).double().eval()
    batch = stage2_batch([3, 1, 2, 2, 1, 3], LENGTHS)
    tensors = (batch.images, batch.prompt_ids, batch.prompt_mask, batch.target_ids, batch.target_mask)
    part = Stage2Batch(*(tensor[rows] for tensor in tensors), [batch.keys[row] for row in rows])
    output = LanguageModelingObjective()(model(part))
    output.loss.backward()
    values = {"lm": output.loss.item(), "accuracy": float(output.metrics["lm_token_accuracy"])}
    return {"values": values, "gradients": gradients(model)}


def run_rank(rank: int, cases: dict[str, Case], shares: list[list[int]]) -> dict[str, Any]:
    rows = shares[rank]
    found = {name: step(case, share(whole_batch(case.model), rows)) for name, case in cases.items()}
    return found | {name: stage2_step(name, rows) for name in STAGE2}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder: Path = tmp_path_factory.mktemp("ranks")
    return on_ranks(2, run_rank, folder, CASES | {"lavis": LAVIS}, SHARES[2])


def assert_mean_of_ranks(ranks: list[dict[str, Any]], whole: dict[str, Any]) -> None:
    for name, expected in whole["gradients"].items():
        averaged = torch.stack([rank["gradients"][name] for rank in ranks]).mean(dim=0)
        torch.testing.assert_close(averaged, expected, rtol=0, atol=ATOL, msg=lambda text, n=name: f"{n}: {text}")
    for name, expected in whole["values"].items():
        atol = ATOL if "_" not in name else 1e-6  # metrics are float32
        assert sum(rank["values"][name] for rank in ranks) / len(ranks) == pytest.approx(expected, abs=atol), name


@pytest.mark.parametrize("name", CASES)
def test_mean_of_uneven_ranks_is_one_process_with_the_whole_batch(ranks: list[dict[str, Any]], name: str) -> None:
    assert_mean_of_ranks([rank[name] for rank in ranks], step(CASES[name], whole_batch(CASES[name].model)))


@pytest.mark.parametrize("name", CASES)
def test_ranks_draw_the_negatives_of_one_process_and_never_the_same_image(
    ranks: list[dict[str, Any]], name: str
) -> None:
    case = CASES[name]
    drawn = torch.cat([rank[name]["negatives"] for rank in ranks], dim=1)
    order = torch.tensor(ORDER)
    assert torch.equal(order[drawn], step(case, whole_batch(case.model))["negatives"][:, order])
    for columns in drawn.tolist():
        for row, column in enumerate(columns):
            assert row != column
            assert not case.multi_positive or IMAGE_IDS[ORDER[row]] != IMAGE_IDS[ORDER[column]]
    assert any((row < 4) != (column < 4) for columns in drawn.tolist() for row, column in enumerate(columns))
    assert [rank[name]["own_column"] for rank in ranks] == [[0, 1, 2, 3], [4, 5]]


@pytest.mark.parametrize("name", STAGE2)
def test_mean_of_uneven_ranks_is_one_process_in_stage_2_too(ranks: list[dict[str, Any]], name: str) -> None:
    assert_mean_of_ranks([rank[name] for rank in ranks], stage2_step(name, [0, 1, 2, 3, 4, 5]))


def test_three_ranks_are_one_process_too(tmp_path: Path) -> None:
    names = ["fake", "trained encoder, in threes"]
    ranks = on_ranks(3, run_rank, tmp_path, {name: CASES[name] for name in names}, SHARES[3])
    for name in names:
        assert_mean_of_ranks([rank[name] for rank in ranks], step(CASES[name], whole_batch(CASES[name].model)))


def naive_lavis(
    shares: list[list[int]], negatives: dict[int, tuple[int, int]]
) -> tuple[list[dict[str, float]], dict[str, Tensor]]:
    """LAVIS's step in one process that plays every rank: other sides' features are constants, means are a rank's."""
    model, batch = build("real"), whole_batch("real")
    tokens = model.image_tokens(batch.images)
    query = model.encode_image(tokens)
    images, texts = model.image_features(query.hidden), model.text_features(batch.input_ids, batch.attention_mask)
    ids, mask, targets = generation_inputs(batch.input_ids, batch.attention_mask, 4)
    words = model.generation_logits(ids, mask, query)
    losses = []
    for rows in shares:
        own = torch.eye(6, dtype=torch.bool)[rows]
        towards = query_text_similarity(images[rows], texts.detach()) / model.temperature
        back = query_text_similarity(images.detach(), texts[rows]).T / model.temperature
        pairs = [(row, row, 1) for row in rows]
        pairs += [(negatives[row][0], row, 0) for row in rows] + [(row, negatives[row][1], 0) for row in rows]
        scores = [
            model.matching_logits(
                tokens[image : image + 1], batch.input_ids[text, None], batch.attention_mask[text, None]
            ).log_softmax(dim=1)[0, label]
            for image, text, label in pairs
        ]
        losses.append(
            {
                "itc": (contrastive_loss(towards, own, 0.1) + contrastive_loss(back, own, 0.1)) / 2,
                "itm": -torch.stack(scores).mean(),
                "itg": next_token_loss(words[rows], targets[rows], 0.1) / count_tokens(targets[rows]),
            }
        )
    torch.stack([loss for rank in losses for loss in rank.values()]).sum().div(len(shares)).backward()
    return [{name: loss.item() for name, loss in rank.items()} for rank in losses], gradients(model)


def test_lavis_settings_are_lavis_as_a_naive_loop(ranks: list[dict[str, Any]]) -> None:
    found = [rank["lavis"] for rank in ranks]
    drawn = torch.cat([rank["negatives"] for rank in found], dim=1).T.tolist()
    negatives = {ORDER[row]: (ORDER[image], ORDER[text]) for row, (image, text) in enumerate(drawn)}
    losses, expected = naive_lavis(SHARES[2], negatives)
    for rank, naive in zip(found, losses, strict=True):
        assert {name: rank["values"][name] for name in naive} == pytest.approx(naive, abs=ATOL)
    for name, gradient in expected.items():
        averaged = (found[0]["gradients"][name] + found[1]["gradients"][name]) / 2
        torch.testing.assert_close(averaged, gradient, rtol=0, atol=ATOL, msg=lambda text, n=name: f"{n}: {text}")


def test_the_settings_matter() -> None:
    both, one = (step(CASES[name], whole_batch("fake"))["gradients"] for name in ("fake", "fake, one-sided"))
    assert not torch.allclose(both["words.weight"], one["words.weight"])


def test_each_ranks_own_means_are_not_those_of_the_whole_batch(ranks: list[dict[str, Any]]) -> None:
    whole = step(replace(LAVIS, global_means=True), whole_batch("real"))
    own = sum(rank["lavis"]["values"]["itg"] for rank in ranks) / 2
    assert abs(own - whole["values"]["itg"]) > 1e-3
