"""The convert verb before it reads anything: its routes, its config, its target."""

from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from blip2train.checkpoint.converted import REPORT, ConversionReport, write_atomically
from blip2train.checkpoint.model_card import LOADING, ModelCard
from blip2train.cli.config import compose, config_dir
from blip2train.cli.convert import (
    DIRECTIONS,
    OWN_KEYS,
    card_source,
    check_overrides,
    language_model_name,
    load_direction,
    model_config,
    plan,
    vision_encoder_name,
)
from blip2train.errors import ConfigError
from blip2train.run_dir import RunDir, write_json

PRESETS = [
    f"{folder}/{path.stem}"
    for folder in ("paper", "lavis")
    for path in sorted((config_dir() / "experiment" / folder).glob("stage*.yaml"))
]


def arguments(start: str, end: str, *more: str) -> list[str]:
    return [f"from={start}", f"to={end}", "source=s", "target=t", *more]


def test_every_pair_of_formats_has_a_route_through_our_form() -> None:
    formats = ("blip2train", "huggingface", "lavis")
    for start in (*formats, "sharded"):
        for end in formats:
            if start == end:
                continue
            steps = plan(compose("convert", arguments(start, end)))
            assert len(steps) == (1 if "blip2train" in (start, end) else 2)
            assert steps[0] == DIRECTIONS[start, "blip2train" if len(steps) == 2 else end]
            assert all(callable(load_direction(step)) for step in steps)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["from=lavis"], "not set: to, source, target"),
        (arguments("lavis", "lavis"), "from and to are both lavis"),
        (arguments("torch", "lavis"), "no format 'torch'(.|\n)*known: blip2train, huggingface, lavis, sharded"),
        (
            arguments("blip2train", "sharded"),
            "no format 'sharded'(.|\n)*to=(.|\n)*known: blip2train, huggingface, lavis$",
        ),
    ],
)
def test_a_wrong_question_is_answered_with_what_there_is(given: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan(compose("convert", given))


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_describes_a_model_without_further_values(preset: str) -> None:
    described = model_config(compose("convert", arguments("lavis", "blip2train", f"experiment={preset}")))
    assert described.name == preset.replace("/", "_")
    assert described.init_from is None and described.init_qformer is None
    assert not set(OWN_KEYS) & set(described)


def test_without_an_experiment_the_model_is_asked_for() -> None:
    with pytest.raises(ConfigError, match="does not say which model(.|\n)*experiment="):
        model_config(compose("convert", arguments("lavis", "blip2train")))


def test_out_of_our_form_nothing_is_accepted_that_nobody_reads() -> None:
    """The run says what it is: an experiment given beside it would change nothing, and look as if it did."""
    check_overrides(compose("convert", arguments("blip2train", "lavis", "source_checkpoint=step-0000450")))
    check_overrides(compose("convert", arguments("lavis", "blip2train", "experiment=paper/stage1_vitg")))
    given = arguments("blip2train", "lavis", "experiment=paper/stage1_vitg", "model.qformer.num_queries=64")
    with pytest.raises(ConfigError, match="not read: .*model, name"):
        check_overrides(compose("convert", given))


@pytest.mark.parametrize("start", ["lavis", "huggingface", "sharded"])
def test_a_checkpoint_is_chosen_of_a_run_only(start: str) -> None:
    given = arguments(start, "blip2train")
    check_overrides(compose("convert", given))
    with pytest.raises(ConfigError, match="not read(.|\n)*source_checkpoint=step-0000450(.|\n)*from=blip2train"):
        check_overrides(compose("convert", [*given, "source_checkpoint=step-0000450"]))


def test_a_file_in_the_targets_path_is_named(tmp_path: Path) -> None:
    """Not as a full disk: there is nothing to free."""
    (tmp_path / "file").write_text("f")
    with pytest.raises(ConfigError, match=f"{tmp_path / 'file'} is a file(.|\n)*target="):
        write_atomically(tmp_path / "file" / "deeper" / "new", lambda _: pytest.fail("written"))


def test_a_target_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    def write(folder: Path) -> ConversionReport:
        assert not (tmp_path / folder.name.removesuffix(".partial")).exists()
        (folder / "weights").write_text("w")
        (folder / REPORT).write_text("{}")
        return ConversionReport()

    def fail(folder: Path) -> ConversionReport:
        write(folder)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(tmp_path / "new", fail)
    assert not list(tmp_path.iterdir())
    (tmp_path / "new.partial").mkdir()  # of a conversion that was killed
    (tmp_path / "new.partial" / "stale").write_text("s")
    write_atomically(tmp_path / "new", write)
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [REPORT, "weights"]
    write_atomically(tmp_path / "one.pth", write, only="weights")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "one.conversion.json", "one.pth"]


