"""Simulate a GPU on a machine without one, to run and time the host path."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from types import SimpleNamespace
from unittest import mock

import triton.language as tl

from multilora_fast.kernels import (
    expand,
    finish,
    grouped_expand,
    grouped_reduce,
    grouped_shrink,
    launch,
    linear,
    plan,
    product,
    reduce,
    shrink,
)
from multilora_fast.ops import backends, call, functional

ARCH, PROCESSORS = "sm_90", 132


class Compiled:
    """A stand-in for a compiled kernel: ``run`` gets the grid, the stream, five more values and the arguments."""

    function, packed_metadata = 0, ()
    metadata = SimpleNamespace(global_scratch_size=0, profile_scratch_size=0)

    def __init__(self, run: Callable):
        self.run = run

    def __getitem__(self, blocks: tuple[int, int, int]) -> Callable:
        return lambda *arguments: self.run(*blocks, 0, 0, (), None, None, None, *arguments)


@contextmanager
def simulated_gpu(compile_and_run: Callable, arch: str = ARCH) -> Iterator[None]:
    """Treat CPU tensors as CUDA tensors; ``compile_and_run(kernel, blocks, arguments)`` compiles a launch."""
    with ExitStack() as stack:

        def replace(module, name: str, value) -> None:
            stack.enter_context(mock.patch.object(module, name, value))

        for name, answer in (
            ("on_gpu", lambda x: True),
            ("on_device", lambda index: nullcontext()),
            ("check_not_capturing", lambda shape: None),
            ("is_jitted", lambda kernel: True),
            ("compile_and_run", compile_and_run),
            ("_runtime_names", _runtime_names),
            ("_COMPILED", {}),
        ):
            replace(launch, name, answer)
        for name, answer in (
            ("current_stream", lambda index: 0),
            ("current_device", lambda: None),
            ("why_not", lambda: None),
        ):
            replace(plan, name, answer)
        grouped = (grouped_shrink, grouped_expand, grouped_reduce)
        for module in (shrink, expand, reduce, finish, product, linear, *grouped):
            if hasattr(module, "device_of"):
                replace(module, "device_of", lambda x: (arch, PROCESSORS))
        replace(call, "is_cached", lambda x: True)
        replace(call, "_CALLS", {})
        chosen = lambda name, device, dtype=None: name or "triton"  # noqa: E731
        replace(backends, "choose", chosen)
        replace(functional, "choose", chosen)
        yield


def _runtime_names(kernel) -> frozenset[str]:
    parameters = inspect.signature(kernel.fn).parameters.items()
    return frozenset(name for name, parameter in parameters if parameter.annotation is not tl.constexpr)
