"""Frozen backbones -> how good they are by themselves: the ceilings of everything trained on top of them.

Implements the text oracle (the language model answers from a description in words), its captions judged against the
truth, and a linear probe of the ViT's tokens. LAVIS has no counterpart: on real data nobody knows the truth.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from blip2train.microworld.judge import true_of
from blip2train.microworld.language import CAPTION_PROMPT, KINDS, QUESTION_PROMPT, describe, questions
from blip2train.microworld.pretrain_image import dense_targets, draw_batch
from blip2train.microworld.scene import Scene, WorldSpec, sample_scene

PROBE_ATTRIBUTES = ("shape", "color", "size", "texture", "where")
_FIRST_SCENE = 3_000_000_000
"""Scenes that neither pre-training nor any split uses."""


def scenes_for(spec: WorldSpec, num_objects: int, count: int) -> list[Scene]:
    """Held-back scenes with a given number of objects and any pairs."""
    one = WorldSpec(size=spec.size, objects=(num_objects,), seed=spec.seed)
    return [sample_scene(one, "all", _FIRST_SCENE + index) for index in range(count)]


@torch.no_grad()
def text_oracle(model: Any, tokenizer: Any, scenes: Sequence[Scene]) -> dict[str, float]:
    """Exact-match accuracy of greedy answers after a description, overall and per kind, from 0 to 1."""
    prompts, answers, kinds = [], [], []
    for scene in scenes:
        rng = random.Random(scene.seed)
        for item in questions(scene, rng):
            prompts.append(f"{describe(scene, rng)} {QUESTION_PROMPT.format(item.question)}")
            answers.append(item.answer)
            kinds.append(item.kind)
    given = continue_texts(model, tokenizer, prompts, max_new_tokens=3)
    right = [float(text == answer) for text, answer in zip(given, answers, strict=True)]
    scores = {"all": _mean(right)}
    for kind in KINDS:
        of_kind = [value for value, found in zip(right, kinds, strict=True) if found == kind]
        if of_kind:
            scores[kind] = _mean(of_kind)
    return scores


@torch.no_grad()
def caption_truth(model: Any, tokenizer: Any, scenes: Sequence[Scene]) -> float:
    """Share of greedy captions after a description of which every statement is true."""
    prompts = [f"{describe(scene, random.Random(scene.seed))} {CAPTION_PROMPT}".strip() for scene in scenes]
    given = continue_texts(model, tokenizer, prompts, max_new_tokens=32)
    return _mean([float(true_of(text, scene)) for text, scene in zip(given, scenes, strict=True)])


def continue_texts(model: Any, tokenizer: Any, prompts: Sequence[str], max_new_tokens: int) -> list[str]:
    """What a transformers model writes after each prompt, greedily and without special tokens."""
    texts: list[str] = []
    for start in range(0, len(prompts), 256):
        rows = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in prompts[start : start + 256]]
        width = max(map(len, rows))
        ids = torch.tensor([[tokenizer.pad_token_id] * (width - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        written = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=max_new_tokens, do_sample=False)
        new = written if model.config.is_encoder_decoder else written[:, width:]
        texts += [text.strip() for text in tokenizer.batch_decode(new, skip_special_tokens=True)]
    return texts


@torch.no_grad()
def probe_vit(vit: nn.Module, spec: WorldSpec, num_train: int = 600, num_test: int = 300) -> dict[str, float]:
    """Accuracy of a ridge-regression probe per attribute, on the patch tokens under objects, from 0 to 1."""
    scenes = scenes_for(spec, 2, num_train + num_test)
    features_NPI = torch.cat([_patch_tokens(vit, spec, scenes[at : at + 100]) for at in range(0, len(scenes), 100)])
    labels = [dense_targets(scene) for scene in scenes]
    occupied_NP = torch.tensor([label["color"] for label in labels]) >= 0
    is_train = torch.arange(len(scenes)) < num_train
    scores = {}
    for name in PROBE_ATTRIBUTES:
        target_NP = torch.tensor([label[name] for label in labels])
        pick_train, pick_test = occupied_NP & is_train[:, None], occupied_NP & ~is_train[:, None]
        weight = _ridge(features_NPI[pick_train], target_NP[pick_train])
        guess = _with_bias(features_NPI[pick_test]) @ weight
        scores[name] = float((guess.argmax(dim=1) == target_NP[pick_test]).double().mean())
    return scores


def _patch_tokens(vit: nn.Module, spec: WorldSpec, scenes: list[Scene]) -> Tensor:
    forward_features: Any = vit.forward_features
    tokens: Tensor = forward_features(draw_batch(spec, scenes).float() / 127.5 - 1.0)
    return tokens[:, 1:].double()


def _ridge(features_NI: Tensor, labels_N: Tensor, penalty: float = 1.0) -> Tensor:
    inputs = _with_bias(features_NI)
    one_hot = torch.nn.functional.one_hot(labels_N).double()
    gram = inputs.T @ inputs + penalty * torch.eye(inputs.shape[1], dtype=torch.float64)
    solution: Tensor = torch.linalg.solve(gram, inputs.T @ one_hot)
    return solution


def _with_bias(features_NI: Tensor) -> Tensor:
    return torch.cat([features_NI, features_NI.new_ones(len(features_NI), 1)], dim=1)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / max(1, len(values))
