"""`blip2train capfilt`: values of the wrong kind are answered as every mistake is, before the folder is made."""

from pathlib import Path

import pytest

from blip2train.cli.capfilt import capfilt
from blip2train.cli.config import compose
from blip2train.errors import ConfigError


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("captioner.settings.num_captions=many", "num_captions='many'"),
        ("captioner.settings=5", "settings=5"),
        ("captioner.settings=null", "settings=None"),
        ("+captioner.settings.beams=3", "no setting beams"),
        ("captioner.model=5", "model=5"),
        ("captioner.dtype=16", "dtype=16"),
        ("captioner=blip", "captioner='blip'"),
        ("ranker.model=null", "model=None"),
        ("rule.keep=all", "keep='all'"),
        ("rule=best", "rule='best'"),
        ("store_all=maybe", "store_all='maybe'"),
        ("batch_size=many", "batch_size='many'"),
        ("max_dropped_share=some", "max_dropped_share='some'"),
        ("max_dropped_share=2", "max_dropped_share=2"),
        ("cache.max_gb=much", "max_gb='much'"),
        ("storage_options=anon", "storage_options='anon'"),
        ("urls=5", "urls=5"),
        ("urls=[5]", r"urls=\[5\]"),
        ("out=5", "out=5"),
        ("index=5", "index=5"),
        ("device=[cpu]", "device="),
    ],
)
def test_a_value_of_the_wrong_kind_is_named(tmp_path: Path, override: str, named: str) -> None:
    given = {"urls": "urls=[none.tar]", "out": f"out={tmp_path / 'out'}", "device": "device=cpu"}
    given[override.split("=")[0]] = override
    with pytest.raises(ConfigError, match=named):
        capfilt(compose("capfilt", list(given.values())))
    assert not (tmp_path / "out").exists()
