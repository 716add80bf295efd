"""A real decoder, and each candidate of the training-step bench on the decoder's weights."""

import copy
from collections.abc import Callable

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from bench.candidates import (
    COMPILED,
    CONCATENATED,
    FP8,
    LORA_COMPILED,
    LORA_GRAPHS,
    OURS_COMPILED,
    OURS_GRAPHS,
    OURS_TORCH,
    Concatenated,
    can_compile,
    on_torch,
)
from multilora_fast.benchmark.layer import FROZEN
from multilora_fast.devices import choose_dtype
from multilora_fast.memory.methods import FULL, LORA, OURS, REFERENCE, adapt, draw_scales
from multilora_fast.models import LINEARS, load_model, shallow_copy
from multilora_fast.reference import MultiLoRALinear


def decoder(tiny: bool, device: str) -> tuple[str, nn.Module]:
    """Name and model: SmolLM2-135M on a CPU, decoder layers of LLaMA-7B's size on a GPU, a small one with ``tiny``.

    Raises:
        ValueError: a package that SmolLM2-135M needs is missing.
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
    """The candidates on the frozen weights of ``base``; full fine-tuning works on a copy."""
    return {name: build() for name, build in builders(base, n, r, p).items()}


def builders(base: nn.Module, n: int, r: int, p: float) -> dict[str, Callable[[], nn.Module]]:
    """A builder of each candidate, by name."""

    def adapted(method: str, **options) -> nn.Module:
        base.requires_grad_(False)
        model = adapt(shallow_copy(base), method, LINEARS, r=r, lora_num=n, lora_dropout=p, **options)
        if method == REFERENCE:
            draw_scales(model)
        return model

    found = {
        FULL: lambda: copy.deepcopy(base).requires_grad_(True),
        REFERENCE: lambda: adapted(REFERENCE),
        COMPILED: lambda: _compiled_loops(adapted(REFERENCE)),
        CONCATENATED: lambda: adapted(REFERENCE, loop=Concatenated),
        LORA: lambda: adapted(LORA),
        OURS: lambda: adapted(OURS),
        FP8: lambda: adapted(OURS, save_inputs="fp8"),
    }
    if not can_compile(base.device.type):
        del found[COMPILED]
    return found


def builders_alone(base: nn.Module, n: int, r: int, p: float, compiled: bool) -> dict[str, Callable[[], nn.Module]]:
    """The candidates measured one at a time, most important first: the frozen model, LoRA's and ours, with ``compiled``
    both compiled whole, on a GPU also as CUDA graphs, then ours on torch matmuls and the others of :func:`builders` but
    the compiled loop.
    """
    eager = builders(base, n, r, p)
    found = {FROZEN: lambda: frozen(base), LORA: eager[LORA], OURS: eager[OURS]}
    if compiled:
        found |= {LORA_COMPILED: lambda: torch.compile(eager[LORA]())}
        found |= {OURS_COMPILED: lambda: torch.compile(eager[OURS]())}
    if compiled and base.device.type == "cuda":
        found |= {LORA_GRAPHS: lambda: torch.compile(eager[LORA](), mode="reduce-overhead")}
        found |= {OURS_GRAPHS: lambda: torch.compile(eager[OURS](), mode="reduce-overhead")}
    found |= {FP8: eager[FP8], OURS_TORCH: lambda: on_torch(eager[OURS]()), REFERENCE: eager[REFERENCE]}
    return found | {FULL: eager[FULL], CONCATENATED: eager[CONCATENATED]}


def frozen(base: nn.Module) -> nn.Module:
    """The model without adapters; backward computes dx down to the output of the embeddings."""
    base.requires_grad_(False)
    model = shallow_copy(base)
    model.get_input_embeddings().register_forward_hook(lambda module, inputs, output: output.requires_grad_())
    return model


def _compiled_loops(model: nn.Module) -> nn.Module:
    for layer in model.modules():
        if isinstance(layer, MultiLoRALinear):
            layer.compile()
    return model
