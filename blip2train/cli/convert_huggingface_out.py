"""`blip2train convert from=blip2train to=huggingface`: a run folder -> what `from_pretrained` loads, complete."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from blip2train.checkpoint import huggingface_config as settings
from blip2train.checkpoint.converted import ConversionReport, read_converted, save_tensors
from blip2train.checkpoint.huggingface import NOT_HELD, Kind, Tensors, is_eva, to_theirs
from blip2train.checkpoint.huggingface import VISION as VISION_PREFIX
from blip2train.checkpoint.huggingface_folder import SIDE_FACTS, SIDE_TENSORS, write_generation_config, write_model
from blip2train.checkpoint.model_card import ModelCard
from blip2train.cli.check import stage_number
from blip2train.cli.config import build
from blip2train.cli.convert import card_source, language_model_name, vision_encoder_name
from blip2train.cli.convert_huggingface_text import Export, add_language_model, add_qformer_tokenizer
from blip2train.cli.evaluate import load_run_config
from blip2train.cli.meta import build_meta
from blip2train.errors import ConfigError
from blip2train.run_dir import RunDir, write_json


def to_huggingface(config: DictConfig, source: Path, folder: Path) -> ConversionReport:
    """Convert a run folder into a folder of `save_pretrained`; see `cli.convert.Direction`.

    Raises:
        ConfigError: the model is another network than transformers' Blip2.
        CheckpointError: no such checkpoint, or tensors without a place in transformers.
    """
    run = RunDir.open(source, where="source=")
    trained = load_run_config(run)
    kind: Kind = "retrieval" if stage_number(trained) == 1 else "generation"
    checkpoint = config.get("source_checkpoint") or "last"
    export = Export(run, trained, kind, read_converted(run, checkpoint), build_meta(trained))
    network = _vision_network(export)
    vision = settings.vision_config(network, str(run.config_path))
    tensors = Tensors(_trained(export), _vision(export), {}, _aside(export))
    report = ConversionReport(notes=settings.eps_note(network))
    theirs = _base_config(export, vision)
    if kind == "generation":
        add_language_model(export, theirs, tensors, folder, report)
    else:
        add_qformer_tokenizer(export, folder)
    dtype = _loaded_dtype(tensors, kind, export, report)
    write_model(folder, theirs, to_theirs(tensors, kind, str(run.path)), kind, dtype)
    _write_side(export, tensors, folder, report)
    report.parts |= {"trainable": len(tensors.trained), "vision encoder": len(tensors.vision)}
    report.parts |= {"language model": len(tensors.language_model)} if tensors.language_model else {}
    _write_card(export, folder, report)
    return report


def _vision_network(export: Export) -> settings.VisionNetwork:
    encoder, norm = export.built.vision_encoder, export.built.ln_vision
    if not hasattr(encoder, "backbone"):
        raise ConfigError(
            f"the vision encoder is a {type(encoder).__name__}, not one of timm's",
            where=str(export.run.config_path),
            fix="transformers' Blip2 holds a plain ViT alone; keep this run in blip2train's form",
        )
    has_norm = isinstance(norm, nn.LayerNorm)
    return settings.VisionNetwork(encoder.backbone, encoder.image.size, has_norm, norm.eps if has_norm else 0.0)


def _trained(export: Export) -> dict[str, Tensor]:
    """What trains, without the encoder's and what transformers cannot hold, in the number formats it once came in."""
    held = {
        name: tensor
        for name, tensor in export.model.state.items()
        if name not in NOT_HELD and not name.startswith(VISION_PREFIX)
    }
    if any(name.startswith("language_model.") for name in held):
        raise ConfigError(
            "the language model has an adapter (LoRA), which a Blip2 of transformers has no place for",
            where=str(export.run.config_path),
            fix="keep this run in blip2train's form",
        )
    return {name: _in_format(tensor, export, name) for name, tensor in held.items()}


def _in_format(tensor: Tensor, export: Export, name: str) -> Tensor:
    """A tensor as it was saved before it came here, if nothing is lost by it (it has not been trained since)."""
    stated = export.model.facts.get("dtypes", {}).get(name) if export.from_huggingface else None
    if stated is None:
        return tensor
    narrow = tensor.to(getattr(torch, stated))
    return narrow if torch.equal(narrow.to(tensor.dtype), tensor) else tensor


