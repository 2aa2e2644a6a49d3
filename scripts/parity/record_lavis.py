"""Record what LAVIS computes: `python record_lavis.py --target FOLDER --name NAME --kind stage1|stage2_opt|stage2_t5`.

Runs in the environment of `lavis_environment.sh`; imports nothing of blip2train. Writes NAME.safetensors
(`state_dict/`, inputs, `hidden/` of every pass, `grads/`, `after_adamw/` of one step of LAVIS's own optimizer) and
NAME.json (`args`, losses, the negatives taken), as `lavis_numerics` has them. In LAVIS's forward one thing is changed:
`torch.multinomial` takes the likeliest instead of drawing. Dropout is 0.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import tempfile
from argparse import Namespace
from pathlib import Path
from typing import Any

import lavis_source as lavis
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from omegaconf import OmegaConf
from safetensors.torch import save_file
from small_lavis import build
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import logging

logging.set_verbosity_error()  # LAVIS starts from a plain BERT, and transformers lists what that lacks
Record = tuple[dict[str, Tensor], dict[str, Any]]
"""Tensors and facts (losses, negatives, ids) of one run."""
PASSES = ("query", "text", "itm", "itg")
"""LAVIS's four calls of Qformer.bert in stage 1, in its order; stage 2 makes the first alone."""

NOT_SHOWN = ("target", "name", "leave_out", "save", "load")
"""Arguments that say nothing of the model or its batch."""


def main() -> None:
    args = _arguments()
    target = args.target.resolve()
    with tempfile.TemporaryDirectory() as folder:
        if args.ranks == 1:
            tensors, facts = _run(0, args, folder)
        else:
            mp.spawn(_save_run, args=(args, folder), nprocs=args.ranks)
            records = [torch.load(f"{folder}/rank{rank}.pt") for rank in range(args.ranks)]
            tensors, facts = _merge(records)
    target.mkdir(parents=True, exist_ok=True)
    kept = {key: item.contiguous() for key, item in tensors.items() if key.split("/")[0] not in args.leave_out}
    save_file(kept, target / f"{args.name}.safetensors")
    shown = {key: value for key, value in vars(args).items() if key not in NOT_SHOWN}
    (target / f"{args.name}.json").write_text(json.dumps({"args": shown, **facts}, indent=1) + "\n")


def _arguments() -> Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", type=Path, required=True)
    parser.add_argument("--name", required=True)
    parser.add_argument("--kind", choices=("stage1", "stage2_opt", "stage2_t5"), default="stage1")
    parser.add_argument("--vit", choices=("eva_clip_g", "clip_L"), default="eva_clip_g")
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float32")
    parser.add_argument("--texts", choices=("mixed", "short", "same", "empty"), default="mixed")
    parser.add_argument("--prompt", default="", help="of Blip2OPT; every caption starts with it")
    parser.add_argument("--temperature", type=float, default=0.07)
    parser.add_argument("--leave-out", nargs="*", default=[], help="groups of tensors not to write, e.g. after_adamw")
    parser.add_argument("--save", type=Path, help="where LAVIS's runner is to put checkpoint_0.pth, before the step")
    parser.add_argument("--load", type=Path, help="a checkpoint that LAVIS reads before the step, over wiped weights")
    parser.add_argument("--same-images", type=int, default=0, help="this many images are copies of the first")
    sizes = {
        "seed": 0, "ranks": 1, "batch": 6, "img": 32, "patch": 16, "vit_width": 16, "vit_depth": 2, "vit_heads": 2,
        "vit_mlp": 32, "q_layers": 4, "q_width": 24, "q_heads": 3, "q_mlp": 48, "queries": 8, "max_txt": 12,
        "max_positions": 40, "embed_dim": 16, "vocab": 50, "cross_attention_every": 2, "lm_width": 32,
    }  # fmt: skip
    for name, default in sizes.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    args = parser.parse_args()
    args.dropout = 0.0
    args.save, args.load = (None if path is None else path.resolve() for path in (args.save, args.load))
    if args.vit == "clip_L":
        args.vit_mlp = 4 * args.vit_width  # LAVIS leaves no choice
    return args


def _save_run(rank: int, args: Namespace, folder: str) -> None:
    torch.save(_run(rank, args, folder), f"{folder}/rank{rank}.pt")


