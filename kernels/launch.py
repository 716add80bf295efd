"""What every launcher needs: the launch itself, the copy of a badly strided input and the types of a tile."""

from functools import cache
from typing import Any

import torch
import triton.language as tl
from triton import knobs
from triton.runtime.jit import JITFunction

from .configs import KernelConfig

TL_DTYPES = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}


_COMPILED: dict[tuple, Any] = {}


def launch(x: torch.Tensor, kernel, grid: tuple[int, int], **arguments) -> None:
    """`kernel[grid](**arguments)` on the device of `x`, `arguments` being all of the kernel's and the options.

    Finding out what to compile takes Triton longer on the host than most of these kernels run: a launch that differs
    from an earlier one in nothing that is compiled in goes straight to what was compiled then.
    """
    if not x.is_cuda or not isinstance(kernel, JITFunction):  # the interpreter's are another class
        kernel[grid](**arguments)
        return
    device, names = x.get_device(), _runtime_names(kernel)
    key = (kernel, device, *(_compiled_in(v) if name in names else v for name, v in arguments.items()))
    if device != torch.cuda.current_device():
        with torch.cuda.device(device):
            _launch(key, kernel, grid, arguments)
    else:
        _launch(key, kernel, grid, arguments)


def _launch(key: tuple, kernel, grid: tuple[int, int], arguments: dict) -> None:
    compiled, blocks = _COMPILED.get(key), (*grid, 1)
    if compiled is None:
        _COMPILED[key] = kernel[blocks](**arguments)
    else:
        compiled[blocks](*[arguments[name] for name in kernel.arg_names])


@cache
def _runtime_names(kernel) -> frozenset[str]:
    return frozenset(param.name for param in kernel.params if not param.is_constexpr)


def _compiled_in(value: torch.Tensor | int | None) -> tuple | None:
    """What Triton may compile in of an argument that is not constant: its type, alignment, and whether it is one."""
    if value is None:
        return None
    if isinstance(value, torch.Tensor):
        return value.dtype, value.data_ptr() % 16 == 0
    return value == 1, value % 16 == 0, value < 1 << 31


def rows(name: str, x: torch.Tensor) -> torch.Tensor:
    """`x` (M, D) as the kernels read it, copied only when its last dimension is not contiguous."""
    if x.dim() != 2 or x.dtype not in TL_DTYPES:
        raise ValueError(f"{name} has shape {tuple(x.shape)} and dtype {x.dtype}, wanted a 2-D floating-point tensor.")
    return x if x.stride(1) == 1 or x.shape[1] <= 1 else x.contiguous()


def check_weight(w: torch.Tensor, scale: torch.Tensor | None, D: int) -> None:
    """A weight is (n, r, D) and its scale, when there is one, is (n, D); both may have any strides."""
    if w.dim() != 3 or w.shape[2] != D or w.shape[0] < 1 or w.shape[1] < 1:
        raise ValueError(f"w has shape {tuple(w.shape)}, wanted (n, r, {D}) with n and r at least 1.")
    if scale is not None and scale.shape != (w.shape[0], D):
        raise ValueError(f"scale has shape {tuple(scale.shape)}, wanted {(w.shape[0], D)}.")


def launch_options(config: KernelConfig) -> dict[str, int]:
    """The compiler's options. Told that a thread may have all 255 registers, ptxas does not spill for occupancy."""
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    return options if torch.version.hip else options | {"maxnreg": 255}


def strides(x: torch.Tensor | None, dims: int) -> tuple[int, ...]:
    """The strides of an optional tensor, zeros where there is none."""
    return (0,) * dims if x is None else x.stride()


@cache
def dot_dtype(dtype: torch.dtype) -> tl.dtype:
    """The type of the factors of a tile's product: the tensor's own, but the interpreter cannot multiply bfloat16."""
    if dtype == torch.bfloat16 and knobs.runtime.interpret:
        return tl.float32
    return TL_DTYPES[dtype]


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type of every sum over tokens, features or ranks."""
    return torch.float64 if dtype == torch.float64 else torch.float32
