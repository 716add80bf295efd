"""Schedule the missing runs: one after the other, or several at once on one device."""

import gc
import itertools
import time
from collections.abc import Callable, Collection
from concurrent.futures import FIRST_COMPLETED, Executor, Future, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import torch

from examples.multitask.execute import Bench, execute, write_record
from examples.multitask.plan import Results, Run, Study, next_run, validation_score
from examples.multitask.steps import CannotCapture
from multilora_fast.console import quiet

Load = Callable[[], Bench]


class Clock:
    """How long a run will take, and whether it ends within ``minutes`` of now, if a limit is given."""

    def __init__(self, study: Study, minutes: float | None, now: Callable[[], float] = time.monotonic):
        self.study, self.now = study, now
        self.end = None if minutes is None else now() + 60 * minutes

    def expected(self, run: Run, done: Results) -> float:
        """The longest finished run like ``run``: of its method and tested as it is, else tested as it is, else any;
        without one the study's guess."""
        tested = self.study.is_tested
        trained = [record for record in done.values() if record["learning_rate"] is not None]
        alike = [record for record in trained if tested(record["seed"]) == tested(run.seed)]
        same = [record for record in alike if record["method"] == run.method]
        return max((record["seconds"] for record in same or alike or trained), default=self.study.guess)

    def begins(self, done: Results, running: Collection[str] = ()) -> Run | None:
        """The next run to begin, or None if there is none or it would not end in time."""
        run = next_run(self.study, done, running)
        late = run is not None and self.end is not None and self.now() + self.expected(run, done) > self.end
        return None if late else run


def run_missing(
    folder: Path, study: Study, bench: Bench, done: dict[str, dict], limit: int | None = None,
    minutes: float | None = None,
) -> None:  # fmt: skip
    """Run what is not in ``done``, at most ``limit`` runs. Each is added to ``done`` and written to ``folder``. No run
    begins that is expected to exceed ``minutes``."""
    clock = Clock(study, minutes)
    for _ in itertools.count() if limit is None else range(limit):
        run = clock.begins(done)
        if run is None:
            return
        _say(f"{run.name} ...")
        _keep(folder, run, execute(run, study, bench), done)
        gc.collect()  # models are reference cycles


def run_side_by_side(
    folder: Path, study: Study, load: Load, done: dict[str, dict], limit: int | None = None,
    minutes: float | None = None, *, workers: int, pool: Executor,
) -> None:  # fmt: skip
    """:func:`run_missing` in the ``workers`` processes of ``pool``, each with its own ``load()``. ``load`` must be
    picklable. A run that fails, such as for lack of memory, does not stop the others. Nor does one that cannot be
    captured, once another was.

    Raises:
        ValueError: a run failed, or a worker was killed.
    """
    clock, left = Clock(study, minutes), itertools.count() if limit is None else iter(range(limit))
    running: dict[Future, Run] = {}
    failed: dict[str, str] = {}
    while True:
        names = {run.name for run in running.values()} | failed.keys()
        run = clock.begins(done, names) if len(running) < workers else None
        if run is not None and next(left, None) is not None:
            _say(f"{run.name} ...")
            running[pool.submit(_execute, run, study, load)] = run
            continue
        if not running:
            break
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            run = running.pop(future)
            try:
                _keep(folder, run, future.result(), done)
            except BrokenProcessPool:
                raise ValueError("a worker was killed; finished runs are kept.") from None
            except (RuntimeError, CannotCapture) as error:  # CUDA's errors are RuntimeErrors
                if isinstance(error, CannotCapture) and not any(one.get("replayed") for one in done.values()):
                    raise  # as all others would
                failed[run.name] = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
                _say(f"{run.name} failed, {failed[run.name]}")
    for name, reason in failed.items():
        raise ValueError(f"{len(failed)} runs failed, the first of them {name}, {reason}")


def _say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')}  {text}", flush=True)


def _keep(folder: Path, run: Run, record: dict, done: dict[str, dict]) -> None:
    write_record(folder / f"{run.name}.json", record)
    done[run.name] = record
    said = f", validation {validation_score(record)[0]:.3f}" if "validation" in record else ""
    _say(f"{run.name}: {record['seconds']:.0f} s{said}")


_bench: Bench | None = None  # of a worker


def _execute(run: Run, study: Study, load: Load) -> dict:
    global _bench
    if _bench is None:
        quiet()
        _bench = load()
    record = execute(run, study, _bench)
    gc.collect()
    torch.cuda.empty_cache()  # for the other workers
    return record
