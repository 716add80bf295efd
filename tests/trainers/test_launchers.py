"""``python -m multilora_fast.peft`` below torchrun and accelerate, and above torchrun."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROGRAM = """
import os, sys
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING as methods
print("MULTILORA" in {method.value for method in methods}, sys.argv[1:], "RANK" in os.environ)
"""


@pytest.mark.parametrize(
    "words",
    [
        ["-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=0", "-m", "multilora_fast.peft"],
        ["-m", "accelerate.commands.launch", "--cpu", "--num_processes=1", "-m", "multilora_fast.peft"],
        ["-m", "multilora_fast.peft", "torchrun", "--nproc-per-node=2", "--master-port=0"],
    ],
    ids=["below torchrun", "below accelerate", "above torchrun"],
)
def test_launchers(words, tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    env = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HOME": str(tmp_path / "home")}
    done = subprocess.run(
        [sys.executable, *words, "program.py", "--rank", "4"], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    count = 1 if "accelerate" in str(words) else 2
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("True ['--rank', '4']") == count, done.stdout + done.stderr
