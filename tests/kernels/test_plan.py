"""What a plan would launch is what Triton's JIT would, and where nothing is replayed."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from triton import knobs

from bench.simulated import Compiled, simulated_gpu
from multilora_fast.kernels import plan
from multilora_fast.kernels.launch import launch, multiply
from multilora_fast.kernels.plan import record

ROOT = Path(__file__).parents[2]


def test_every_launch_of_the_quick_compile_report_and_of_drawn_tensors_is_the_jits():
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "tests/support/plan_keys.py"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]


class Kernel:
    """A kernel of one tensor."""

    arg_names = ("x_ptr", "size")

    @staticmethod
    def fn(x_ptr, size):
        pass


def launched(compiled=None):
    """A function that launches, and the simulation it runs in."""
    ran = []
    compiled = compiled or Compiled(lambda *arguments: ran.append(arguments[9:]))

    def function(x):
        launch(x, Kernel, (1, 1), x_ptr=x, size=x.numel())
        return (x,)

    return function, ran, simulated_gpu(lambda *_: compiled)


def test_a_plan_runs_with_the_address_of_another_tensor():
    function, ran, simulated = launched()
    x, y = torch.randn(4), torch.randn(4)
    with simulated:
        outputs, made = record(function, (x,))
        assert outputs[0] is x
        assert made.replay(y) == (y,)
    assert ran == [(y.data_ptr(), 4)]


def test_scratch_memory_is_no_plan():
    compiled = Compiled(lambda *_: None)
    compiled.metadata = SimpleNamespace(global_scratch_size=128, profile_scratch_size=0)
    function, _, simulated = launched(compiled)
    with simulated:
        assert record(function, (torch.randn(4),))[1] is None


def test_another_operation_than_a_launch_is_no_plan():
    function, _, simulated = launched()
    with simulated:
        assert record(lambda x: function(x + 1), (torch.randn(4),))[1] is None
        assert record(lambda x: function(x.view(2, 2)), (torch.randn(4),))[1] is not None


def test_one_tensor_in_two_places_is_no_plan():
    function, _, simulated = launched()
    x = torch.randn(4)
    with simulated:
        assert record(lambda a, b: function(a), (x, x))[1] is None
        assert record(lambda a, b: function(a), (x, torch.empty(0)))[1] is None


def test_a_product_of_the_library_is_replayed_on_the_tensors():
    function, _, simulated = launched()

    def both(x, out, a, b):
        function(x)
        multiply(out, a, b.t())
        multiply(out, a, b.t())
        return ()

    a, b = torch.randn(3, 4), torch.randn(5, 4)
    with simulated:
        _, made = record(both, (torch.randn(4), torch.empty(3, 5), torch.randn(3, 4), torch.randn(5, 4)))
        out = torch.zeros(3, 5)
        assert made.replay(torch.randn(4), out, a, b) == ()
    torch.testing.assert_close(out, 2 * a @ b.t())


def test_temporaries_keep_their_places():
    ran = []

    def function(x):
        first, second = torch.empty(3), torch.empty(8, 4)[2:]
        for t in (first, second, first):
            launch(x, Kernel, (1, 1), x_ptr=t, size=t.numel())
        return (torch.empty(2, 2),)

    with simulated_gpu(lambda *_: Compiled(lambda *arguments: ran.append(arguments[9:]))):
        _, made = record(function, (torch.randn(4),))
        ran.clear()
        (out,) = made.replay(torch.randn(4))
    assert out.shape == (2, 2)
    (first, _), (second, size), (again, _) = ran
    assert (again, size) == (first, 24)
    assert second - first == plan.ALIGNMENT + 2 * 4 * 4
    assert "temporary" in made.source


def test_launch_hooks_have_every_launch_told_of(monkeypatch):
    assert not plan.hooked()
    for name in ("launch_enter_hook", "launch_exit_hook"):
        with monkeypatch.context() as patched:
            patched.setattr(knobs.runtime, name, lambda metadata: None)
            assert plan.hooked()
        chain = getattr(knobs.runtime, name)
        hook = lambda metadata: None  # noqa: E731
        chain.add(hook)
        try:
            assert plan.hooked()
        finally:
            chain.remove(hook)
    assert not plan.hooked()


@pytest.mark.parametrize(
    ("where", "name", "value", "says"),
    [
        (knobs.runtime, "interpret", True, "TRITON_INTERPRET"),
        (torch.version, "hip", "6.4", "HIP"),
        (plan, "hooked", lambda: True, "launch hook"),
        (plan, "_known_signature", lambda: False, "this Triton's launcher"),
    ],
    ids=["interpreter", "HIP", "hooks", "signature"],
)
def test_where_nothing_is_replayed_it_says_why(where, name, value, says, monkeypatch):
    monkeypatch.setattr(knobs.runtime, "interpret", False)
    assert plan.why_not() is None
    monkeypatch.setattr(where, name, value)
    assert says in plan.why_not()
    function, _, simulated = launched()
    with simulated, monkeypatch.context() as patched:
        patched.setattr(plan, "why_not", lambda: says)
        assert record(function, (torch.randn(4),))[1] is None
