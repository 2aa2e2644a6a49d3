"""Bytes that the images of matching's negatives move per step: all tokens gathered, as in LAVIS, or the picked fetched.

    unshare -rn sh -c 'ip link set lo up && exec python scripts/benchmark/negatives.py --out OUT.json'

Gloo processes of one machine, tokens of ViT-g (257 x 1408) in bfloat16, a few steps of each kind:

- lavis: `all_gather` of all tokens, and in the backward pass `all_reduce` of the gradient of all of them, the two
  collectives of LAVIS's `all_gather_with_grad` (base_model.py); the gradient serves `ln_vision` alone.
- gather: the same tokens and gradients by `distributed.gather`, whose backward sends every block to its owner only.
- fetch: the drawn images alone, as the encoder left them: with a frozen encoder nothing goes back.
- fetch, trained encoder: the gradient of the drawn images goes back to their owners.

A negative is any other pair of the global batch, evenly drawn: (world - 1) / world of them lie elsewhere, and an image
that two rows of a rank draw travels once. Two measurements per rank and step: `counter` is `distributed.traffic`, of
what arrived; `kernel` is what the loopback device carried, divided by the ranks, with the headers of TCP. Other traffic
on the loopback device would count too: hence the network namespace of its own (`unshare`).
"""

import argparse
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from blip2train import distributed
from blip2train.objective.draw import Draw
from blip2train.run_dir import write_json

TOKENS, WIDTH, DTYPE = 257, 1408, torch.bfloat16


class LavisGather(torch.autograd.Function):
    """The collectives of LAVIS's GatherLayer."""

    @staticmethod
    def forward(ctx: Any, local: Tensor) -> Tensor:
        parts = [torch.empty_like(local) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, local)
        return torch.stack(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)
        return gradient[dist.get_rank()]


def lavis(tokens: Tensor, wanted: Tensor) -> Tensor:
    return LavisGather.apply(tokens.requires_grad_()).flatten(0, 1)[wanted]


def gather(tokens: Tensor, wanted: Tensor) -> Tensor:
    return distributed.gather(tokens.requires_grad_(), with_grad=True)[wanted]


def fetch(tokens: Tensor, wanted: Tensor) -> Tensor:
    sizes = [len(tokens)] * distributed.world_size()
    fetched, position = distributed.exchange_rows(tokens, wanted, sizes)
    return torch.cat([tokens, fetched])[position]


def fetch_trained(tokens: Tensor, wanted: Tensor) -> Tensor:
    return fetch(tokens.requires_grad_(), wanted)


KINDS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "lavis": lavis, "gather": gather, "fetch": fetch, "fetch, trained encoder": fetch_trained,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worlds", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--batch", type=int, default=32, help="pairs per rank")
    parser.add_argument("--steps", type=int, default=3, help="of each kind, averaged")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    rows = [row for world in arguments.worlds for row in measure(world, arguments.batch, arguments.steps)]
    for row in rows:
        print(row)
    if arguments.out:
        facts = {"backend": "gloo", "tokens": TOKENS, "width": WIDTH, "dtype": str(DTYPE).removeprefix("torch.")}
        facts |= {"batch_per_rank": arguments.batch, "steps": arguments.steps}
        write_json(arguments.out, facts | {"unit": "bytes per rank and step", "rows": rows})


def measure(world: int, batch: int, steps: int) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(worker, args=(world, folder, batch, steps), nprocs=world, start_method="spawn")
        ranks = [torch.load(Path(folder) / f"{rank}.pt") for rank in range(world)]
    rows = []
    for kind in KINDS:
        counter = sum(rank[kind]["counter"] for rank in ranks) / world / steps
        row = {"world": world, "kind": kind, "counter": None if kind == "lavis" else round(counter)}
        rows.append(row | {"kernel": round(ranks[0][kind]["kernel"] / world / steps)})
    for row in rows:
        row["share_of_lavis"] = round(row["kernel"] / rows[0]["kernel"], 3)
    return rows


def worker(rank: int, world: int, folder: str, batch: int, steps: int) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    tokens = torch.randn(batch, TOKENS, WIDTH, generator=torch.Generator().manual_seed(rank)).to(DTYPE)
    found = {}
    for kind, negatives in KINDS.items():
        distributed.barrier()
        before, carried = sum(distributed.traffic().values()), loopback_bytes()
        for step in range(steps):
            drawn = negatives(tokens.clone(), draw_others(rank, batch, world, step))
            if drawn.requires_grad:
                drawn.backward(torch.ones_like(drawn))
        distributed.barrier()
        found[kind] = {
            "counter": sum(distributed.traffic().values()) - before,
            "kernel": loopback_bytes() - carried,
        }
        distributed.barrier()
    torch.save(found, Path(folder) / f"{rank}.pt")
    distributed.barrier()
    dist.destroy_process_group()


def draw_others(rank: int, batch: int, world: int, step: int) -> Tensor:
    """(B,) any pair of the global batch but the own one."""
    own, columns = torch.arange(rank * batch, (rank + 1) * batch), torch.arange(world * batch)
    noise = Draw(0, step).uniform(0, own[:, None], columns[None, :])
    return noise.masked_fill(own[:, None] == columns, 0).argmax(dim=1)


def loopback_bytes() -> int:
    """Received by the loopback device since it is up: what one process sends to another counts once."""
    line = next(line for line in Path("/proc/net/dev").read_text().splitlines() if line.strip().startswith("lo:"))
    return int(line.split(":")[1].split()[0])


if __name__ == "__main__":
    main()
