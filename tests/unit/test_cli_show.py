"""The microscope looks at any experiment as it is, without what only a training needs."""

import pytest

from blip2train.cli.config import compose
from blip2train.cli.show import show_params


def test_params_of_stage_two_need_no_stage_one_weights(capsys: pytest.CaptureFixture[str]) -> None:
    show_params(compose("train", ["experiment=microworld_stage2_opt", "run_dir=outputs/x"]))
    rows = {line.split("│")[1].strip(): line for line in capsys.readouterr().out.splitlines() if "│" in line}
    frozen_column = rows["language_model"].split("│")[3].strip()
    assert int(frozen_column.replace(",", "")) > 400_000 and rows["language_model"].split("│")[2].strip() == "0"
