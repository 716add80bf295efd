"""The order of the GPU profile's runs, on a made-up clock: the main comparison first, no idle worker, nothing late."""

import dataclasses
import heapq
import multiprocessing
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from examples.multitask import schedule, workers
from examples.multitask.plan import MAIN, Run, Study, is_swept, next_run
from examples.multitask.profile import gpu
from examples.multitask.schedule import Clock
from examples.multitask.steps import CannotCapture

STUDY = gpu("bfloat16")


def record(run: Run, study: Study, seconds: float) -> dict:
    """Of a method whose best rate is the middle one of its grid."""
    grid = sorted(study.rates.get(run.method, ()))
    right = 0.6 if run.rate is not None and run.rate == grid[len(grid) // 2] else 0.5
    found = {"validation": {"BoolQ": {"accuracy": right, "nll": 1.0}}}
    return found | {"method": run.method, "learning_rate": run.rate, "seed": run.seed, "seconds": seconds}


def simulate(study: Study, *, workers: int, minutes: float, done: dict | None = None, took=None):
    """Begin and end of every run, as (begin, end, name, runs at once). A sweep's run takes 20 s, a tested one 30 s."""
    took = took or (lambda run: 30.0 if study.is_tested(run.seed) and run.rate else 20.0 if run.rate else 10.0)
    now, done = 0.0, {} if done is None else done
    clock = Clock(study, minutes, lambda: now)
    running: list[tuple[float, str, Run]] = []
    begun = []
    while True:
        names = {name for _, name, _ in running}
        run = clock.begins(done, names) if len(running) < workers else None
        if run is not None:
            heapq.heappush(running, (now + took(run), run.name, run))
            begun.append((now, now + took(run), run.name, len(running)))
            continue
        if not running:
            return begun
        now, name, run = heapq.heappop(running)
        done[name] = record(run, study, took(run))


ORDER = """\
  0 to  10  zero-shot
  0 to  20  lora-lr2e-04-seed0
  0 to  20  lora-lr5e-04-seed0
  0 to  20  lora-lr1e-03-seed0
 10 to  30  multilora-3-lr1e-03-seed0
 20 to  40  multilora-3-lr2e-03-seed0
 20 to  40  multilora-3-lr5e-03-seed0
 20 to  50  lora-lr5e-04-seed1
 30 to  60  lora-lr5e-04-seed2
 40 to  70  lora-lr5e-04-seed3
 40 to  70  multilora-3-lr2e-03-seed1
 50 to  80  multilora-3-lr2e-03-seed2
 60 to  90  multilora-3-lr2e-03-seed3
 70 to 100  lora-lr5e-04-seed4
 70 to 100  multilora-3-lr2e-03-seed4
 80 to 110  lora-lr5e-04-seed5
 90 to 120  multilora-3-lr2e-03-seed5
100 to 120  lora-160-lr2e-04-seed0
100 to 120  lora-160-lr5e-04-seed0
110 to 130  lora-160-lr1e-03-seed0
"""


def test_the_order_of_the_first_two_minutes():
    begun = simulate(STUDY, workers=4, minutes=4)
    said = "".join(f"{begin:3.0f} to {end:3.0f}  {name}\n" for begin, end, name, _ in begun if begin <= 110)
    print(said)
    assert said == ORDER


@pytest.mark.parametrize("workers", [1, 2, 8])
def test_no_worker_is_idle_and_nothing_ends_late(workers):
    done: dict[str, dict] = {}
    begun = simulate(STUDY, workers=workers, minutes=4, done=done)
    assert max(end for _, end, _, _ in begun) <= 240
    for moment in range(0, 200, 10):  # until a run would end late
        assert sum(begin <= moment < end for begin, end, _, _ in begun) == workers
    main = [(begin, name) for begin, _, name, _ in begun if name.startswith(tuple(f"{m}-lr" for m in MAIN))]
    if workers > 1:  # three rates and five seeds of each
        assert len(main) == 16
    assert all(name == "zero-shot" or (begin, name) in main for begin, _, name, _ in begun[:7])
    if workers == 8:
        assert main[-1][0] <= 60


def test_a_seed_waits_for_its_sweep_even_beyond_the_grid():
    done: dict[str, dict] = {}
    simulate(STUDY, workers=6, minutes=1.0, done=done)
    done[Run("lora", 1e-3).name]["validation"]["BoolQ"]["accuracy"] = 0.9  # the best is at the edge
    assert not is_swept(STUDY, "lora", done)
    found = next_run(STUDY, done)
    assert (found.method, found.rate, found.seed) == ("lora", 2e-3, 0)
    assert next_run(STUDY, done, {found.name}).method == "multilora-3"


def test_a_run_begins_only_if_it_can_end():
    assert simulate(STUDY, workers=4, minutes=0.99) == []  # shorter than the first guess
    assert len(simulate(dataclasses.replace(STUDY, guess=10.0), workers=1, minutes=0.5)) == 2
    done: dict[str, dict] = {}
    simulate(STUDY, workers=6, minutes=1.0, done=done)
    done = {name: one for name, one in done.items() if one["seed"] == 0}
    clock = Clock(STUDY, 0.4, lambda: 0.0)  # 24 s, where a run of the sweep took 20
    swept, tested = Run("lora-160", 2e-4), Run("lora", 5e-4, 1)
    assert clock.expected(swept, done) == clock.expected(tested, done) == 20.0
    assert clock.begins(done) == tested
    done[Run("multilora-3", 2e-3, 1).name] = record(Run("multilora-3", 2e-3, 1), STUDY, 30.0)
    assert clock.expected(tested, done) == 30.0
    assert clock.expected(swept, done) == 20.0
    assert clock.begins(done) is None


def side_by_side(folder, monkeypatch, outcome, **options) -> dict:
    """The records of scheduled runs, whose outcome is a record, or an exception that is raised."""

    def executed(run, *_):
        found = outcome(run)
        if isinstance(found, BaseException):
            raise found
        return found

    monkeypatch.setattr(schedule, "_execute", executed)
    done: dict[str, dict] = {}
    try:
        with ThreadPoolExecutor(3) as pool:
            schedule.run_side_by_side(folder, STUDY, None, done, workers=3, pool=pool, **options)
    finally:
        assert {path.stem for path in folder.glob("*.json")} == done.keys()
    return done


def test_a_run_without_memory_does_not_stop_the_others(tmp_path, monkeypatch):
    def outcome(run):
        return torch.OutOfMemoryError("CUDA out of memory.\nMore") if run.method == "lora" else record(run, STUDY, 1.0)

    with pytest.raises(
        ValueError, match=r"3 runs failed, the first of them lora-.*OutOfMemoryError: CUDA out of memory.$"
    ):
        side_by_side(tmp_path, monkeypatch, outcome, limit=12)
    assert len(list(tmp_path.iterdir())) == 9


def test_a_method_that_cannot_be_captured_does_not_stop_those_that_can(tmp_path, monkeypatch):
    def outcome(run):
        cannot = CannotCapture("a training step cannot be captured (why): give --eager.")
        return cannot if run.method == "multilora-3" else record(run, STUDY, 1.0) | {"replayed": 490}

    with pytest.raises(ValueError, match=r"^3 runs failed, .*multilora-3.*--eager"):
        side_by_side(tmp_path, monkeypatch, outcome, limit=14)
    assert len(list(tmp_path.iterdir())) == 11


@pytest.mark.parametrize("error", [CannotCapture("no: give --eager."), ValueError("--prepared"), KeyboardInterrupt()])
def test_other_errors_end_the_study_and_keep_what_is_finished(error, tmp_path, monkeypatch):
    def outcome(run):
        return error if run.method == "multilora-3" else record(run, STUDY, 1.0)

    with pytest.raises(type(error)):
        side_by_side(tmp_path, monkeypatch, outcome)
    assert (tmp_path / "zero-shot.json").exists()


def test_workers_are_spawned_and_ended_at_once():
    with workers.started(2):
        made = multiprocessing.active_children()
        assert {type(process).__name__ for process in made} == {"SpawnProcess"}
        workers.ended()
    assert not any(process.is_alive() for process in made)
