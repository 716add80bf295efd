"""One training step of a real decoder (forward, backward, AdamW), beside its peers in turns.

On a CPU: SmolLM2-135M in bfloat16, or float32 where the CPU has no bfloat16; on a GPU: decoder layers of LLaMA-7B's
size in bfloat16, random weights. Adapters on all seven linears, in the base's dtype, n·r = 96. Each size of linear
must pass the 2× rule before anything is timed; compilation is of each adapted linear alone.
"""

import copy
from functools import partial

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from bench.candidates import COMPILED, CONCATENATED, FP8, Concatenated, can_compile
from bench.timing import contest
from multilora_fast import MultiLoraConfig, MultiLoRALinear
from multilora_fast.benchmark.layer import gate, multilora
from multilora_fast.benchmark.timing import Turn
from multilora_fast.devices import choose_dtype
from multilora_fast.memory import peak_bytes, saved_bytes
from multilora_fast.memory.methods import FULL, LORA, OURS, REFERENCE
from multilora_fast.models import LINEARS, load_model, shallow_copy, target_linears


def decoder(tiny: bool, device: str) -> tuple[str, nn.Module]:
    if tiny or device == "cuda":
        sizes = {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "num_hidden_layers": 4}
        if tiny:
            sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_hidden_layers": 1}
        config = LlamaConfig(vocab_size=32000 if not tiny else 64, use_cache=False, **sizes)
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        with torch.device(device):
            return f"LLaMA-7B, {config.num_hidden_layers} layers", LlamaForCausalLM(config).to(dtype)
    try:
        model = load_model(None, choose_dtype("auto", torch.device("cpu")), torch.device("cpu"))
    except ValueError as error:
        pytest.skip(str(error))
    return "SmolLM2-135M", model


def methods(base: nn.Module, n: int, r: int, p: float) -> dict[str, nn.Module]:
    """The candidates on the base's own weights; full fine-tuning on a copy."""
    full = copy.deepcopy(base).requires_grad_(True)
    base.requires_grad_(False)
    found = {FULL: full}
    loops = {REFERENCE: MultiLoRALinear, COMPILED: MultiLoRALinear, CONCATENATED: Concatenated}
    if not can_compile(base.device.type):
        del loops[COMPILED]
    for name, cls in loops.items():
        model = found[name] = shallow_copy(base)
        for path in target_linears(model, LINEARS):
            layer = multilora(cls, model.get_submodule(path), n, r, p)
            model.set_submodule(path, layer)
            if name == COMPILED:
                layer.compile()
    shared = {"lora_dropout": p, "target_modules": list(LINEARS)}
    lora = LoraConfig(r=n * r, lora_alpha=n * r, **shared)
    found[LORA] = get_peft_model(shallow_copy(base), lora, autocast_adapter_dtype=False)
    for name, choice in ((OURS, "exact"), (FP8, "fp8")):
        config = MultiLoraConfig(r=r, lora_num=n, save_inputs=choice, **shared)
        found[name] = get_peft_model(shallow_copy(base), config, autocast_adapter_dtype=False)
    return found


@pytest.mark.parametrize("p", [0.0, 0.05])
def test_step(benchmark, p, tiny, device, request):
    n, r = (2, 2) if tiny else (3, 32)
    batch, length = (2, 8) if tiny else (8, 1024) if device == "cuda" else (4, 128)
    torch.manual_seed(0)
    name, base = decoder(tiny, device)
    adapted = map(base.get_submodule, target_linears(base, LINEARS))
    for K, N in {(layer.in_features, layer.out_features) for layer in adapted}:
        gate(K, N, n, r, p, base.dtype, device)
    models = methods(base, n, r, p)
    tokens = torch.randint(base.config.vocab_size, (batch, length), device=device)

    def turn(model: nn.Module) -> Turn:
        optimizer = torch.optim.AdamW((q for q in model.parameters() if q.requires_grad), lr=1e-5)

        def step(_=None):
            model(input_ids=tokens, labels=tokens).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        return Turn(lambda: None, step)

    turns = {method: turn(model.train()) for method, model in models.items()}
    memory = {}
    for method, model in models.items():
        turns[method].run(None)
        with saved_bytes([*model.parameters(), *model.buffers(), tokens]) as saved:
            model(input_ids=tokens, labels=tokens)
        memory[method] = {"saved": saved.total}
        del saved
        memory[method]["peak"] = peak_bytes(partial(turns[method].run, None), torch.device(device))
    medians = contest(benchmark, turns, OURS, rounds=request.config.getoption("--step-rounds"), warmup=0)
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
