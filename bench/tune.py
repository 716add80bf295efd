"""Times candidate tiles on this GPU and prints rows to paste into kernels/configs.py.

    python -m bench.tune [--kernel shrink|expand|reduce] [--size tokens|decode] [--seconds N] [--out DIR]

A stage is one kernel, size class and rank class. Each candidate is checked against torch in float32 before it is timed
(CUDA events, L2 emptied between runs, median), over the uses and shapes of its stage; the present row is the first
candidate. The seconds are shared out over the stages; a stage out of time keeps the best so far and says so.
"""

import argparse
import itertools
import json
import math
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources

from bench.environment import conditions, slug
from multilora_fast.kernels.configs import KernelConfig, device_of, dtype_class, pick, rank_class, rank_tiles
from multilora_fast.kernels.dropout import drop_threshold, dropout_mask
from multilora_fast.kernels.expand import expand
from multilora_fast.kernels.reduce import reduce, reduce_scaled
from multilora_fast.kernels.shrink import shrink

P = 0.05
SHARED_LIMIT = 224 * 1024
TOKENS = {"tokens": (8192, 2048), "decode": (1, 64)}
FEATURES = (4096, 11008)
RANKS = {64: (2, 32), 128: (3, 32), 288: (5, 32), 512: (15, 32)}
DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Stage:
    kernel: str
    size: str
    rank: int

    @property
    def key(self) -> tuple:
        return self.kernel, self.size, self.rank


def stages(kernel: str | None = None, size: str | None = None) -> list[Stage]:
    """The headline rank classes first. reduce has no decode rows: nothing trains on a handful of tokens. Rank 512 is
    several layers at once in training, for shrink and reduce alone: expand takes any rank in slices.
    """
    every = (Stage(k, s, rank) for rank in (128, 288, 512, 64) for k in ("shrink", "expand", "reduce") for s in TOKENS)
    return [
        stage
        for stage in every
        if (stage.kernel, stage.size) != ("reduce", "decode")
        and (stage.rank < 512 or (stage.size == "tokens" and stage.kernel != "expand"))
        and kernel in (None, stage.kernel)
        and size in (None, stage.size)
    ]


def shared_bytes(kernel: str, config: KernelConfig, R: int, itemsize: int = 2) -> int:
    """Roughly the shared memory of the pipelined tiles."""
    columns = 32 if kernel == "expand" else sum(rank_tiles(R, config))
    across, along = (config.BLOCK_D, config.BLOCK_M) if kernel == "reduce" else (config.BLOCK_M, config.BLOCK_D)
    tiles = (across + along) * columns if kernel == "expand" else along * (across + columns)
    return config.num_stages * tiles * itemsize


def candidates(stage: Stage, present: KernelConfig) -> list[KernelConfig]:
    """The present row, then every tile worth timing, shuffled so that a short run still samples them all."""
    n, r = RANKS[stage.rank]
    rows = (64, 128) if stage.size == "tokens" else (64,)
    columns = (32, 64, 128)
    packs = (True, False) if stage.kernel != "reduce" else (False,)
    steps = (4,) if stage.size == "tokens" else (1, 2, 4)
    if stage.kernel == "expand":
        columns, steps = (64, 128, 256), (4,)
    if stage.kernel == "reduce":
        rows, columns, steps = (32, 64, 128), (64, 128), (2, 4, 8)
    whole = (256, 512) if n * r > 256 else (256,)
    product = itertools.product(rows, columns, (4, 8), (2, 3, 4), steps, packs, (True,), whole)
    others = [KernelConfig(*values) for values in product]
    others = [c for c in others if c != present and shared_bytes(stage.kernel, c, n * r) <= SHARED_LIMIT]
    random.Random(0).shuffle(others)
    return [present, *others]


Use = tuple[str, Callable[[KernelConfig], torch.Tensor], torch.Tensor]


def uses(kernel: str, M: int, D: int, n: int, r: int, dtype=DTYPE, device="cuda") -> Iterator[Use]:
    """(name, launch, result of torch in float32) for each use of a kernel on one shape."""
    make = lambda *size: torch.randn(*size, device=device, dtype=dtype)  # noqa: E731
    big, h, scale, seed = make(M, D), make(M, n * r), make(n, D), torch.tensor([1], device=device)
    a, b = make(n, r, D) / math.sqrt(D), make(n, D, r) / math.sqrt(r)
    keep = dropout_mask(seed, M, D, P) * (65536 / (65536 - drop_threshold(P)))
    flat, dropped = a.reshape(n * r, D).float(), big.float() * keep
    packed = (scale[:, :, None].float() * b.float()).permute(1, 0, 2).reshape(D, n * r)
    bt = b.transpose(1, 2)
    if kernel == "shrink":
        yield "forward", lambda c: shrink(big, a, config=c), big.float() @ flat.T
        yield "forward, dropout", lambda c: shrink(big, a, seed=seed, p=P, config=c), dropped @ flat.T
        yield "backward", lambda c: shrink(big, bt, scale, config=c), big.float() @ packed
    elif kernel == "expand":
        y = make(M, D)
        ran = lambda *args, **kwargs: (expand(y, *args, **kwargs), y)[1]  # noqa: E731
        yield "forward", lambda c: ran(h, bt, scale, config=c), h.float() @ packed.T
        yield "backward, dropout", lambda c: ran(h, a, seed=seed, p=P, config=c), keep * (h.float() @ flat)
    else:
        summed = (big.float().T @ h.float()).reshape(D, n, r).permute(1, 0, 2)
        yield "forward", lambda c: reduce_scaled(h, big, bt, scale, config=c)[0], scale[:, :, None] * summed
        backward = (h.float().T @ dropped).reshape(n, r, D)
        yield "backward, dropout", lambda c: reduce(h, big, n, dtype, seed, P, config=c), backward


