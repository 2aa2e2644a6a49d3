"""Check "versions": what is installed against what the package asks for and was tested with, and CUDA against torch."""

from __future__ import annotations

import importlib
import importlib.metadata
import platform
from collections.abc import Iterator, Mapping

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from blip2train.cli.config import config_dir
from blip2train.cli.doctor.context import Context, uses_gpu, zero_stage
from blip2train.cli.doctor.devices import driver_version, num_gpus
from blip2train.cli.doctor.row import Row

CHECK = "versions"
SHOWN = ("torch", "torchvision", "pytorch-lightning", "transformers", "timm")
"""Named in the table whether or not something is wrong with them."""


def check_versions(context: Context) -> Iterator[Row]:
    """One row of Python and packages, and one of CUDA where the config wants GPUs."""
    config = context.config
    extras = set() if zero_stage(config) is None else {"deepspeed"}
    if config.model and config.model.get("language_model") and config.model.language_model.get("lora"):
        extras.add("lora")
    shown = [*SHOWN, *(["deepspeed"] if "deepspeed" in extras else [])]
    yield judge_packages(requirements(extras), installed(), tested(), shown)
    importlib.import_module("torchvision")  # a build for another torch fails here, and is this check's failure
    if uses_gpu(config, num_gpus()):
        yield judge_cuda(*_cuda_facts())


def requirements(extras: set[str]) -> list[Requirement]:
    """What the installed package asks for: always, and for some of its extras."""
    stated = [Requirement(text) for text in importlib.metadata.requires("blip2train") or []]
    return [
        item
        for item in stated
        if item.marker is None or any(item.marker.evaluate({"extra": extra}) for extra in {"", *extras})
    ]


def installed() -> dict[str, str]:
    """Version of every installed package by its canonical name."""
    return {
        canonicalize_name(found.name): found.version
        for found in importlib.metadata.distributions()
        if found.name is not None
    }


def tested() -> dict[str, str]:
    """Versions of constraints.txt, with which the tests ran; a checkout has it, an installed package does not."""
    path = config_dir().parent / "constraints.txt"
    if not path.is_file():
        return {}
    lines = (line.partition("==") for line in path.read_text(encoding="utf-8").splitlines())
    return {canonicalize_name(name): version.strip() for name, _, version in lines if version}


def judge_packages(
    wanted: list[Requirement], found: Mapping[str, str], known_good: Mapping[str, str], shown: list[str]
) -> Row:
    """A package that is missing or out of its range fails; one of another version than was tested is said."""
    missing = [str(item.name) for item in wanted if canonicalize_name(item.name) not in found]
    outside = [
        f"{item.name} {found[canonicalize_name(item.name)]} (wanted {item.specifier})"
        for item in wanted
        if canonicalize_name(item.name) in found
        and not item.specifier.contains(found[canonicalize_name(item.name)], prereleases=True)
    ]
    if missing or outside:
        said = [*(f"{name} is not installed" for name in missing), *outside]
        fix = "pip install 'blip2train[deepspeed]'" if missing == ["deepspeed"] else "pip install -U blip2train"
        return Row(CHECK, "fail", "; ".join(said), f"{fix}, in a checkout with -c constraints.txt")
    parts = [f"python {platform.python_version()}"]
    for name in shown:
        version, good = found.get(canonicalize_name(name), "?"), known_good.get(canonicalize_name(name))
        other = good is not None and version.partition("+")[0] != good.partition("+")[0]
        parts.append(f"{name} {version}" + (f" (tested: {good})" if other else ""))
    return Row(CHECK, "ok", ", ".join(parts))


def _cuda_facts() -> tuple[str | None, str | None, str | None]:
    """(CUDA that torch was built for, driver, NCCL)."""
    import torch

    nccl = None
    if torch.distributed.is_available() and torch.distributed.is_nccl_available() and torch.version.cuda:
        nccl = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
    return torch.version.cuda, driver_version(), nccl


def judge_cuda(built_for: str | None, driver: str | None, nccl: str | None) -> Row:
    """torch must be a CUDA build and a driver must be there; whether the two fit shows in the devices found."""
    if built_for is None:
        return Row(
            CHECK, "fail", "torch is a build without CUDA", "install torch's CUDA build (pytorch.org), or trainer=cpu"
        )
    if driver is None:
        fix = "install NVIDIA's driver, or pass the GPUs on (docker --gpus all, srun --gres=gpu:N); or trainer=cpu"
        return Row(CHECK, "fail", f"torch is built for CUDA {built_for}; there is no NVIDIA driver", fix)
    measured = f"torch is built for CUDA {built_for}; driver {driver}; NCCL {nccl or 'missing'}"
    if nccl is None:
        return Row(CHECK, "warn", measured, "several GPUs need NCCL: install torch's Linux CUDA build")
    return Row(CHECK, "ok", measured)
