"""Runs of ``multilora-fast train`` in processes of their own."""

import os
import socket
from multiprocessing import get_context

import torch

from multilora_fast.training.config import TrainSettings

TIMEOUT = 120  # seconds; more is a hang
FORKS = get_context("forkserver")  # loads the libraries once, and forks each run from them
FORKS.set_forkserver_preload(["multilora_fast.training.run"])


def work(settings: TrainSettings, environment: dict[str, str]) -> None:
    """A run in a process of its own, which says nothing."""
    os.environ.update(environment)
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    torch.set_num_threads(1)
    from multilora_fast.training.run import run

    run(settings)


def start(settings: TrainSettings, **environment: str):
    process = FORKS.Process(target=work, args=(settings, environment))
    process.start()
    return process


def finished(process) -> int:
    """The exit code."""
    process.join(TIMEOUT)
    hangs = process.is_alive()
    process.kill()
    assert not hangs, f"the run hangs: it did not end in {TIMEOUT} s"
    return process.exitcode


def group(count: int) -> list[dict[str, str]]:
    """The environments of ``count`` processes that find each other."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]


def pair(settings: TrainSettings) -> list:
    """Two processes that train together over gloo."""
    return [start(settings, **one, ACCELERATE_USE_CPU="true") for one in group(2)]
