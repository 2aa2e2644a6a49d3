"""An evaluation finds its shards where the run had them, or where the user says they are now."""

import pytest
from omegaconf import OmegaConf

from blip2train.cli.config import compose, resolved_yaml
from blip2train.cli.evaluate import merge_with_run


@pytest.mark.parametrize(
    ("overrides", "root"),
    [
        ([], "/made/here"),
        (["paths.data=/moved/there"], "/moved/there"),
        (["benchmark=microworld_retrieval_out"], "/made/here"),
        (["benchmark=microworld_retrieval_out", "paths.data=/moved/there"], "/moved/there"),
    ],
)
def test_shards_are_sought_under_the_root_of_the_run_or_the_given_one(overrides: list[str], root: str) -> None:
    train = compose("train", ["experiment=microworld_stage1", "paths.data=/made/here", "run_dir=outputs/x"])
    trained = OmegaConf.create(resolved_yaml(train))
    whole = merge_with_run(compose("evaluate", ["run=outputs/x", *overrides]), trained)
    urls = [url for benchmark in whole.benchmarks.values() for url in benchmark.urls]
    assert urls and all(url.startswith(f"{root}/microworld/val_") for url in urls)
