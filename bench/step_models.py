"""A real decoder, and the models that its training step is taken by: each candidate on the decoder's own weights."""

import copy

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from bench.candidates import COMPILED, CONCATENATED, FP8, Concatenated, can_compile
from multilora_fast.devices import choose_dtype
from multilora_fast.memory.methods import FULL, LORA, OURS, REFERENCE, adapt, draw_scales
from multilora_fast.models import LINEARS, load_model, shallow_copy
from multilora_fast.reference import MultiLoRALinear


def decoder(tiny: bool, device: str) -> tuple[str, nn.Module]:
    """Name and model: on a CPU SmolLM2-135M, on a GPU decoder layers of LLaMA-7B's size, ``tiny`` a small one.

    Raises:
        ValueError: a package that SmolLM2-135M comes from is missing.
    """
    if tiny or device == "cuda":
        sizes = {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "num_hidden_layers": 4}
        if tiny:
            sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_hidden_layers": 1}
        config = LlamaConfig(vocab_size=32000 if not tiny else 64, use_cache=False, **sizes)
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        with torch.device(device):
            return f"LLaMA-7B, {config.num_hidden_layers} layers", LlamaForCausalLM(config).to(dtype)
    cpu = torch.device("cpu")
    return "SmolLM2-135M", load_model(None, choose_dtype("auto", cpu), cpu)


def methods(base: nn.Module, n: int, r: int, p: float) -> dict[str, nn.Module]:
    """The candidates on the weights of ``base``, which is frozen; full fine-tuning on a copy."""
    full = copy.deepcopy(base).requires_grad_(True)
    base.requires_grad_(False)

    def adapted(method: str, **options) -> nn.Module:
        return adapt(shallow_copy(base), method, LINEARS, r=r, lora_num=n, lora_dropout=p, **options)

    found = {
        FULL: full,
        REFERENCE: adapted(REFERENCE),
        COMPILED: adapted(REFERENCE),
        CONCATENATED: adapted(REFERENCE, loop=Concatenated),
        LORA: adapted(LORA),
        OURS: adapted(OURS),
        FP8: adapted(OURS, save_inputs="fp8"),
    }
    for name in (REFERENCE, COMPILED, CONCATENATED):
        draw_scales(found[name])
    if not can_compile(base.device.type):
        del found[COMPILED]
        return found
    for layer in found[COMPILED].modules():
        if isinstance(layer, MultiLoRALinear):
            layer.compile()
    return found
