"""Tile configurations by kernel, tokens, rank, dtype and architecture.

`TUNED_CONFIGS` has a default that fits every GPU and the interpreter, and rows that are better on one architecture.
`bench.tune` prints rows to paste here.
"""

from dataclasses import dataclass
from functools import lru_cache
from itertools import product

import torch
import triton
from triton import knobs

RANK_CLASSES = (64, 96, 128, 160, 288, 320, 512)  # 288 is three layers of rank 96, 320 two of 160
# The most tokens of each size class, which is named by the tokens it is tuned at; more are "8192".
SIZE_CLASSES = {"decode": 64, "512": 1024, "2048": 4096}
SIZES = (*SIZE_CLASSES, "8192")


@dataclass(frozen=True)
class KernelConfig:
    """A tile, its compiler options, and how a kernel splits its work."""

    BLOCK_M: int  # tokens
    BLOCK_D: int  # features
    num_warps: int
    num_stages: int
    min_steps: int | None = 4  # least tiles in a split of the summed axis; None: no split
    pack: bool = False  # scale the weight in a launch of its own, where a tile is read often or has too many registers
    two_tiles: bool = True  # run a rank as two tiles where that pads less than one
    columns: int = 256  # most of the rank in one program, a power of two; more runs in chunks, or in slices (expand)
    programs: int = 1  # that a processor runs at once


