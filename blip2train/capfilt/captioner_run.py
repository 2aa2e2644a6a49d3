"""Our own checkpoints as captioners: stage 1 by its caption head, stage 2 through its language model.

Implements the captioner of CapFilt for runs of this package: a first model captions the data of the next one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from blip2train.capfilt.captioner import CaptionSettings, group
from blip2train.capfilt.sampling import SeededNucleus
from blip2train.data.image_transform import Transform
from blip2train.data.tokenizer import LanguageModelTokenizer, QFormerTokenizer
from blip2train.errors import ConfigError
from blip2train.model.blip2_stage1 import Blip2Stage1
from blip2train.model.blip2_stage2 import Blip2Stage2
from blip2train.model.language_model.base import GenerationSettings, check_vocabulary
from blip2train.model.qformer.qformer import QueryStates

_MAX_PROMPT_TOKENS = 32


class Stage2Captioner:
    """Captions by the language model of a stage-2 run.

    Args:
        model: with its trained weights, in evaluation mode.
        tokenizer: of its language model.
        transform: the encoder's evaluation transform.
        settings: how to write; `prompt` follows the visual prompt.
        device: where the model is.

    Raises:
        ConfigError: more than one caption without sampling, or a tokenizer that does not fit.
    """

    def __init__(
        self,
        model: Blip2Stage2,
        tokenizer: LanguageModelTokenizer,
        transform: Transform,
        settings: CaptionSettings,
        device: torch.device,
    ) -> None:
        _check_count(settings)
        check_vocabulary(model.language_model, tokenizer.vocab_size)
        self.model, self.tokenizer, self.transform = model, tokenizer, transform
        self.settings, self.device = settings, device
        self._generation = GenerationSettings(
            max_new_tokens=settings.max_tokens,
            min_new_tokens=settings.min_tokens,
            num_beams=settings.num_beams,
            repetition_penalty=settings.repetition_penalty,
            end_id=tokenizer.end_id,
        )

    @torch.inference_mode()
    def __call__(self, images: Sequence[Tensor], keys: Sequence[str]) -> list[list[str]]:
        pixels_B3hw = torch.stack([self.transform(image, None) for image in images])
        number = self.settings.num_captions
        visual_RQL = self.model.visual_prompt(pixels_B3hw.to(self.device)).repeat_interleave(number, dim=0)
        prompts = [self.settings.prompt or ""] * len(visual_RQL)
        ids_RT, mask_RT = self.tokenizer.encode_prompt(prompts, _MAX_PROMPT_TOKENS, side="left")
        # nothing is drawn by transformers: the greedy choice takes the one token that `choose` leaves
        new_RT = self.model.language_model.generate(
            visual_RQL, ids_RT.to(self.device), mask_RT.to(self.device), self._generation, self.settings.choose(keys)
        )
        texts = self.tokenizer.decode(new_RT.cpu())
        return group([" ".join(text.split()) for text in texts], number)


class Stage1Captioner:
    """Captions by the Q-Former of a stage-1 run, as its image-grounded generation loss trained it: [DEC], then words.

    Args:
        model: with its trained weights, in evaluation mode.
        tokenizer: of the Q-Former.
        transform: the encoder's evaluation transform.
        settings: how to write; beams are not offered here.
        device: where the model is.

    Raises:
        ConfigError: more than one caption without sampling, beams, or more tokens than the Q-Former has positions.
    """

    def __init__(
        self,
        model: Blip2Stage1,
        tokenizer: QFormerTokenizer,
        transform: Transform,
        settings: CaptionSettings,
        device: torch.device,
    ) -> None:
        _check_count(settings)
        if settings.num_beams > 1:
            raise ConfigError(
                "a stage-1 run has no beam search",
                where="captioner.settings.num_beams",
                fix="sample (captioner.settings.do_sample=true), or set captioner.settings.num_beams=1",
            )
        self.model, self.tokenizer, self.transform = model, tokenizer, transform
        self.settings, self.device = settings, device
        prompt_1T, _ = tokenizer([settings.prompt or ""], _MAX_PROMPT_TOKENS)
        prompt_1T[:, 0] = tokenizer.dec_id
        self._prompt_1T = prompt_1T[:, :-1]

    @torch.inference_mode()
    def __call__(self, images: Sequence[Tensor], keys: Sequence[str]) -> list[list[str]]:
        pixels_B3hw = torch.stack([self.transform(image, None) for image in images]).to(self.device)
        number = self.settings.num_captions
        query = self.model.encode_image(self.model.image_tokens(pixels_B3hw))
        new_RT = self._generate(_repeat(query, number), len(images) * number, self.settings.choose(keys))
        texts = self.tokenizer.decode(new_RT.cpu())
        return group([" ".join(text.split()) for text in texts], number)

    def _generate(self, query: QueryStates, rows: int, choose: SeededNucleus | None) -> Tensor:
        """New ids (rows, T). Every step reads the whole text again: at 20 tokens a cache would gain little."""
        settings, end = self.settings, self.tokenizer.sep_id
        ids_RT = self._prompt_1T.to(self.device).expand(rows, -1)
        start = ids_RT.shape[1]
        ended_R = torch.zeros(rows, dtype=torch.bool, device=self.device)
        for step in range(settings.max_tokens):
            logits_RTV = self.model.generation_logits(ids_RT, torch.ones_like(ids_RT, dtype=torch.bool), query)
            scores_RV = _penalise(logits_RTV[:, -1].float(), ids_RT, settings.repetition_penalty)
            if step < settings.min_tokens:
                scores_RV[:, end] = -torch.inf
            if choose is not None:
                scores_RV = choose(ids_RT, scores_RV)
            next_R = scores_RV.argmax(dim=1).masked_fill(ended_R, end)
            ids_RT = torch.cat([ids_RT, next_R[:, None]], dim=1)
            ended_R |= next_R == end
            if bool(ended_R.all()):
                break
        return ids_RT[:, start:]


def _penalise(scores_RV: Tensor, ids_RT: Tensor, penalty: float) -> Tensor:
    """Make tokens that the text holds already less likely, as transformers' repetition penalty does."""
    if penalty == 1.0:
        return scores_RV
    found_RT = scores_RV.gather(1, ids_RT)
    return scores_RV.scatter(1, ids_RT, torch.where(found_RT < 0, found_RT * penalty, found_RT / penalty))


def _repeat(query: QueryStates, number: int) -> QueryStates:
    keys_values = [
        (keys.repeat_interleave(number, dim=0), values.repeat_interleave(number, dim=0))
        for keys, values in query.keys_values
    ]
    return QueryStates(query.hidden, keys_values, [])


def _check_count(settings: CaptionSettings) -> None:
    if not settings.do_sample and settings.num_captions > 1:
        raise ConfigError(
            f"{settings.num_captions} captions of a run without sampling would all be the same",
            where="captioner.settings.num_captions",
            fix="sample (captioner.settings.do_sample=true), or set captioner.settings.num_captions=1",
        )
