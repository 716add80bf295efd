"""The tuner's candidates, result check, time shares and rows, without a GPU."""

import math
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from device import DEVICE

from bench import tune, tune_grouped, tune_product, tune_uses
from bench.tune_product import JOINT, LIBRARY, ProductStage, winning_rows, wins
from multilora_fast.kernels.configs import TUNED_CONFIGS, KernelConfig, find_row, product_config

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("stage", tune.stages(), ids=lambda stage: "-".join(map(str, stage.key)))
def test_candidates_start_with_the_present_row_and_fit(stage):
    n, r = tune.RANKS[stage.rank]
    present = tune.present_row(stage, "sm_90")
    found = tune.candidates(stage, present)
    assert found[0] == present
    assert len(found) == len(set(found)) > 10
    assert all(tune.shared_bytes(stage.kernel, config, n * r) <= tune.SHARED_LIMIT for config in found[1:])


def test_every_use_of_the_table_has_stages_of_its_own():
    timed = {stage.kernel for stage in tune.stages()}
    uses = ("shrink", "expand", "expand add", "reduce", "grouped_shrink", "grouped_expand", "grouped_reduce")
    assert timed == {use + dropout for use in uses for dropout in ("", " dropout")}
    assert {key[0] for key in TUNED_CONFIGS} <= timed
    for stage in tune.stages():
        kernel, *use = stage.kernel.split()
        for M, _ in stage.shapes:
            row = find_row(kernel, M, stage.rank, tune.DTYPE, "sm_90", "add" in use, "dropout" in use)
            assert row[0] in (kernel, stage.kernel)
            assert row[1] in (stage.size, "8192")


def test_a_printed_row_of_experts_is_the_one_that_serves_what_was_timed(monkeypatch):
    for stage in tune.stages("grouped"):
        config = KernelConfig(48, 48, 4, 2)
        monkeypatch.setitem(TUNED_CONFIGS, (stage.kernel, stage.size, "half", "sm_90", stage.rank), config)
        kernel, *use = stage.kernel.split()
        for M, _ in stage.shapes:
            key = find_row(kernel, M, stage.rank, tune.DTYPE, "sm_90", dropout="dropout" in use)
            assert TUNED_CONFIGS[key] is config


@pytest.fixture
def few_experts(monkeypatch):
    monkeypatch.setattr(tune_grouped, "EXPERTS", 4)
    monkeypatch.setattr(tune_grouped, "TAKEN", 2)


def inputs_of(stage):
    return stage.uses.draw_inputs(8 if stage.kernel in tune.GROUPED else 40, 48, 2, 8, torch.float32, DEVICE)


@pytest.mark.parametrize("kernel", [*tune.KERNELS, *tune.GROUPED])
def test_right_results_pass_the_check_and_wrong_ones_do_not(kernel, few_experts):
    stage, config = tune.Stage(kernel, "512", 16), KernelConfig(32, 32, 4, 2)
    inputs = inputs_of(stage)
    truths = stage.uses.truths(kernel, inputs)
    for name, launch in stage.uses.launches(kernel, inputs).items():
        assert tune.correct(kernel, launch, config, truths[name])
        assert not tune.correct(kernel, launch, config, 1.05 * truths[name] + 0.1)


@pytest.mark.parametrize("kernel", ["shrink", "expand add dropout", "grouped_expand dropout"])
def test_a_configuration_is_timed_by_use_and_shape_over_all_inputs_or_not_at_all(kernel, few_experts):
    stage, rotated = tune.Stage(kernel, "512", 16), []
    sets = [inputs_of(stage) for _ in range(3)]
    work = [tune.Work("40x48", sets, stage.uses.truths(kernel, sets[0]))]

    def clock(calls, replays):
        rotated.append([call().data_ptr() for call in calls])
        return 7.0

    names = stage.uses.launches(kernel, sets[0])
    found = tune.time_config(stage, KernelConfig(32, 32, 4, 2), work, clock)
    assert found == {f"{name} 40x48": 7.0 for name in names}
    assert all(len(addresses) == 9 for addresses in rotated)
    if "expand" in kernel:
        assert set(rotated[0]) == {t.y.data_ptr() for t in sets}
    work[0].truth.update({name: truth + 1 for name, truth in work[0].truth.items()})
    assert "wrong result" in tune.time_config(stage, KernelConfig(32, 32, 4, 2), work, clock)


def test_a_stage_of_experts_prints_the_row_of_its_fastest_candidate(few_experts, monkeypatch, capsys):
    inputs = partial(tune_grouped.draw_inputs, dtype=torch.float32, device=DEVICE)
    monkeypatch.setattr(tune_grouped, "draw_inputs", inputs)
    monkeypatch.setattr(tune_grouped, "ROWS", {"decode": (4,)})
    monkeypatch.setattr(tune_grouped, "FEATURES", (16, 24))
    monkeypatch.setattr(tune, "RANKS", {96: (2, 4)})
    monkeypatch.setattr(tune, "cache_bytes", lambda: 1)
    fast = KernelConfig(32, 32, 4, 2, columns=128)
    monkeypatch.setattr(tune, "candidates", lambda stage, present: [present, fast])
    times = iter([5.0, 6.0, 3.0, 4.0])
    monkeypatch.setattr(tune.time_config, "__defaults__", (lambda calls, replays: next(times),))
    found = tune.run_stage(tune.Stage("grouped_reduce dropout", "decode", 96), "sm_90", math.inf)
    assert [list(tried["result"].values()) for tried in found["tried"]] == [[5.0, 6.0], [3.0, 4.0]]
    row = '("grouped_reduce dropout", "decode", "half", "sm_90", 64): KernelConfig(32, 32, 4, 2, columns=128),'
    assert f"{row}  # 7 us, was 11" in capsys.readouterr().out


