"""Compiles every row of kernels/configs.py for its architectures, without a GPU, and reports what came out.

    python -m bench.compile_report [--quick] [--arch ARCH] [--jobs N] [--json OUT]

The launchers themselves are called, on unread tensors of the real shapes, and what they would have launched is compiled
with the attributes a real call has. A row falls short when a kernel spills, needs more shared memory than the
architecture has, lacks its tensor-core instruction (bf16 and fp16) or pays more than 24 SASS instructions per element
for dropout (sm_90); the exit status is then 1. --quick compiles the widest rank of each row in one dtype.
"""

import argparse
import json
import math
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

import torch
import triton

from bench.compiled import compile_for, inspect, launches, options, source, tile_instructions
from multilora_fast.kernels.configs import TUNED_CONFIGS, find_row, rank_tiles
from multilora_fast.kernels.expand import expand
from multilora_fast.kernels.reduce import reduce, reduce_scaled
from multilora_fast.kernels.shrink import shrink

KIB = 1024
SHARED_LIMITS = {
    "sm_80": 163 * KIB,
    "sm_86": 99 * KIB,
    "sm_89": 99 * KIB,
    "sm_90": 227 * KIB,
    "sm_100": 227 * KIB,
    "sm_120": 99 * KIB,
    "gfx942": 64 * KIB,
}
DROPOUT_ARCH, DROPOUT_LIMIT = "sm_90", 24.0
MATRIX_KERNELS = ("shrink_kernel", "expand_kernel", "reduce_kernel")
# use -> whether it regenerates the dropout mask
USES = {
    "shrink.forward": True, "shrink.backward": False, "expand.forward": False, "expand.backward": True,
    "expand.write": True, "reduce.forward": False, "reduce.backward": True,
}  # fmt: skip
TOKENS = (8192, 16)
RANKS = ((2, 32), (3, 32), (4, 32), (5, 32), (8, 32), (5, 12), (9, 32), (10, 32), (12, 32), (15, 32))
DTYPES = (("bfloat16", "bfloat16"), ("float16", "float16"), ("bfloat16", "float32"), ("float32", "float32"))


@dataclass(frozen=True)
class Case:
    """A launcher call: `use` is kernel.direction, D the features of the large tensor, params the dtype of A, B, s."""

    use: str
    arch: str
    M: int
    D: int
    n: int
    r: int
    dtype: str
    params: str
    dropout: bool

    @property
    def row(self) -> tuple:
        return find_row(self.use.split(".")[0], self.M, self.n * self.r, getattr(torch, self.dtype), self.arch)

    def __call__(self) -> None:
        """Calls the launcher; the tensors are allocated and never read."""
        dtype, params, config = getattr(torch, self.dtype), getattr(torch, self.params), TUNED_CONFIGS[self.row]
        M, D, n, r = self.M, self.D, self.n, self.r
        big, h = torch.empty(M, D, dtype=dtype), torch.empty(M, n * r, dtype=dtype)
        a, b = torch.empty(n, r, D, dtype=params), torch.empty(n, D, r, dtype=params).transpose(1, 2)
        scale = torch.empty(n, D, dtype=params)
        drop = {"seed": torch.empty(1, dtype=torch.int64), "p": 0.05} if self.dropout else {}
        match self.use:
            case "shrink.forward":
                shrink(big, a, **drop, config=config)
            case "shrink.backward":
                shrink(big, b, scale, 0.5, config=config)
            case "expand.forward":
                expand(big, h, b, scale, 0.5, config=config)
            case "expand.backward":
                expand(big, h, a, **drop, config=config)
            case "expand.write":
                expand(big, h, a, **drop, accumulate=False, config=config)
            case "reduce.forward":
                reduce_scaled(h, big, b, scale, 0.5, config=config)
            case "reduce.backward":
                reduce(h, big, n, params, **drop, config=config)
            case _:
                raise AssertionError(self.use)


def odd_cases() -> Iterator[Case]:
    """Features that align with nothing, and one feature at rank one, where the JIT turns the sizes into constants."""
    for use, may_drop in USES.items():
        for D, n, r in ((83, 3, 12), (1, 1, 1)):
            yield Case(use, DROPOUT_ARCH, 37, D, n, r, "bfloat16", "bfloat16", may_drop)


def all_cases() -> Iterator[Case]:
    """Every use on every architecture: many and few tokens, every rank class, every dtype, dropout on and off.

    expand takes its rank in slices, so ranks beyond 256 compile to nothing new there.
    """
    for arch in SHARED_LIMITS:
        for use, may_drop in USES.items():
            for M in TOKENS:
                for n, r in (rank for rank in RANKS if math.prod(rank) <= 256 or not use.startswith("expand")):
                    for dtype, params in DTYPES:
                        for dropout in sorted({False, may_drop}):
                            yield Case(use, arch, M, 4096, n, r, dtype, params, dropout)


