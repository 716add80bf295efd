"""The joint kernel: the base product and the branches in one launch, with the rank as extra K.

    forward   y  = x Wᵀ + b + H B̃ᵀ                        W (N, K) as nn.Linear stores it: `transposed=True`
    backward  dx = dy W + mask/(1−p) ⊙ (dH Ã)             dy takes the place of x, and K and N are swapped

The kernel is persistent: a program walks over tiles of y, grouped so that W stays in L2. One pipelined loop copies the
slices of the rank and then those of K. Triton flattens it with the loop over tiles, so a tile is written while the next
is read. B̃ needs W's layout: it is packed as (N, R), unless lora_B is that already. Scaling B on the tile would pass it
through registers. Ã is (R, K) already.

With dropout the rank has a loop of its own, the mask is applied to the sums after it, and tiles do not overlap. A mask
inside the one loop makes Triton (3.6 and 3.9) omit a wait for the tensor cores on sm_90, and carry the sums through
registers in every step on sm_100.

Tensor descriptors are made on the host and passed as arguments. Device-side descriptors would delay every program's
first tile and need scratch memory, hence an allocator, which Triton keeps in a context variable that autograd's threads
do not see.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs
from triton.tools.tensor_descriptor import TensorDescriptor

from .configs import KernelConfig, cdiv, device_of, product_tile
from .dropout import drop_sum, mask_arguments
from .launch import TL_DTYPES, check_weight, dot_dtype, launch, launch_options, output, sum_dtype
from .pack import pack
from .tiles import dot

ALIGNMENT = 16  # bytes, of a descriptor's address and row stride
SWIZZLE = 128  # bytes of K in a slice: the widest row that TMA swizzles over the banks of shared memory
GROUP_M = 8


@triton.jit
def add_slice(acc, a_desc, b_desc, start_m, start_n, start_k, TRANSPOSED: tl.constexpr, DOT: tl.constexpr):
    """acc + a b over one slice of the summed axis."""
    a = a_desc.load([start_m, start_k])  # [BLOCK_M, BLOCK_K]
    if TRANSPOSED:
        b = b_desc.load([start_n, start_k]).T  # [BLOCK_K, BLOCK_N]
    else:
        b = b_desc.load([start_k, start_n])  # [BLOCK_K, BLOCK_N]
    return dot(a.to(DOT), b.to(DOT), acc)


@triton.jit(do_not_specialize=["M", "N", "K", "R", "threshold", "stride_bits"])
def product_kernel(
    x_desc,  # x [M, K]
    weight_desc,  # W [N, K], or [K, N] when not TRANSPOSED
    h_desc,  # H [M, R]
    w_desc,  # B̃ [N, R], or [R, N] when not TRANSPOSED
    y_desc,  # y [M, N]
    bias_ptr,  # bias [N], or None
    bits_ptr, stride_bits,  # mask [M, ⌈N/32⌉], or None
    threshold,  # 65536·p
    M,  # tokens
    N,  # columns of y
    K,  # columns of x
    R,  # n·r
    TRANSPOSED: tl.constexpr,  # whether W and B̃ have a row for each column of y
    DOT: tl.constexpr,  # dtype of the factors
    ACC: tl.constexpr,  # dtype of the sums
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,  # tiles of rows in a group
    FLATTEN: tl.constexpr,  # whether tiles overlap
):  # fmt: skip
    """y = Σ_t a_t b_t + bias, (a_t, b_t) being the t-th slice of (H, B̃) and, when those are through, of (x, W)

    Bytes: the M·K + K·N + M·N elements of the product itself, and M·R + R·N of the branches.
    """
    num_m, num_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    rank_steps = tl.cdiv(R, BLOCK_K)
    steps = rank_steps + tl.cdiv(K, BLOCK_K)
    for tile in tl.range(tl.program_id(0), num_m * num_n, tl.num_programs(0), flatten=FLATTEN):
        first_m = tile // (GROUP_M * num_n) * GROUP_M
        group_m = min(num_m - first_m, GROUP_M)
        start_m = (first_m + tile % group_m) * BLOCK_M
        start_n = tile % (GROUP_M * num_n) // group_m * BLOCK_N
        acc = tl.zeros((BLOCK_M, BLOCK_N), ACC)
        first = 0
        if bits_ptr is not None:
            for t in range(0, rank_steps):
                acc = add_slice(acc, h_desc, w_desc, start_m, start_n, t * BLOCK_K, TRANSPOSED, DOT)
            mask = (bits_ptr, stride_bits, M, threshold)
            acc = drop_sum(acc, mask, start_m + tl.arange(0, BLOCK_M), start_n, BLOCK_M, BLOCK_N)
            first = rank_steps
        for t in range(first, steps):
            if t < rank_steps:
                a_desc = h_desc
                b_desc = w_desc
                start_k = t * BLOCK_K
            else:
                a_desc = x_desc
                b_desc = weight_desc
                start_k = (t - rank_steps) * BLOCK_K
            acc = add_slice(acc, a_desc, b_desc, start_m, start_n, start_k, TRANSPOSED, DOT)
        if bias_ptr is not None:
            offs_n = start_n + tl.arange(0, BLOCK_N)
            bias = tl.load(bias_ptr + offs_n, mask=offs_n < N, other=0.0)  # [BLOCK_N]
            acc += bias.to(ACC)[None, :]
        y_desc.store([start_m, start_n], acc.to(y_desc.dtype))


def product(
    x: Tensor, weight: Tensor, bias: Tensor | None, h: Tensor, w: Tensor, scale: Tensor | None = None,
    scaling: float = 1.0, bits: Tensor | None = None, p: float = 0.0, *, transposed: bool, out: Tensor | None = None,
    config: KernelConfig | None = None,
) -> Tensor:  # fmt: skip
    """x Wᵀ (weight (N, K), `transposed`) or x W (weight (K, N)), plus bias (N,) and the branches: (M, N) in x's dtype.

    The branches come from h (M, n·r), w (n, r, N) and scale None or (n, N), as `expand` takes them. `bits` is the
    dropout mask of an (M, N) input as `draw` gives it for p, and multiplies what the branches add. The result goes to
    `out` where it is given. Raises ValueError for shapes that do not agree and where :func:`serves` is False.
    """
    M, N, K = _check(x, weight, bias, h, w, scale, transposed)
    mask = mask_arguments(bits, p, M, N)
    out = output(out, (M, N), x.dtype, x)
    if out.numel() == 0 or out.is_meta:
        return out
    if reason := _refusal(x, weight, h, out):
        raise ValueError(reason)
    arch, processors = device_of(x)
    config = config or product_tile(arch)
    assert config is not None
    BLOCK_M, BLOCK_N, BLOCK_K = config.BLOCK_M, config.BLOCK_D, SWIZZLE // x.element_size()
    block_w = (BLOCK_N, BLOCK_K) if transposed else (BLOCK_K, BLOCK_N)
    launch(
        x, product_kernel, (min(processors, cdiv(M, BLOCK_M) * cdiv(N, BLOCK_N)), 1),
        x_desc=describe(x, BLOCK_M, BLOCK_K), weight_desc=describe(weight, *block_w),
        h_desc=describe(h, BLOCK_M, BLOCK_K),
        w_desc=describe(_rank_weight(w, h, scale, scaling, transposed), *block_w),
        y_desc=describe(out, BLOCK_M, BLOCK_N), bias_ptr=None if bias is None else bias.contiguous(), **mask,
        M=M, N=N, K=K, R=h.shape[1], TRANSPOSED=transposed,
        DOT=dot_dtype(x.dtype), ACC=TL_DTYPES[sum_dtype(x.dtype)], BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, BLOCK_K=BLOCK_K,
        GROUP_M=GROUP_M, FLATTEN=mask["bits_ptr"] is None, **launch_options(config),
    )  # fmt: skip
    return out


def serves(x: Tensor, weight: Tensor, h: Tensor | None, out: Tensor) -> bool:
    """Whether :func:`product` can run on these: half precision on an architecture with TMA, and every tensor with a
    contiguous last dimension, a 16-byte aligned address and a row stride that is a multiple of 16 bytes. `out` may be a
    meta tensor.
    """
    return _refusal(x, weight, h, out) is None


def _refusal(x, weight, h, out) -> str | None:
    arch, _ = device_of(x)
    if product_tile(arch) is None:
        return f"x is on {arch}, wanted an architecture with a copy engine, sm_90 or newer."
    if x.element_size() != 2 and not knobs.runtime.interpret:
        return f"x has dtype {x.dtype}, wanted float16 or bfloat16."
    for name, t in (("x", x), ("weight", weight), ("h", h), ("out", out)):
        if t is not None and not describable(t):
            return (
                f"{name} has shape {tuple(t.shape)}, strides {t.stride()} and dtype {t.dtype}, wanted rows of "
                f"contiguous elements at addresses that are multiples of {ALIGNMENT} bytes."
            )
    return None


def describable(t: Tensor) -> bool:
    """Whether TMA can read the matrix t in place."""
    if t.dim() != 2:
        return False
    (rows, columns), size = t.shape, t.element_size()
    contiguous = columns == 1 or t.stride(1) == 1
    apart = rows == 1 or (t.stride(0) >= columns and t.stride(0) * size % ALIGNMENT == 0)
    return t.numel() > 0 and contiguous and apart and (t.is_meta or t.data_ptr() % ALIGNMENT == 0)


def describe(t: Tensor, *block: int) -> TensorDescriptor:
    """The descriptor of a :func:`describable` matrix. A single row may have any stride in torch."""
    rows, columns = t.shape
    apart = t.stride(0) if rows > 1 else _aligned(columns, t.dtype)
    return TensorDescriptor(t, [rows, columns], [apart, 1], list(block))


def _aligned(columns: int, dtype: torch.dtype) -> int:
    """The least row stride, in elements, of an aligned matrix of `columns` columns."""
    unit = ALIGNMENT // dtype.itemsize
    return cdiv(columns, unit) * unit


def rank_rows(rows: int, columns: int, like: Tensor) -> Tensor:
    """An empty matrix that TMA can read."""
    return torch.empty((rows, _aligned(columns, like.dtype)), dtype=like.dtype, device=like.device)[:, :columns]


def _rank_weight(w, h, scale, scaling, transposed: bool) -> Tensor:
    """scaling·scale⊙w as (R, N), or (N, R) when transposed: a view of w where that is it, else packed."""
    n, r, N = w.shape
    apart = w.stride(1) if r > 1 else w.stride(0)
    if scale is None and scaling == 1.0 and w.dtype == h.dtype and (n == 1 or w.stride(0) == r * apart):
        found = w.as_strided((n * r, N), (apart, w.stride(2)))
        found = found.t() if transposed else found
        if describable(found):
            return found
    found = rank_rows(*((N, n * r) if transposed else (n * r, N)), h)
    pack(w, h.dtype, scale, scaling, out=found.t() if transposed else found)
    return found


def _check(x, weight, bias, h, w, scale, transposed: bool) -> tuple[int, int, int]:
    """(M, N, K)."""
    if x.dim() != 2 or x.dtype not in TL_DTYPES:
        raise ValueError(f"x has shape {tuple(x.shape)} and dtype {x.dtype}, wanted a 2-D floating-point tensor.")
    axis = 1 if transposed else 0
    if weight.dim() != 2 or weight.shape[axis] != x.shape[1] or weight.dtype != x.dtype:
        raise ValueError(
            f"weight has shape {tuple(weight.shape)} and dtype {weight.dtype}, wanted a 2-D {x.dtype} tensor with "
            f"{x.shape[1]} {'columns' if transposed else 'rows'}."
        )
    N = weight.shape[1 - axis]
    if bias is not None and bias.shape != (N,):
        raise ValueError(f"bias has shape {tuple(bias.shape)}, wanted {(N,)}.")
    check_weight(w, scale, N)
    wanted = (x.shape[0], w.shape[0] * w.shape[1])
    if h.shape != wanted or h.dtype != x.dtype:
        raise ValueError(f"h has shape {tuple(h.shape)} and dtype {h.dtype}, wanted {wanted} and {x.dtype}.")
    return x.shape[0], N, x.shape[1]
