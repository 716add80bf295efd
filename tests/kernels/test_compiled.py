"""Every row of the table compiles for its architectures, in a process where the kernels are not interpreted."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from bench import compile_grouped, compile_product, compile_report, compiled
from bench.compile_report import MATRIX_KERNELS, USES, Case

ROOT = Path(__file__).parents[2]
SOURCES = [path.read_text() for path in (ROOT / "kernels").glob("*.py")]
KERNELS = {name for source in SOURCES for name in re.findall(r"def (\w+)_kernel\(", source)}
MATRIX = {name.removesuffix("_kernel") for name in MATRIX_KERNELS}
NOT_MATRIX = ("mask.draw", "mask.numbers")


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> dict:
    """The quick compile report, which exits 1 where a row fails, and takes minutes."""
    if "COMPILED" not in os.environ:
        pytest.skip("make compiled")
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
    assert {row["kernel"] for row in rows} == KERNELS
    assert all(row["tensor_cores"] > 0 for row in rows if row["kernel"] in MATRIX and row["dtype"] != "float32")


def test_every_use_is_compiled_for_every_architecture(report):
    pairs = {
        (row["use"], row["arch"]) for row in report["rows"] if row["kernel"] in MATRIX and row["dtype"] != "float32"
    }
    uses = set(USES) - set(NOT_MATRIX) | set(compile_grouped.USES)
    assert {use for use, _ in pairs} == uses
    assert {arch for _, arch in pairs} == {"sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942"}
    assert len(pairs) == 7 * len(uses)


def test_instructions_an_element_stay_within_their_limits(report):
    """On sm_90, in bfloat16, at 8192 tokens: what an H100 loses time on is issuing them."""
    found = {
        (row["use"], row["n"] * row["r"], row["dropout"]): row["sass_per_element"]
        for row in report["rows"]
        if (row["arch"], row["M"], row["D"], row["dtype"]) == ("sm_90", 8192, 4096, "bfloat16")
        and row["kernel"] in MATRIX | {"mask", "product"}
        and row["params"] == "bfloat16"
    }
    assert found["expand.forward", 96, False] <= 6
    assert found["expand.add", 96, False] <= 9
    assert found["expand.forward", 160, False] <= 8
    assert found["expand.add", 160, False] <= 11
    assert found["expand.backward", 96, True] <= 11
    assert found["shrink.forward", 96, False] <= 4.5
    assert found["shrink.forward", 96, True] <= 10
    assert found["reduce.forward", 96, False] <= 5.5
    assert found["reduce.backward", 96, True] <= 11
    assert found["reduce.both", 96, True] <= 11
    assert max(value for (use, _, _), value in found.items() if use == "mask.draw") <= 12


@pytest.mark.parametrize(("instructions", "stack"), [("STL.64 [R1], RZ", 0), ("STL [R1+0x4], R9\nLDL R9, [R1+0x4]", 8)])
def test_a_stack_is_counted_where_it_is_read_back(monkeypatch, instructions, stack):
    output = {"cuobjdump": "REG:40 STACK:8 SHARED:0", "nvdisasm": instructions}
    monkeypatch.setattr(compiled, "tool", lambda name, *args, binary: output[name])
    kernel = SimpleNamespace(asm={"ptx": "", "cubin": b""}, metadata=SimpleNamespace(shared=0))
    assert compiled.inspect(kernel, "sm_120")["stack"] == stack


def test_a_kernel_that_does_not_compile_falls_short(monkeypatch):
    def fail(*_):
        raise RuntimeError("PassManager::run failed")

    case = Case("reduce.backward", "sm_100", 8192, 4096, 3, 32, "bfloat16", "bfloat16", True)
    joint = next(compile_product.cases(quick=True))
    kernel = SimpleNamespace(__name__="reduce_kernel")
    for module in (compile_report, compile_product):
        monkeypatch.setattr(module, "launches", lambda _: [(kernel, {})])
        monkeypatch.setattr(module, "compile_for", fail)
    for row in (compile_report.examine((case, 0)), compile_product.examine((joint, 0))):
        assert row["fails"] == ["does not compile"]
        assert compile_report.line(row)[-1] == "does not compile"
