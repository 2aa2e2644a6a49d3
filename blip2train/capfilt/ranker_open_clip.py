"""Rankers of open_clip: `open_clip:ViT-L-14/openai`, or a checkpoint of one's own.

Implements the filter of CapFilt for models that transformers does not have. open_clip is an optional dependency.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchvision.transforms.v2.functional import to_pil_image

from blip2train.capfilt.loading import choose_dtype, load_part
from blip2train.capfilt.ranker import Ranking, cosine_scores
from blip2train.errors import ConfigError

PREFIX = "open_clip:"
_PRECISION = {torch.float32: "fp32", torch.float16: "pure_fp16", torch.bfloat16: "pure_bf16"}


class OpenClipRanker:
    """A model of open_clip with its own transform and tokenizer.

    Args:
        model: ARCHITECTURE/WEIGHTS after "open_clip:", where WEIGHTS is a tag or a path; or one of open_clip's own
            schemes, "hf-hub:..." and "local-dir:...", which hold both.
        device: where it runs.
        dtype: "auto", "float32", "float16" or "bfloat16".

    Raises:
        ConfigError: open_clip is not installed, or does not know the model or its weights.
    """

    def __init__(self, model: str, device: torch.device, dtype: str = "auto") -> None:
        open_clip = _import()
        self.device = device
        self.dtype = choose_dtype(dtype, device, "ranker.dtype")
        name, weights = _split(model.removeprefix(PREFIX))
        self.model, self._transform, self._tokenizer = load_part(
            lambda: _load(open_clip, name, weights, _PRECISION[self.dtype], device),
            *(model, "ranker.model", "a ranker of open_clip"),
        )
        self._name = model

    @torch.inference_mode()
    def __call__(self, images: Sequence[Tensor], texts: Sequence[Sequence[str]]) -> Ranking:
        flat = [text for row in texts for text in row]
        if not flat:
            return Ranking([[] for _ in texts], 0)
        pixels_B3hw = torch.stack([self._transform(to_pil_image(image)) for image in images])
        images_BE = self.model.encode_image(pixels_B3hw.to(self.device, self.dtype))
        ids_NT = self._tokenizer(flat)
        texts_NE = self.model.encode_text(ids_NT.to(self.device))
        scores = cosine_scores(images_BE, texts_NE, [len(row) for row in texts], self._name)
        return Ranking(scores, self._num_truncated(flat, ids_NT.shape[1]))

    def _num_truncated(self, texts: Sequence[str], length: int) -> int:
        """open_clip cuts in silence; one more place than it reads shows which texts it would have cut."""
        last_N = self._tokenizer(["", *texts], context_length=length + 1)[:, -1]
        return int((last_N[1:] != last_N[0]).sum())


def weights_path(model: str) -> str:
    """Where the weights of an open_clip model would lie if they are a local file or folder."""
    name = model.removeprefix(PREFIX)
    return name.removeprefix("local-dir:") if name.startswith("local-dir:") else name.partition("/")[2]


def _split(model: str) -> tuple[str, str | None]:
    if model.startswith(("hf-hub:", "local-dir:")):
        return model, None
    name, _, weights = model.partition("/")
    if not weights:
        raise ConfigError(
            f"open_clip model {name!r} without weights",
            where="ranker.model",
            fix=f"give them after a slash: {PREFIX}{name}/openai, or {PREFIX}{name}/PATH",
        )
    return name, weights


def _load(open_clip: Any, name: str, weights: str | None, precision: str, device: torch.device) -> tuple[Any, Any, Any]:
    given = weights if weights is None else str(Path(weights).expanduser()) if "/" in weights else weights
    model, _, transform = open_clip.create_model_and_transforms(
        name, pretrained=given, precision=precision, device=device
    )
    return model.eval(), transform, open_clip.get_tokenizer(name)


def _import() -> Any:
    try:
        import open_clip
    except ImportError as error:
        raise ConfigError(
            "open_clip is not installed",
            where="ranker.model",
            fix="pip install 'blip2train[open_clip]', or take a ranker of transformers",
        ) from error
    return open_clip
