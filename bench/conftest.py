import gc
import math
import os
import time
from collections.abc import Callable

import pytest
import torch

from bench.environment import conditions

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
THREADS = 2


def pytest_addoption(parser):
    parser.addoption("--tiny", action="store_true", help="tiny shapes, to check that every bench runs")
    parser.addoption(
        "--seconds",
        type=float,
        help="start no case later than this many seconds after the start; the JSON is written at the end",
    )
    parser.addoption(
        "--step-rounds",
        type=int,
        default=4,
        help="timed rounds of the training step (default 4); use more on a noisy machine",
    )


def pytest_configure(config):
    torch.set_num_threads(THREADS)
    config.bench_end = time.monotonic() + (config.getoption("--seconds") or math.inf)


def pytest_runtest_setup(item):
    if time.monotonic() > item.config.bench_end:
        pytest.skip("out of time (--seconds)")


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info.update(conditions())


@pytest.fixture(autouse=True)
def _start_anew():
    """Free the models of the previous case, which form reference cycles, and reset torch.compile: after eight versions
    of one function it silently runs the function eagerly.
    """
    gc.collect()
    torch.compiler.reset()


@pytest.fixture
def tiny(request) -> bool:
    return request.config.getoption("--tiny")


@pytest.fixture
def seconds_left(request) -> Callable[[], float]:
    """Seconds left of ``--seconds``."""
    return lambda: request.config.bench_end - time.monotonic()


@pytest.fixture
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
