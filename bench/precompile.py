"""Compiles candidates ahead of their timing, in other processes, into Triton's cache on disk.

A compilation takes most of a second on one core, a timing milliseconds on the GPU. Compiling during another stage's
timing does not disturb it: a graph replay needs no host, and these processes launch nothing.
"""

import contextlib
import multiprocessing
import os
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from unittest import mock

from multilora_fast.kernels.configs import KernelConfig

WORKERS = max(1, min(12, (os.cpu_count() or 1) - 3))


class Precompiler:
    """``start(stage, …)`` compiles the candidates of a stage, ``wait(stage, seconds)`` waits for them. The launch
    compiles what is not ready by then, or has failed."""

    def __init__(self, workers: int = WORKERS):
        self.pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))
        self.begun: dict[object, list[Future]] = {}

    def start(self, stage, configs: list[KernelConfig], shape: tuple[int, int, int, int]) -> None:
        """Start compiling ``configs`` of ``stage``, in order and only once; ``shape`` is (M, D, n, r)."""
        if stage in self.begun:
            return
        self.begun[stage] = []
        with contextlib.suppress(BrokenProcessPool):
            for config in configs:
                self.begun[stage].append(self.pool.submit(compile_uses, stage, config, *shape))

    def wait(self, stage, seconds: float) -> None:
        """Wait until all of ``stage`` are compiled, at most ``seconds``."""
        for future in wait(self.begun.get(stage, ()), timeout=seconds).not_done:
            future.cancel()

    def __enter__(self) -> "Precompiler":
        return self

    def __exit__(self, *_) -> None:
        self.pool.shutdown(wait=False, cancel_futures=True)


def compile_uses(stage, config: KernelConfig, M: int, D: int, n: int, r: int, device: str = "cuda") -> None:
    """Compile what the uses of a stage's kernel launch on (M, D), through their launchers, and launch nothing.

    The sizes are those that are timed, because the split of a sum changes the code.
    """
    from multilora_fast.kernels import launch

    with mock.patch.object(launch, "compile_and_run", compile_only), mock.patch.object(launch, "_COMPILED", {}):
        for use in stage.uses.launches(stage.kernel, stage.uses.empty_inputs(M, D, n, r, device=device)).values():
            with contextlib.suppress(Exception):  # the launch raises it again
                use(config)


class NotRun:
    """Stands for a compiled kernel and launches nothing."""

    def __getitem__(self, blocks: tuple[int, int, int]):
        return lambda *arguments: None


def compile_only(kernel, blocks: tuple[int, int, int], arguments: dict) -> NotRun:
    kernel.warmup(grid=blocks, **arguments)
    return NotRun()
