"""One training step of a real decoder (forward, backward, AdamW), interleaved with its peers.

On a CPU: SmolLM2-135M in bfloat16, or float32 where the CPU has no bfloat16; on a GPU: decoder layers of LLaMA-7B's
size in bfloat16, random weights. Adapters on all seven linears, in the base's dtype, n·r = 96. Each size of linear
must pass the 2× rule before anything is timed; compilation is of each adapted linear alone.
"""

from functools import partial

import pytest
import torch
from torch import nn

from bench.step_models import decoder, methods
from bench.timing import compare
from multilora_fast.benchmark.layer import gate
from multilora_fast.benchmark.timing import Timed
from multilora_fast.memory import peak_bytes, saved_bytes
from multilora_fast.memory.methods import LORA, OURS, REFERENCE
from multilora_fast.models import LINEARS, target_linears


@pytest.mark.parametrize("p", [0.0, 0.05])
def test_step(benchmark, p, tiny, device, request):
    n, r = (2, 2) if tiny else (3, 32)
    batch, length = (2, 8) if tiny else (8, 1024) if device == "cuda" else (4, 128)
    torch.manual_seed(0)
    try:
        name, base = decoder(tiny, device)
    except ValueError as error:
        pytest.skip(str(error))
    adapted = map(base.get_submodule, target_linears(base, LINEARS))
    for K, N in {(layer.in_features, layer.out_features) for layer in adapted}:
        gate(K, N, n, r, p, base.dtype, device)
    models = methods(base, n, r, p)
    tokens = torch.randint(base.config.vocab_size, (batch, length), device=device)

    def timed_step(model: nn.Module) -> Timed:
        optimizer = torch.optim.AdamW((q for q in model.parameters() if q.requires_grad), lr=1e-5)

        def step(_=None):
            model(input_ids=tokens, labels=tokens).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        return Timed(lambda: None, step)

    timed = {method: timed_step(model.train()) for method, model in models.items()}
    memory = {}
    for method, model in models.items():
        timed[method].run(None)
        with saved_bytes([*model.parameters(), *model.buffers(), tokens]) as saved:
            model(input_ids=tokens, labels=tokens)
        memory[method] = {"saved": saved.total}
        del saved
        memory[method]["peak"] = peak_bytes(partial(timed[method].run, None), torch.device(device))
    medians = compare(benchmark, timed, OURS, rounds=request.config.getoption("--step-rounds"), warmup=0)
    benchmark.extra_info["settings"] = {
        "model": name, "batch": batch, "length": length, "n": n, "r": r, "dropout": p, "dtype": str(base.dtype),
    }  # fmt: skip
    benchmark.extra_info["memory"] = memory
    if not benchmark.disabled:
        benchmark.extra_info["median"] = medians
        benchmark.extra_info["ratios"] = {
            "ours / PEFT LoRA": medians[OURS] / medians[LORA],
            "reference / ours": medians[REFERENCE] / medians[OURS],
            "tokens per second": batch * length / medians[OURS],
        }
