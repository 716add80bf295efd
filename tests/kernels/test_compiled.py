"""Every row of the table compiles for its architectures, in a process where the kernels are not interpreted."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MATRIX = {"shrink", "expand", "reduce"}


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> dict:
    """The quick compile report, which fails by itself where a row falls short."""
    out = tmp_path_factory.mktemp("compile") / "report.json"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    env.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-m", "bench.compile_report", "--quick", "--json", str(out)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return json.loads(out.read_text())


def test_no_row_spills_or_misses_its_tensor_cores(report):
    rows = report["rows"]
    assert [row for row in rows if row["fails"] or row["stack"]] == []
    assert {row["kernel"] for row in rows} == MATRIX | {"finish", "pack", "sum_parts"}
    assert all(row["tensor_cores"] > 0 for row in rows if row["kernel"] in MATRIX and row["dtype"] != "float32")


def test_every_use_is_compiled_for_every_architecture(report):
    pairs = {
        (row["use"], row["arch"]) for row in report["rows"] if row["kernel"] in MATRIX and row["dtype"] != "float32"
    }
    assert len({use for use, _ in pairs}) == 7
    assert {arch for _, arch in pairs} == {"sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942"}
    assert len(pairs) == 7 * 7


def test_dropout_adds_at_most_24_instructions_an_element(report):
    added = {row["use"]: row["dropout_per_element"] for row in report["rows"] if row["dropout_per_element"] is not None}
    assert set(added) == {"shrink.forward", "expand.backward", "expand.write", "reduce.backward"}
    assert max(added.values()) <= 24
