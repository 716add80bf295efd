"""Trainers, each in its own virtual environment in .trainers/: `make trainers`, not `make test`."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs/trainers.md"
NAMES = ("torch", "transformers", "peft", "trl", "accelerate")
FIGURES = ("trained", "resumed", "merged")
collect_ignore_glob = [] if os.environ.get("TRAINERS") else ["test_*.py"]


@pytest.fixture(scope="session")
def environment():
    """A function from the name of a requirements file in this folder to a Python with them installed."""

    def python(name: str) -> Path:
        script = ROOT / "tests/trainers/environment.sh"
        made = subprocess.run([script, name, sys.executable], capture_output=True, text=True)
        assert made.returncode == 0, f"{name} could not be installed: {made.stderr.strip()}"
        return ROOT / ".trainers" / name / "bin/python"

    return python


@pytest.fixture(scope="session")
def report():
    """A function that adds a trainer's row; at the end the table is printed and written into the docs."""
    rows = {}

    def add(name: str, python: Path, package: str, **figures: float) -> None:
        code = f"from importlib.metadata import version as v; print(*map(v, {(package, *NAMES)!r}))"
        found = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.split()
        rows[name] = f"| {name} | {' | '.join([*found, *(f'{figures[key]:.1g}' for key in FIGURES)])} |"

    yield add
    if rows:
        text = DOCS.read_text()
        earlier = dict(re.findall(r"^(?=\| ([A-Za-z]\S*) \|)(\|.*\|)$", text.partition("<!-- /report -->")[0], re.M))
        earlier.pop("trainer", None)
        head = ["trainer", "version", *NAMES, *FIGURES]
        table = [f"| {' | '.join(head)} |", "|" + " --- |" * len(head)]
        table += [row for _, row in sorted((earlier | rows).items())]
        block = "\n".join(["<!-- report -->", *table, "<!-- /report -->"])
        DOCS.write_text(re.sub(r"<!-- report -->.*<!-- /report -->", lambda _: block, text, flags=re.S))
        print("", *table, sep="\n")
