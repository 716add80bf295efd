"""Compare what a launch plan launches with what Triton's JIT would launch; run it without TRITON_INTERPRET.

It runs every case of the quick compile report on NVIDIA architectures, and tensors drawn at random, and prints counts.
An AssertionError says where a plan and the JIT differ.
"""

import random

import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from bench.compile_report import quick_cases
from bench.compiled import options, source
from bench.simulated import Compiled, simulated_gpu
from multilora_fast.kernels.launch import Launch, recording
from multilora_fast.kernels.linear import linear
from multilora_fast.kernels.plan import Plan, base_of
from multilora_fast.kernels.reduce import reduce_all
from multilora_fast.kernels.shrink import shrink
from multilora_fast.ops.call import signature


class Jit:
    """Compiles nothing; records for each launch what would be compiled, and its arguments."""

    def __init__(self):
        self.ran: list[tuple] = []

    def __call__(self, kernel, blocks, arguments):
        def run(*given):
            self.ran.append((kernel, given[:3], given[9:]))

        compiled = Compiled(run)
        compiled.kernel = kernel
        compiled.options = {name: value for name, value in arguments.items() if name not in kernel.arg_names}
        return compiled


def address(value):
    """An argument as a plan passes it on: tensors by their address."""
    if isinstance(value, TensorDescriptor):
        return value.base.data_ptr(), value.shape, value.strides, value.block_shape
    return value.data_ptr() if isinstance(value, torch.Tensor) else value


def compiled_to(step: Launch, arch: str) -> tuple:
    kernel = step.compiled.kernel
    arguments = dict(zip(kernel.arg_names, step.arguments, strict=True)) | step.compiled.options
    return kernel.__name__, source(kernel, arguments).hash(), tuple(options(arguments, arch).items())


def another(t: torch.Tensor) -> torch.Tensor:
    """A tensor of the same kind, elsewhere."""
    storage = torch.empty(t.untyped_storage().nbytes() + 64, dtype=torch.uint8)
    shift = (t.data_ptr() - storage.data_ptr()) % 64
    return storage[shift:][: storage.numel() - 64].view(t.dtype).as_strided(t.shape, t.stride())


def check_case(case) -> int:
    jit = Jit()
    with simulated_gpu(jit, case.arch):
        with recording() as steps:
            case()
        tensors = {
            base_of(v).data_ptr(): base_of(v) for s in steps for v in s.arguments if hasattr(base_of(v), "data_ptr")
        }
        plan = Plan(steps, list(tensors.values()), ())
        jit.ran.clear()
        fresh = {at: another(t) for at, t in tensors.items()}
        plan.replay(*fresh.values())
    assert len(jit.ran) == len(steps)
    for (kernel, blocks, given), step in zip(jit.ran, steps, strict=True):
        wanted = []
        for value in step.arguments:
            new = fresh.get(base_of(value).data_ptr()) if hasattr(base_of(value), "data_ptr") else None
            if isinstance(value, TensorDescriptor):
                value = TensorDescriptor(new, value.shape, value.strides, value.block_shape)
            wanted.append(value if new is None or isinstance(value, TensorDescriptor) else new)
        assert kernel is step.compiled.kernel
        assert blocks == (*step.grid, 1)
        assert list(map(address, given)) == list(map(address, wanted)), (case, kernel.__name__)
        moved = step._replace(arguments=tuple(wanted))
        assert compiled_to(moved, case.arch) == compiled_to(step, case.arch), (case, kernel.__name__)
    return len(steps)


def draw(generator: random.Random, shape: tuple[int, ...], gap: int, dtype: torch.dtype) -> torch.Tensor:
    """A tensor with rows ``gap`` elements apart, at some alignment."""
    shift, last = generator.choice([0, 0, 0, 0, 1, 4, 8, 16]), shape[-1] + gap
    whole = torch.empty(shift + last * torch.Size(shape[:-1]).numel(), dtype=dtype)
    return whole[shift:].view(*shape[:-1], last)[..., : shape[-1]]


def fuzz(kinds: int, draws: int) -> tuple[int, int]:
    """The number of plans made, and of replays, each with the JIT's launches."""
    generator, plans, met = random.Random(0), {}, 0
    for _ in range(kinds):
        M, K, N = (generator.choice(sizes) for sizes in ((1, 16, 17, 2048), (1, 16, 40, 64), (1, 16, 24, 64)))
        n, r = generator.choice([(1, 1), (3, 2), (3, 32)])
        dtype, gaps = (
            generator.choice([torch.bfloat16, torch.float32]),
            [generator.choice([0, 0, 1, 8]) for _ in "xdWABs"],
        )
        shapes = ((M, K), (M, N), (N, K), (n, r, K), (n, N, r), (n, N))
        for _ in range(draws):
            inputs = [draw(generator, shape, gap, dtype) for shape, gap in zip(shapes, gaps, strict=True)]
            x, dy, W, A, B, s = inputs
            with simulated_gpu(Jit()), recording() as steps:
                w, y = B.transpose(1, 2), torch.empty(M, N, dtype=dtype)
                H = shrink(x, A)
                linear(y, x, W, None, H, w, s, 0.5, transposed=True)
                reduce_all(H, dy, w, s, 0.5, shrink(dy, w, s, 0.5), x, dtype)
                launched = [compiled_to(step, "sm_90") for step in steps if isinstance(step, Launch)]
                known = plans.setdefault(signature(inputs), [])
                serving = [of for made, of in known if made.replay(*inputs) is not None]
                if not serving:
                    known.append((Plan(steps, inputs, (y,)), launched))
            met += len(serving)
            assert serving in ([], [launched]), signature(inputs)
    return sum(map(len, plans.values())), met


if __name__ == "__main__":
    cases = [case for case in quick_cases() if case.arch.startswith("sm_")]
    launches = sum(map(check_case, cases))
    keys, met = fuzz(kinds=60, draws=25)
    print(f"{len(cases)} cases, {launches} launches; {keys} plans, {met} replays")
    assert met > 50