def test_the_seconds_are_shared_out_and_no_stage_gets_too_little_to_begin():
    assert tune.share(100.0, 10) == 10.0
    assert tune.share(20.0, 10) == tune.LEAST_SECONDS
    assert tune.share(tune.LEAST_SECONDS / 2, 3) == 0.0


def test_the_headline_rank_comes_first_with_the_joint_kernel_after_its_rows():
    todo = tune.schedule()
    experts = tune.schedule("grouped")
    assert todo[-len(experts) :] == experts
    assert {stage.kernel for stage in experts} == set(tune.GROUPED)
    del todo[-len(experts) :]
    ranks = [stage.rank for stage in todo]
    assert ranks == sorted(ranks)
    kinds = [isinstance(stage, ProductStage) for stage in todo if stage.rank == 96]
    assert any(kinds)
    assert kinds == sorted(kinds)
    assert all(isinstance(stage, ProductStage) for stage in tune.schedule(JOINT))
    assert not any(isinstance(stage, ProductStage) for stage in tune.schedule("shrink"))


def test_rows_paste_as_they_are_printed():
    key = ("expand add", "8192", "half", "sm_90", 96)
    assert eval(f"({tune.quoted(key)})") == key
    config = KernelConfig(64, 128, 4, 3, min_steps=None, programs=2)
    assert tune.row_text(config) == "KernelConfig(64, 128, 4, 3, min_steps=None, programs=2)"
    for config in TUNED_CONFIGS.values():
        assert eval(tune.row_text(config)) == config


@pytest.mark.parametrize("direction", tune_product.DIRECTIONS)
@pytest.mark.parametrize("p", [0.0, 0.05])
def test_both_ways_of_a_product_give_what_torch_does(direction, p):
    ways, truth = tune_product.ways(direction, 40, 48, 64, 2, 8, p, torch.float32, DEVICE)
    assert set(ways) == {LIBRARY, JOINT} or torch.cuda.is_available()  # a GPU's copy engine is given no float32
    for way in ways.values():
        assert tune_uses.near(way(), truth)


def test_the_joint_kernel_wins_where_it_is_faster_with_and_without_dropout():
    times = {
        "8192 tokens, dropout 0": {LIBRARY: 100.0, JOINT: 90.0},
        "8192 tokens, dropout 0.05": {LIBRARY: 100.0, JOINT: 95.0},
        "2048 tokens, dropout 0": {LIBRARY: 100.0, JOINT: 90.0},
        "2048 tokens, dropout 0.05": {LIBRARY: 100.0, JOINT: 99.0},
        "1024 tokens, dropout 0": "wrong result of product",
    }
    assert wins(times) == {8192: True, 2048: False, 1024: False}


def test_a_row_stands_for_what_was_timed_at_its_rank_and_below_and_its_tokens_and_above(monkeypatch):
    def won(rank, *tokens, way="forward", K=4096, N=4096):
        return {ProductStage(way, K, N, rank): {t: t in tokens for t in (8192, 2048, 1024)}}

    measured = {
        **won(96, 8192, 2048, 1024), **won(160, 8192, 2048),
        **won(96, 8192, 1024, way="backward"), **won(160, 8192, way="backward"),
        **won(160, 8192, K=11008), **won(96, 1024, N=11008),
    }  # fmt: skip
    rows = winning_rows(measured, (96, 160))
    assert rows == {
        "forward": [(4096, 4096, 96, 1024), (4096, 4096, 160, 2048)],
        "backward": [(4096, 4096, 160, 8192)],
    }
    table = {("sm_90", way): found for way, found in rows.items()}
    monkeypatch.setattr("multilora_fast.kernels.configs.PRODUCT_WINS", table)
    product_config.cache_clear()
    for (way, K, N, rank), M in [(stage, M) for stage in [("forward", 4096, 4096, 96)] for M in (1024, 8192)]:
        assert product_config(way, M, K, N, rank, torch.bfloat16, "sm_90") is not None
    assert product_config("forward", 1024, 4096, 4096, 160, torch.bfloat16, "sm_90") is None
    assert product_config("backward", 2048, 4096, 4096, 96, torch.bfloat16, "sm_90") is None
    product_config.cache_clear()


AHEAD = """
from bench import precompile, tune
from bench.simulated import simulated_gpu
compiled = []
precompile.compile_only = lambda kernel, *_: (compiled.append(kernel.__name__), precompile.NotRun())[1]
with simulated_gpu(None):
    for kernel in (*tune.KERNELS, *tune.GROUPED):
        stage = tune.Stage(kernel, "8192", 96)
        precompile.compile_uses(stage, tune.present_row(stage, "sm_90"), 64, 64, 3, 32, "cpu")
        print(kernel, "|", *compiled)
        compiled.clear()
"""


def test_all_uses_are_compiled_ahead_and_none_is_launched():
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    env.pop("TRITON_INTERPRET", None)
    done = subprocess.run([sys.executable, "-c", AHEAD], cwd=ROOT, env=env, capture_output=True, text=True)
    found = dict(line.split(" | ") for line in done.stdout.splitlines())
    assert list(found) == [*tune.KERNELS, *tune.GROUPED], done.stderr[-2000:]
    for kernel, launched in found.items():
        assert f"{kernel.split()[0]}_kernel" in launched.split(), kernel


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
def test_without_a_gpu_it_says_so(capsys):
    assert tune.main([]) == 1
    assert "needs a GPU" in capsys.readouterr().err
