"""Time candidate tiles on this GPU and print rows for kernels/configs.py.

    python -m bench.tune [--kernel KERNEL] [--size 8192|2048|512|decode] [--seconds N] [--out DIR]

A stage is one row of the table: a kernel and its use (expand adding or writing, with or without a mask), a size class
and a rank class. For every shape of a stage, each candidate is checked against torch in float32, then timed by replays
of a captured graph over inputs that exceed L2. The first candidate is the present row. The stages of "product" compare
the joint kernel with expand and the library's product; those of "grouped" are the kernels of experts. The time budget
is divided over the stages, headline ones first; a stage that runs out of time keeps its best so far and says so, and a
stage with too little time is not started.
"""

import argparse
import itertools
import json
import random
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources

from bench import tune_grouped, tune_uses
from bench.clock import cache_bytes, cold_copies, device_time
from bench.environment import conditions, slug
from bench.precompile import Precompiler
from bench.tune_grouped import GROUPED
from bench.tune_product import JOINT, ProductStage, product_stages, time_product, winning_rows, wins
from bench.tune_uses import DTYPE, KERNELS, correct
from multilora_fast.kernels.configs import KernelConfig, device_of, dtype_class, pick, rank_class, rank_tiles

SHARED_LIMIT = 224 * 1024
TOKENS = {"8192": (8192,), "2048": (2048,), "512": (512,), "decode": (1, 64)}
FEATURES = (4096, 11008)
RANKS = {96: (3, 32), 160: (5, 32), 288: (9, 32), 512: (15, 32)}
HEADLINE = (96, 160)  # 288 and 512 occur where several layers share an input
LEAST_SECONDS = 3.0  # for one stage: inputs, the check of the present row and a few candidates
TOGETHER = 24  # candidates of a stage compiled at once


@dataclass(frozen=True)
class Stage:
    kernel: str
    size: str
    rank: int

    @property
    def key(self) -> tuple:
        return self.kernel, self.size, self.rank

    @property
    def uses(self):
        """The module that draws the inputs of the kernel and launches it."""
        return tune_grouped if self.kernel in GROUPED else tune_uses

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """(M, D) of the inputs, M being the rows of one expert in the kernels of experts."""
        rows, features = (tune_grouped.ROWS, tune_grouped.FEATURES) if self.kernel in GROUPED else (TOKENS, FEATURES)
        return list(itertools.product(rows[self.size], features))


def stages(kernel: str | None = None, size: str | None = None) -> list[Stage]:
    """The kernels' rows, headline rank classes and sizes first, then the experts'. Training never has decode-sized
    inputs, so reduce and masked uses have no decode rows; of an expert's rows it may have as few.
    """
    every = [Stage(k, s, rank) for rank in RANKS for s in TOKENS for k in KERNELS]
    every = [
        stage
        for stage in every
        if not (stage.size == "decode" and (stage.kernel.startswith("reduce") or "dropout" in stage.kernel))
        and (stage.rank in HEADLINE or stage.size == "8192")
    ]
    every += [Stage(k, s, HEADLINE[0]) for s in tune_grouped.ROWS for k in GROUPED]
    return [stage for stage in every if stage.kernel.startswith(kernel or "") and size in (None, stage.size)]


def schedule(kernel: str | None = None, size: str | None = None) -> list[Stage | ProductStage]:
    """All stages in order: for each headline rank the kernels', then the joint kernel's; then the other ranks' and the
    experts'."""
    every = stages(kernel, size)
    joint = product_stages(HEADLINE) if kernel in (None, JOINT) and size is None else []
    experts = [stage for stage in every if stage.kernel in GROUPED]
    kernels = [stage for stage in every if stage.kernel not in GROUPED]
    found: list[Stage | ProductStage] = []
    for rank in RANKS:
        found += [stage for stage in (*kernels, *joint) if stage.rank == rank]
    return found + experts


def shared_bytes(kernel: str, config: KernelConfig, R: int, itemsize: int = 2) -> int:
    """Approximate shared memory of the pipelined tiles and of the weight that expand keeps, in bytes."""
    columns, kernel = sum(rank_tiles(R, config)), kernel.removeprefix("grouped_")
    if kernel.startswith("expand"):
        return (config.num_stages * config.BLOCK_M + config.BLOCK_D) * columns * itemsize
    across, along = (
        (config.BLOCK_D, config.BLOCK_M) if kernel.startswith("reduce") else (config.BLOCK_M, config.BLOCK_D)
    )
    return config.num_stages * along * (across + columns) * itemsize


