"""Every way a run can begin: each tensor's origin is in the run folder, and the values are those of that origin."""

import shutil
from pathlib import Path

import pytest
import torch
from omegaconf import DictConfig
from safetensors.torch import load_file
from transformers import BertConfig, BertForPreTraining

from blip2train.checkpoint.find import find_checkpoint
from blip2train.checkpoint.io import WEIGHTS
from blip2train.cli.config import build
from blip2train.cli.evaluate import load_model, load_run_config
from blip2train.cli.initial_weights import InitialWeights
from blip2train.data.tokenizer import QFormerTokenizer
from blip2train.errors import CheckpointError, ConfigError
from blip2train.model.init_report import InitReport
from blip2train.run_dir import RunDir, read_json


@pytest.fixture(scope="module")
def bert_folder(laboratory, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT of the micro-world's sizes, with its tokenizer's words but [DEC]."""
    folder = tmp_path_factory.mktemp("bert")
    tokenizer: QFormerTokenizer = build(laboratory.compose("microworld_stage1", folder).data).collator.tokenizer
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=tokenizer.vocab_size - 1, hidden_size=96, num_hidden_layers=4, num_attention_heads=4,
        intermediate_size=384, max_position_embeddings=64,
    )  # fmt: skip
    BertForPreTraining(config).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(tokenizer.words[:-1]) + "\n")
    return folder


def fill(config: DictConfig) -> tuple[torch.nn.Module, InitReport]:
    weights, model = InitialWeights(config, None, ()), build(config.model)
    weights(model)
    assert weights.report is not None
    return model, weights.report


def test_stage1_from_random_and_from_bert(laboratory, bert_folder: Path, tmp_path: Path) -> None:
    config = laboratory.compose("microworld_stage1", tmp_path)
    _, random = fill(config)
    assert set(random.counts()) == {"random"}
    config.init_qformer = str(bert_folder)
    model, report = fill(config)
    assert set(report.origins) == {name for name, value in model.named_parameters() if value.requires_grad}
    assert report.counts() == {"bert": 4 * 16 + 2 + 2 + 5, "copied": 4 * 6, "random": 1 + 2 * 10 + 9}
    assert report.names("copied")[0] == "qformer.blocks.0.query_ffn.contract.bias"
    assert {"temperature", "itm_head.weight", "ln_vision.weight", "qformer.query_tokens"} <= set(report.names("random"))


def test_stage2_from_scratch_with_and_without_bert(laboratory, bert_folder: Path, tmp_path: Path) -> None:
    config = laboratory.compose("microworld_stage2_opt", tmp_path, "init_from=scratch")
    assert set(fill(config)[1].counts()) == {"random"}
    config.init_qformer = str(bert_folder)
    model, report = fill(config)
    assert report.origins["projection.weight"] == "random"
    assert report.counts()["copied"] == 4 * 6
    assert set(report.origins) == {name for name, value in model.named_parameters() if value.requires_grad}


def test_a_vision_encoder_that_trains_has_its_own_origin(laboratory, stage1_run: RunDir, tmp_path: Path) -> None:
    """Stage 1 froze it, so the run's checkpoint does not hold it: it starts from its own weights."""
    trains = "++model.vision_encoder.trainable_blocks=1"
    config = laboratory.compose("microworld_stage2_opt", tmp_path, f"init_from={stage1_run.path}", trains)
    _, report = fill(config)
    assert report.names("pretrained") and all(n.startswith("vision_encoder.") for n in report.names("pretrained"))
    assert report.names("random") == ["projection.bias", "projection.weight"]


def test_a_vision_encoder_trained_in_stage1_stays_so_when_stage2_freezes_it(laboratory, tmp_path: Path) -> None:
    """Trained in one run, frozen in the next: training, resuming and evaluating the next all see the trained one."""
    name = "vision_encoder.backbone.blocks.2.mlp.fc1.weight"
    trains = ["++model.vision_encoder.trainable_blocks=1", "optim.lr=0.01"]
    first = laboratory.train("microworld_stage1", tmp_path / "first", *trains).run
    trained = load_file(find_checkpoint(first) / WEIGHTS)[name]
    settings = [f"init_from={first.path}", "checkpoint.every_steps=2", "checkpoint.keep_last=0"]
    second = laboratory.train("microworld_stage2_opt", tmp_path / "second", *settings).run
    assert read_json(second.init_path)["origins"][name] == "checkpoint"
    shutil.rmtree(second.checkpoints / "step-0000004")
    laboratory.train("microworld_stage2_opt", second.path, *settings)
    assert find_checkpoint(second).name == "step-0000004"
    model = load_model(load_run_config(second), second)
    assert torch.equal(model.get_parameter(name), trained) and not model.get_parameter(name).requires_grad
    assert not torch.equal(trained, build(load_run_config(second).model).get_parameter(name))


def test_a_run_from_bert_records_it_and_resumes_from_its_checkpoint(
    laboratory, bert_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bert = shutil.copytree(bert_folder, tmp_path / "bert")
    settings = [f"init_qformer={bert}", "checkpoint.every_steps=2", "checkpoint.keep_last=0"]
    with caplog.at_level("INFO"):
        run = laboratory.train("microworld_stage1", tmp_path / "run", *settings).run
    assert "first value of every trained tensor" in caplog.text and "qformer.blocks.query_ffn" in caplog.text
    init = read_json(run.init_path)
    assert init["sources"] == {"bert": str(bert)} and init["counts"] == read_json(run.manifest_path)["init"]["counts"]
    assert init["origins"]["qformer.text_embeddings.word.weight"] == "bert"
    shutil.rmtree(run.checkpoints / "step-0000004")
    shutil.rmtree(bert)  # nobody asks for it any more
    laboratory.train("microworld_stage1", run.path, *settings)
    assert read_json(run.init_path) == init


def test_another_tokenizer_than_berts_leaves_no_run(laboratory, bert_folder: Path, tmp_path: Path) -> None:
    other = shutil.copytree(bert_folder, tmp_path / "bert")
    words = (other / "vocab.txt").read_text().splitlines()
    (other / "vocab.txt").write_text("\n".join([*words[:5], words[6], words[5], *words[7:]]) + "\n")
    with pytest.raises(ConfigError, match="word 5 is"):
        laboratory.train("microworld_stage1", tmp_path / "run", f"init_qformer={other}")
    assert not (tmp_path / "run" / "config.yaml").exists()


@pytest.mark.parametrize("wrong", ["model.qformer.hidden_size=48", "model.qformer.num_layers=5"])
def test_a_bert_of_other_sizes_leaves_no_run(laboratory, bert_folder: Path, tmp_path: Path, wrong: str) -> None:
    with pytest.raises(CheckpointError, match="BERT's is"):
        laboratory.train("microworld_stage1", tmp_path / "run", f"init_qformer={bert_folder}", wrong)
    assert not (tmp_path / "run").exists()


def test_a_first_step_that_cannot_be_made_leaves_no_run(laboratory, tmp_path: Path) -> None:
    wrong = ["data.datasets.microworld.transform.spec=${other}", "+other._target_=blip2train.batch.ImageSpec"]
    wrong += ["+other.size=32", "+other.mean=[0.5,0.5,0.5]", "+other.std=[0.5,0.5,0.5]"]
    with pytest.raises(ConfigError, match="32x32 pixels"):
        laboratory.train("microworld_stage1", tmp_path / "run", *wrong)
    assert not list((tmp_path / "run").glob("*.json")) and not (tmp_path / "run" / "config.yaml").exists()


def test_an_interrupted_later_step_keeps_the_run(laboratory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only a start that failed is withdrawn; a run that made steps keeps its record whatever ends it."""
    monkeypatch.setattr("blip2train.callback.checkpoint.save_weights", _full)
    with pytest.raises(CheckpointError, match="full"):
        laboratory.train("microworld_stage1", tmp_path / "run", "checkpoint.final_wait_minutes=0")
    assert RunDir(tmp_path / "run").config_path.exists()


def _full(*_: object) -> None:
    raise CheckpointError("full", where="disk", fix="free some")


def test_a_bert_that_does_not_fit_is_found_before_the_model_is_built(
    laboratory, bert_folder: Path, tmp_path: Path
) -> None:
    """At the paper's size the encoder would otherwise be fetched first."""
    config = laboratory.compose("microworld_stage1", tmp_path, "model.qformer.intermediate_size=100")
    config.init_qformer = str(bert_folder)
    with pytest.raises(CheckpointError, match="intermediate_size is 100, BERT's is"):
        InitialWeights(config, None, ())
