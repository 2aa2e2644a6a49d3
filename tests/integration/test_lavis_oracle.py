"""Ours against the released LAVIS 1.0.2, run afresh in its own environment (scripts/parity/lavis_environment.sh).

Hidden states of the four passes, losses, gradients, matching scores and one update, over sizes and seeds; in float64
(to 1e-12) wherever LAVIS can compute in it. Skipped where that environment is not there; what is recorded in
tests/data/lavis_recordings and beside the checkout is compared everywhere.
"""

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from lavis_comparison import (
    assert_after_update,
    assert_close_to,
    assert_hidden_states,
    assert_match_scores,
    assert_stage1_step,
    assert_stage2_step,
    assert_two_ranks,
    stage1_step,
)
from lavis_parity import TOWERS, LavisRun, build_stage1, build_stage2, load_run, stage1_batch, vision_encoder
from test_convert_lavis import assert_same_file, described, run_convert

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).parents[2]
RECORDER = REPOSITORY / "scripts" / "parity" / "record_lavis.py"
ODD_SIZES = (
    "--q-width 30 --q-heads 5 --q-mlp 44 --q-layers 5 --vit-width 18 --vit-heads 3 --vit-mlp 40 --vit-depth 3 --img 48"
    " --embed-dim 7 --vocab 77 --queries 9 --max-txt 17 --max-positions 23 --batch 5"
)
STAGE1 = {
    "as by default": "--dtype float64",
    "odd sizes": f"--dtype float64 --seed 11 {ODD_SIZES}",
    "32 queries": "--dtype float64 --seed 12 --queries 32",
    "cross-attention in every layer, all texts empty": "--dtype float64 --cross-attention-every 1 --texts empty",
    "one cross-attention, two pairs, high temperature": (
        "--dtype float64 --cross-attention-every 4 --batch 2 --queries 2 --temperature 5"
    ),
    "one text for all, equal images, low temperature": (
        "--dtype float64 --seed 13 --texts same --same-images 3 --temperature 0.01"
    ),
    "mostly padding": "--dtype float64 --seed 14 --texts short --max-txt 30",
    "CLIP": "--dtype float64 --seed 17 --vit clip_L",
    "float32": "--seed 15",
    "float32, odd sizes": f"--seed 16 {ODD_SIZES}",
}
STAGE2 = {
    "opt": "--kind stage2_opt --dtype float64 --seed 21",
    "opt, odd sizes": f"--kind stage2_opt --dtype float64 --seed 22 {ODD_SIZES}",
    "opt, one query, mostly padding": "--kind stage2_opt --dtype float64 --queries 1 --texts short --max-txt 30",
    "opt, a prompt": "--kind stage2_opt --dtype float64 --max-txt 30 --prompt abc",
    "opt, float32, one pair": "--kind stage2_opt --batch 1",
    "t5": "--kind stage2_t5 --dtype float64 --seed 31",
    "t5, odd sizes": f"--kind stage2_t5 --dtype float64 --seed 32 {ODD_SIZES}",
    "t5, empty texts": "--kind stage2_t5 --dtype float64 --texts empty",
    "t5, mostly padding, one query": "--kind stage2_t5 --dtype float64 --queries 1 --texts short --max-txt 30",
    "t5, float32, one pair": "--kind stage2_t5 --batch 1",
}

LEAVES = ("weight", "bias")
Record = Callable[[str], LavisRun]


@pytest.fixture(scope="module")
def lavis_python() -> Path:
    python = Path(os.environ.get("BLIP2TRAIN_LAVIS_PYTHON", REPOSITORY / ".venv-lavis" / "bin" / "python"))
    if not python.is_file():
        pytest.skip("no LAVIS: run scripts/parity/lavis_environment.sh, or set BLIP2TRAIN_LAVIS_PYTHON")
    return python


@pytest.fixture
def record(lavis_python: Path, tmp_path: Path) -> Record:
    """Let LAVIS compute with the given options of the recorder, and read what it wrote."""

    def run(options: str) -> LavisRun:
        command = [lavis_python, RECORDER, "--target", tmp_path, "--name", "run", *options.split()]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(done.stderr[-2000:])
        return load_run(tmp_path, "run")

    return run


@pytest.mark.parametrize("options", STAGE1.values(), ids=STAGE1)
def test_stage1(record: Record, options: str) -> None:
    run = record(options)
    assert_hidden_states(build_stage1(run), run)
    assert_stage1_step(build_stage1(run), run)
    assert_after_update(build_stage1(run), run, temperature_decays=False)
    if "match/itm" in run.tensors:
        assert_match_scores(build_stage1(run), run)


