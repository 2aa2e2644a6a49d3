"""What captions images in CapFilt: any model behind one call, and the settings they share.

Implements the captioner of CapFilt (the paper takes BLIP-large and ten captions per image).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from blip2train.capfilt.sampling import SeededNucleus, draw_uniforms
from blip2train.capfilt.setting import check_types
from blip2train.errors import ConfigError


@dataclass(frozen=True, slots=True)
class CaptionSettings:
    """How captions are written.

    Args:
        num_captions: per image.
        do_sample: nucleus sampling; otherwise the best `num_captions` of `num_beams` beams.
        top_p: nucleus of the draw; BLIP uses 0.9.
        temperature: of the draw.
        num_beams: beam width where nothing is drawn.
        min_tokens: tokens before a caption may end; the prompt does not count.
        max_tokens: longest caption, end token included; the prompt does not count.
        repetition_penalty: 1 is off; BLIP's released sampling uses 1.1.
        prompt: what the captioner is asked to continue; cut from the captions. None is the captioner's own.
        seed: of the draws.
    """

    num_captions: int = 10
    do_sample: bool = True
    top_p: float = 0.9
    temperature: float = 1.0
    num_beams: int = 1
    min_tokens: int = 5
    max_tokens: int = 20
    repetition_penalty: float = 1.1
    prompt: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_types(self, "captioner.settings")
        problems = {
            f"num_captions={self.num_captions}": self.num_captions < 1,
            f"top_p={self.top_p}": not 0 < self.top_p <= 1,
            f"temperature={self.temperature}": self.temperature <= 0,
            f"repetition_penalty={self.repetition_penalty}": self.repetition_penalty <= 0,
            f"num_beams={self.num_beams}": self.num_beams < 1,
            f"min_tokens={self.min_tokens} with max_tokens={self.max_tokens}": not (
                0 <= self.min_tokens < self.max_tokens
            ),
        }
        for problem, found in problems.items():
            if found:
                raise ConfigError(
                    problem, where="captioner.settings", fix="BLIP: 10 captions, top_p 0.9, 5 to 20 tokens"
                )
        if self.do_sample and self.num_beams > 1:
            raise ConfigError(
                f"do_sample with num_beams={self.num_beams}",
                where="captioner.settings.num_beams",
                fix="set captioner.settings.num_beams=1 to sample, or captioner.settings.do_sample=false for beams",
            )
        if not self.do_sample and self.num_captions > self.num_beams:
            raise ConfigError(
                f"{self.num_captions} captions from {self.num_beams} beams",
                where="captioner.settings.num_captions",
                fix="raise captioner.settings.num_beams, or sample (captioner.settings.do_sample=true)",
            )

    def choose(self, keys: Sequence[str]) -> SeededNucleus | None:
        """The processor that draws for a batch of these images; None where nothing is drawn."""
        if not self.do_sample:
            return None
        uniforms = draw_uniforms(self.seed, keys, self.num_captions, self.max_tokens)
        return SeededNucleus(uniforms, self.top_p, self.temperature)

    def without_prompt(self, text: str) -> str:
        """The caption alone; decoder-only models give back what they were asked to continue."""
        written, prompt = " ".join(text.split()), " ".join((self.prompt or "").split())
        starts = written.lower().startswith(prompt.lower())
        return written[len(prompt) :].strip() if prompt and starts else written


class Captioner(Protocol):
    """Writes captions."""

    def __call__(self, images: Sequence[Tensor], keys: Sequence[str]) -> list[list[str]]:
        """Write `num_captions` texts for each image (3, h, w) uint8, drawn by its key."""
        ...


def group(texts: Sequence[str], num_captions: int) -> list[list[str]]:
    """Rows grouped by image -> one list per image."""
    return [list(texts[start : start + num_captions]) for start in range(0, len(texts), num_captions)]
