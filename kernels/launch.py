"""What every launcher needs: the device guard, the copy of a badly strided input and the types of a tile."""

from contextlib import nullcontext

import torch
import triton.language as tl
from triton import knobs

from .configs import Config

TL_DTYPES = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}


def on_device(x: torch.Tensor):
    """The context a kernel that reads `x` is launched in."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


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


def launch_options(config: Config) -> dict[str, int]:
    """The compiler's options. Told that a thread may have all 255 registers, ptxas does not spill for occupancy."""
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    return options if torch.version.hip else options | {"maxnreg": 255}


def strides(x: torch.Tensor | None, dims: int) -> tuple[int, ...]:
    """The strides of an optional tensor, zeros where there is none."""
    return (0,) * dims if x is None else x.stride()


def dot_dtype(dtype: torch.dtype) -> tl.dtype:
    """The type of the factors of a tile's product: the tensor's own, but the interpreter cannot multiply bfloat16."""
    if dtype == torch.bfloat16 and knobs.runtime.interpret:
        return tl.float32
    return TL_DTYPES[dtype]


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type of every sum over tokens, features or ranks."""
    return torch.float64 if dtype == torch.float64 else torch.float32
