"""Facts of an exported model -> README.md beside its weights: what it is, where from, what it must not be used for.

Names the limitations and risks that section 6 of the paper states; the numbers are those of the conversion.
LAVIS releases its weights without a card.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

LOADING = {
    ("huggingface", 1): """from transformers import AutoProcessor, Blip2ForImageTextRetrieval

model = Blip2ForImageTextRetrieval.from_pretrained("DIRECTORY")
processor = AutoProcessor.from_pretrained("DIRECTORY")""",
    ("huggingface", 2): """from transformers import AutoProcessor, Blip2ForConditionalGeneration

model = Blip2ForConditionalGeneration.from_pretrained("DIRECTORY")
processor = AutoProcessor.from_pretrained("DIRECTORY")""",
    ("lavis", 1): """model.load_checkpoint("DIRECTORY/model.pth")  # a LAVIS model of the class `blip2`""",
    (
        "lavis",
        2,
    ): """model.load_checkpoint("DIRECTORY/model.pth")  # a LAVIS model of the class `blip2_opt` or `blip2_t5`""",
}
USES = {
    1: "Scoring how well an image and a text fit each other, retrieval both ways, and as the start of stage 2.",
    2: "Describing images and answering questions about them, with the language model named above.",
}


@dataclass(frozen=True, slots=True)
class ModelCard:
    """What a card says.

    Args:
        name: of the run or the released model.
        stage: 1 or 2.
        format: "huggingface" or "lavis".
        source: where the weights came from: a run's name, a file's name.
        steps: optimizer steps of the run, 0 where unknown.
        backbones: part -> its name, e.g. "vision encoder" -> "eva_giant_patch14_clip_224".
        tensors: part -> number of tensors in the folder.
        not_held: what this format cannot hold, each with the reason.
        notes: what a user of the folder should know.
    """

    name: str
    stage: int
    format: str
    source: str
    steps: int
    backbones: Mapping[str, str]
    tensors: Mapping[str, int]
    not_held: Sequence[str] = ()
    notes: Sequence[str] = ()

    def text(self) -> str:
        """The card as Markdown, with the header that model hubs read."""
        tag = "image-to-text" if self.stage == 2 else "zero-shot-image-classification"
        library = "transformers" if self.format == "huggingface" else "salesforce-lavis"
        head = (
            f"---\nlibrary_name: {library}\npipeline_tag: {tag}\nlicense: other\ntags:\n- blip-2\n- blip2train\n---\n"
        )
        return head + "\n\n".join(section for section in self._sections() if section) + "\n"

    def _sections(self) -> list[str]:
        trained = f" after {self.steps:,} optimizer steps" if self.steps else ""
        about = (
            f"# {self.name}\n\nA BLIP-2 model of stage {self.stage} (arXiv 2301.12597), exported by blip2train from "
            f"{self.source}{trained}. No result of the paper is claimed for these weights."
        )
        rows = [*(f"{part}: {name}" for part, name in self.backbones.items())]
        rows += [f"{count} tensors in this folder: {part}" for part, count in self.tensors.items()]
        return [
            about,
            f"## Load it\n\n```python\n{LOADING[self.format, self.stage]}\n```",
            "## Parts\n\n" + _list(rows),
            f"## Intended use\n\nResearch. {USES[self.stage]}",
            LIMITATIONS,
            "## Not in this folder\n\n" + _list(self.not_held) if self.not_held else "",
            "## Notes\n\n" + _list(self.notes) if self.notes else "",
            LICENCE,
        ]


LIMITATIONS = """## Limitations and risks

From the paper's section on limitations, and as true here:

- The model does not profit from examples given in its prompt: it was trained on single image-text pairs.
- Answers can be wrong because the language model's knowledge is wrong or out of date, or because it reasons wrongly.
- It has the risks of its language model and of web data: offensive language, social bias, leaks of private information.
- It was not evaluated for any use in which a wrong answer does harm. Guide its output by instructions, train it on
  filtered data, and measure it on the data it is to be used on."""

LICENCE = """## Licence

The weights of the backbones named above keep the licences of those who released them, some of which (OPT's, LLaMA's)
exclude commercial use or have conditions; images and captions that the model was trained on have their own.
Say here which ones apply before you publish this folder."""


def _list(items: Sequence[str]) -> str:
    return "\n".join(f"- {item}" for item in items)
