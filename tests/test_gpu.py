"""What only a GPU can show. The other tests of the op run there too, on the device they find."""

from functools import partial

import pytest
import torch
from torch import nn

from multilora_fast import FusedMultiLoRALinear, multilora_linear
from multilora_fast.testing import assert_two_times_rule, random_case, run

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("n_r", [(3, 32), (5, 32), (2, 7)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("adapter_dtype", [None, torch.float32])
@pytest.mark.parametrize("shape", [((2048, 1024), 1536), ((8, 1024), 1536), ((333, 515), 711)])
def test_two_times_rule_at_size(shape, adapter_dtype, dtype, n_r):
    case = random_case(*shape, *n_r, dtype=dtype, adapter_dtype=adapter_dtype, device="cuda")
    assert_two_times_rule(partial(multilora_linear, scaling_factor=case.scaling_factor), case)


def test_launches_share_no_kernel_that_was_compiled_for_other_sizes_or_alignment():
    for rows, K, offset in (
        (64, 128, 0),
        (64, 128, 1),
        (64, 127, 0),
        (1, 128, 0),
        (48, 1, 0),
        (64, 128, 8),
        (64, 128, 0),
    ):
        case = random_case((rows, K), 96, 2, 16, dtype=torch.bfloat16, device="cuda")
        wide = torch.zeros(rows, K + 8, dtype=torch.bfloat16, device="cuda")
        wide[:, offset : offset + K] = case.x
        case.x = wide[:, offset : offset + K]
        assert_two_times_rule(partial(multilora_linear, scaling_factor=case.scaling_factor), case)


def test_bit_equal_twice():
    case = random_case((4096, 1024), 1536, 5, 32, dtype=torch.bfloat16, device="cuda")
    op = partial(multilora_linear, scaling_factor=case.scaling_factor, dropout_p=0.1, seed=3)
    first, second = run(op, case), run(op, case)
    assert all(torch.equal(first[k], second[k]) for k in first)


def test_a_cuda_graph_draws_a_new_mask_at_every_replay():
    case = random_case((256, 64), 64, 1, 16, device="cuda")
    op = partial(multilora_linear, case.x, **case.parameters, dropout_p=0.5)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            op()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = op()
    outputs = []
    for _ in range(2):
        graph.replay()
        outputs.append(y.clone())
    assert not torch.equal(*outputs)


@pytest.mark.parametrize("p", [0.0, 0.05])
def test_peak_memory_of_a_step_beyond_the_frozen_layer(p):
    M, K, N, n, r = 8192, 4096, 4096, 3, 32
    base = nn.Linear(K, N, bias=False, device="cuda", dtype=torch.bfloat16).requires_grad_(False)
    ours = FusedMultiLoRALinear(base, r=r, lora_num=n, lora_dropout=p)
    x = torch.randn(M, K, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    dy = torch.randn(M, N, device="cuda", dtype=torch.bfloat16)

    def peak(layer):
        for _ in range(2):
            x.grad = None
            torch.cuda.reset_peak_memory_stats()
            start = torch.cuda.memory_allocated()
            layer(x).backward(dy)
            top = torch.cuda.max_memory_allocated() - start
        return top

    R = n * r
    adapter = 2 * (R * (K + N) + n * N)
    parts = 4 * 8 * R * max(K, N)  # float32 partial sums of reduce, a few of them
    assert peak(ours) - peak(base) <= 2 * (2 * M * R * 2) + 2 * adapter + parts