def cdiv(a: int, b: int) -> int:
    """⌈a / b⌉; Triton's own takes microseconds on the host."""
    return -(-a // b)


def size_class(M: int) -> str:
    return next((size for size, most in SIZE_CLASSES.items() if most >= M), "8192")


def rank_class(R: int) -> int:
    """The least of RANK_CLASSES that holds R, or the largest."""
    return next((rank for rank in RANK_CLASSES if rank >= R), RANK_CLASSES[-1])


def dtype_class(dtype: torch.dtype) -> str:
    return "half" if dtype in (torch.float16, torch.bfloat16) else "float"


# (kernel and use, size class, dtype class, architecture, rank class). An architecture has rows where it was measured
# (sm_90) or where its compiler needs another tile.
DEFAULT = "default"
TUNED_CONFIGS = {
    ("shrink", "decode", "half", DEFAULT, 512): KernelConfig(64, 32, 8, 2, two_tiles=False),
    ("shrink", "512", "half", DEFAULT, 512): KernelConfig(64, 32, 8, 2, pack=True),
    ("shrink", "2048", "half", DEFAULT, 512): KernelConfig(32, 32, 4, 2, None, pack=True),
    ("shrink", "8192", "half", DEFAULT, 128): KernelConfig(64, 64, 4, 3, None, pack=True),
    ("shrink", "8192", "half", DEFAULT, 512): KernelConfig(64, 32, 8, 2, None, pack=True),
    ("shrink", "2048", "half", "sm_90", 128): KernelConfig(16, 128, 4, 4, None, pack=True),
    ("shrink", "8192", "half", "sm_90", 128): KernelConfig(64, 64, 4, 6, None, pack=True),
    ("shrink dropout", "8192", "half", "sm_90", 128): KernelConfig(64, 128, 4, 3, None, pack=True),
    ("shrink", "8192", "half", "sm_90", 288): KernelConfig(64, 64, 8, 4, None, pack=True, columns=512),
    ("shrink", "8192", "half", "sm_90", 512): KernelConfig(64, 32, 8, 4, None, pack=True, columns=512),
    ("shrink", "512", "float", DEFAULT, 512): KernelConfig(32, 32, 8, 1, pack=True, two_tiles=False),
    ("shrink", "8192", "float", DEFAULT, 512): KernelConfig(32, 32, 8, 1, None, pack=True, two_tiles=False),
    ("expand", "decode", "half", DEFAULT, 512): KernelConfig(64, 32, 4, 2, programs=2),
    ("expand", "8192", "half", DEFAULT, 128): KernelConfig(64, 64, 4, 2, programs=2),
    ("expand", "8192", "half", DEFAULT, 160): KernelConfig(64, 64, 8, 2, programs=2),
    ("expand", "8192", "half", DEFAULT, 512): KernelConfig(64, 32, 8, 2, pack=True, programs=2),
    ("expand", "8192", "half", "gfx942", 512): KernelConfig(64, 32, 8, 2, pack=True, columns=128, programs=2),
    ("expand", "8192", "half", "sm_90", 160): KernelConfig(64, 128, 4, 3, programs=2),
    ("expand", "8192", "half", "sm_90", 320): KernelConfig(64, 128, 4, 3, pack=True, columns=512),
    ("expand", "8192", "half", "sm_90", 512): KernelConfig(64, 64, 4, 2, pack=True, columns=512),
    ("expand dropout", "8192", "half", "sm_90", 96): KernelConfig(64, 128, 4, 3, programs=3),
    ("expand", "8192", "float", DEFAULT, 512): KernelConfig(32, 64, 4, 2, columns=16, programs=4),
    ("reduce", "8192", "half", DEFAULT, 128): KernelConfig(64, 64, 4, 3),
    ("reduce", "8192", "half", DEFAULT, 320): KernelConfig(64, 64, 8, 2),
    ("reduce", "8192", "half", DEFAULT, 512): KernelConfig(32, 64, 8, 2, columns=128),
    ("reduce", "8192", "half", "sm_90", 128): KernelConfig(64, 64, 4, 4, programs=2),
    ("reduce dropout", "8192", "half", "sm_90", 64): KernelConfig(32, 64, 4, 6, programs=2),
    ("reduce", "8192", "half", "sm_90", 288): KernelConfig(64, 128, 8, 3, columns=512),
    ("reduce", "8192", "half", "sm_90", 512): KernelConfig(32, 64, 8, 4, columns=512),
    ("reduce", "8192", "float", DEFAULT, 512): KernelConfig(16, 64, 8, 2, two_tiles=False),
    ("reduce dropout", "8192", "float", DEFAULT, 512): KernelConfig(16, 32, 8, 2, two_tiles=False),
    ("grouped_shrink", "decode", "half", DEFAULT, 512): KernelConfig(32, 32, 4, 2, columns=128),
    ("grouped_shrink", "8192", "half", DEFAULT, 512): KernelConfig(64, 32, 8, 2, columns=128),
    ("grouped_shrink", "8192", "half", "sm_90", 512): KernelConfig(64, 64, 4, 3, columns=128),
    ("grouped_shrink", "decode", "float", DEFAULT, 512): KernelConfig(16, 32, 4, 1, two_tiles=False, columns=128),
    ("grouped_shrink", "8192", "float", DEFAULT, 512): KernelConfig(32, 32, 8, 1, two_tiles=False, columns=128),
    ("grouped_expand", "decode", "half", DEFAULT, 512): KernelConfig(32, 32, 4, 2, columns=128, programs=4),
    ("grouped_expand", "8192", "half", DEFAULT, 512): KernelConfig(64, 32, 8, 2, columns=128, programs=4),
    ("grouped_expand", "8192", "half", "sm_90", 512): KernelConfig(64, 64, 8, 2, columns=128, programs=4),
    ("grouped_expand", "decode", "float", DEFAULT, 512): KernelConfig(16, 64, 4, 2, columns=16, programs=4),
    ("grouped_expand", "8192", "float", DEFAULT, 512): KernelConfig(32, 64, 4, 2, columns=16, programs=4),
    ("grouped_reduce", "decode", "half", DEFAULT, 512): KernelConfig(32, 64, 8, 2, columns=128),
    ("grouped_reduce", "8192", "half", DEFAULT, 512): KernelConfig(64, 64, 8, 2, columns=128),
    ("grouped_reduce", "8192", "float", DEFAULT, 512): KernelConfig(16, 64, 8, 2, two_tiles=False, columns=64),
}


def find_row(
    kernel: str, M: int, R: int, dtype: torch.dtype, arch: str, add: bool = False, dropout: bool = False
) -> tuple:
    """The key in TUNED_CONFIGS for a kernel over M tokens at rank R; `add` is expand's y += instead of y =.

    A missing row falls back to the next wider rank, then to the row without use, the default, and the next size.
    """
    sizes, ranks = SIZES[SIZES.index(size_class(M)) :], RANK_CLASSES[RANK_CLASSES.index(rank_class(R)) :]
    uses = (kernel + " add" * add + " dropout" * dropout, kernel)
    for size, architecture, use, rank in product(sizes, (arch, DEFAULT), uses, ranks):
        key = (use, size, dtype_class(dtype), architecture, rank)
        if key in TUNED_CONFIGS:
            return key
    raise AssertionError(f"configs.TUNED_CONFIGS has no default for {kernel}, {dtype}")


@lru_cache(1024)
def pick(
    kernel: str, M: int, R: int, dtype: torch.dtype, arch: str, add: bool = False, dropout: bool = False
) -> KernelConfig:
    return TUNED_CONFIGS[find_row(kernel, M, R, dtype, arch, add, dropout)]


@lru_cache
def _device(index: int) -> tuple[str, int]:
    properties = torch.cuda.get_device_properties(index)
    arch = properties.gcnArchName.split(":")[0] if torch.version.hip else f"sm_{properties.major}{properties.minor}"
    return arch, properties.multi_processor_count


def device_of(x: torch.Tensor) -> tuple[str, int]:
    """(architecture, multiprocessors) of the device of `x`; the interpreter counts as four."""
    if x.is_cuda:
        return _device(x.get_device())
    return ("interpreter" if knobs.runtime.interpret else "cpu"), 4


@lru_cache(1024)
def rank_tiles(R: int, config: KernelConfig) -> tuple[int, int]:
    """R columns as one tile of a power of two, or two where that pads less: 96 = 64 + 32, 160 = 128 + 32.

    A second tile of 0 columns is none. More columns than the configuration holds run in equal chunks of such tiles.
    """
    R = cdiv(R, cdiv(R, config.columns))
    whole = max(16, triton.next_power_of_2(R))
    half = whole // 2
    if not config.two_tiles or half < 64 or half + half // 2 < R:
        return whole, 0
    return half, max(16, triton.next_power_of_2(R - half))


def slice_tiles(R: int, config: KernelConfig, itemsize: int) -> tuple[int, int]:
    """The tiles of a rank in expand: all of it, or where the configuration holds less, slices of 32 columns (16 of
    more than two bytes)."""
    first, second = rank_tiles(R, config)
    return (first, second) if first + second >= R else (min(config.columns, 16 if itemsize > 2 else 32), 0)


@lru_cache(1024)
def split_k(tiles: int, steps: int, programs: int, min_steps: int | None) -> tuple[int, int]:
    """Split-K of a sum of `steps` tiles into (parts, steps per part), so that `tiles` · parts is near `programs`."""
    if min_steps is None:
        return 1, steps
    parts = max(1, programs // max(1, tiles))
    if 4 * parts * tiles < 3 * programs:
        parts += 1
    per_part = max(cdiv(steps, parts), min_steps, 1)
    return max(1, cdiv(steps, per_part)), per_part


# The tile of the joint kernel, `product`, on every architecture with TMA.
PRODUCT_TILES = {
    "interpreter": KernelConfig(32, 64, 4, 2),
    "sm_90": KernelConfig(128, 256, 8, 3),
    "sm_100": KernelConfig(128, 256, 8, 3),
    "sm_120": KernelConfig(128, 128, 8, 3),
}
# Where the joint kernel is faster than `expand` and cuBLAS: (architecture, direction): [(in_features, out_features,
# rank, tokens)]. A row covers layers whose features are within half as much again, of no wider rank, with no fewer
# tokens. The rows are from an H100, bf16, and an older kernel that read the rank outside its pipeline; 4096 → 4096 at
# rank 160 and 11008 → 4096 at rank 96, both forward, and 4096 → 11008 forward at 2048 tokens lost there.
PRODUCT_WINS = {
    ("sm_90", "forward"): [(4096, 4096, 96, 1024), (4096, 11008, 96, 8192)],
    ("sm_90", "backward"): [
        (4096, 4096, 96, 1024), (4096, 4096, 160, 8192), (4096, 11008, 96, 8192), (11008, 4096, 96, 8192),
    ],
}  # fmt: skip


def product_tile(arch: str) -> KernelConfig | None:
    """The joint kernel's tile, None on an architecture without TMA. A machine without a GPU, which can only compile it,
    gets the H100's."""
    return PRODUCT_TILES.get("sm_90" if arch == "cpu" else arch)


@lru_cache(1024)
def product_config(
    direction: str, M: int, K: int, N: int, R: int, dtype: torch.dtype, arch: str
) -> KernelConfig | None:
    """The joint kernel's tile where PRODUCT_WINS calls it faster for a layer of K in_features and N out_features;
    `direction` is "forward" or "backward"."""
    if dtype_class(dtype) != "half":
        return None
    for k, n, rank, tokens in PRODUCT_WINS.get((arch, direction), ()):
        near = all(2 * measured <= 3 * size <= 4.5 * measured for size, measured in ((K, k), (N, n)))
        if near and rank >= R and tokens <= M:
            return product_tile(arch)
    return None