def correct(kernel: str, launch: Callable, config: KernelConfig, truth: torch.Tensor) -> bool:
    """Whether one launch is within 1 % of float32; expand adds to what its target holds, which is zero then."""
    if kernel == "expand":
        launch(config).zero_()
    return bool((launch(config).float() - truth).norm() <= 0.01 * truth.norm())


def microseconds(launch: Callable[[], object], runs: int = 15) -> float:
    """The median over `runs`, each with an L2 that holds none of its inputs."""
    flush = torch.empty(64 * 2**20, dtype=torch.int32, device="cuda")
    times = []
    for _ in range(runs):
        flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        launch()
        end.record()
        end.synchronize()
        times.append(1000 * start.elapsed_time(end))
    return statistics.median(times)


def time_config(stage: Stage, config: KernelConfig, work: list[tuple[str, Use]]) -> dict[str, float] | str:
    """Microseconds by use and shape, or why the configuration does not count."""
    times = {}
    for shape, (name, launch, truth) in work:
        try:
            if not correct(stage.kernel, launch, config, truth):
                return f"wrong result in {name} at {shape}"
        except OutOfResources as error:
            return f"does not fit ({error})"
        except (CompilationError, RuntimeError) as error:  # some tiles are beyond some compilers
            return f"does not compile or run ({str(error).splitlines()[0][:200]})"
        times[f"{name} {shape}"] = microseconds(lambda launch=launch: launch(config))
    return times


def run_stage(stage: Stage, arch: str, deadline: float) -> dict:
    n, r = RANKS[stage.rank]
    present = pick(stage.kernel, TOKENS[stage.size][0], n * r, DTYPE, arch)
    work = [(f"{M}x{D}", use) for M in TOKENS[stage.size] for D in FEATURES for use in uses(stage.kernel, M, D, n, r)]
    timed, left = {}, candidates(stage, present)
    while left and (not timed or time.monotonic() < deadline):
        config = left.pop(0)
        timed[config] = time_config(stage, config, work)
    good = {config: sum(times.values()) for config, times in timed.items() if isinstance(times, dict)}
    if not good:
        raise SystemExit(f"No candidate of {stage.key} gives the right result on {arch}: {timed}")
    best = min(good, key=good.get)
    key = (stage.kernel, stage.size, dtype_class(DTYPE), arch, rank_class(n * r))
    was = f"{good[present]:.0f}" if present in good else str(timed[present])
    left_out = f", {len(left)} candidates not reached" if left else ""
    quoted = ", ".join(f'"{part}"' if isinstance(part, str) else str(part) for part in key)
    print(f"    ({quoted}): {best},  # {good[best]:.0f} us, was {was}{left_out}", flush=True)
    tried = [{"config": asdict(config), "result": result} for config, result in timed.items()]
    return {"key": key, "best": asdict(best), "present": asdict(present), "tried": tried, "not_reached": len(left)}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.tune", description=__doc__.split("\n")[0])
    parser.add_argument("--kernel", choices=["shrink", "expand", "reduce"], help="only this kernel")
    parser.add_argument("--size", choices=list(TOKENS), help="only this size class")
    parser.add_argument("--seconds", type=float, default=480.0, help="time for all stages together (default 480)")
    parser.add_argument("--out", type=Path, default=Path("bench/results") / slug(), help="folder for tune.json")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("bench.tune needs a GPU: it times kernels, and torch.cuda.is_available() is False here.", file=sys.stderr)
        return 1
    arch, _ = device_of(torch.empty(0, device="cuda"))
    todo, results, end = stages(args.kernel, args.size), [], time.monotonic() + args.seconds
    out, about = args.out / "tune.json", {"arch": arch, "dtype": str(DTYPE), **conditions()}
    out.parent.mkdir(parents=True, exist_ok=True)
    for index, stage in enumerate(todo):
        now = time.monotonic()
        results.append(run_stage(stage, arch, now + (end - now) / (len(todo) - index)))
        out.write_text(json.dumps({**about, "stages": results}, indent=1) + "\n")
    print(f"{len(results)} stages, written to {out}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
