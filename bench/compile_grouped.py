"""The kernels of experts for bench.compile_report: every row of the table at the ranks of experts.

Ranks 6 and 24 are one padded tile, 96 is two tiles, 128 the widest tile; 160 and 480 run in chunks or slices.
"""

from collections.abc import Iterator
from itertools import product

import torch

from bench.compiled import DTYPES, LauncherCall
from multilora_fast.kernels.configs import TUNED_CONFIGS, find_row
from multilora_fast.kernels.grouped_expand import grouped_expand
from multilora_fast.kernels.grouped_reduce import grouped_reduce, grouped_reduce_scaled
from multilora_fast.kernels.grouped_shrink import grouped_shrink

# use -> whether dropout can be on
USES = {
    "grouped_shrink.forward": True, "grouped_shrink.backward": False, "grouped_expand.forward": False,
    "grouped_expand.backward": True, "grouped_reduce.forward": False, "grouped_reduce.backward": True,
}  # fmt: skip
EXPERTS, TAKEN, FEATURES = 128, 8, 2048  # those of Qwen3-30B-A3B
TOKENS = (256, 16)  # of one expert
RANKS = ((2, 3), (3, 8), (3, 32), (4, 32), (5, 32), (15, 32))


class Case(LauncherCall):
    """A launcher call on EXPERTS experts with M rows each."""

    @property
    def row(self) -> tuple:
        kernel, R, dtype = self.use.split(".")[0], self.n * self.r, getattr(torch, self.dtype)
        return find_row(kernel, self.M, R, dtype, self.arch, dropout=self.dropout)

    def __call__(self) -> None:
        """Calls the launcher on uninitialized tensors."""
        dtype, params, config = getattr(torch, self.dtype), getattr(torch, self.params), TUNED_CONFIGS[self.row]
        S, E, D, n, r = self.M * EXPERTS, EXPERTS, self.D, self.n, self.r
        x, large, h = (torch.empty(*size, dtype=dtype) for size in ((S // TAKEN, D), (S, D), (S, n * r)))
        a, b = torch.empty(E, n, r, D, dtype=params), torch.empty(E, n, D, r, dtype=params).transpose(2, 3)
        scale, offs = torch.empty(E, n, D, dtype=params), torch.empty(E, dtype=torch.int32)
        index, ids = torch.empty(S, dtype=torch.int64), torch.empty(S, dtype=torch.int64)
        bits = torch.empty(S, -(-D // 32), dtype=torch.int32)
        drop = {"ids": ids, "bits": bits, "p": 0.05} if self.dropout else {}
        match self.use:
            case "grouped_shrink.forward":
                grouped_shrink(x, a, offs, index=index, **drop, config=config)
            case "grouped_shrink.backward":
                grouped_shrink(large, b, offs, scale, 0.5, config=config)
            case "grouped_expand.forward":
                grouped_expand(large, h, b, offs, scale, 0.5, config=config)
            case "grouped_expand.backward":
                grouped_expand(large, h, a, offs, **drop, config=config)
            case "grouped_reduce.forward":
                grouped_reduce_scaled(h, large, b, offs, scale, 0.5, config=config)
            case "grouped_reduce.backward":
                grouped_reduce(h, x, offs, n, params, index=index, **drop, config=config)
            case _:
                raise AssertionError(self.use)


def cases(architectures, quick: bool) -> Iterator[Case]:
    """Every use, size and rank, in every dtype, dropout on and off. Quick ones have rank 96, dropout where it applies
    and alternating half types; on sm_90 also rank 480 and float32."""
    for (at, arch), (use, may_drop), M, (n, r), (dtype, params) in product(
        enumerate(architectures), USES.items(), TOKENS, RANKS, DTYPES
    ):
        half = ("bfloat16", "float16")[(list(USES).index(use) + at) % 2]
        if not quick:
            yield from (Case(use, arch, M, FEATURES, n, r, dtype, params, drop) for drop in {False, may_drop})
        elif dtype == params and (dtype, n * r) in ((half, 96), *((half, 480), ("float32", 96)) * (arch == "sm_90")):
            yield Case(use, arch, M, FEATURES, n, r, dtype, params, may_drop)
