"""The wheel and the sdist: what is in them, that each runs away from the repository, and versions in one place."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import multilora_fast

ROOT = Path(__file__).parent.parent
KERNELS = {f"multilora_fast/kernels/{path.name}" for path in (ROOT / "kernels").glob("*.py")}
STEP = """
import logging, sys
import multilora_fast
print(*sorted({name.split(".")[0] for name in sys.modules}))
if "quick" not in sys.argv:
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it speaks when PEFT imports it
    import multilora_fast.peft, multilora_fast.adapters.export, multilora_fast.spectrum
import multilora_fast.kernels.shrink
print(multilora_fast.__file__, multilora_fast.kernels.shrink.__file__)
import torch
from torch import nn
from multilora_fast import FusedMultiLoRALinear
layer = FusedMultiLoRALinear(nn.Linear(16, 16).requires_grad_(False), r=2, lora_num=3)
optimizer = torch.optim.AdamW([p for p in layer.parameters() if p.requires_grad])
layer(torch.randn(4, 16)).square().sum().backward()
optimizer.step()
assert layer.lora_scaling.detach().abs().min() > 0
from multilora_fast.cli import main
sys.argv = ["multilora-fast", "info"]
main()
"""


def run(*words: object, cwd: Path, path: Path | None = None) -> str:
    environment = {**os.environ, "PYTHONPATH": "" if path is None else str(path), "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, *map(str, words)], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def build(source: Path, target: Path, kind: str) -> Path:
    """The one file that the build backend makes of a copy of ``source``, which it leaves its traces in."""
    pytest.importorskip("build")
    copy = target / "source"
    ignored = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__", "results")
    shutil.copytree(source, copy, symlinks=True, ignore=ignored)
    run("-m", "build", "--no-isolation", f"--{kind}", "--outdir", target / "dist", copy, cwd=target)
    (made,) = (target / "dist").iterdir()
    return made


def wheel_files(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if ".dist-info/" not in name}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    return build(ROOT, tmp_path_factory.mktemp("wheel"), "wheel")


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    return build(ROOT, tmp_path_factory.mktemp("sdist"), "sdist")


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    files = wheel_files(wheel)
    package = {str(path.relative_to(ROOT)) for path in (ROOT / "multilora_fast").rglob("*.py")} | KERNELS
    assert files == package | {"multilora_fast/py.typed", "multilora_fast/kernels/README.md"}
    assert "multilora_fast/kernels/__init__.py" not in files
    with zipfile.ZipFile(wheel) as archive:  # real files, where the repository has a link
        assert archive.read("multilora_fast/kernels/shrink.py") == (ROOT / "kernels/shrink.py").read_bytes()


def test_the_sdist_makes_the_same_wheel(sdist, wheel, tmp_path):
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (source,) = tmp_path.iterdir()
    again = build(source, tmp_path / "again", "wheel")
    assert wheel_files(again) == wheel_files(wheel)
    assert not (source / "tests").exists()
    assert (source / "LICENSE").is_file()


@pytest.mark.parametrize("kind", ["wheel", "checkout"])
def test_it_runs_away_from_the_repository(kind, wheel, tmp_path):
    home = ROOT
    if kind == "wheel":
        home = tmp_path / "home"
        options = ("--quiet", "--no-deps", "--no-index", "--disable-pip-version-check", "--target", home)
        run("-m", "pip", "install", *options, wheel, cwd=tmp_path)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    loaded, files, said = run("-c", STEP, *["quick"] * (kind == "checkout"), cwd=elsewhere, path=home).split("\n", 2)
    assert "torch" in loaded.split()
    assert not set(loaded.split()) & {"kernels", "triton", "transformers", "peft"}
    assert files == f"{home / 'multilora_fast/__init__.py'} {home / 'multilora_fast/kernels/shrink.py'}"
    assert re.match(r"multilora-fast .*\n(.*\n)*backend +\w+\n", said)  # and nothing before it


def test_the_version_is_one(wheel):
    assert f"-{multilora_fast.__version__}-" in wheel.name
    heads = re.findall(r"^## (\d+\.\d+\.\d+)", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert heads[0] == multilora_fast.__version__


def test_floors_are_in_setup_py_alone():
    """A page may repeat the floor of Python, which one needs to know first, if it is the same."""
    floors = dict(re.findall(r'"([a-z]+)>=([\d.]+)', (ROOT / "setup.py").read_text()))
    floors["python"] = re.search(r'python_requires=">=([\d.]+)"', (ROOT / "setup.py").read_text())[1]
    assert {"torch", "triton", "transformers", "peft", "python"} <= set(floors)
    pages = [*ROOT.glob("*.md"), ROOT / "Makefile", ROOT / "kernels/README.md", *ROOT.glob("examples/**/*.md")]
    for page in pages:
        said = re.findall(r"\b(torch|triton|transformers|peft|python)`? ?(?:>=|≥) ?([\d.]*\d)", page.read_text(), re.I)
        assert all(floors[name.lower()] == version for name, version in said), f"{page.name}: {said}"
