"""A simulated GPU whose compiled kernels run in Triton's interpreter, and take addresses as real ones do."""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from torch.utils._python_dispatch import _disable_current_modes
from triton.tools.tensor_descriptor import TensorDescriptor

from bench import simulated
from bench.simulated import Compiled, simulated_gpu
from multilora_fast.kernels.configs import device_of

REACH = 2**20  # bytes from an address that a kernel of these tests may touch


class Ran(list):
    """What ran, in order: (kernel, True for a replay)."""


@contextmanager
def interpreted_gpu() -> Iterator[Ran]:
    ran = Ran()

    def compile_and_run(kernel, blocks, arguments):
        kinds = {name: value for name, value in arguments.items() if hasattr(value, "data_ptr")}
        kinds = {name: value.dtype for name, value in kinds.items()}
        descriptors = {n: v.base.dtype for n, v in arguments.items() if isinstance(v, TensorDescriptor)}

        def seen(name, value):
            if name in kinds and value is not None:
                return at(value, kinds[name])
            if name in descriptors:
                base = at(value.base.data_ptr(), descriptors[name])
                return TensorDescriptor(base, value.shape, value.strides, value.block_shape)
            return value

        def run(x, y, z, stream, function, metadata, launch_metadata, enter, leave, *given):
            named = {name: seen(name, value) for name, value in zip(kernel.arg_names, given, strict=True)}
            ran.append((kernel.fn.__name__, True))
            with _disable_current_modes():
                kernel[(x, y, z)](**named)

        ran.append((kernel.fn.__name__, False))
        with _disable_current_modes():
            kernel[blocks](**arguments)
        return Addressed(run, kernel, ran)

    processors = device_of(torch.empty(0))[1]  # as without the simulation: sums are split by them
    with mock.patch.object(simulated, "PROCESSORS", processors), simulated_gpu(compile_and_run, arch="interpreter"):
        yield ran


class Addressed(Compiled):
    """A launch that no plan made brings tensors."""

    def __init__(self, run, kernel, ran):
        super().__init__(run)
        self.kernel, self.ran = kernel, ran

    def __getitem__(self, blocks):
        def run(*arguments):
            self.ran.append((self.kernel.fn.__name__, False))
            with _disable_current_modes():
                self.kernel[blocks](**dict(zip(self.kernel.arg_names, arguments, strict=True)))

        return run


def at(address: int, dtype: torch.dtype) -> torch.Tensor:
    """The memory from an address on, as elements of ``dtype``."""
    memory = (ctypes.c_char * REACH).from_address(address)
    return torch.frombuffer(memory, dtype=torch.uint8).view(dtype)
