"""Compiles every row of kernels/configs.py for its architectures, without a GPU, and reports the result.

    python -m bench.compile_report [--quick] [--arch ARCH] [--kernel KERNEL] [--jobs N] [--json OUT]

It calls the launchers on uninitialized tensors of the real shapes, and compiles what they would launch as a real call
would specialize it. A row fails when a kernel spills, exceeds the shared memory of the architecture, lacks its
tensor-core instruction (bf16 and fp16) or exceeds SASS_LIMITS, instructions per element of the large tensor (sm_90).
The exit status is then 1. --quick compiles the widest rank of each row in one dtype, and every case with such a limit.
"""

import argparse
import json
import math
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from itertools import product
from multiprocessing import get_context
from pathlib import Path

import torch
import triton

from bench import compile_grouped, compile_product
from bench.compiled import (
    DTYPES,
    NOT_COMPILED,
    LauncherCall,
    compile_for,
    inspect,
    launches,
    options,
    sass_per_element,
    source,
)
from multilora_fast.kernels.configs import PRODUCT_WINS, TUNED_CONFIGS, find_row, rank_tiles
from multilora_fast.kernels.dropout import draw, dropout_mask
from multilora_fast.kernels.expand import expand
from multilora_fast.kernels.pack import Packing
from multilora_fast.kernels.reduce import reduce, reduce_all, reduce_scaled
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
MATRIX_KERNELS = tuple(f"{group}{name}_kernel" for group in ("", "grouped_") for name in ("shrink", "expand", "reduce"))
# use -> whether dropout can be on
USES = {
    "shrink.forward": True, "shrink.pack": True, "shrink.backward": False, "expand.forward": False,
    "expand.bias": False, "expand.add": False, "expand.backward": True, "expand.backward_add": True,
    "reduce.forward": False, "reduce.backward": True, "reduce.both": True, "mask.draw": True, "mask.numbers": True,
}  # fmt: skip
TOKENS = (8192, 2048, 512, 16)
RANKS = ((2, 32), (3, 32), (4, 32), (5, 32), (8, 32), (5, 12), (9, 32), (10, 32), (12, 32), (15, 32))
# Every rank is compiled at 8192 tokens in bfloat16. Elsewhere only these are.
FEW_RANKS = {"size": (96, 160, 480), "float16": (96,), "mixed": (96, 288), "float32": (96, 288, 480)}
# Most SASS instructions per element on sm_90 in bfloat16 at 8192 tokens: {use: {n·r: (without, with dropout)}}
SASS_ARCH = "sm_90"
WRITTEN, ADDED = {96: (6.0, 11.0), 160: (8.0, None)}, {96: (9.0, None), 160: (11.0, None)}
SASS_LIMITS = {
    "shrink.forward": {96: (4.5, 10.0)}, "shrink.pack": {96: (4.5, 10.0)}, "shrink.backward": {96: (4.5, None)},
    "expand.forward": WRITTEN, "expand.bias": WRITTEN, "expand.backward": WRITTEN,
    "expand.add": ADDED, "expand.backward_add": ADDED,
    "reduce.forward": {96: (5.5, None)}, "reduce.backward": {96: (5.5, 11.0)}, "reduce.both": {96: (5.5, 11.0)},
    "mask.draw": {96: (None, 12.0)},
}  # fmt: skip


