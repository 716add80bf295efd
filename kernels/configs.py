"""Which tile each kernel runs: data by kernel, tokens, rank, dtype and architecture.

Nothing here needs a GPU. `TUNED_CONFIGS` holds the default, small enough for any GPU and right in the interpreter, and
what an architecture does better with; `bench.tune` prints rows to paste here.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
from triton import knobs

RANK_CLASSES = (64, 128, 288, 320, 512)  # 288 is three layers of rank 96, 320 two of 160
DECODE_TOKENS = 64


@dataclass(frozen=True)
class KernelConfig:
    """A tile of BLOCK_M tokens by BLOCK_D features.

    min_steps is the least number of tiles a split of the summed axis gets; pack builds c·s⊙w once in the dtype of the
    product instead of on every tile; two_tiles lets a rank run as two tiles where that pads less than one; columns, a
    power of two, is the most of the rank that one program holds: a larger rank runs in chunks.
    """

    BLOCK_M: int
    BLOCK_D: int
    num_warps: int
    num_stages: int
    min_steps: int = 4
    pack: bool = False
    two_tiles: bool = True
    columns: int = 256


def cdiv(a: int, b: int) -> int:
    """⌈a / b⌉; Triton's own takes microseconds on the host."""
    return -(-a // b)


def size_class(M: int) -> str:
    return "decode" if M <= DECODE_TOKENS else "tokens"


def rank_class(R: int) -> int:
    """The least of RANK_CLASSES that holds R, or the largest."""
    return next((rank for rank in RANK_CLASSES if rank >= R), RANK_CLASSES[-1])


def dtype_class(dtype: torch.dtype) -> str:
    return "half" if dtype in (torch.float16, torch.bfloat16) else "float"


# (kernel, size class, dtype class, architecture, rank class). LARGE serves the architectures with 160 KB of shared
# memory or more; what fits 64 KB fits anywhere. A missing row is served by the next wider rank, then by "tokens".
# Ranks of 257 to 320 run as two chunks where mma.sync would hold the sums: a tile of 256 beside one of 64 spills there.
DEFAULT, LARGE = "default", "large"
ARCHITECTURES = {"sm_80": LARGE, "sm_90": LARGE, "sm_100": LARGE}
TUNED_CONFIGS = {
    ("shrink", "tokens", "half", DEFAULT, 128): KernelConfig(64, 64, 4, 3, pack=True),
    ("shrink", "tokens", "half", DEFAULT, 320): KernelConfig(64, 64, 8, 2, pack=True),
    ("shrink", "tokens", "half", DEFAULT, 512): KernelConfig(64, 32, 8, 2, pack=True, columns=512),
    ("shrink", "tokens", "half", LARGE, 128): KernelConfig(128, 64, 8, 4, pack=True),
    ("shrink", "tokens", "half", LARGE, 288): KernelConfig(128, 64, 8, 3, pack=True, columns=512),
    ("shrink", "tokens", "half", LARGE, 512): KernelConfig(64, 32, 8, 4, pack=True, columns=512),
    ("shrink", "tokens", "half", "sm_90", 288): KernelConfig(64, 64, 8, 4, pack=True, columns=512),
    ("shrink", "tokens", "half", "sm_80", 320): KernelConfig(128, 32, 8, 4, pack=True),
    ("shrink", "tokens", "float", DEFAULT, 512): KernelConfig(64, 32, 8, 2, pack=True, two_tiles=False),
    ("shrink", "decode", "half", DEFAULT, 512): KernelConfig(64, 32, 8, 2, two_tiles=False),
    ("shrink", "decode", "half", "gfx942", 512): KernelConfig(64, 32, 8, 1, two_tiles=False),
    ("expand", "tokens", "half", DEFAULT, 512): KernelConfig(64, 64, 4, 2),
    ("expand", "tokens", "half", LARGE, 512): KernelConfig(128, 64, 8, 3),
    ("expand", "tokens", "half", "sm_90", 128): KernelConfig(64, 64, 4, 3),
    ("expand", "tokens", "half", "sm_90", 512): KernelConfig(64, 128, 8, 3),
    ("expand", "tokens", "float", DEFAULT, 512): KernelConfig(32, 64, 4, 2),
    ("expand", "decode", "half", DEFAULT, 512): KernelConfig(64, 64, 4, 2),
    ("reduce", "tokens", "half", DEFAULT, 128): KernelConfig(64, 64, 4, 3),
    ("reduce", "tokens", "half", DEFAULT, 320): KernelConfig(64, 64, 8, 2),
    ("reduce", "tokens", "half", DEFAULT, 512): KernelConfig(32, 64, 8, 2, columns=512),
    ("reduce", "tokens", "half", LARGE, 128): KernelConfig(64, 128, 8, 4),
    ("reduce", "tokens", "half", LARGE, 288): KernelConfig(64, 128, 8, 3, columns=512),
    ("reduce", "tokens", "half", LARGE, 512): KernelConfig(32, 64, 8, 4, columns=512),
    ("reduce", "tokens", "half", "sm_80", 128): KernelConfig(64, 128, 8, 4),
    ("reduce", "tokens", "half", "sm_80", 320): KernelConfig(64, 128, 8, 2),
    # One tile: Triton 3.6 cannot pipeline two products of one transposed tile behind a dropout mask for sm_100.
    ("reduce", "tokens", "half", "sm_100", 128): KernelConfig(64, 128, 8, 4, two_tiles=False),
    ("reduce", "tokens", "half", "sm_100", 288): KernelConfig(64, 128, 8, 3, two_tiles=False),
    ("reduce", "tokens", "half", "sm_100", 512): KernelConfig(32, 64, 8, 4, two_tiles=False, columns=512),
    ("reduce", "tokens", "float", DEFAULT, 512): KernelConfig(32, 64, 8, 2, two_tiles=False),
    ("reduce", "tokens", "float", "sm_80", 512): KernelConfig(16, 64, 8, 2, two_tiles=False),
    ("reduce", "tokens", "float", "sm_120", 320): KernelConfig(16, 64, 8, 2),
    ("reduce", "tokens", "float", "sm_120", 512): KernelConfig(16, 64, 8, 2, columns=128),
}


def find_row(kernel: str, M: int, R: int, dtype: torch.dtype, arch: str) -> tuple:
    """The key in TUNED_CONFIGS for a kernel over M tokens at rank R: its architecture's own row, or its class's."""
    kind = dtype_class(dtype)
    for size in dict.fromkeys((size_class(M), "tokens")):
        for architecture in (arch, ARCHITECTURES.get(arch, DEFAULT), DEFAULT):
            for rank in RANK_CLASSES:
                key = (kernel, size, kind, architecture, rank)
                if rank >= rank_class(R) and key in TUNED_CONFIGS:
                    return key
    raise AssertionError(f"configs.TUNED_CONFIGS has no default for {kernel}, {kind}")


@lru_cache(1024)
def pick(kernel: str, M: int, R: int, dtype: torch.dtype, arch: str) -> KernelConfig:
    return TUNED_CONFIGS[find_row(kernel, M, R, dtype, arch)]


@lru_cache
def _device(index: int) -> tuple[str, int]:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        return properties.gcnArchName.split(":")[0], properties.multi_processor_count
    return f"sm_{properties.major}{properties.minor}", properties.multi_processor_count


def device_of(x: torch.Tensor) -> tuple[str, int]:
    """(architecture, multiprocessors) of the device `x` is on; the interpreter counts as four."""
    if x.is_cuda:
        return _device(x.get_device())
    return ("interpreter" if knobs.runtime.interpret else "cpu"), 4


@lru_cache(1024)
def rank_tiles(R: int, config: KernelConfig) -> tuple[int, int]:
    """R columns as a tile of a power of two and, where that pads less, a second one: 96 = 64 + 32, 160 = 128 + 32.

    A second tile of 0 columns is none. More columns than the configuration holds run as equal chunks of such tiles.
    """
    R = cdiv(R, cdiv(R, config.columns))
    whole = max(16, triton.next_power_of_2(R))
    half = whole // 2
    if not config.two_tiles or half < 64 or half + half // 2 < R:
        return whole, 0
    return half, max(16, triton.next_power_of_2(R - half))


@lru_cache(1024)
def split_k(tiles: int, steps: int, processors: int, min_steps: int) -> tuple[int, int]:
    """Split-K: (parts, steps per part) of a sum of `steps` tiles, `tiles` programs a part, to fill the processors."""
    parts = max(1, processors // max(1, tiles))
    if 4 * parts * tiles < 3 * processors:
        parts += 1
    per_part = max(cdiv(steps, parts), min_steps, 1)
    return max(1, cdiv(steps, per_part)), per_part
