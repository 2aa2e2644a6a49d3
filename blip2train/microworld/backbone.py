"""Part name -> a folder of frozen weights: makes, measures and guards the tiny backbones that ship with the package.

Implements `blip2train microworld pretrain`: train, save in float16, load again, measure, and write the scores with the
command beside them in `world.json`. LAVIS downloads its backbones and takes their quality on trust.
"""

from __future__ import annotations

import importlib.metadata
import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from blip2train.errors import ConfigError
from blip2train.microworld import oracle
from blip2train.microworld.pretrain_image import DenseHeads, build_vit, image_step
from blip2train.microworld.pretrain_text import build_opt, build_t5, causal_step, position_biases, seq2seq_step
from blip2train.microworld.scene import WorldSpec
from blip2train.microworld.training import Plan, Progress, train
from blip2train.microworld.vocabulary import LANGUAGE_MODEL_TOKENS, QFORMER_TOKENS, save_tokenizer, world_hash
from blip2train.run_dir import read_json, write_json

logger = logging.getLogger(__name__)

Part = Literal["vit", "opt", "t5", "qformer_tokenizer"]
PARTS: tuple[Part, ...] = get_args(Part)
ASSETS = Path(__file__).parent / "assets"
WORLD_FILE = "world.json"
WEIGHTS = "model.safetensors"
PLANS: Mapping[str, Plan] = {
    "vit": Plan(steps=4000, batch_size=64, lr=2e-3, warmup_steps=100, weight_decay=0.02),
    "opt": Plan(steps=9000, batch_size=32, lr=3e-3),
    "t5": Plan(steps=6000, batch_size=16, lr=1e-3),
}
"""The recipes of the shipped weights."""
MEASURED_OBJECTS = {"one_object": 1, "two_objects": 2, "three_objects": 3}