def _run(rank: int, args: Namespace, folder: str) -> Record:
    """Build the model and make one training step in a process group, as LAVIS's trainer always does."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=args.ranks)
    own_folder = Path(folder) / f"models{rank}"
    own_folder.mkdir()
    os.chdir(own_folder)
    model = build(args)
    if args.load is not None:
        _load(model, args.load)
    if args.save is not None:
        _save(model, args.save)
    record = _step(model, _samples(model, args, rank), args)
    dist.barrier()
    dist.destroy_process_group()
    return record


def _samples(model: nn.Module, args: Namespace, rank: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1000 * args.seed + rank)
    image = torch.randn(args.batch, 3, args.img, args.img, generator=generator, dtype=torch.float64)
    image[1 : 1 + args.same_images] = image[0]
    words = random.Random(1000 * args.seed + rank)
    samples = {"image": image.to(model.query_tokens.dtype)}
    if args.kind == "stage2_t5":
        return samples | {"text_input": _texts(args, words, 30), "text_output": _texts(args, words, 30)}
    if args.kind == "stage2_opt":
        letters = ["".join(words.choices("abcdefgh 123", k=length)) for length in _lengths(args, words)]
        return samples | {"text_input": [args.prompt + text for text in letters]}
    return samples | {"text_input": _texts(args, words, args.vocab)}


def _texts(args: Namespace, words: random.Random, vocab: int) -> list[str]:
    texts = [" ".join(f"w{words.randrange(5, vocab)}" for _ in range(length)) for length in _lengths(args, words)]
    return [texts[0]] * len(texts) if args.texts == "same" else texts


def _lengths(args: Namespace, words: random.Random) -> list[int]:
    """Words per text: "short" is mostly padding beside one long text, "mixed" also truncates some."""
    if args.texts == "empty":
        return [0] * args.batch
    if args.texts == "short":
        return [args.max_txt] + [words.randrange(0, 3) for _ in range(args.batch - 1)]
    return [words.randrange(1, args.max_txt + 2) for _ in range(args.batch)]


def _step(model: nn.Module, samples: dict[str, Any], args: Namespace) -> Record:
    """Forward, backward and one update; what the model was given is read off the calls that it makes."""
    tensors = {f"state_dict/{name}": tensor.detach().clone() for name, tensor in model.state_dict().items()}
    tensors["image"] = samples["image"]
    tensors.update(_tokens(model, samples, args))
    taken: list[int] = []
    torch.multinomial = lambda weights, _: _likeliest(weights, taken)
    trained = DistributedDataParallel(model, find_unused_parameters=True) if args.ranks > 1 else model
    with _HiddenStates(model) as hidden:
        output = trained(samples)
    output["loss"].backward()
    tensors.update(hidden.tensors)
    facts = {key: float(value.detach()) for key, value in output.items()} | {"lm_config": _lm_config(model)}
    if args.kind == "stage1":
        facts |= {"bos": model.tokenizer.bos_token_id, "pad": model.tokenizer.pad_token_id}
        facts |= {"neg_image_for_text": taken[: args.batch], "neg_text_for_image": taken[args.batch :]}
        tensors.update(_match_scores(model, samples, args))
    named = {name: item for name, item in model.named_parameters() if item.requires_grad}
    tensors.update({f"grads/{name}": item.grad.clone() for name, item in named.items() if item.grad is not None})
    _lavis_optimizer(model).step()
    tensors.update({f"after_adamw/{name}": item.detach().clone() for name, item in named.items()})
    return tensors, facts


def _likeliest(weights: Tensor, taken: list[int]) -> Tensor:
    taken.append(int(weights.argmax()))
    return torch.tensor([taken[-1]])


class _HiddenStates:
    """Keeps the image tokens and the last hidden states of every pass through LAVIS's BERT."""

    def __init__(self, model: nn.Module) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.calls = iter(PASSES)
        self.hooks = [
            model.Qformer.bert.register_forward_hook(self._keep),
            model.ln_vision.register_forward_hook(self._keep_image),
        ]

    def __enter__(self) -> _HiddenStates:
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self.hooks:
            hook.remove()

    def _keep(self, module: nn.Module, inputs: object, output: Any) -> None:
        self.tensors[f"hidden/{next(self.calls)}"] = output.last_hidden_state.detach().clone()

    def _keep_image(self, module: nn.Module, inputs: object, output: Tensor) -> None:
        self.tensors["hidden/image"] = output.detach().clone()


