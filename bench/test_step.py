"""One training step of a real decoder (forward, backward, AdamW), interleaved with its peers.

On a CPU: SmolLM2-135M in bfloat16, or in float32 where the CPU has no bfloat16; compiled candidates compile each
adapted linear. On a GPU: decoder layers of LLaMA-7B's size in bfloat16 with random weights; each method is built,
measured and freed before the next; frozen, PEFT LoRA and ours also run as a CUDA graph of the whole step; compiled
candidates compile the whole model. Adapters on all seven linears, in the base's dtype, n·r = 96. Each size of linear
must pass the 2× rule before timing. With ``--seconds`` a case measures further candidates in the time that later cases
do not need.
"""

from functools import partial

import pytest
import torch
from torch import nn

from bench.step_alone import Steps, measure_alone, training_step
from bench.step_models import builders_alone, decoder, methods
from bench.timing import add_clocks, compare
from multilora_fast.benchmark.layer import gate
from multilora_fast.benchmark.timing import Timed
from multilora_fast.memory import peak_bytes, saved_bytes
from multilora_fast.memory.methods import LORA, OURS, REFERENCE
from multilora_fast.models import LINEARS, target_linears

GPU = torch.cuda.is_available()
# (batch, length, dropout), most important first on a GPU, the first two also compiled
CASES = [(4, 128, 0.0), (4, 128, 0.05)]
if GPU:
    CASES = [(8, 1024, 0.05), (1, 1024, 0.05), (8, 1024, 0.0), (1, 1024, 0.0)]
# Of a case on a GPU: for what must be measured, and for LoRA and ours compiled.
NEEDED_SECONDS, COMPILED_SECONDS = 12.0, 50.0


@pytest.mark.parametrize(("batch", "length", "p"), CASES)
def test_step(benchmark, batch, length, p, tiny, device, request, seconds_left):
    n, r = (2, 2) if tiny else (3, 32)
    at = CASES.index((batch, length, p))
    compiled = at < 2
    reserved = NEEDED_SECONDS * (len(CASES) - at - 1) + COMPILED_SECONDS * (at == 0)
    batch, length = (2, 8) if tiny else (batch, length)
    torch.manual_seed(0)
    try:
        name, base = decoder(tiny, device)
    except ValueError as error:
        pytest.skip(str(error))
    adapted = map(base.get_submodule, target_linears(base, LINEARS))
    for K, N in {(layer.in_features, layer.out_features) for layer in adapted}:
        gate(K, N, n, r, p, base.dtype, device)
    tokens = torch.randint(base.config.vocab_size, (batch, length), device=device)
    rounds = request.config.getoption("--step-rounds")
    if GPU:
        models = builders_alone(base, n, r, p, compiled)
        found = measure_alone(benchmark, models, tokens, 2 * rounds, lambda: seconds_left() - reserved)
    else:
        found = measure_together(benchmark, methods(base, n, r, p), tokens, rounds)
    info, medians = benchmark.extra_info, found.median
    info["settings"] = {
        "model": name, "batch": batch, "length": length, "n": n, "r": r, "dropout": p, "dtype": str(base.dtype),
    }  # fmt: skip
    info |= {"memory": found.memory, **{key: value for key in ("failed", "cut") if (value := getattr(found, key))}}
    if not benchmark.disabled:
        info["median"] = medians
        info["ratios"] = {"tokens per second": batch * length / medians[OURS]}
        info["ratios"] |= {"ours / PEFT LoRA": medians[OURS] / medians[LORA]} if LORA in medians else {}
        info["ratios"] |= {"reference / ours": medians[REFERENCE] / medians[OURS]} if REFERENCE in medians else {}
        add_clocks(info, medians, **({"device": (found.device, {})} if GPU else {}))


def measure_together(benchmark, models: dict[str, nn.Module], tokens: torch.Tensor, rounds: int) -> Steps:
    """Measure all ``models`` interleaved, so that drift affects all of them."""
    timed = {name: Timed(lambda: None, training_step(model.train(), tokens)) for name, model in models.items()}
    found = Steps()
    for name, model in models.items():
        timed[name].run(None)
        with saved_bytes([*model.parameters(), *model.buffers(), tokens]) as saved:
            model(input_ids=tokens, labels=tokens)
        found.memory[name] = {"saved": saved.total}
        del saved
        found.memory[name]["peak"] = peak_bytes(partial(timed[name].run, None), tokens.device)
    found.median = compare(benchmark, timed, OURS, rounds=rounds, warmup=0)
    return found