def _vision(export: Export) -> dict[str, Tensor]:
    """The whole encoder by timm's names; what was trained of it from the checkpoint."""
    changed = {
        name.removeprefix(VISION_PREFIX): _in_format(tensor, export, name)
        for name, tensor in export.model.state.items()
        if name.startswith(VISION_PREFIX)
    }
    export.side["trained_vision"] = sorted(changed)
    names = set(export.built.vision_encoder.backbone.state_dict())
    if names <= set(export.model.vision):
        whole = {name: export.model.vision[name] for name in names}
    elif names <= set(changed):
        whole = {}
    else:
        _require_weights(export)
        whole = dict(build(export.config.model.vision_encoder).backbone.state_dict())
    export.side["eva"] = is_eva(names)
    return whole | changed


def _require_weights(export: Export) -> None:
    """Refuse a frozen encoder that would be drawn anew: the Q-Former was trained on another one.

    Raises:
        ConfigError: neither the run's parts/ nor its config gives the encoder weights.
    """
    encoder = export.config.model.vision_encoder
    if not encoder.get("pretrained", False) and not encoder.get("weights", None):
        raise ConfigError(
            f"the frozen vision encoder {encoder.name} has no weights: it would be exported with random ones",
            where=f"model.vision_encoder in {export.run.config_path}",
            fix="set pretrained: true there, or weights: to a file of the encoder that this model was trained on "
            "(from=lavis: model.vision_encoder.pretrained=true or model.vision_encoder.weights=FILE)",
        )


def _aside(export: Export) -> dict[str, Tensor]:
    return dict(export.model.extra) if export.from_huggingface else {}


def _base_config(export: Export, vision: dict[str, Any]) -> Any:
    """transformers' config without its language model: that of the source, or one for our sizes."""
    if export.from_huggingface:
        return settings.blip2_config(copy.deepcopy(export.model.facts["config"]))
    ours: Any = OmegaConf.to_container(export.config.model.qformer, resolve=True)
    contrastive = {"image_text_hidden_size": export.config.model.contrastive_dim} if export.kind == "retrieval" else {}
    return settings.blip2_config(
        {
            "vision_config": vision,
            "qformer_config": settings.qformer_config(ours, text=export.kind == "retrieval"),
            "num_query_tokens": ours["num_queries"],
            **contrastive,
        }
    )


def _loaded_dtype(tensors: Tensors, kind: Kind, export: Export, report: ConversionReport) -> str:
    """What `from_pretrained` loads when it is not told: the large part's number format."""
    if export.from_huggingface and export.model.facts["config"].get("dtype"):
        return str(export.model.facts["config"]["dtype"])
    large = tensors.language_model if kind == "generation" else tensors.vision
    formats = {settings.name_of(tensor.dtype) for tensor in large.values() if tensor.is_floating_point()}
    dtype = formats.pop() if len(formats) == 1 else "float32"
    if dtype != "float32":
        report.notes.append(
            f"from_pretrained loads the vision encoder, the projection and the language model in {dtype} unless it is "
            "told dtype=; in blip2train what trains is float32. The files hold every tensor in its own format"
        )
    return dtype


def _write_side(export: Export, tensors: Tensors, folder: Path, report: ConversionReport) -> None:
    """What transformers cannot hold, beside its files, and the model's generation settings."""
    invented = set(export.model.facts.get("invented", []))
    kept = {name: export.model.state[name] for name in NOT_HELD if name in export.model.state and name not in invented}
    if kept:
        save_tensors(kept, folder / SIDE_TENSORS)
        report.kept_aside += sorted(kept)
    reasons = dict.fromkeys(NOT_HELD[name] for name in kept)
    report.not_held += [f"{', '.join(name for name in kept if NOT_HELD[name] == why)}: {why}" for why in reasons]
    if export.from_huggingface:
        return
    encoder = export.config.model.vision_encoder
    export.side |= {"step": export.model.step, "ln_vision_eps": float(export.built.ln_vision.eps)}
    export.side["vision_encoder"] = {
        key: encoder[key] for key in ("trainable_blocks", "checkpoint_activations") if key in encoder
    }
    write_json(folder / SIDE_FACTS, export.side)
    if export.kind == "generation":
        write_generation_config(folder)


def _write_card(export: Export, folder: Path, report: ConversionReport) -> None:
    backbones = {"vision encoder": vision_encoder_name(export.config)}
    if export.kind == "generation":
        backbones["language model"] = language_model_name(export.config)
    card = ModelCard(
        name=str(export.config.name),
        stage=stage_number(export.config),
        format="huggingface",
        source=card_source(export.run, export.config.name),
        steps=export.model.step,
        backbones=backbones,
        tensors=report.parts,
        not_held=report.not_held,
        notes=report.notes,
    )
    (folder / "README.md").write_text(card.text(), encoding="utf-8")