def candidates(stage: Stage, present: KernelConfig) -> list[KernelConfig]:
    """The present row, then all plausible tiles, shuffled so that a short run still samples them."""
    n, r = RANKS[stage.rank]
    few = stage.size in ("512", "decode")
    rows, columns, programs = (64, 128), (64, 128), (1,)
    packs, steps = (False,), (2, 4, 8)
    if stage.kernel.startswith("shrink"):
        rows, columns, packs = (
            ((16, 32, 64), (32, 64, 128), (True, False)) if few else ((16, 32, 64), (64, 128), (True,))
        )
        steps = (1, 2, 4) if few else (None, 4) if stage.size == "2048" else (None,)
    if stage.kernel.startswith("expand"):
        columns, packs, steps, programs = (32, 64, 128), (False, True) if n * r > 160 else (False,), (4,), (1, 2, 3)
    if stage.kernel.startswith("reduce"):
        rows, programs = (32, 64, 128), (1, 2)
    whole = (256, 512) if n * r > 256 else (256,)
    if stage.kernel in GROUPED:
        rows, columns, steps, whole = (16, 32, 64, 128), (32, 64, 128), (4,), (128,)
        programs = (2, 4) if "expand" in stage.kernel else (1,)
    every = itertools.product(rows, columns, (4, 8), (2, 3, 4, 6), steps, packs, (True,), whole, programs)
    others = [KernelConfig(*values) for values in every]
    others = [c for c in others if c != present and shared_bytes(stage.kernel, c, n * r) <= SHARED_LIMIT]
    random.Random(0).shuffle(others)
    return [present, *others]


@dataclass(frozen=True)
class Work:
    """One shape of a stage: launches over rotating inputs, and the expected result of the first."""

    shape: str
    sets: list
    truth: dict[str, torch.Tensor]


def work_of(stage: Stage) -> list[Work]:
    n, r = RANKS[stage.rank]
    found = []
    experts = tune_grouped.EXPERTS if stage.kernel in GROUPED else 1
    for M, D in stage.shapes:
        touched = experts * DTYPE.itemsize * D * (M + n * r)  # the minimum traffic of one launch
        sets = [stage.uses.draw_inputs(M, D, n, r) for _ in range(cold_copies(touched, cache_bytes()))]
        found.append(Work(f"{M}x{D}", sets, stage.uses.truths(stage.kernel, sets[0])))
    return found