@pytest.mark.parametrize("tower", TOWERS)
def test_vision_weights_in_a_file_of_lavis(record: Record, tmp_path: Path, tower: str) -> None:
    """eva_vit_g.pth and clip_vit_L.pth as LAVIS has them, read by `weights=`: the tokens are LAVIS's."""
    run = record(f"--dtype float64 --vit {tower} --batch 2")
    prefix = "state_dict/visual_encoder."
    tower_state = {key.removeprefix(prefix): item for key, item in run.tensors.items() if key.startswith(prefix)}
    torch.save(tower_state, tmp_path / "tower.pth")
    encoder = vision_encoder(run.facts["args"], weights=str(tmp_path / "tower.pth"))
    state = run.ours("state_dict")
    with torch.no_grad():
        tokens = encoder(run.tensors["image"].float())  # the encoder's own format; its loader rounds to it
        normalised = F.layer_norm(tokens, tokens.shape[-1:], *(state[f"ln_vision.{leaf}"].float() for leaf in LEAVES))
    assert_close_to({"tokens": normalised}, {"tokens": run.tensors["hidden/image"]}, 1e-5)


def test_float32_recordings_have_match_scores(record: Record) -> None:
    """Otherwise the comparison with Blip2ITM above would never run."""
    assert {"match/itm", "match/itc"} <= set(record(STAGE1["float32"]).tensors)


@pytest.mark.parametrize("options", STAGE2.values(), ids=STAGE2)
def test_stage2(record: Record, options: str) -> None:
    run = record(options)
    assert_stage2_step(run)
    assert_after_update(build_stage2(run), run, temperature_decays=False)


def test_stage1_on_two_ranks(record: Record, tmp_path: Path) -> None:
    record("--ranks 2 --dtype float64 --batch 3 --seed 41")
    assert_two_ranks(tmp_path, "run", tmp_path)


@pytest.mark.parametrize("kind", ["stage1", "stage2_opt", "stage2_t5"])
def test_a_checkpoint_that_lavis_wrote_comes_back_bit_by_bit_and_lavis_computes_the_same(
    record: Record, tmp_path: Path, kind: str
) -> None:
    """LAVIS's runner saves, `convert` takes the file in and out, LAVIS reads it over wiped weights and steps again."""
    options = f"--kind {kind} --max-positions 512 --seed 51"
    before = record(f"{options} --save {tmp_path}/lavis")
    source, ours, back = tmp_path / "lavis" / "checkpoint_0.pth", tmp_path / "ours", tmp_path / "back.pth"
    run_convert("from=lavis", "to=blip2train", f"source={source}", f"target={ours}", *_description(before, kind))
    run_convert("from=blip2train", "to=lavis", f"source={ours}", f"target={back}")
    assert_same_file(back, torch.load(source, weights_only=True)["model"])
    after = record(f"{options} --load {back}")
    assert after.facts["loss"] == before.facts["loss"]
    assert_close_to(after.ours("grads"), before.ours("grads"), 0.0)


def _description(run: LavisRun, kind: str) -> list[str]:
    if kind == "stage1":
        return described(run, 1)
    width = run.facts["args"]["lm_width"]
    fields = {"stage2_opt": ("hidden_size", "word_embed_proj_dim"), "stage2_t5": ("d_model",)}[kind]
    tiny = kind.replace("stage2", "tiny")
    sizes = [f"llm.architecture.{field}={width}" for field in fields]
    return [*described(run, 2), f"model/language_model={tiny}", *sizes, "llm.path=of-the-recording"]


@pytest.mark.parametrize("options", ["--queries 1", "--batch 1"])
def test_where_lavis_itself_fails_in_stage1(record: Record, options: str) -> None:
    """It squeezes away a single query or a single pair; test_objective_lavis_parity.py says what ours give there."""
    with pytest.raises(RuntimeError, match="(?i)cross_entropy|dimension out of range"):
        record(options)


def test_the_comparison_notices_a_wrong_weight(record: Record) -> None:
    """The checks above can fail: one bias moved by 1e-6 is seen in hidden states, losses and gradients."""
    run = record(STAGE1["as by default"])
    model = build_stage1(run)
    model.qformer.blocks[1].query_ffn.expand.bias.data[0] += 1e-6
    with pytest.raises(AssertionError, match="off by"):
        assert_hidden_states(model, run)
    step = stage1_step(model, stage1_batch(run), run.facts["bos"])
    assert step["losses"]["itc"] != pytest.approx(run.facts["loss_itc"], rel=1e-12)
    with pytest.raises(AssertionError):
        assert_stage1_step(model, run)
