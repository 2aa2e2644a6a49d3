"""What the rest of the package knows of a frozen language model: a visual prompt (B, Q, L) and text in, logits out.

Section 3.3: the projected queries are soft prompts before the text embeddings. Logits and targets leave an adapter
already aligned, so no loss ever shifts (LAVIS shifts inside transformers and masks prompts by counting tokens).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from blip2train.batch import Stage2Batch
from blip2train.errors import ConfigError

LogitsProcessor = Callable[[Tensor, Tensor], Tensor]
"""Ids so far (B, T) and logits of the next token (B, V) -> logits (B, V), as transformers calls them."""


@dataclass  # no slots: ZeRO-3's hooks read the `vars` of what a module returns
class LanguageModelOutput:
    """Logits with the token each must predict.

    Args:
        logits: (B, T', V), float32.
        targets: (B, T') int64; `logits[:, t]` predicts `targets[:, t]`; IGNORE_INDEX where there is nothing to predict.
    """

    logits: Tensor
    targets: Tensor


@dataclass(frozen=True, slots=True)
class GenerationSettings:
    """How to decode; the whole of it: a checkpoint's own generation defaults are not consulted.

    Args:
        max_new_tokens: longest answer in tokens, end token included.
        num_beams: beam width; 1 is greedy. The paper uses 5.
        length_penalty: exponent on the length of a beam; the paper's VQA uses -1 to favour short answers.
        min_new_tokens: tokens before the end token is allowed.
        repetition_penalty: 1 is off.
        do_sample: draw instead of taking the best.
        temperature: of the draw.
        top_p: nucleus of the draw.
        end_id: token that ends an answer; None takes the model's own. BLIP-2 ends OPT's text with a line break.
    """

    max_new_tokens: int
    num_beams: int = 1
    length_penalty: float = 1.0
    min_new_tokens: int = 0
    repetition_penalty: float = 1.0
    do_sample: bool = False
    temperature: float = 1.0
    top_p: float = 1.0
    end_id: int | None = None


class LanguageModel(Protocol):
    """A frozen `nn.Module` through which gradients reach the visual prompt, and an adapter if it has one; nothing else.

    It freezes itself and keeps its frozen part in eval mode. `visual_prompt=None` means no image at all: the blind
    baseline and the text oracle.
    """

    @property
    def embed_dim(self) -> int:
        """Width L of the model's input embeddings."""
        ...

    @property
    def vocab_size(self) -> int:
        """Rows of the input embeddings: ids from here on have none."""
        ...

    def __call__(self, visual_prompt: Tensor | None, batch: Stage2Batch) -> LanguageModelOutput:
        """Predict the batch's targets after the visual prompt (B, Q, L) and the batch's prompt."""
        ...

    def generate(
        self,
        visual_prompt: Tensor | None,
        prompt_ids: Tensor,
        prompt_mask: Tensor,
        settings: GenerationSettings,
        choose: LogitsProcessor | None = None,
    ) -> Tensor:
        """Continue visual prompt (B, Q, L) and prompt (B, Tp); returns only new ids (B, T), padded at the end.

        `choose`, where given, has the last word on every step's logits before a token is taken.
        """
        ...


def check_vocabulary(language_model: LanguageModel, num_tokens: int) -> None:
    """Refuse a tokenizer with ids that the model has no embedding for; a GPU would stop without saying why.

    More embeddings than tokens are usual: OPT and T5 pad theirs to round numbers.

    Raises:
        ConfigError: the tokenizer has more tokens than the model has embeddings.
    """
    if num_tokens > language_model.vocab_size:
        raise ConfigError(
            f"the tokenizer has {num_tokens} tokens, the language model {language_model.vocab_size} embeddings",
            where="llm.tokenizer.path, llm.path",
            fix="give both the same model",
        )