def pretrain(
    part: Part,
    spec: WorldSpec,
    out: str | Path = ASSETS,
    *,
    steps: int | None = None,
    seed: int = 0,
    bfloat16: bool = False,
    command: str = "",
    num_scenes: int = 300,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Make one part under `out/<part>` and note how good it is in `out/world.json`.

    Interrupt it at will: the same call continues from `out/<part>.state`, written every few hundred steps.

    Args:
        part: "vit", "opt", "t5" or "qformer_tokenizer".
        spec: the world; only its size and its drawing dials matter here.
        out: folder of the parts.
        steps: optimizer steps; the recipe's own number if omitted.
        seed: of weights and batches.
        bfloat16: compute in bfloat16 (faster where the CPU has it, and not the same weights to the last bit).
        command: the command line to note in `world.json`.
        num_scenes: how many scenes of each size a language model is measured on.
        progress: called after every step.

    Returns:
        The part's entry in `world.json`; its "scores" are shares from 0 to 1.

    Raises:
        ConfigError: unknown part.
        CheckpointError: an interrupted run with other settings is in the way.
    """
    folder = Path(out) / part
    if part == "qformer_tokenizer":
        save_tokenizer(QFORMER_TOKENS, folder)
        return note(part, spec, Path(out), {"command": command})
    if part not in PLANS:
        raise ConfigError(f"no part {part!r}", where="part=", fix=f"one of {', '.join(PARTS)}")
    plan = replace(PLANS[part], seed=seed, bfloat16=bfloat16)
    if steps is not None:
        plan = replace(plan, steps=steps, warmup_steps=min(plan.warmup_steps, steps // 4))
    state_path = Path(out) / f"{part}.state"
    model = trained(part, spec, plan, state_path, progress)
    export(part, model, folder)
    state_path.unlink(missing_ok=True)
    entry = {"command": command, "plan": asdict(plan), "scores": measure(part, spec, folder, num_scenes)}
    return note(part, spec, Path(out), entry)


def trained(part: str, spec: WorldSpec, plan: Plan, state_path: Path, progress: Progress | None = None) -> nn.Module:
    """Build one part from its seed and train it, or finish what `state_path` holds."""
    torch.manual_seed(plan.seed)
    if part == "vit":
        heads = DenseHeads(build_vit(spec.size))
        train(heads, image_step(heads, spec, plan), plan, state_path, progress)
        return heads.vit
    if part == "opt":
        opt: nn.Module = build_opt()
        train(opt, causal_step(opt, spec, plan), plan, state_path, progress)
        return opt
    t5: nn.Module = build_t5()
    train(t5, seq2seq_step(t5, spec, plan), plan, state_path, progress, position_biases(t5))
    return t5


def export(part: str, model: nn.Module, folder: Path) -> None:
    """Write weights in float16, with configuration and tokenizer where the part has them."""
    folder.mkdir(parents=True, exist_ok=True)
    if part == "vit":
        state = {name: tensor.half().contiguous() for name, tensor in model.state_dict().items()}
        save_file(state, folder / WEIGHTS)
        return
    language_model: Any = model
    language_model.half().save_pretrained(folder)
    save_tokenizer(LANGUAGE_MODEL_TOKENS, folder)


def load(part: str, spec: WorldSpec, folder: Path) -> tuple[Any, Any]:
    """(model in float32, tokenizer or None) from an exported folder, through the classes every user loads them with."""
    if part == "vit":
        vit = build_vit(spec.size)
        vit.load_state_dict({name: tensor.float() for name, tensor in load_file(folder / WEIGHTS).items()})
        return vit.eval(), None
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

    loader = AutoModelForCausalLM if part == "opt" else AutoModelForSeq2SeqLM
    return loader.from_pretrained(folder, dtype=torch.float32).eval(), AutoTokenizer.from_pretrained(folder)


def measure(part: str, spec: WorldSpec, folder: Path, num_scenes: int = 300) -> dict[str, Any]:
    """What the exported part can do: a linear probe for the ViT, oracle and caption truth for a language model."""
    model, tokenizer = load(part, spec, folder)
    if part == "vit":
        return {"probe": oracle.probe_vit(model, spec)}
    scores: dict[str, Any] = {}
    for name, number in MEASURED_OBJECTS.items():
        scenes = oracle.scenes_for(spec, number, num_scenes)
        scores[name] = oracle.text_oracle(model, tokenizer, scenes)
        scores[name]["caption_true"] = oracle.caption_truth(model, tokenizer, scenes)
    return scores


def note(part: str, spec: WorldSpec, out: Path, entry: Mapping[str, Any]) -> dict[str, Any]:
    """Write the entry of one part to `out/world.json`; entries made for another world are dropped."""
    path = out / WORLD_FILE
    known = read_json(path) if path.is_file() else {}
    if known.get("world_hash") != world_hash(spec):
        known = {"world_hash": world_hash(spec), "parts": {}}
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "timm", "tokenizers")}
    known["parts"][part] = _rounded(entry) | {"versions": versions}
    write_json(path, known)
    added: dict[str, Any] = known["parts"][part]
    return added


def check_backbones(data_world_hash: str, assets: str | Path = ASSETS) -> None:
    """Refuse backbones that were made for another world than the data.

    Args:
        data_world_hash: "world_hash" of the data's `microworld.json`.
        assets: folder of the backbones.

    Raises:
        ConfigError: they do not belong together, or there are no backbones.
    """
    path = Path(assets) / WORLD_FILE
    if not path.is_file():
        raise ConfigError("no backbones", where=str(path), fix="make them: blip2train microworld pretrain")
    known = read_json(path)["world_hash"]
    if known != data_world_hash:
        raise ConfigError(
            f"the backbones know world {known}, the data shows world {data_world_hash}",
            where=str(path),
            fix="use the default world.size and language, or pretrain backbones for this world",
        )


def _rounded(value: Any) -> Any:
    return json.loads(json.dumps(value), parse_float=lambda text: round(float(text), 6))