def time_config(stage: Stage, config: KernelConfig, work: list[Work], clock=device_time) -> dict[str, float] | str:
    """Microseconds by use and shape, or why the configuration fails."""
    times = {}
    for case in work:
        rotated = [stage.uses.launches(stage.kernel, inputs) for inputs in case.sets]
        for name, launch in rotated[0].items():
            try:
                if not correct(stage.kernel, launch, config, case.truth[name]):
                    return f"wrong result in {name} at {case.shape}"
            except OutOfResources as error:
                return f"does not fit ({error})"
            except (CompilationError, RuntimeError) as error:  # some tiles fail in some compilers
                return f"does not compile or run ({(str(error).splitlines() or [''])[0][:200]})"
            calls = [lambda use=uses[name]: use(config) for uses in rotated]
            calls *= -(-8 // len(calls))
            times[f"{name} {case.shape}"] = clock(calls, replays=5)
    return times


def present_row(stage: Stage, arch: str) -> KernelConfig:
    kernel, *use = stage.kernel.split()
    n, r = RANKS[stage.rank]
    return pick(kernel, stage.shapes[0][0], n * r, DTYPE, arch, "add" in use, "dropout" in use)


def run_stage(stage: Stage, arch: str, deadline: float) -> dict:
    n, r = RANKS[stage.rank]
    present, work = present_row(stage, arch), work_of(stage)
    timed, left = {}, candidates(stage, present)
    while left and (not timed or time.monotonic() < deadline):
        config = left.pop(0)
        timed[config] = time_config(stage, config, work)
    tried = [{"config": asdict(config), "result": result} for config, result in timed.items()]
    found = {"key": stage.key, "present": asdict(present), "tried": tried, "not_reached": len(left)}
    good = {config: sum(times.values()) for config, times in timed.items() if isinstance(times, dict)}
    if not good:
        print(f"    # no candidate of {stage.key} gives the right result on {arch}: {timed[present]}", flush=True)
        return found
    best = min(good, key=good.get)
    key = (stage.kernel, stage.size, dtype_class(DTYPE), arch, rank_class(n * r))
    was = f"{good[present]:.0f}" if present in good else str(timed[present])
    left_out = f", {len(left)} candidates not reached" if left else ""
    print(f"    ({quoted(key)}): {row_text(best)},  # {good[best]:.0f} us, was {was}{left_out}", flush=True)
    return {**found, "key": key, "best": asdict(best)}


def quoted(key: tuple) -> str:
    return ", ".join(f'"{part}"' if isinstance(part, str) else str(part) for part in key)


def row_text(config: KernelConfig) -> str:
    """The call that builds the configuration: its four sizes, and what differs from the defaults."""
    values = list(asdict(config).values())[:4]
    plain = asdict(KernelConfig(*values))
    named = [f"{name}={value!r}" for name, value in asdict(config).items() if value != plain[name]]
    return f"KernelConfig({', '.join([*map(str, values), *named])})"


def share(seconds: float, stages_left: int) -> float:
    """The seconds of the next stage: an equal share, raised to a useful minimum; 0 if too few are left."""
    if seconds < LEAST_SECONDS:
        return 0.0
    return max(LEAST_SECONDS, seconds / stages_left)


def run_product_stage(stage: ProductStage) -> dict:
    times = time_product(stage, *RANKS[stage.rank])
    for case, result in times.items():
        said = result if isinstance(result, str) else ", ".join(f"{name} {us:.0f} us" for name, us in result.items())
        print(f"    # {stage.direction} {stage.K}->{stage.N}, rank {stage.rank}, {case}: {said}", flush=True)
    return {"key": stage.key, "tried": times, "wins": wins(times)}


def begin(ahead: Precompiler, soon: list[Stage | ProductStage], arch: str) -> None:
    """Start compiling the first candidates of the kernels' stages among ``soon``."""
    for stage in soon:
        if isinstance(stage, Stage):
            shape = *stage.shapes[0], *RANKS[stage.rank]
            ahead.start(stage, candidates(stage, present_row(stage, arch))[:TOGETHER], shape)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.tune", description=__doc__.split("\n")[0])
    parser.add_argument("--kernel", choices=["shrink", "expand", "reduce", JOINT, "grouped"], help="tune only this")
    parser.add_argument("--size", choices=list(TOKENS), help="tune only this size class")
    parser.add_argument("--seconds", type=float, default=480.0, help="total time in seconds (default 480)")
    parser.add_argument("--out", type=Path, default=Path("bench/results") / slug(), help="directory for tune.json")
    args = parser.parse_args(argv)
    todo = schedule(args.kernel, args.size)
    if not todo:
        parser.error(f"--kernel {args.kernel} has no stage of --size {args.size}.")
    if not torch.cuda.is_available():
        print("bench.tune needs a GPU: it times kernels, and torch.cuda.is_available() is False here.", file=sys.stderr)
        return 1
    end = time.monotonic() + args.seconds
    arch, _ = device_of(torch.empty(0, device="cuda"))
    out, about = args.out / "tune.json", {"arch": arch, "dtype": str(DTYPE), **conditions()}
    out.parent.mkdir(parents=True, exist_ok=True)
    results, won = [], {}
    with Precompiler() as ahead:
        begin(ahead, todo[:2], arch)
        ahead.wait(todo[0], min(30.0, args.seconds / 6))  # start the worker processes
        for index, stage in enumerate(todo):
            now = time.monotonic()
            seconds = share(end - now, len(todo) - index)
            if not seconds:
                break
            begin(ahead, todo[index : index + 3], arch)
            if isinstance(stage, ProductStage):
                results.append(run_product_stage(stage))
                won[stage] = results[-1]["wins"]
            else:
                ahead.wait(stage, seconds / 2)
                results.append(run_stage(stage, arch, now + seconds))
            document = {**about, "stages": results, "not_begun": [stage.key for stage in todo[index + 1 :]]}
            out.write_text(json.dumps({**document, "product_wins": winning_rows(won, HEADLINE)}, indent=1) + "\n")
    for way, rows in winning_rows(won, HEADLINE).items():
        if won:
            print(f'    ("{arch}", "{way}"): {rows},', flush=True)
    print(f"{len(results)} of {len(todo)} stages, written to {out}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
