"""Device and host time, measured on a fake device, and on a GPU where there is one."""

import time

import pytest
import torch

from bench.clock import cold_copies, device_time, device_times, host_time, own_cost, own_costs


class FakeDevice:
    """Spins for the enqueued microseconds, at once or at each replay of a captured graph."""

    def __init__(self):
        self.graph = None
        self.order = []

    def enqueue(self, microseconds):
        if self.graph is None:
            self.spin(microseconds)
        else:
            self.graph.append(microseconds)

    def spin(self, microseconds):
        end = time.perf_counter() + 1e-6 * microseconds
        while time.perf_counter() < end:
            pass

    def warm_up(self, calls):
        self.order.append("warm up")
        for call in calls:
            call()

    def capture(self, calls):
        self.order.append("capture")
        self.graph = []
        for call in calls:
            call()
        graph, self.graph = self.graph, None

        def replay():
            self.order.append("replay")
            for microseconds in graph:
                self.spin(microseconds)

        return replay

    def elapsed(self, replay):
        start = time.perf_counter()
        replay()
        return 1e6 * (time.perf_counter() - start)

    def wait(self):
        self.order.append("wait")


def test_a_launcher_that_sleeps_on_the_host_and_runs_nothing_takes_no_time():
    launcher = lambda: time.sleep(200e-6)  # noqa: E731
    assert device_time([launcher] * 4, machine=FakeDevice()) < 5
    assert host_time(launcher, calls=5, machine=FakeDevice()) > 200


def test_what_the_device_runs_is_the_figure_whatever_the_host_does():
    device = FakeDevice()

    def launcher(microseconds):
        time.sleep(1e-3)
        device.enqueue(microseconds)

    found = device_time([lambda: launcher(200), lambda: launcher(400)], machine=device)
    assert 300 <= found < 600


def test_every_call_is_warmed_up_before_the_capture_and_replays_before_the_timing():
    device, calls = FakeDevice(), []
    found = device_times([lambda: calls.append(0), lambda: calls.append(1)], replays=3, warm_ups=2, machine=device)
    assert device.order == ["warm up", "capture", *["replay"] * 2, "wait", *["replay"] * 3]
    assert calls == [0, 1, 0, 1]
    assert len(found) == 3


@pytest.mark.parametrize(("each", "expected"), [(67e6, 2), (50e6, 2), (20e6, 4), (1e6, 51), (1e3, 64)])
def test_copies_outgrow_the_cache(each, expected):
    assert cold_copies(int(each), int(50e6)) == expected


def test_own_cost_is_the_share_of_what_lora_costs():
    assert own_cost(956, 697, 1103) == pytest.approx(259 / 406)
    assert own_cost(950, 700, 700) is None
    times = {"frozen": 100.0, "lora": 300.0, "ours": 150.0, "loop": 500.0}
    assert own_costs(times, "frozen", "lora") == {"ours": 0.25, "loop": 2.0}
    assert own_costs({"frozen": 100.0, "ours": 150.0}, "frozen", "lora") == {}


@pytest.mark.gpu
def test_a_gpu_is_timed_without_the_host():
    assert device_time([lambda: time.sleep(200e-6)] * 4) < 5


@pytest.mark.gpu
def test_a_gpu_is_timed_for_what_it_runs():
    def launcher(cycles):
        time.sleep(5e-3)
        torch.cuda._sleep(cycles)

    one, four = (device_time([lambda c=c: launcher(c)] * 2) for c in (500_000, 2_000_000))
    assert 50 < one < 2500
    assert 3 < four / one < 5
