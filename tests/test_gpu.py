"""Tests that need a GPU. The other tests of the op run there too."""

import copy
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from examples.cuda_graph import captured_step
from multilora_fast import FusedMultiLoRALinear, MultiLoraConfig, multilora_linear
from multilora_fast.kernels import launch
from multilora_fast.ops import call
from multilora_fast.testing import assert_two_times_rule, random_case

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("n_r", [(3, 32), (5, 32), (2, 7)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("adapter_dtype", [None, torch.float32])
@pytest.mark.parametrize("shape", [((2048, 1024), 1536), ((8, 1024), 1536), ((333, 515), 711)])
def test_two_times_rule_at_size(shape, adapter_dtype, dtype, n_r):
    case = random_case(*shape, *n_r, dtype=dtype, adapter_dtype=adapter_dtype, device="cuda")
    assert_two_times_rule(partial(multilora_linear, scaling_factor=case.scaling_factor), case)


def test_launches_share_no_kernel_that_was_compiled_for_other_sizes_or_alignment():
    sizes = ((64, 128, 0), (64, 128, 1), (64, 127, 0), (1, 128, 0), (48, 1, 0), (64, 128, 8), (64, 128, 0))
    for rows, K, offset in sizes:
        case = random_case((rows, K), 96, 2, 16, dtype=torch.bfloat16, device="cuda")
        wide = torch.zeros(rows, K + 8, dtype=torch.bfloat16, device="cuda")
        wide[:, offset : offset + K] = case.x
        case.x = wide[:, offset : offset + K]
        assert_two_times_rule(partial(multilora_linear, scaling_factor=case.scaling_factor), case)


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


@sdpa_kernel(SDPBackend.MATH)  # the same bits at every run; transformers' eager attention cannot be captured
def test_a_captured_training_step_replays_the_bits_of_an_eager_one():
    from peft import get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_hidden_layers": 2}
    config = LlamaConfig(vocab_size=512, attn_implementation="sdpa", use_cache=False, **sizes)
    base = LlamaForCausalLM(config).to("cuda", torch.bfloat16)
    adapter = MultiLoraConfig(r=16, lora_num=3, target_modules="all-linear", init_weights=False)
    eager = get_peft_model(base, adapter).train()
    captured = copy.deepcopy(eager)
    tokens = torch.randint(512, (2, 64), device="cuda")

    def trained(model):
        return [parameter for parameter in model.parameters() if parameter.requires_grad]

    steps = 4
    optimizer = torch.optim.AdamW(trained(eager), lr=1e-2, capturable=True)
    for _ in range(steps):
        optimizer.zero_grad()
        eager(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
    replay = captured_step(captured, torch.optim.AdamW(trained(captured), lr=1e-2, capturable=True), tokens)
    for _ in range(steps - 1):  # the warm-up was a step, the capture was none
        replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(trained(eager), trained(captured), strict=True))


def test_a_first_use_inside_a_capture_is_refused(monkeypatch):
    case = random_case((64, 128), 96, 2, 16, dtype=torch.bfloat16, device="cuda")
    op = partial(multilora_linear, case.x, **case.parameters)
    op()  # the kernels are checked, and cuBLAS has its handle
    monkeypatch.setattr(launch, "_COMPILED", {})
    monkeypatch.setattr(call, "_CALLS", {})
    torch.cuda.synchronize()
    with torch.cuda.graph(torch.cuda.CUDAGraph()), pytest.raises(RuntimeError, match="before the capture"):
        op()
    assert torch.isfinite(op()).all()


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