class Case(LauncherCall):
    """A launcher call of a dense kernel."""

    @property
    def row(self) -> tuple:
        """The key in TUNED_CONFIGS; () for the mask, which has none."""
        kernel, R, add = self.use.split(".")[0], self.n * self.r, self.use in ("expand.add", "expand.backward_add")
        if kernel == "mask":
            return ()
        return find_row(kernel, self.M, R, getattr(torch, self.dtype), self.arch, add, self.dropout)

    def __call__(self) -> None:
        """Calls the launcher on uninitialized tensors."""
        dtype, params, config = getattr(torch, self.dtype), getattr(torch, self.params), TUNED_CONFIGS.get(self.row)
        M, D, n, r = self.M, self.D, self.n, self.r
        big, h = torch.empty(M, D, dtype=dtype), torch.empty(M, n * r, dtype=dtype)
        a, b = torch.empty(n, r, D, dtype=params), torch.empty(n, D, r, dtype=params).transpose(1, 2)
        scale, bias, seed = (torch.empty(*size, dtype=params) for size in ((n, D), (D,), (1,)))
        bits = torch.empty(M, -(-D // 32), dtype=torch.int32)
        drop = {"bits": bits, "p": 0.05} if self.dropout else {}
        match self.use:
            case "shrink.forward":
                shrink(big, a, **drop, config=config)
            case "shrink.pack":
                packing = Packing(b, scale, 0.5, torch.empty(n * r, D, dtype=dtype))
                shrink(big, a, **drop, packing=packing, config=config)
            case "shrink.backward":
                shrink(big, b, scale, 0.5, config=config)
            case "expand.forward":
                expand(big, h, b, scale, 0.5, accumulate=False, config=config)
            case "expand.bias":
                expand(big, h, b, scale, 0.5, accumulate=False, bias=bias, config=config)
            case "expand.add":
                expand(big, h, b, scale, 0.5, config=config)
            case "expand.backward":
                expand(big, h, a, **drop, accumulate=False, config=config)
            case "expand.backward_add":
                expand(big, h, a, **drop, config=config)
            case "reduce.forward":
                reduce_scaled(h, big, b, scale, 0.5, config=config)
            case "reduce.backward":
                reduce(h, big, n, params, **drop, config=config)
            case "reduce.both":
                reduce_all(h, big, b, scale, 0.5, h, big, params, **drop, config=config)
            case "mask.draw":
                draw(seed.long(), M, D, 0.05)
            case "mask.numbers":
                dropout_mask(seed.long(), M, D, 0.05, dtype)
            case _:
                raise AssertionError(self.use)


def odd_cases() -> Iterator[Case]:
    """Unaligned features, and one feature at rank one, where the JIT specializes the sizes to 1."""
    for use, may_drop in USES.items():
        for D, n, r in ((83, 3, 12), (1, 1, 1)):
            yield Case(use, SASS_ARCH, 37, D, n, r, "bfloat16", "bfloat16", may_drop)


def all_cases() -> Iterator[Case]:
    """Every use on every architecture: each size and rank class, every dtype, dropout on and off; packing beside shrink
    up to the widest rank of the joint kernel."""
    widest = max(rank for (_, way), wins in PRODUCT_WINS.items() if way == "forward" for *_, rank, _ in wins)
    for arch, (use, may_drop), M, (n, r) in product(SHARED_LIMITS, USES.items(), TOKENS, RANKS):
        for dtype, params in DTYPES:
            if use == "shrink.pack" and (n * r > widest or dtype == "float32"):
                continue
            kind = "mixed" if params != dtype else dtype
            few = [FEW_RANKS.get(kind), FEW_RANKS["size"] if TOKENS[0] != M else None]
            if all(ranks is None or n * r in ranks for ranks in few):
                yield from (Case(use, arch, M, 4096, n, r, dtype, params, dropout) for dropout in {False, may_drop})


def adds_nothing(case: Case, kernel) -> bool:
    """Whether another launch covers this one: second passes, for which a few ranks are enough; expand without dropout,
    which is forward's without a scale; and slices of a rank, which differ only in number."""
    if kernel.__name__ not in MATRIX_KERNELS:
        return case.n * case.r not in FEW_RANKS["float32"] and case.D == 4096 and "mask" not in case.use
    if case.use.startswith("expand") and case.dtype == "float32" and case.n * case.r > 96:
        return case.n * case.r != 288
    return case.use.startswith("expand.backward") and not case.dropout and sass_limit(case) is None


def quick_cases() -> list[Case]:
    """Every case with a limit of instructions, and the widest rank of every row in each of its uses on every
    architecture, alternating bf16 and fp16, with dropout where it applies.

    Also float32 parameters where a row of shrink casts them on the tile, which takes the most shared memory, and ranks
    that are no power of two, whose second tile or padding takes registers: one of each width of the second tile.
    """
    chosen: dict[tuple, Case] = {}
    for case in all_cases():
        half = ("bfloat16", "float16")[(list(USES).index(case.use) + list(SHARED_LIMITS).index(case.arch)) % 2]
        mixed, rank = case.dtype != case.params, case.n * case.r
        if sass_limit(case):
            chosen[(case,)] = case
        cast_on_tile = mixed and case.use.startswith("shrink") and not TUNED_CONFIGS[case.row].pack
        wanted = cast_on_tile or (not mixed and case.dtype in (half, "bfloat16", "float32"))
        if not wanted or case.dropout != USES[case.use]:
            continue
        uneven = case.dtype == half and case.row and rank & (rank - 1) > 0
        second = rank_tiles(rank, TUNED_CONFIGS[case.row])[1] if uneven else 0
        key = (case.arch, case.use, case.row, case.dtype == "float32", mixed, uneven, second)
        if key not in chosen or chosen[key].n * chosen[key].r < rank:
            chosen[key] = case
    return [*chosen.values(), *odd_cases()]


def sass_limit(case: Case) -> float | None:
    """The case's limit of instructions per element, or None."""
    if (case.arch, case.M, case.D, case.dtype, case.params) != (SASS_ARCH, 8192, 4096, "bfloat16", "bfloat16"):
        return None
    return SASS_LIMITS.get(case.use, {}).get(case.n * case.r, (None, None))[case.dropout]


def unserved_rows(cases: list[Case]) -> set[tuple]:
    """Rows of the table that no case compiles."""
    return set(TUNED_CONFIGS) - {case.row for case in cases}


def jobs(cases: list[Case]) -> list[tuple[Case, int]]:
    """(case, index of its launch) without launches that compile to the same code as an earlier one."""
    seen, chosen = set(), []
    for case in cases:
        for index, (kernel, kwargs) in enumerate(launches(case)):
            if adds_nothing(case, kernel):
                continue
            key = (case.arch, source(kernel, kwargs).hash(), *options(kwargs, case.arch).values())
            if key not in seen:
                seen.add(key)
                chosen.append((case, index))
    return chosen


def examine(job: tuple[Case, int]) -> dict:
    """Compile one launch; `fails` names the limits it breaks."""
    case, index = job
    kernel, kwargs = launches(case)[index]
    matrix, sass = kernel.__name__ in MATRIX_KERNELS, None
    found = {"kernel": kernel.__name__.removesuffix("_kernel"), **asdict(case), "row": "/".join(map(str, case.row))}
    try:
        compiled = compile_for(kernel, kwargs, case.arch)
    except Exception:  # a pass of Triton's or ptxas, each with an exception of its own
        return {**found, **NOT_COMPILED}
    found |= inspect(compiled, case.arch, kwargs["BLOCK_D" if "reduce" in case.use else "BLOCK_M"] if matrix else 64)
    if case.arch == SASS_ARCH and (matrix or kernel.__name__ == "mask_kernel"):
        sass = round(sass_per_element(compiled, kwargs), 1)
    limits = {
        "spills": found["stack"] > 0,
        "shared memory": found["shared"] > SHARED_LIMITS[case.arch],
        f"no {found['tensor_core']}": matrix and case.dtype != "float32" and not found["tensor_cores"],
        "SASS": sass is not None and sass > (sass_limit(case) or math.inf),
    }
    return {**found, "sass_per_element": sass, "fails": [name for name, short in limits.items() if short]}


HEADER = (
    "kernel", "use", "row", "n·r", "dtype", "params", "dropout", "arch", "registers", "stack", "shared", "tensor cores",
    "SASS per element", "fails",
)  # fmt: skip


def line(found: dict) -> tuple[str, ...]:
    sass = found["sass_per_element"]
    return (
        found["kernel"], found["use"], found["row"], f"{found['n']}·{found['r']}", found["dtype"], found["params"],
        "yes" if found["dropout"] else "no", found["arch"], str(found["registers"]), str(found["stack"]),
        str(found["shared"]), f"{found['tensor_cores']} {found['tensor_core']}", "" if sass is None else f"{sass:.1f}",
        ", ".join(found["fails"]),
    )  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.compile_report", description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="the widest rank of each row in one dtype")
    parser.add_argument("--arch", choices=list(SHARED_LIMITS), help="only this architecture")
    parser.add_argument("--kernel", default="", help="only kernels whose name begins so: shrink, grouped_reduce")
    parser.add_argument("--jobs", type=int, default=min(os.cpu_count() or 1, 16), help="processes (default: cores)")
    parser.add_argument("--json", type=Path, metavar="OUT", help="also write the rows as JSON")
    args = parser.parse_args(argv)
    if triton.knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set, and the interpreter compiles nothing: unset it.")
    cases = quick_cases() if args.quick else [*all_cases(), *odd_cases()]
    cases += compile_grouped.cases(SHARED_LIMITS, args.quick)
    assert not unserved_rows(cases), f"rows nothing compiles: {unserved_rows(cases)}"
    work = jobs([case for case in cases if args.arch in (None, case.arch) and case.use.startswith(args.kernel)])
    with ProcessPoolExecutor(args.jobs, mp_context=get_context("spawn")) as pool:
        found = list(pool.map(examine, work))
        joint = compile_product.cases(args.quick) if "product".startswith(args.kernel) else ()
        wanted = [case for case in joint if args.arch in (None, case["arch"])]
        found += pool.map(compile_product.examine, [(case, SHARED_LIMITS[case["arch"]]) for case in wanted])
    print(" | ".join(HEADER))
    for row in found:
        print(" | ".join(line(row)))
    short = [row for row in found if row["fails"]]
    print(f"{len(found)} kernels compiled with Triton {triton.__version__}, {len(short)} fail.")
    for row in short:
        print("fails: " + " | ".join(line(row)))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        document = {"triton": triton.__version__, "torch": torch.__version__, "rows": found}
        args.json.write_text(json.dumps(document, indent=1) + "\n")
    return 1 if short else 0


if __name__ == "__main__":
    sys.exit(main())
