"""Record what LAVIS's RandAugment operations make of one small picture: tests/data/lavis_randaugment.json.

    python -m venv ENV && ENV/bin/pip install opencv-python-headless==4.5.5.64 'numpy<2' torch
    ENV/bin/pip install --no-deps salesforce-lavis==1.0.2
    ENV/bin/python scripts/parity/record_randaugment.py tests/data/lavis_randaugment.json

Imports nothing of blip2train. Read straight from its file: LAVIS's package would import every model it has.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

# our names -> LAVIS's
NAMES = {
    "identity": "Identity",
    "auto_contrast_lavis": "AutoContrast",
    "brightness": "Brightness",
    "sharpness": "Sharpness",
    "equalize": "Equalize",
    "shear_x": "ShearX",
    "shear_y": "ShearY",
    "translate_x": "TranslateX",
    "translate_y": "TranslateY",
    "rotate": "Rotate",
}
SIGNED = {"shear_x", "shear_y", "translate_x", "translate_y", "rotate"}
MAGNITUDES = dict.fromkeys([*SIGNED, "brightness"], (5, 8)) | {"sharpness": (2, 5)}  # above 5 its bytes overflow


def load_lavis() -> Any:
    package = importlib.util.find_spec("lavis")
    assert package is not None and package.origin is not None, "salesforce-lavis is not installed"
    path = Path(package.origin).parent / "processors" / "randaugment.py"
    spec = importlib.util.spec_from_file_location("randaugment", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def picture() -> np.ndarray:
    """Colour ramps with an edge and some noise; 24 x 20: enough pixels for equalize; only the green plane has a 0."""
    rows, columns = np.mgrid[0:24, 0:20]
    planes = [40 + 5 * rows + 2 * columns, 140 - 4 * rows - 3 * columns, 60 + 100 * ((rows > 9) & (columns > 7))]
    noise = np.random.RandomState(0).randint(-9, 10, (24, 20, 3))
    return np.clip(np.stack(planes, axis=-1) + noise, 0, 255).astype(np.uint8)


def main() -> None:
    lavis, image = load_lavis(), picture()
    rows = []
    for name, theirs in NAMES.items():
        for magnitude in MAGNITUDES.get(name, (5,)):
            for negative in (False, True) if name in SIGNED else (False,):
                arguments = list(lavis.arg_dict[theirs](magnitude))
                if name in SIGNED:
                    arguments[0] = -abs(arguments[0]) if negative else abs(arguments[0])
                out = lavis.func_dict[theirs](image, *arguments)
                pixels = out.transpose(2, 0, 1).tobytes().hex()
                rows.append({"name": name, "magnitude": magnitude, "negative": negative, "pixels": pixels})
    recorded = {"shape": [3, 24, 20], "image": image.transpose(2, 0, 1).tobytes().hex(), "rows": rows}
    Path(sys.argv[1]).write_text(json.dumps(recorded, indent=0) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
