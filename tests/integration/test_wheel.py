"""The wheel carries its configs, backbones and page template, and works from a folder that knows no checkout."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from blip2train.run_dir import read_json

REPOSITORY = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel's content, as pip lays it out."""
    out, target = tmp_path_factory.mktemp("wheel"), tmp_path_factory.mktemp("site")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(REPOSITORY)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = out.glob("*.whl")
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(target)]
    subprocess.run([*install, str(wheel)], check=True, capture_output=True)
    return target


def run(installed: Path, cwd: Path, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_wheel_holds_every_config_asset_and_template_and_nothing_else(installed: Path) -> None:
    package = installed / "blip2train"
    for folder in ("configs", "blip2train/microworld/assets"):
        source = REPOSITORY / folder
        inside = package / folder.removeprefix("blip2train/")
        wanted = {path.relative_to(source) for path in source.rglob("*") if path.is_file()}
        assert {path.relative_to(inside) for path in inside.rglob("*") if path.is_file()} == wanted
    assert (package / "report" / "template.html.j2").is_file() and (package / "py.typed").is_file()
    assert {path.name for path in installed.iterdir() if path.suffix != ".dist-info"} <= {"blip2train", "bin"}


def test_backbones_stay_under_three_megabytes() -> None:
    assets = REPOSITORY / "blip2train" / "microworld" / "assets"
    assert sum(path.stat().st_size for path in assets.rglob("*") if path.is_file()) < 3_000_000


def test_smoke_quickstart_runs_from_another_folder(installed: Path, tmp_path: Path) -> None:
    where = run(installed, tmp_path, "-c", "import blip2train; print(blip2train.__file__)")
    assert where.startswith(str(installed))
    run(installed, tmp_path, "-m", "blip2train.cli.main", "quickstart", "limit=smoke", "num_threads=1")
    summary = read_json(tmp_path / "outputs" / "quickstart" / "summary.json")
    assert summary["stage1"]["text_recall@1"] > 2 * summary["stage1"]["chance"]
    assert summary["stage2"]["vqa_accuracy"] > summary["stage2"]["vqa_blind"]
    assert (tmp_path / "outputs" / "quickstart" / "report.html").stat().st_size > 100_000


def test_source_distribution_builds_the_same_wheel(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(tmp_path), str(REPOSITORY)]
    subprocess.run(build, check=True, capture_output=True)  # sdist first, the wheel from it
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "blip2train/configs/train.yaml" in names
    assert not [name for name in names if name.startswith(("tests/", "notebooks/", "configs/"))]
