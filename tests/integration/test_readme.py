"""README cannot rot: what it names exists and composes, and each command in its bash blocks runs, at a small size."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from capfilt_world import save_blip, save_clip
from huggingface_world import save_generation
from omegaconf import OmegaConf
from PIL import Image

from blip2train.cli.config import compose, config_dir
from blip2train.cli.main import VERBS
from blip2train.microworld.render import render
from blip2train.microworld.scene import WorldSpec, sample_scene

REPOSITORY = Path(__file__).resolve().parents[2]
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
FENCES = re.findall(r"^```(\w*)\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
LINES = [line for language, block in FENCES if language == "bash" for line in block.splitlines()]
COMMANDS = [line for line in LINES if line.strip() and not line.startswith("#")]
PROSE = re.sub(r"^```.*?^```", "", README, flags=re.DOTALL | re.MULTILINE)
SPANS: list[str] = re.findall(r"`([^`\n]+)`", PROSE)
OVERRIDE_TABLE = re.search(r"^\| want \| write \|\n\|[-|]+\|\n((?:\|.*\n)+)", README, re.MULTILINE)
OVERRIDE_ROWS = OVERRIDE_TABLE.group(1).splitlines() if OVERRIDE_TABLE else []

WORDS = ["the", "on", "at", "and", "red", "green", "blue", "large", "small", "background"]
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
VOCABULARY += [prefix + letter for letter in "abcdefghijklmnopqrstuvwxyz" for prefix in ("", "##")]
"""Of a word-piece tokenizer that spells most words; [DEC] is added to it when it is loaded."""

PHOTOS = "PHOTOS"
RELEASED = "blip2-opt-2.7b"
COMPOSE_ONLY = ("--cfg", "job", "--resolve")
FEW_STEPS = ("trainer.max_steps=4", "optim.warmup_steps=1", "data.batch_size=8", "data.num_workers=0")
FEW_STEPS += ("num_threads=1", "log_every_steps=1")
TOKENIZER = (
    "tokenizer.path=tokenizer",
    f"tokenizer.vocab_size={len(VOCABULARY) + 1}",
    f"tokenizer.dec_id={len(VOCABULARY)}",
)


@dataclass(frozen=True)
class Size:
    """How one command of README becomes small: what is appended to it, and files it must leave (globs)."""

    extra: tuple[str, ...] = ()
    leaves: tuple[str, ...] = ()


SIZES = {
    "bash scripts/quickstart.sh": Size(
        ("limit=smoke", "num_threads=1"), ("outputs/quickstart/report.html", "outputs/quickstart/summary.json")
    ),
    "bash scripts/test.sh": Size(("--collect-only", "-q")),
    "blip2train microworld build": Size(("train_images=48", "val_images=8"), ("data/microworld/train-*.tar",)),
    "blip2train train experiment=microworld_stage1 run_dir=outputs/first": Size(
        FEW_STEPS, ("outputs/first/checkpoints/step-0000004/model.safetensors",)
    ),
    "blip2train evaluate run=outputs/first": Size(leaves=("outputs/first/eval/microworld_retrieval/metrics.json",)),
    "blip2train train experiment=microworld_stage2_opt init_from=outputs/first run_dir=outputs/second": Size(
        FEW_STEPS, ("outputs/second/checkpoints/step-0000004/model.safetensors",)
    ),
    "blip2train evaluate run=outputs/second": Size(("limit=4",), ("outputs/second/eval/microworld_vqa/metrics.json",)),
    "blip2train report 'runs=[outputs/first,outputs/second]' out=outputs/page": Size(
        leaves=("outputs/page/report.html",)
    ),
    "blip2train data pack input=PHOTOS out=data/photos": Size(leaves=("data/photos/*.tar", "data/photos/index.json")),
    "blip2train train experiment=photos_stage1": Size(
        (*FEW_STEPS, *TOKENIZER), ("outputs/photos_stage1/*/checkpoints/step-0000004/model.safetensors",)
    ),
    "blip2train data pack input=PHOTOS out=data/small shards.resize_short_side=256": Size(
        leaves=("data/small/manifest.json",)
    ),
    "blip2train data check urls=data/photos": Size(),
    "blip2train data view urls=data/photos out=outputs/photos.html": Size(leaves=("outputs/photos.html",)),
    "blip2train capfilt urls=data/photos out=data/captioned": Size(
        ("captioner.model=captioner", "ranker.model=ranker", "captioner.settings.num_captions=2"),
        ("data/captioned/index.json", "data/captioned/report.html"),
    ),
    "blip2train data cache-features experiment=photos_stage1 'data.datasets.photos.urls=[data/captioned]' "
    "out=outputs/features": Size(TOKENIZER, ("outputs/features/features.json",)),
    "blip2train train experiment=photos_stage1 'data.datasets.photos.urls=[data/captioned]' "
    "features=outputs/features": Size((*FEW_STEPS, *TOKENIZER)),
    "blip2train show order experiment=photos_stage1 steps=1..3": Size(TOKENIZER),
    "blip2train doctor experiment=microworld_stage1": Size(("data.batch_size=8", "num_threads=1")),
    "blip2train train experiment=microworld_stage1 trainer=ddp trainer.accelerator=cpu trainer.devices=2 "
    "trainer.precision=32-true run_dir=outputs/two": Size(
        FEW_STEPS, ("outputs/two/checkpoints/step-0000004/model.safetensors", "outputs/two/metrics.csv")
    ),
    "blip2train train experiment=paper/stage1_vitg trainer.devices=16 paths.data=/datasets": Size(COMPOSE_ONLY),
    "blip2train train experiment=paper/stage2_vitg_opt_2_7b trainer.devices=16 paths.data=/datasets "
    "init_from=outputs/paper_stage1_vitg/ID": Size(COMPOSE_ONLY),
    "blip2train show paper-diff experiment=lavis/stage1_vitg": Size(),
    "blip2train show params experiment=paper/stage2_vitg_flan_t5_xxl": Size(),
    "blip2train show estimate experiment=paper/stage1_vitg samples_per_second=800": Size(),
    "blip2train convert from=blip2train to=lavis source=outputs/first target=exported/first.pth": Size(
        leaves=("exported/first.pth",)
    ),
    "blip2train convert from=lavis to=blip2train source=exported/first.pth target=outputs/again "
    "experiment=microworld_stage1": Size(leaves=("outputs/again/checkpoints/step-*/model.safetensors",)),
    f"blip2train convert from=huggingface to=blip2train source={RELEASED} target=outputs/released": Size(
        leaves=("outputs/released/config.yaml", "outputs/released/conversion.json")
    ),
    "blip2train convert from=blip2train to=huggingface source=outputs/released target=exported/released": Size(
        leaves=("exported/released/model.safetensors", "exported/released/README.md")
    ),
    "blip2train show masks experiment=microworld_stage1": Size(leaves=("show_masks.png",)),
    "blip2train show batch experiment=microworld_stage1": Size(leaves=("show_batch.png",)),
    "blip2train show params experiment=microworld_stage1": Size(),
    "blip2train show config experiment=microworld_stage1": Size(),
}


def test_readme_has_commands_and_each_has_a_small_size_here() -> None:
    assert len(COMMANDS) >= 10, "the bash blocks of README.md were not found"
    new = [command for command in COMMANDS if command not in SIZES]
    assert not new, f"README.md shows commands that nothing runs; add them to SIZES in {Path(__file__).name}: {new}"
    gone = [command for command in SIZES if command not in COMMANDS]
    assert not gone, f"README.md no longer shows these; remove them from SIZES: {gone}"


@pytest.mark.parametrize("command", [line for line in COMMANDS if line.startswith("blip2train ")])
def test_command_names_a_verb_and_composes(command: str) -> None:
    _, verb, *arguments = shlex.split(command)
    assert verb in VERBS
    config_name = "train" if verb == "show" else verb
    if verb in {"data", "microworld", "show"}:
        part, *arguments = arguments
        own = f"{verb}_{part}".replace("-", "_")  # `show batch` and others have none and read train.yaml
        config_name = own if (config_dir() / f"{own}.yaml").is_file() else config_name
    compose(config_name, arguments)


def test_verbs_and_experiments_named_in_prose_exist() -> None:
    verbs = {match.group(1) for span in SPANS if (match := re.match(r"blip2train ([a-z]+)", span))}
    assert verbs <= set(VERBS)
    experiments = set(re.findall(r"experiment=([\w/]+)|configs/experiment/([\w/]+)\.yaml", README))
    folder = config_dir() / "experiment"
    assert {one or other for one, other in experiments} <= {
        path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.yaml")
    }


@pytest.mark.parametrize("row", OVERRIDE_ROWS)
def test_overrides_of_the_want_and_write_table_compose_and_resolve(row: str) -> None:
    """Each code span in the right column is typed behind a training command of the stage it is about."""
    spans = re.findall(r"`([^`]+)`", row.strip("| ").split(" | ", 1)[1])
    stage2 = any(name in span for span in spans for name in ("language_model", "init_from", "llm."))
    base = ["experiment=paper/stage2_vitg_opt_2_7b" if stage2 else "experiment=paper/stage1_vitg", "init_from=scratch"]
    for span in (span for span in spans if "=" in span or span.startswith("'~")):
        overrides = [_first_of_a_sweep(item) for item in shlex.split(span) if item != "-m"]
        config = compose("train", [*base, "run_dir=outputs/x", *overrides])
        OmegaConf.to_container(config, resolve=True)


def test_the_override_table_was_found() -> None:
    assert len(OVERRIDE_ROWS) >= 8


def test_files_and_packages_named_in_readme_exist() -> None:
    suffixes = (".py", ".yaml", ".sh", ".toml", ".ipynb")
    folders = ("blip2train/", "configs/", "scripts/", "tests/", "notebooks/")
    words = {word for span in SPANS for word in span.split() if word.endswith(suffixes) or word.startswith(folders)}
    words |= {word for command in COMMANDS for word in command.split() if word.endswith(".sh")}
    written = {"config.yaml", "captions.jsonl"}  # in a run folder, by the user
    missing = [word for word in sorted(words - written) if not _exists(word)]
    assert len(words) > 10 and not missing
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", README)
    assert all((REPOSITORY / link).exists() for link in links)


def test_the_layers_drawn_in_readme_are_packages() -> None:
    drawing = next(block for _, block in FENCES if block.startswith("cli "))
    names = [name.strip() for line in drawing.splitlines() for name in re.split(r"\s{2,}", line)[0].split("|")]
    package = REPOSITORY / "blip2train"
    modules = (path for path in package.iterdir() if path.suffix == ".py" or path.is_dir())
    assert set(names) == {path.stem for path in modules if not path.name.startswith("_")}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project to type README's commands in, with PHOTOS, a tokenizer and a small released model."""
    root = tmp_path_factory.mktemp("checkout")
    ignored = shutil.ignore_patterns("__pycache__")
    for name in ("blip2train", "configs", "notebooks", "scripts", "tests"):
        shutil.copytree(REPOSITORY / name, root / name, ignore=ignored)
    for name in ("README.md", "pyproject.toml", "constraints.txt"):
        shutil.copy(REPOSITORY / name, root / name)
    (root / "tokenizer").mkdir()
    (root / "tokenizer" / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n", encoding="utf-8")
    _write_photos(root / PHOTOS)
    save_generation(root / RELEASED, "opt")
    save_blip(root / "captioner")
    save_clip(root / "ranker")
    return root


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("command", COMMANDS)
def test_command_runs_where_the_reader_would_type_it(command: str, checkout: Path) -> None:
    """In README's order, in one folder: later commands use what earlier ones left."""
    assert command in SIZES, f"README.md shows a command without an entry in SIZES of {Path(__file__).name}: {command}"
    size = SIZES[command]
    program, *arguments = shlex.split(command)
    process = [sys.executable, "-m", "blip2train.cli.main"] if program == "blip2train" else [program]
    # another test may have named its run in this process; a reader's shell has not
    environment = {name: value for name, value in os.environ.items() if name != "BLIP2TRAIN_RUN_ID"}
    environment |= {"BLIP2TRAIN_PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [*process, *arguments, *size.extra],
        cwd=checkout,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-4000:]}"
    missing = [pattern for pattern in size.leaves if not list(checkout.glob(pattern))]
    assert not missing, f"{command} left no {missing}\n{done.stdout[-4000:]}"


def _write_photos(folder: Path) -> None:
    folder.mkdir()
    spec = WorldSpec(seed=3)
    with (folder / "captions.jsonl").open("w", encoding="utf-8") as lines:
        for index in range(12):
            scene = sample_scene(spec, "in", index)
            Image.fromarray(render(scene, spec)).resize((80, 60)).save(folder / f"{index}.jpg")
            words = " and ".join(f"a {item.size} {item.color} {item.shape}" for item in scene.objects)
            lines.write(json.dumps({"image": f"{index}.jpg", "captions": [words, f"{words} at {index}"]}) + "\n")


def _exists(word: str) -> bool:
    """A path from the root or, as in the reading order, from the package; NAME stands for a file yet to be written."""
    if "NAME" in word:
        word = word.rsplit("/", 1)[0]
    return any((root / word).exists() for root in (REPOSITORY, REPOSITORY / "blip2train"))


def _first_of_a_sweep(override: str) -> str:
    return override if re.search(r"[\[{]", override) else override.split(",")[0]
