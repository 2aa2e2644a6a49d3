"""Training from cached features is the training it replaces, on the evaluation transform, to the storage precision."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from omegaconf import DictConfig
from safetensors.torch import load_file, save_file
from test_resume import cut, weights

from blip2train.cli import data_cache_features
from blip2train.cli.config import build, compose
from blip2train.cli.data_cache_features import run as cache_features
from blip2train.cli.evaluate import evaluate
from blip2train.cli.features import with_features
from blip2train.cli.show import show_batch
from blip2train.cli.show_estimate import show_estimate
from blip2train.data.image_transform import decode_image
from blip2train.data.shards import ShardReader, open_shards
from blip2train.errors import ConfigError, DataError
from blip2train.model.vision_encoder.timm_vit import TimmVisionEncoder
from blip2train.run_dir import RunDir, read_json

STAGE1, T5 = "microworld_stage1", "microworld_stage2_t5"
LOSSES = {STAGE1: ("train/itc_loss", "train/itm_loss", "train/itg_loss"), T5: ("train/lm_loss",)}


def caching(laboratory, out: Path, *overrides: str) -> DictConfig:
    own = [f"experiment={STAGE1}", f"paths.data={laboratory.data}", f"out={out}", "encode_batch=8", "device=cpu"]
    return compose("data_cache_features", [*own, "data.num_workers=0", *overrides])


def cached(laboratory, out: Path, *overrides: str) -> Path:
    cache_features(caching(laboratory, out, *overrides))
    return out


def losses(run: RunDir, experiment: str) -> list[list[float]]:
    return [[row[name] for name in LOSSES[experiment]] for row in run.read_metrics()]


@pytest.fixture(scope="module")
def exact(laboratory, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Features that lose nothing: the micro-world's encoder computes in float32."""
    return cached(laboratory, tmp_path_factory.mktemp("features") / "float32", "codec=float32")


def refuse_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on, whoever builds an encoder fails."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the vision encoder was built")

    monkeypatch.setattr(TimmVisionEncoder, "__init__", refuse)


