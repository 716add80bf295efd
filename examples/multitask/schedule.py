"""Schedule the missing runs: one after the other, or several at once on one device."""

import gc
import itertools
import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path

from examples.multitask.execute import Bench, execute, write_record
from examples.multitask.plan import Run, Study, next_run, validation_score

Load = Callable[[], Bench]


def run_missing(
    folder: Path, study: Study, bench: Bench, done: dict[str, dict], limit: int | None = None,
    minutes: float | None = None,
) -> None:  # fmt: skip
    """Run what is not in ``done``, at most ``limit`` runs. Each is added to ``done`` and written to ``folder``. No run
    begins if the longest run so far would exceed what is left of ``minutes``."""
    clock = Clock(minutes)
    for _ in itertools.count() if limit is None else range(limit):
        run = next_run(study, done)
        if run is None or not clock.has_time():
            return
        print(f"{time.strftime('%H:%M:%S')}  {run.name} ...", flush=True)
        _keep(folder, run, execute(run, study, bench), done, clock)
        gc.collect()  # models are reference cycles


def run_side_by_side(
    folder: Path, study: Study, load: Load, done: dict[str, dict], limit: int | None = None,
    minutes: float | None = None, *, workers: int,
) -> None:  # fmt: skip
    """:func:`run_missing` in ``workers`` processes, each with its own ``load()``. ``load`` must be picklable."""
    clock, left = Clock(minutes), itertools.count() if limit is None else iter(range(limit))
    context = multiprocessing.get_context("forkserver")  # imports the libraries once, and leaves CUDA to the workers
    context.set_forkserver_preload(["examples.multitask.loading"])
    with ProcessPoolExecutor(workers, context, initializer=_begin, initargs=(study, load)) as pool:
        running: dict[Future, Run] = {}
        while True:
            names = {run.name for run in running.values()}
            run = next_run(study, done, names) if len(running) < workers and clock.has_time() else None
            if run is not None and next(left, None) is not None:
                print(f"{time.strftime('%H:%M:%S')}  {run.name} ...", flush=True)
                running[pool.submit(_execute, run)] = run
                continue
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                _keep(folder, running.pop(future), future.result(), done, clock)


class Clock:
    """The time left, and the longest run so far."""

    def __init__(self, minutes: float | None):
        self.end = None if minutes is None else time.monotonic() + 60 * minutes
        self.longest = 0.0

    def has_time(self) -> bool:
        return self.end is None or time.monotonic() + self.longest < self.end


def _keep(folder: Path, run: Run, record: dict, done: dict[str, dict], clock: Clock) -> None:
    write_record(folder / f"{run.name}.json", record)
    done[run.name] = record
    clock.longest = max(clock.longest, record["seconds"])
    said = f", validation {validation_score(record)[0]:.3f}" if "validation" in record else ""
    print(f"{time.strftime('%H:%M:%S')}  {run.name}: {record['seconds']:.0f} s{said}", flush=True)


def _begin(study: Study, load: Load) -> None:
    global _at_work
    _at_work = (study, load())


def _execute(run: Run) -> dict:
    study, bench = _at_work
    record = execute(run, study, bench)
    gc.collect()
    return record