def test_a_card_names_no_folder_of_the_machine_it_was_written_on(tmp_path: Path) -> None:
    """A language model in the run's own parts/ has a path that is gone by the time the card is read."""
    for folder, said in (("parts/language_model", "the source's own (opt)"), ("my-opt", "my-opt (opt)")):
        (tmp_path / folder).mkdir(parents=True)
        write_json(tmp_path / folder / "config.json", {"model_type": "opt"})
        assert language_model_name(OmegaConf.create({"llm": {"path": str(tmp_path / folder)}})) == said
    assert language_model_name(OmegaConf.create({"llm": {"path": "facebook/opt-2.7b"}})) == "facebook/opt-2.7b"


def test_a_card_says_what_a_converted_run_was_made_of(tmp_path: Path) -> None:
    write_json(tmp_path / "manifest.json", {"steps": 0})
    assert card_source(RunDir(tmp_path), "mine") == "the run mine"
    write_json(tmp_path / "manifest.json", {"converted": {"from": "huggingface", "file": "blip2-opt-2.7b", "steps": 0}})
    assert card_source(RunDir(tmp_path), "mine") == "blip2-opt-2.7b (huggingface)"


@pytest.mark.parametrize(("form", "stage"), LOADING)
def test_a_card_says_what_how_and_what_not(form: str, stage: int) -> None:
    card = ModelCard("mine", stage, form, "the run a", 80_000, {"vision encoder": "eva"}, {"model": 3}, ["temp"], ["n"])
    text = card.text()
    assert text.startswith("---\nlibrary_name: ") and "license: other" in text
    for said in (
        "# mine",
        "80,000 optimizer steps",
        "- vision encoder: eva",
        "- temp",
        "- n",
        "social bias",
        "Licence",
    ):
        assert said in text


def test_help_says_what_every_argument_takes_and_its_examples_have_a_route() -> None:
    shipped: Any = OmegaConf.to_container(OmegaConf.load(config_dir() / "convert.yaml"), resolve=False)
    text = shipped["hydra"]["help"]["template"]
    assert "$APP_CONFIG_GROUPS" in text and "$CONFIG" in text
    for said in (*OWN_KEYS, *(start for start, _ in DIRECTIONS)):
        assert said in text
    examples = [line.split()[2:] for line in text.splitlines() if line.startswith("blip2train convert from=")]
    assert len(examples) == 3 and all(plan(compose("convert", example)) for example in examples)


def test_a_card_gives_the_sizes_of_an_encoder_that_is_not_timms() -> None:
    encoder: dict[str, Any] = {"name": "eva_giant_patch14_clip_224"}
    assert vision_encoder_name(OmegaConf.create({"model": {"vision_encoder": encoder}})) == encoder["name"]
    encoder["model_args"] = {"embed_dim": 24, "depth": 2, "qkv_bias": True}
    said = vision_encoder_name(OmegaConf.create({"model": {"vision_encoder": encoder}}))
    assert said == "the network of eva_giant_patch14_clip_224 with embed_dim 24, depth 2"