@pytest.mark.parametrize(
    ("codec", "tolerance"), [("float32", 1e-6), ("bfloat16", 1e-4), ("float8", 5e-4), ("int8", 2e-4)]
)
def test_itc_itm_and_itg_are_those_of_the_uncached_run_and_no_encoder_is_built(
    laboratory, stage1_run: RunDir, tmp_path: Path, codec: str, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    features = cached(laboratory, tmp_path / codec, f"codec={codec}")
    refuse_encoder(monkeypatch)
    run = laboratory.train(STAGE1, tmp_path / "run", f"features={features}").run
    rows, expected = losses(run, STAGE1), losses(stage1_run, STAGE1)
    assert len(rows) == len(expected) == 4
    assert rows[0] == pytest.approx(expected[0], rel=tolerance)
    for row, twin in zip(rows, expected, strict=True):  # later steps also carry the difference of the weights
        assert row == pytest.approx(twin, rel=30 * tolerance)


def test_the_prefix_language_modelling_of_stage_two_is_that_of_the_uncached_run(
    laboratory, stage1_run: RunDir, exact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = f"init_from={stage1_run.path}"
    plain = laboratory.train(T5, tmp_path / "plain", start).run
    refuse_encoder(monkeypatch)
    run = laboratory.train(T5, tmp_path / "cached", start, f"features={exact}").run
    for row, twin in zip(losses(run, T5), losses(plain, T5), strict=True):
        assert row == pytest.approx(twin, rel=2e-6)


def test_a_half_precision_encoder_stored_in_its_own_format_loses_no_bit(laboratory, tmp_path: Path) -> None:
    features = cached(laboratory, tmp_path / "bfloat16", "model.vision_encoder.dtype=bfloat16")
    config = laboratory.compose(STAGE1, tmp_path, "model.vision_encoder.dtype=bfloat16", f"features={features}")
    built = with_features(config)
    encoders = [build(each.model.vision_encoder).eval() for each in (config, built)]
    readers = [ShardReader(open_shards(list(each.data.datasets.microworld.urls))) for each in (config, built)]
    transforms = [build(each.data.datasets.microworld.transform) for each in (config, built)]
    images = torch.stack([transforms[0](decode_image(readers[0].record(0, place)["jpg"]), None) for place in range(8)])
    stored = torch.stack([transforms[1].read(readers[1].record(0, place)["tokens"]) for place in range(8)])
    assert encoders[0](images).abs().max() > 0
    assert torch.equal(encoders[1](stored), encoders[0](images))


def test_an_evaluation_builds_the_real_encoder_again(
    laboratory, stage1_run: RunDir, exact: Path, tmp_path: Path
) -> None:
    run = laboratory.train(STAGE1, tmp_path / "run", f"features={exact}").run
    chosen = ["benchmark=microworld_retrieval", f"paths.data={laboratory.data}"]
    scores = [evaluate(compose("evaluate", [f"run={each.path}", *chosen]), each) for each in (run, stage1_run)]
    assert scores[0] == {"microworld_retrieval": pytest.approx(scores[1]["microworld_retrieval"], abs=1e-3)}
    manifest = read_json(run.manifest_path)
    assert manifest["features"]["augmentation"] == "off" and manifest["features"]["codec"] == "float32"
    assert read_json(stage1_run.manifest_path)["features"] is None


def test_a_run_from_features_resumes_bit_equal_with_other_workers(laboratory, exact: Path, tmp_path: Path) -> None:
    settings = [f"features={exact}", "checkpoint.every_steps=2", "checkpoint.keep_last=0"]
    whole = laboratory.train(STAGE1, tmp_path / "whole", *settings).run
    resumed = cut(whole, "step-0000002", tmp_path / "resumed")
    laboratory.train(STAGE1, resumed.path, *settings, "data.num_workers=2")
    assert weights(resumed) == weights(whole) and losses(resumed, STAGE1) == losses(whole, STAGE1)
    assert read_json(resumed.manifest_path)["data"] == read_json(whole.manifest_path)["data"]


def test_urls_that_the_cache_was_not_made_from_are_named(
    laboratory, exact: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with_features(laboratory.compose(STAGE1, tmp_path / "run", f"features={exact}"))
    assert "are not read" not in caplog.text
    other = "data.datasets.microworld.urls=[captioned/*.tar]"
    with_features(laboratory.compose(STAGE1, tmp_path / "run", f"features={exact}", other))
    assert "train-*.tar" in caplog.text and "['captioned/*.tar'], its urls here, are not read" in caplog.text


def test_a_run_does_not_go_on_from_another_cache_in_the_same_place(laboratory, tmp_path: Path) -> None:
    features = cached(laboratory, tmp_path / "features")
    settings = [f"features={features}", "checkpoint.every_steps=2", "checkpoint.keep_last=0"]
    run = cut(laboratory.train(STAGE1, tmp_path / "run", *settings).run, "step-0000002", tmp_path / "cut")
    shutil.rmtree(features)
    cached(laboratory, features, "codec=int8")
    with pytest.raises(ConfigError, match=r"not the one that this run began with: codec 'bfloat16' there, 'int8' here"):
        laboratory.train(STAGE1, run.path, *settings)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.vision_encoder.layer=-2", r"another encoder: layer -1 there, -2 here"),
        ("model.vision_encoder.image.size=80", r"image.size 64 there, 80 here"),
        ("model.vision_encoder.final_norm=false", r"final_norm True there, False here"),
        ("model.vision_encoder.dtype=bfloat16", r"dtype 'float32' there, 'bfloat16' here"),
        (
            "model.vision_encoder.trainable_blocks=1",
            r"trainable_blocks is 1: the tokens of an encoder that trains change",
        ),
        ("data.datasets.microworld.name=other", r"holds no dataset other[\s\S]*whole: microworld"),
        ("data.max_pixels=5000", r"pictures up to 89478485 pixels, this run's data up to 5000"),
        ("features=nowhere", r"no feature cache in nowhere"),
    ],
)
def test_features_of_something_else_are_refused_with_both_values(
    laboratory, exact: Path, tmp_path: Path, override: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        laboratory.train(STAGE1, tmp_path / "run", f"features={exact}", override)
    assert not (tmp_path / "run").exists()


def test_features_of_other_weights_are_refused(laboratory, exact: Path, tmp_path: Path) -> None:
    config = laboratory.compose(STAGE1, tmp_path / "run")
    state = load_file(config.model.vision_encoder.weights)
    next(iter(state.values())).add_(1e-3)
    save_file(state, tmp_path / "other.safetensors")
    with pytest.raises(ConfigError, match=r"weights 'sha256 [0-9a-f]{64}' there, 'sha256 [0-9a-f]{64}' here"):
        laboratory.train(
            STAGE1, tmp_path / "run", f"features={exact}", f"model.vision_encoder.weights={tmp_path}/other.safetensors"
        )


def test_an_encoder_that_trains_or_has_no_weights_is_not_cached(laboratory, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"trainable_blocks is all"):
        cached(laboratory, tmp_path / "out", "model.vision_encoder.trainable_blocks=all")
    with pytest.raises(ConfigError, match=r"an encoder with random weights"):
        cached(laboratory, tmp_path / "out", "model.vision_encoder.weights=null")
    with pytest.raises(ConfigError, match=r"unknown codec 'fp8'"):
        cached(laboratory, tmp_path / "out", "codec=fp8")
    assert not (tmp_path / "out").exists()


def test_a_run_whose_encoder_was_trained_cannot_go_on_from_features(laboratory, exact: Path, tmp_path: Path) -> None:
    trained = laboratory.train(STAGE1, tmp_path / "trained", "model.vision_encoder.trainable_blocks=1").run
    with pytest.raises(ConfigError, match=r"has trained its vision encoder"):
        laboratory.train(T5, tmp_path / "run", f"init_from={trained.path}", f"features={exact}")


def test_the_size_is_said_and_the_disk_looked_at_before_anything_is_written(
    laboratory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(data_cache_features, "free_bytes", lambda folder: 64 << 20)
    refuse = lambda *_: pytest.fail("the encoder was built")  # noqa: E731
    monkeypatch.setattr(data_cache_features, "_build_encoder", refuse)
    with pytest.raises(DataError, match=r"not enough disk space"):
        cached(laboratory, tmp_path / "out", "codec=int8")
    printed = " ".join(capsys.readouterr().out.split())
    assert "17 tokens of width 96: 1,700 bytes per image" in printed and "│ 64 │" in printed
    assert not (tmp_path / "out").exists()


def test_a_second_call_finds_everything_done(laboratory, exact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path: path.stat().st_mtime_ns for path in exact.rglob("*.tar")}
    index = json.loads((exact / "microworld" / "index.json").read_text())
    cached(laboratory, exact, "codec=float32")
    assert {path: path.stat().st_mtime_ns for path in exact.rglob("*.tar")} == before
    assert json.loads((exact / "microworld" / "index.json").read_text()) == index
    with pytest.raises(DataError, match=r"another feature cache: codec 'float32' there, 'int8' here"):
        cached(laboratory, exact, "codec=int8")
    with pytest.raises(DataError, match=r"another feature cache: max_pixels 89478485 there, 5000 here"):
        cached(laboratory, exact, "codec=float32", "data.max_pixels=5000")


def test_show_looks_at_a_batch_and_an_estimate_of_cached_features(
    laboratory, exact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    refuse_encoder(monkeypatch)
    config = laboratory.compose(STAGE1, tmp_path / "run", f"features={exact}")
    show_batch(config)
    printed = capsys.readouterr().out
    assert "stored_tokens" in printed and "(8, 17, 384)" in printed and "pixel_values" not in printed
    show_estimate(
        with_features(compose("show_estimate", [f"experiment={STAGE1}", f"run_dir={tmp_path}", f"features={exact}"]))
    )
    assert "weights: vision_encoder" not in capsys.readouterr().out
