"""The captured step without a GPU; test_gpu.py checks its bits on one."""

import pytest
import torch

from examples import cuda_graph


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
def test_without_a_gpu_it_says_so(capsys):
    assert cuda_graph.main() == 1
    said = capsys.readouterr().err
    assert "needs a CUDA device" in said
    assert said.count("\n") == 1


@pytest.mark.gpu
def test_on_a_gpu_it_trains(capsys):
    assert cuda_graph.main() == 0
    assert "20 steps replayed" in capsys.readouterr().out
