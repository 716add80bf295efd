"""transformers' Trainer under DeepSpeed, one and two gloo processes: the losses and gradient norms without it.

The run without DeepSpeed has as many processes, and in bfloat16 float32 masters, which DeepSpeed keeps too."""

import json
import os
import subprocess
from itertools import pairwise, product
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CASES = [
    f"ZeRO-{stage} {dtype} {checkpointing} checkpointing{early}"
    for stage, dtype, checkpointing, early in product(
        (1, 2, 3), ("float32", "bfloat16"), ("no", "plain", "reentrant"), ("", " eval_on_start")
    )
    if (stage, dtype) != (3, "bfloat16")
]


@pytest.fixture(scope="module", params=[1, 2], ids=["one process", "two processes"])
def seen(request, environment, tmp_path_factory) -> dict:
    python, folder = environment("deepspeed"), tmp_path_factory.mktemp("deepspeed")
    words = [python, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(request.param)]
    variables = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    ended = subprocess.run(
        [*words, "tests/trainers/deepspeed_worker.py", folder], cwd=ROOT, env={**os.environ, **variables},
        capture_output=True, text=True, timeout=3000,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr[-5000:]
    ranks = [json.loads((folder / f"seen-{rank}.json").read_text()) for rank in range(request.param)]
    assert all(one == other for one, other in pairwise(ranks))
    return ranks[0]


@pytest.mark.parametrize("case", CASES)
def test_losses_and_norms_are_those_without_deepspeed(case, seen):
    wanted, whole, again = seen[case.split()[1]], seen[case]["whole"], seen[case]["again"]
    assert len(wanted["losses"]) == len(wanted["norms"]) == len(wanted["evaluated"]) + 1 == 4
    for name in ("losses", "norms"):
        assert whole[name] == pytest.approx(wanted[name], rel=1e-6)
        assert again[name][-2:] == pytest.approx(wanted[name][2:], rel=1e-6)
    evaluated = wanted["evaluated"][0 if "eval_on_start" in case else 1 :]
    assert whole["evaluated"] == pytest.approx(evaluated, rel=1e-6)
    assert again["evaluated"][-1] == pytest.approx(evaluated[-1], rel=1e-6)
