"""Other people's trainers, each in a virtual environment of its own in .trainers/: `make trainers`, not `make test`."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
collect_ignore_glob = [] if os.environ.get("TRAINERS") else ["test_*.py"]


@pytest.fixture(scope="session")
def environment():
    """A function from the name of a file of requirements beside this one to the Python with them installed."""

    def python(name: str) -> Path:
        script = ROOT / "tests/trainers/environment.sh"
        made = subprocess.run([script, name, sys.executable], capture_output=True, text=True)
        assert made.returncode == 0, f"{name} could not be installed: {made.stderr.strip()}"
        return ROOT / ".trainers" / name / "bin/python"

    return python
