"""The tuner's candidates and its check of a result, which need no GPU."""

import pytest
import torch
from device import DEVICE

from bench import tune
from multilora_fast.kernels.configs import KernelConfig, pick


@pytest.mark.parametrize("stage", tune.stages(), ids=lambda stage: "-".join(map(str, stage.key)))
def test_candidates_start_with_the_present_row_and_fit(stage):
    n, r = tune.RANKS[stage.rank]
    present = pick(stage.kernel, tune.TOKENS[stage.size][0], n * r, tune.DTYPE, "sm_90")
    found = tune.candidates(stage, present)
    assert found[0] == present
    assert len(found) == len(set(found)) > 10
    assert all(tune.shared_bytes(stage.kernel, config, n * r) <= tune.SHARED_LIMIT for config in found[1:])


@pytest.mark.parametrize("kernel", ["shrink", "expand", "reduce"])
def test_right_results_pass_the_check_and_wrong_ones_do_not(kernel):
    for _, launch, truth in tune.uses(kernel, 40, 48, 2, 8, torch.float32, DEVICE):
        assert tune.correct(kernel, launch, KernelConfig(32, 32, 4, 2), truth)
        assert not tune.correct(kernel, launch, KernelConfig(32, 32, 4, 2), 1.05 * truth + 0.1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
def test_without_a_gpu_it_says_so(capsys):
    assert tune.main([]) == 1
    assert "needs a GPU" in capsys.readouterr().err
