"""When a launch goes straight to a kernel that was compiled before. That it then runs right, test_gpu.py asks."""

import torch

from multilora_fast.kernels import launch


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
    monkeypatch.setattr(launch, "_COMPILED", {})
    kernel, arguments = Kernel(), {"BLOCK": 32, "x_ptr": 7, "M": 3}
    launch._launch(("one kind",), kernel, (4, 2), arguments)
    launch._launch(("one kind",), kernel, (5, 1), arguments | {"M": 9})
    launch._launch(("another",), kernel, (5, 1), arguments)
    assert [blocks for blocks, _ in kernel.compiled] == [(4, 2, 1), (5, 1, 1)]
    assert kernel.ran == [((5, 1, 1), (7, 9, 32))]


def test_kinds_differ_in_all_that_triton_compiles_in():
    x = torch.zeros(64, dtype=torch.bfloat16)
    values = [None, x, x[1:], x.float(), 1, 2, 16, 2**31, 2**31 + 1]
    assert len({launch._compiled_in(value) for value in values}) == len(values)
    assert launch._compiled_in(x) == launch._compiled_in(x[8:])
    assert launch._compiled_in(2) == launch._compiled_in(18)
    assert launch._compiled_in(16) == launch._compiled_in(4096)
