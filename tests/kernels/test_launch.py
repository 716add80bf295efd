"""How often kernels are launched, and when a launch goes straight to one that was compiled before. That it then runs
right, test_gpu.py asks."""

from contextlib import nullcontext
from importlib import import_module

import pytest
import torch

from multilora_fast.kernels import launch
from multilora_fast.kernels.dropout import draw
from multilora_fast.kernels.expand import expand
from multilora_fast.kernels.reduce import reduce_all
from multilora_fast.kernels.shrink import shrink


class Kernel:
    """Stands for a jitted kernel and what it compiles to, and writes down what is asked of it."""

    arg_names = ("x_ptr", "M", "BLOCK")

    def __init__(self):
        self.compiled, self.ran = [], []

    def __getitem__(self, blocks):
        def compile_and_run(**arguments):
            self.compiled.append((blocks, arguments))
            return Compiled(self)

        return compile_and_run


class Compiled:
    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, blocks):
        return lambda *arguments: self.kernel.ran.append((blocks, arguments))


def test_a_second_launch_of_a_kind_runs_what_the_first_compiled(monkeypatch):
    for name, value in {
        "_COMPILED": {}, "on_gpu": lambda x: True, "is_jitted": lambda kernel: True,
        "on_device": lambda index: nullcontext(), "_runtime_names": lambda kernel: {"x_ptr", "M"},
    }.items():  # fmt: skip
        monkeypatch.setattr(launch, name, value)
    kernel, x = Kernel(), torch.zeros(64)
    launch.launch(x, kernel, (4, 2), x_ptr=x, M=3, BLOCK=32)
    launch.launch(x, kernel, (5, 1), x_ptr=x, M=9, BLOCK=32)
    launch.launch(x, kernel, (5, 1), x_ptr=x, M=9, BLOCK=64)
    assert [blocks for blocks, _ in kernel.compiled] == [(4, 2, 1), (5, 1, 1)]
    assert kernel.ran == [((5, 1, 1), (x, 9, 32))]


def test_kinds_differ_in_all_that_triton_compiles_in():
    x = torch.zeros(64, dtype=torch.bfloat16)
    values = [None, x, x[1:], x.float(), 1, 2, 16, 2**31, 2**31 + 1]
    assert len({launch._compiled_in(value) for value in values}) == len(values)
    assert launch._compiled_in(x) == launch._compiled_in(x[8:])
    assert launch._compiled_in(2) == launch._compiled_in(18)
    assert launch._compiled_in(16) == launch._compiled_in(4096)


@pytest.mark.parametrize("arch", [("sm_90", 132), ("sm_80", 108), ("sm_100", 148)], ids=str)
@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize(("M", "most"), [(8192, 8), (2048, 8), (512, 10), (16, 10)])
def test_launches_of_a_forward_and_a_backward(M, most, p, arch, monkeypatch):
    """Beside the two products with W."""
    launched = []
    for name in ("dropout", "expand", "finish", "pack", "reduce", "shrink"):
        module = import_module(f"multilora_fast.kernels.{name}")
        monkeypatch.setattr(module, "launch", lambda x, kernel, grid, **options: launched.append(options))
        monkeypatch.setattr(module, "device_of", lambda x: arch, raising=False)
    K, N, n, r = 4096, 4096, 3, 32
    make = lambda *size: torch.empty(*size, dtype=torch.bfloat16)  # noqa: E731
    x, dy, y, A, B, s = make(M, K), make(M, N), make(M, N), make(n, r, K), make(n, N, r).transpose(1, 2), make(n, N)
    seed = torch.zeros(1, dtype=torch.int64)
    mask = draw(seed, M, K, p), p
    H = shrink(x, A, None, 1.0, *mask)
    expand(y, H, B, s, 2.0, accumulate=False)
    mask = draw(seed, M, K, p), p
    dH = shrink(dy, B, s, 2.0)
    expand(x, dH, A, None, 1.0, *mask, accumulate=False)
    reduce_all(H, dy, B, s, 2.0, dH, x, A.dtype, *mask)
    assert len(launched) <= most + 2 * (p > 0)
    assert all(options["enable_fp_fusion"] for options in launched)  # a default that differs between Triton's versions
