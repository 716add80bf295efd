"""Shared by all launchers: cached launches, checks of inputs, and the arguments of a tile."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cache
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch.utils._python_dispatch import _disable_current_modes
from triton import knobs
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from .configs import KernelConfig

TL_DTYPES = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}


class Launch(NamedTuple):
    """A launch of a compiled kernel: its grid and its arguments in order."""

    compiled: Any
    grid: tuple[int, int]
    arguments: tuple


class Product(NamedTuple):
    """A product by torch: out += a b."""

    out: torch.Tensor
    a: torch.Tensor
    b: torch.Tensor


class _Recording(threading.local):
    steps: list[Launch | Product] | None = None


_COMPILED: dict[tuple, Any] = {}
_recording = _Recording()


def launch(x: torch.Tensor, kernel, grid: tuple[int, int], **arguments) -> None:
    """`kernel[grid](**arguments)` on the device of `x`, with all arguments of the kernel and its options.

    Caches compiled kernels by everything Triton specializes on. Triton's own lookup takes longer on the host than most
    of these kernels run.
    """
    if not on_gpu(x) or not is_jitted(kernel):
        kernel[grid](**arguments)
        return
    device, names = x.get_device(), _runtime_names(kernel)
    key = (kernel, device, *(_compiled_in(v) if name in names else v for name, v in arguments.items()))
    with on_device(device):
        compiled, blocks = _COMPILED.get(key), (*grid, 1)
        if compiled is None:
            check_not_capturing(x.shape)
            compiled = _COMPILED[key] = compile_and_run(kernel, blocks, arguments)
        else:
            compiled[blocks](*[arguments[name] for name in kernel.arg_names])
    if _recording.steps is not None:
        _recording.steps.append(Launch(compiled, grid, tuple(arguments[name] for name in kernel.arg_names)))


def multiply(out: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """out (M, N) += a (M, K) b (K, N), by torch."""
    with nullcontext() if _recording.steps is None else _disable_current_modes():
        out.addmm_(a, b)
    if _recording.steps is not None:
        _recording.steps.append(Product(out, a, b))


@contextmanager
def recording(enabled: bool = True) -> Iterator[list[Launch | Product]]:
    """Record every launch and product of this thread in order, and keep their tensors alive."""
    steps: list[Launch | Product] = []
    outer, _recording.steps = _recording.steps, steps if enabled else None
    try:
        yield steps
    finally:
        _recording.steps = outer


@contextmanager
def unrecorded() -> Iterator[None]:
    """Exclude what runs inside from a recording, as the self-check of kernels."""
    with recording(enabled=False), _disable_current_modes():
        yield


# Replaced by tests and by the host benchmark, which simulate a GPU.


def on_gpu(x: torch.Tensor) -> bool:
    return x.is_cuda


def is_jitted(kernel) -> bool:
    return isinstance(kernel, JITFunction)  # the interpreter's are another class


def on_device(index: int):
    return torch.cuda.device(index)


def compile_and_run(kernel, blocks: tuple[int, int, int], arguments: dict):
    return kernel[blocks](**arguments)


def check_not_capturing(shape: Sequence[int]) -> None:
    """Raise RuntimeError inside the capture of a CUDA graph, where nothing can be compiled or checked."""
    if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "multilora_fast compiles and checks kernels at first use, which a CUDA graph cannot capture: take a step "
            f"with inputs of the same shapes, here {tuple(shape)}, before the capture."
        )


@cache
def _runtime_names(kernel) -> frozenset[str]:
    return frozenset(param.name for param in kernel.params if not param.is_constexpr)


def _compiled_in(value: torch.Tensor | TensorDescriptor | int | None) -> tuple | None:
    """What Triton specializes a runtime argument on: dtype, alignment, and equality to 1."""
    if value is None:
        return None
    if isinstance(value, torch.Tensor):
        return value.dtype, value.data_ptr() % 16 == 0
    if isinstance(value, TensorDescriptor):
        return value.base.dtype, *value.block_shape
    return value == 1, value % 16 == 0, value < 1 << 31


def rows(name: str, x: torch.Tensor) -> torch.Tensor:
    """`x` (M, D), copied only if its last dimension is not contiguous."""
    if x.dim() != 2 or x.dtype not in TL_DTYPES:
        raise ValueError(f"{name} has shape {tuple(x.shape)} and dtype {x.dtype}, wanted a 2-D floating-point tensor.")
    return x if x.stride(1) == 1 or x.shape[1] <= 1 else x.contiguous()


def check_written(name: str, y: torch.Tensor) -> None:
    """Raise ValueError unless a kernel can write into y: 2-D with a contiguous last dimension."""
    if y.dim() != 2 or y.dtype not in TL_DTYPES or (y.stride(1) != 1 and y.shape[1] > 1):
        raise ValueError(
            f"{name} has shape {tuple(y.shape)}, strides {y.stride()}, wanted 2-D with a contiguous last dimension."
        )


def check_weight(w: torch.Tensor, scale: torch.Tensor | None, D: int, dims: int = 3) -> None:
    """Raise ValueError unless w is (n, r, D) and scale None or (n, D), or of 4 dims, where E experts come first."""
    if w.dim() != dims or w.shape[-1] != D or min(w.shape[:-1]) < 1:
        sizes = "E, n, r" if dims == 4 else "n, r"
        raise ValueError(f"w has shape {tuple(w.shape)}, wanted ({sizes}, {D}) with {sizes} at least 1.")
    if scale is not None and scale.shape != (*w.shape[:-2], D):
        raise ValueError(f"scale has shape {tuple(scale.shape)}, wanted {(*w.shape[:-2], D)}.")


def output(out: torch.Tensor | None, shape: tuple[int, int], dtype: torch.dtype, like: torch.Tensor) -> torch.Tensor:
    """`out`, which must have this shape and dtype, or where it is None a new matrix on the device of `like`."""
    if out is None:
        return torch.empty(shape, dtype=dtype, device=like.device)
    if out.shape != shape or out.dtype != dtype:
        raise ValueError(f"out has shape {tuple(out.shape)} and dtype {out.dtype}, wanted {shape} and {dtype}.")
    return out


@cache
def dot_dtype(dtype: torch.dtype) -> tl.dtype:
    """The dtype of a product's factors: the tensor's, but float32 for bfloat16 in the interpreter, which lacks it."""
    if dtype == torch.bfloat16 and knobs.runtime.interpret:
        return tl.float32
    return TL_DTYPES[dtype]


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of every sum over tokens, features or ranks."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@cache
def launch_options(config: KernelConfig | None = None) -> dict[str, int]:
    """Compiler options, None being a kernel without a configuration. maxnreg=255 keeps ptxas from spilling for
    occupancy. Triton 3.10 turns fusion into fma off by default."""
    options = {"num_warps": 4} if config is None else {"num_warps": config.num_warps, "num_stages": config.num_stages}
    options["enable_fp_fusion"] = True
    return options if torch.version.hip else options | {"maxnreg": 255}


def tile_arguments(dtype: torch.dtype, config: KernelConfig, blocks: tuple[int, int]) -> dict:
    """The dtypes, the tile and the options of a kernel on `dtype`; `blocks` are the tiles of its rank."""
    return {
        "DOT": dot_dtype(dtype), "ACC": TL_DTYPES[sum_dtype(dtype)], "BLOCK_M": config.BLOCK_M,
        "BLOCK_D": config.BLOCK_D, "BLOCK_R": blocks[0], "BLOCK_R2": blocks[1], **launch_options(config),
    }  # fmt: skip
