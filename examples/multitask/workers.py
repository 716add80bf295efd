"""Processes that execute runs side by side. This module imports nothing large, so that they start early."""

import importlib
import multiprocessing
import signal
from concurrent.futures import ProcessPoolExecutor

IMPORTED = ("examples.multitask.loading", "peft", "transformers.models.llama.modeling_llama")


def started(count: int) -> ProcessPoolExecutor:
    """``count`` processes, which import the libraries while the caller goes on.

    They are spawned: importing torch.utils.benchmark asks for CUDA devices, after which a fork cannot use CUDA.
    """
    pool = ProcessPoolExecutor(count, multiprocessing.get_context("spawn"), initializer=_begin)
    for _ in range(count):
        pool.submit(_import)
    return pool


def ended() -> None:
    """End the processes at once."""
    for worker in multiprocessing.active_children():
        worker.terminate()


def _begin() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the scheduler ends them


def _import() -> None:
    for name in IMPORTED:
        importlib.import_module(name)
