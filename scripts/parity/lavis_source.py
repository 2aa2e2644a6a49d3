"""LAVIS's own BLIP-2 classes, from the installed `salesforce-lavis`, without the rest of that package.

Runs in the environment that `lavis_environment.sh` makes; imports nothing of blip2train. `lavis/__init__.py` imports
every dataset, task and model of LAVIS (video readers, OpenCV, spaCy); none takes part in BLIP-2, so two packages get an
empty `__init__`, and fairscale, whose checkpointing is asked for by a switch that is off here, an empty stand-in.
The model files themselves are read as they are.
"""

from __future__ import annotations

import importlib.util
import sys
import types
from pathlib import Path

_FAIRSCALE = "fairscale.nn.checkpoint.checkpoint_activations"


def _without_init(name: str, folder: Path) -> None:
    package = types.ModuleType(name)
    package.__path__ = [str(folder)]
    sys.modules[name] = package


def _refuse(module: object) -> object:
    raise RuntimeError("activation checkpointing (fairscale) is not installed in the parity environment")


def _stand_in_for_fairscale() -> None:
    parts = _FAIRSCALE.split(".")
    for end in range(1, len(parts) + 1):
        sys.modules[".".join(parts[:end])] = types.ModuleType(".".join(parts[:end]))
    sys.modules[_FAIRSCALE].checkpoint_wrapper = _refuse  # type: ignore[attr-defined]


def _install() -> None:
    spec = importlib.util.find_spec("lavis")  # finds the folder, runs nothing
    assert spec is not None and spec.origin is not None, "salesforce-lavis is not installed: run lavis_environment.sh"
    root = Path(spec.origin).parent
    _without_init("lavis", root)
    _without_init("lavis.models", root / "models")
    _stand_in_for_fairscale()


_install()

from lavis.models import base_model  # noqa: E402

sys.modules["lavis.models"].BaseModel = base_model.BaseModel  # type: ignore[attr-defined]  # the registry asks for it

from lavis.models import clip_vit, eva_vit  # noqa: E402
from lavis.models.blip2_models import Qformer, blip2, blip2_opt, blip2_qformer, blip2_t5  # noqa: E402
from lavis.models.blip2_models.blip2_image_text_matching import Blip2ITM  # noqa: E402

__all__ = ["Blip2ITM", "Qformer", "blip2", "blip2_opt", "blip2_qformer", "blip2_t5", "clip_vit", "eva_vit"]