def quick_cases() -> list[Case]:
    """The widest rank of every row in both of its uses on every architecture, bf16 and fp16 taking turns.

    Added are float32 parameters where a row of shrink casts them on the tile, which takes the most shared memory, and
    ranks that are no power of two, whose second tile or padding takes registers: one of each width of the second tile.
    """
    chosen: dict[tuple, Case] = {}
    for case in all_cases():
        half = ("bfloat16", "float16")[(list(USES).index(case.use) + list(SHARED_LIMITS).index(case.arch)) % 2]
        mixed = case.dtype != case.params
        cast_on_tile = mixed and case.use.startswith("shrink") and not TUNED_CONFIGS[case.row].pack
        wanted = cast_on_tile or (not mixed and case.dtype in (half, "float32"))
        if not wanted or case.dropout != USES[case.use]:
            continue
        rank = case.n * case.r
        uneven = case.dtype == half and not case.use.startswith("expand") and rank & (rank - 1) > 0
        second = rank_tiles(rank, TUNED_CONFIGS[case.row])[1] if uneven else 0
        key = (case.arch, case.use, case.row, mixed, uneven, second)
        if key not in chosen or chosen[key].n * chosen[key].r < rank:
            chosen[key] = case
    return [*chosen.values(), *odd_cases()]


def unserved_rows(cases: list[Case]) -> set[tuple]:
    """Rows of the table that no case compiles."""
    return set(TUNED_CONFIGS) - {case.row for case in cases}


def jobs(cases: list[Case]) -> list[tuple[Case, int]]:
    """(case, index of its launch), leaving out launches that compile to what an earlier one did."""
    seen, chosen = set(), []
    for case in cases:
        for index, (kernel, kwargs) in enumerate(launches(case)):
            key = (case.arch, source(kernel, kwargs).hash(), *options(kwargs, case.arch).values())
            if key not in seen:
                seen.add(key)
                chosen.append((case, index))
    return chosen


def examine(job: tuple[Case, int]) -> dict:
    """One launch compiled, with what falls short under `fails`."""
    case, index = job
    kernel, kwargs = launches(case)[index]
    compiled = compile_for(kernel, kwargs, case.arch)
    found = {"kernel": kernel.__name__.removesuffix("_kernel"), **asdict(case), "row": "/".join(map(str, case.row))}
    found |= inspect(compiled, case.arch)
    matrix, added = kernel.__name__ in MATRIX_KERNELS, None
    if matrix and case.dropout and case.arch == DROPOUT_ARCH:
        looped = kernel.__name__ != "expand_kernel"
        bare = compile_for(kernel, {**kwargs, "DROPOUT": False, "seed_ptr": None}, case.arch)
        elements = kwargs["BLOCK_M"] * kwargs["BLOCK_D"] / (32 * kwargs["num_warps"])
        added = round((tile_instructions(compiled, looped) - tile_instructions(bare, looped)) / elements, 1)
    limits = {
        "spills": found["stack"] > 0,
        "shared memory": found["shared"] > SHARED_LIMITS[case.arch],
        f"no {found['tensor_core']}": matrix and case.dtype != "float32" and not found["tensor_cores"],
        "dropout": (added or 0.0) > DROPOUT_LIMIT,
    }
    return {**found, "dropout_per_element": added, "fails": [name for name, short in limits.items() if short]}


HEADER = (
    "kernel", "use", "row", "n·r", "dtype", "params", "dropout", "arch", "registers", "stack", "shared", "tensor cores",
    "dropout adds", "falls short",
)  # fmt: skip


def line(found: dict) -> tuple[str, ...]:
    drop = found["dropout_per_element"]
    return (
        found["kernel"], found["use"], found["row"], f"{found['n']}·{found['r']}", found["dtype"], found["params"],
        "yes" if found["dropout"] else "no", found["arch"], str(found["registers"]), str(found["stack"]),
        str(found["shared"]), f"{found['tensor_cores']} {found['tensor_core']}", "" if drop is None else f"{drop:.1f}",
        ", ".join(found["fails"]),
    )  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.compile_report", description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="the widest rank of each row in one dtype")
    parser.add_argument("--arch", choices=list(SHARED_LIMITS), help="only this architecture")
    parser.add_argument("--jobs", type=int, default=min(os.cpu_count() or 1, 16), help="processes (default: cores)")
    parser.add_argument("--json", type=Path, metavar="OUT", help="also write the rows as JSON")
    args = parser.parse_args(argv)
    if triton.knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set, and the interpreter compiles nothing: unset it.")
    cases = quick_cases() if args.quick else [*all_cases(), *odd_cases()]
    assert not unserved_rows(cases), f"rows nothing compiles: {unserved_rows(cases)}"
    work = jobs([case for case in cases if args.arch in (None, case.arch)])
    with ProcessPoolExecutor(args.jobs, mp_context=get_context("spawn")) as pool:
        found = list(pool.map(examine, work))
    print(" | ".join(HEADER))
    for row in found:
        print(" | ".join(line(row)))
    short = [row for row in found if row["fails"]]
    print(f"{len(found)} kernels compiled with Triton {triton.__version__}, {len(short)} fall short.")
    for row in short:
        print("falls short: " + " | ".join(line(row)))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        document = {"triton": triton.__version__, "torch": torch.__version__, "rows": found}
        args.json.write_text(json.dumps(document, indent=1) + "\n")
    return 1 if short else 0


if __name__ == "__main__":
    sys.exit(main())
