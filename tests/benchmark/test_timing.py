"""Candidates of the benches: failures, clocks, one step at a time, and the costs in the JSON."""

import weakref
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from bench.candidates import ADDMM, LORA_COMPILED, OURS_COMPILED, OURS_TORCH, layers
from bench.step_alone import LEAST_SECONDS, measure_alone
from bench.step_models import builders_alone, decoder
from bench.timing import add_clocks, device_seconds, drop_failing, enqueue_seconds
from multilora_fast.benchmark.layer import FROZEN
from multilora_fast.benchmark.timing import Timed
from multilora_fast.memory.methods import LORA, OURS, REFERENCE


def broken():
    raise RuntimeError("no compiler here\nand more")


def timed(**runs) -> dict[str, Timed]:
    return {name: Timed(lambda: None, lambda _, run=run: run()) for name, run in runs.items()}


def test_a_peer_that_does_not_run_is_named_and_left_out():
    found = timed(ours=lambda: None, peer=broken)
    assert drop_failing(found, ("ours",)) == {"peer": "RuntimeError: no compiler here"}
    assert list(found) == ["ours"]
    with pytest.raises(RuntimeError, match="no compiler"):
        drop_failing(timed(ours=broken), ("ours",))


def test_the_clocks_get_every_call_of_a_candidate_and_a_failure_costs_no_other():
    ran = []
    first, second = (timed(ours=lambda i=i: ran.append(i), peer=broken) for i in range(2))

    def clock(calls):
        for call in calls:
            call()
        return 250.0

    found, failed = device_seconds({name: [first[name], second[name]] for name in first}, clock)
    assert found == {"ours": pytest.approx(250e-6)}
    assert ran == [0, 1]
    assert failed == {"peer": "RuntimeError: no compiler here"}
    found, failed = enqueue_seconds(first, lambda call: (call(), 40.0)[1])
    assert (found, set(failed)) == ({"ours": pytest.approx(40e-6)}, {"peer"})


def test_own_costs_are_told_apart_by_clock():
    info = {}
    waited, device = {FROZEN: 10.0, LORA: 14.0, OURS: 16.0}, {FROZEN: 8.0, LORA: 12.0, OURS: 10.0}
    add_clocks(info, waited, device=(device, {ADDMM: "why"}), host=({FROZEN: 1.0, OURS: 2.0}, {}))
    assert info["device"] == device
    assert info["failed"] == {f"{ADDMM}, device": "why"}
    assert info["own cost"] == {"wall clock": {OURS: 1.5}, "device": {OURS: 0.5}, "host": {}}


def test_the_layer_has_every_row():
    found = layers(32, 48, 2, 4, 0.0, torch.float32, "cpu", (LORA_COMPILED, OURS_COMPILED))
    assert {FROZEN, LORA, OURS, REFERENCE, ADDMM} <= set(found)
    assert {LORA_COMPILED, OURS_COMPILED} <= set(found) or not torch.cuda.is_available()
    assert ADDMM not in layers(32, 48, 2, 4, 0.1, torch.float32, "cpu", ())


class Benchmark:
    """Stands for pytest-benchmark's fixture."""

    disabled = False

    def pedantic(self, step, rounds, warmup_rounds):
        for _ in range(rounds):
            step()
        self.stats = SimpleNamespace(stats=SimpleNamespace(median=0.5))


def test_steps_are_measured_one_at_a_time_and_freed():
    _, base = decoder(True, "cpu")
    tokens, alive, built = torch.randint(64, (2, 8)), [], []
    left = iter([LEAST_SECONDS + 1] * 2 + [0.0] * 9)

    def watched(name, build):
        def made():
            alive.append(sum(isinstance(m(), nn.Module) for _, m in built))
            model = build()
            built.append((name, weakref.ref(model)))
            return model

        return made

    builders = {name: watched(name, build) for name, build in builders_alone(base, 2, 2, 0.1, False).items()}
    builders["broken"] = broken
    order = [FROZEN, LORA, OURS, "broken", OURS_TORCH, REFERENCE]
    builders = {name: builders[name] for name in order}
    captured = lambda calls: (calls[0](), 1000.0)[1]  # noqa: E731
    found = measure_alone(Benchmark(), builders, tokens, 2, lambda: next(left), clock=captured)
    assert set(alive) == {0}
    assert [name for name, _ in built] == [FROZEN, FROZEN, LORA, LORA, OURS, OURS, OURS_TORCH]
    assert set(found.median) == {FROZEN, LORA, OURS, OURS_TORCH} == set(found.memory)
    assert found.median[OURS] == 0.5
    assert found.device == dict.fromkeys((FROZEN, LORA, OURS), pytest.approx(1e-3))
    assert found.failed == {"broken": "RuntimeError: no compiler here"}
    assert found.cut == [REFERENCE]
    assert found.memory[OURS]["saved"] > 0
    with pytest.raises(RuntimeError, match="no compiler"):
        measure_alone(Benchmark(), {OURS: broken}, tokens, 2, lambda: 99.0)
