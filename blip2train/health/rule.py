"""Log entries of a training -> what looks wrong in them. Pure functions of the last few entries.

Each rule asks `PATIENCE` entries to agree: a single one proves nothing. LAVIS prints the same losses and judges none.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from blip2train.health.finding import Finding

PATIENCE = 5
"""Log entries that must agree before anything is said."""

_NEAR_CHANCE = 0.98
_COLLAPSED = 0.99
_ALWAYS_NO = 0.005
_FEW_MISSING = 0.01

Entry = Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Setting:
    """What the rules compare with.

    Args:
        settle_steps: before this step no loss is expected to have left its chance level.
        max_data_wait: share of the time that may be spent waiting for data.
        min_temperature: floor of the learned temperature.
    """

    settle_steps: int
    max_data_wait: float
    min_temperature: float


_PLATEAU = {
    "itc": (
        "image and text features do not tell pairs apart: the learning rate is too high or too low, captions and "
        "images of the data do not belong together, or the weights to start from were not loaded",
        "a few pairs (`blip2train show batch`), init.json of the run folder, optim.lr and its warm-up",
    ),
    "itm": (
        "the matching head says the same of every pair, a plateau that stage 1 can stay on for long: negatives that "
        "are too hard from the start, or duplicates among them that do match",
        "train/itm_accuracy (2/3 is always 'no match'), stage.objectives.itm.hard_share below 1, "
        "stage.objectives.itm.same_text_matches=true where captions repeat",
    ),
    "itg": (
        "the text decoder has not even learned which words are frequent: its weights do not train, or the text is not "
        "what the tokenizer expects",
        "captions and tokens of a batch (`blip2train show batch`), data.tokenizer, init_qformer",
    ),
    "lm": (
        "the language model does not model this text at all: its weights were not loaded, or tokenizer and model do "
        "not belong together",
        "init.json of the run folder, model.language_model, the captions of `blip2train show batch`",
    ),
}


def find(history: Sequence[tuple[int, Entry]], setting: Setting) -> list[Finding]:
    """Everything that the last `PATIENCE` entries, (step, entry) in order, agree on."""
    if len(history) < PATIENCE:
        return []
    step = history[-1][0]
    entries = [entry for _, entry in history[-PATIENCE:]]
    found = [*_temperature(entries, setting), *_still(entries), *_starved(entries, setting)]
    if step >= setting.settle_steps:
        found += [*_at_chance(step, entries), *_always_no(step, entries), *_collapse(step, entries)]
    return found


def _values(entries: Sequence[Entry], key: str) -> list[float] | None:
    """The quantity in every entry; None where one lacks it."""
    if not all(key in entry for entry in entries):
        return None
    return [entry[key] for entry in entries]


def _at_chance(step: int, entries: Sequence[Entry]) -> Iterator[Finding]:
    levels = {name: level for name, level in entries[-1].items() if name.startswith("chance/")}
    for chance_key, level in levels.items():
        key = f"train/{chance_key.removeprefix('chance/')}"
        values = _values(entries, key)
        if not key.endswith("_loss") or values is None:
            continue
        name = key.removeprefix("train/").removesuffix("_loss")
        chance = matching_chance(entries[-1].get("train/itm_missing_negatives", 0.0)) if name == "itm" else level
        if min(values) >= _NEAR_CHANCE * chance:
            likely, look = _PLATEAU.get(name, ("nothing is learned from this loss", "the data and optim.lr"))
            seen = f"{key} is {values[-1]:.4f} after {step} steps; a model that knows nothing has {chance:.4f}"
            yield Finding(f"{name}_at_chance", seen, likely, look)


def matching_chance(missing: float) -> float:
    """Matching loss of the best constant answer, in nats, where a share of the negatives could not be drawn.

    One pair in 3 - 2 * missing is true; 0.6365 without any missing.
    """
    true = 1.0 / (3.0 - 2.0 * missing)
    return 0.0 if true >= 1.0 else -true * math.log(true) - (1.0 - true) * math.log(1.0 - true)


def _always_no(step: int, entries: Sequence[Entry]) -> Iterator[Finding]:
    values = _values(entries, "train/itm_accuracy")
    if values is None or entries[-1].get("train/itm_missing_negatives", 0.0) > _FEW_MISSING:
        return
    if all(abs(value - 2 / 3) <= _ALWAYS_NO for value in values):
        yield Finding(
            "itm_always_no",
            f"train/itm_accuracy is {values[-1]:.4f} after {step} steps, the share of pairs that do not match",
            "the matching head answers 'no match' to everything",
            "train/itm_loss against 0.6365, stage.objectives.itm.hard_share below 1, duplicates in the data",
        )


def _collapse(step: int, entries: Sequence[Entry]) -> Iterator[Finding]:
    values = _values(entries, "train/itc_query_similarity")
    if values is not None and min(values) >= _COLLAPSED:
        yield Finding(
            "query_collapse",
            f"the query outputs of an image are alike after {step} steps: mean cosine {values[-1]:.4f}",
            "all queries read the same from the image: a learning rate too high for the new layers, images that are "
            "all alike, or cross-attention that does not train",
            "the images of `blip2train show batch`, optim.lr and its warm-up, init.json of the run folder",
        )


def _temperature(entries: Sequence[Entry], setting: Setting) -> Iterator[Finding]:
    values = _values(entries, "train/itc_temperature")
    if values is not None and max(values) <= 1.01 * setting.min_temperature:
        yield Finding(
            "temperature_at_clamp",
            f"the temperature is {values[-1]:.2g}, at its floor of {setting.min_temperature:g}: it learns no more",
            "the contrastive loss is driven to be sharper than it can be: a learning rate too high for this one "
            "number, or so few different pairs that they are known by heart",
            "optim.lr, the global batch size, train/itc_i2t_accuracy near 1",
        )


def _still(entries: Sequence[Entry]) -> Iterator[Finding]:
    norms = _values(entries, "gradient_norm")
    if norms is not None and max(norms) == 0.0:
        yield Finding(
            "gradient_zero",
            "the gradient norm is exactly 0",
            "nothing that trains is reached by a loss, or every token of the text is left out of it",
            "`blip2train show params`, stage.objectives, attention_mask and targets of `blip2train show batch`",
        )
    losses = _values(entries, "train/loss")
    if losses is not None and len(set(losses)) == 1:
        yield Finding(
            "loss_constant",
            f"train/loss has been exactly {losses[0]:.6g} in {PATIENCE} log entries",
            "the weights do not change, or every batch is the same",
            "learning_rate and gradient_norm in metrics.jsonl, `blip2train show order`",
        )


def _starved(entries: Sequence[Entry], setting: Setting) -> Iterator[Finding]:
    values = _values(entries, "data_wait_fraction")
    if values is not None and min(values) > setting.max_data_wait:
        yield Finding(
            "data_starvation",
            f"{100 * values[-1]:.0f} % of the time goes into waiting for data",
            "the loader is slower than the model: too few workers, a slow disk or network, large images",
            "data.num_workers, the shard cache (data.cache), `blip2train data cache-features`",
        )


def learning_rate_stands(rates: Sequence[tuple[int, float]], scheduled: Sequence[float]) -> Finding | None:
    """The rate is 0, or stays while its schedule moves.

    Args:
        rates: (step, learning rate) of the last entries.
        scheduled: what the schedule says for the same steps; empty where it cannot be asked.
    """
    if len(rates) < PATIENCE:
        return None
    values = [rate for _, rate in rates[-PATIENCE:]]
    look = "optim.lr, optim.schedule, and the run's trainer.max_steps"
    if max(values) == 0.0:
        likely = "the schedule is at its end already, or something sets the rate after it"
        return Finding("learning_rate_zero", "the learning rate is 0", likely, look)
    if len(set(values)) == 1 and len(set(scheduled[-PATIENCE:])) > 1:
        first, last = rates[-PATIENCE][0], rates[-1][0]
        return Finding(
            "learning_rate_still",
            f"the learning rate has been exactly {values[0]:.3g} from step {first} to {last}, its schedule moves",
            "the scheduler is not stepped, or something sets the rate back after it",
            look,
        )
    return None
