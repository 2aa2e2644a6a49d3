"""LAVIS's own BLIP-2 classes, from the installed `salesforce-lavis`, without the rest of that package.

Runs in the environment that `lavis_environment.sh` makes; imports nothing of blip2train. `lavis/__init__.py` imports
every dataset, task and model of LAVIS (video readers, OpenCV, spaCy); none takes part in BLIP-2. So three packages get
an empty `__init__`, and what the runner imports to load data, and fairscale, whose checkpointing is asked for by a
switch that is off here, get stand-ins that refuse to work. The model files and the runner are read as they are.
"""

from __future__ import annotations

import importlib.util
import sys
import types
from pathlib import Path

_REFUSING = {
    "fairscale.nn.checkpoint.checkpoint_activations": ["checkpoint_wrapper"],
    "lavis.datasets.data_utils": ["concat_datasets", "reorg_datasets_by_split"],
    "lavis.datasets.datasets.dataloader_utils": ["IterLoader", "MultiIterLoader", "PrefetchLoader"],
    "webdataset": [],
}


def _refuse(*_: object) -> object:
    raise RuntimeError("this part of LAVIS is not installed in the parity environment")


def _stand_in(name: str, members: list[str]) -> None:
    parts = name.split(".")
    for end in range(1, len(parts) + 1):
        module = sys.modules.setdefault(".".join(parts[:end]), types.ModuleType(".".join(parts[:end])))
    for member in members:
        setattr(module, member, _refuse)


def _install() -> None:
    spec = importlib.util.find_spec("lavis")  # finds the folder, runs nothing
    assert spec is not None and spec.origin is not None, "salesforce-lavis is not installed: run lavis_environment.sh"
    root = Path(spec.origin).parent
    for name in ("lavis", "lavis.models", "lavis.runners"):
        package = types.ModuleType(name)
        package.__path__ = [str(root.joinpath(*name.split(".")[1:]))]
        sys.modules[name] = package
    for name, members in _REFUSING.items():
        _stand_in(name, members)


_install()

from lavis.models import base_model  # noqa: E402

sys.modules["lavis.models"].BaseModel = base_model.BaseModel  # type: ignore[attr-defined]  # the registry asks for it

from lavis.models import clip_vit, eva_vit  # noqa: E402
from lavis.models.blip2_models import Qformer, blip2, blip2_opt, blip2_qformer, blip2_t5  # noqa: E402
from lavis.models.blip2_models.blip2_image_text_matching import Blip2ITM  # noqa: E402
from lavis.runners.runner_base import RunnerBase  # noqa: E402

__all__ = [
    "Blip2ITM",
    "Qformer",
    "RunnerBase",
    "blip2",
    "blip2_opt",
    "blip2_qformer",
    "blip2_t5",
    "clip_vit",
    "eva_vit",
]