def _tokens(model: nn.Module, samples: dict[str, Any], args: Namespace) -> dict[str, Tensor]:
    """The ids that LAVIS's forward makes of the texts, by the same calls of the same tokenizers."""
    cut = {"truncation": True, "max_length": args.max_txt, "return_tensors": "pt"}
    if args.kind == "stage1":
        text = model.tokenizer(samples["text_input"], padding="max_length", **cut)
        return {"input_ids": text.input_ids, "attention_mask": text.attention_mask}
    if args.kind == "stage2_opt":
        model.opt_tokenizer.padding_side = "right"
        text = model.opt_tokenizer([line + "\n" for line in samples["text_input"]], padding="longest", **cut)
        length = model.prompt_length if args.prompt else torch.zeros(1, dtype=torch.long)
        return {"text/input_ids": text.input_ids, "text/attention_mask": text.attention_mask, "prompt_length": length}
    tensors = {}
    for name in ("text_input", "text_output"):
        text = model.t5_tokenizer(samples[name], padding="longest", **cut)
        tensors |= {f"{name}/input_ids": text.input_ids, f"{name}/attention_mask": text.attention_mask}
    return tensors


def _lm_config(model: nn.Module) -> dict[str, Any] | None:
    language_model = getattr(model, "opt_model", None) or getattr(model, "t5_model", None)
    return None if language_model is None else json.loads(language_model.config.to_json_string(use_diff=False))


@torch.no_grad()
def _match_scores(model: nn.Module, samples: dict[str, Any], args: Namespace) -> dict[str, Tensor]:
    """What `Blip2ITM` answers for every image with its text; it does not pad, so one pair at a time.

    Left out in float64: it casts the image tokens to float32.
    """
    if args.dtype == "float64":
        return {}
    pairs = [
        {"image": samples["image"][row : row + 1], "text_input": [samples["text_input"][row]]}
        for row in range(args.batch)
    ]
    heads = {head: [lavis.Blip2ITM.forward(model, pair, match_head=head) for pair in pairs] for head in ("itm", "itc")}
    return {f"match/{head}": torch.cat(scores) for head, scores in heads.items()}


@torch.no_grad()
def _load(model: nn.Module, path: Path) -> None:
    """Wipe what trains and let LAVIS read a checkpoint, as it does before evaluation or fine-tuning."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.fill_(0.5)
    message = model.load_checkpoint(str(path))
    assert not message.unexpected_keys, message.unexpected_keys


def _save(model: nn.Module, folder: Path) -> None:
    """What LAVIS's runner writes at the end of an epoch."""
    folder.mkdir(parents=True, exist_ok=True)
    runner = Namespace(
        model=model,
        optimizer=_lavis_optimizer(model),
        config=Namespace(to_dict=lambda: {"run": {"init_lr": 1e-4}}),
        scaler=None,
        output_dir=str(folder),
        unwrap_dist_model=lambda wrapped: wrapped,
    )
    lavis.RunnerBase._save_checkpoint(runner, cur_epoch=0)


def _lavis_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer of LAVIS's runner: its groups, its betas; rate and decay of its stage-1 config."""
    run = OmegaConf.create({"run_cfg": {"init_lr": 1e-4, "weight_decay": 0.05}})
    runner = Namespace(_optimizer=None, model=model, config=run)
    optimizer: torch.optim.Optimizer = lavis.RunnerBase.optimizer.fget(runner)
    return optimizer


def _merge(records: list[Record]) -> Record:
    """One record of several ranks: own inputs, losses and negatives; state dict and averaged gradients are the same."""
    same = ("state_dict/", "grads/", "after_adamw/")
    tensors, facts = {}, {"world": len(records)}
    for key, tensor in records[0][0].items():
        if key.startswith(same):
            assert all(torch.equal(tensor, other[key]) for other, _ in records), key
            tensors[key.replace("grads/", "grads_ddp_mean/")] = tensor
    for rank, (own, own_facts) in enumerate(records):
        tensors |= {f"ranks{rank}/{key}": tensor for key, tensor in own.items() if not key.startswith(same)}
        facts |= {f"ranks{rank}/{key}": value for key, value in own_facts.items() if key not in ("bos", "pad")}
    return tensors, facts | {key: records[0][1][key] for key in ("bos", "pad")}


if __name__ == "__main__":
    main()
