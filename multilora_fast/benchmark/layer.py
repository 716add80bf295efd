"""Benchmark of one linear layer: frozen, reference loop, PEFT LoRA of the same total rank, and ours. Each result is
checked before it is timed."""

import statistics
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from multilora_fast.benchmark.timing import interleaved, timed_layer
from multilora_fast.console import progress
from multilora_fast.layers.fused import FusedMultiLoRALinear
from multilora_fast.memory import peak_bytes, saved_bytes
from multilora_fast.memory.methods import LORA, OURS, REFERENCE
from multilora_fast.ops.functional import dropout_mask, multilora_linear
from multilora_fast.ops.torch_backend import inverse_keep
from multilora_fast.reference import MultiLoRALinear
from multilora_fast.testing import assert_two_times_rule, random_case

FROZEN = "frozen base layer"
DIRECTIONS = ("forward", "backward", "forward+backward")


@dataclass(frozen=True)
class LayerCost:
    """Median seconds by DIRECTIONS, the bytes saved for backward beyond the weights, and the peak bytes of forward and
    backward beyond weights, x and dy."""

    seconds: dict[str, float]
    saved: int
    peak: int


def base_layer(K: int, N: int, dtype: torch.dtype, device: str) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(K, N, bias=False, dtype=dtype, device=device).requires_grad_(False)


def multilora(cls: type[MultiLoRALinear], base: nn.Linear, n: int, r: int, p: float) -> MultiLoRALinear:
    """A layer with non-zero scales, in the base's dtype."""
    torch.manual_seed(1)
    layer = cls(base, r=r, lora_num=n, lora_dropout=p)
    nn.init.normal_(layer.lora_scaling)
    return layer


def peft_lora(base: nn.Linear, rank: int, p: float, *, float32: bool = False) -> nn.Module:
    """PEFT's LoRA, in the base's dtype unless ``float32``."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=rank, lora_alpha=rank, lora_dropout=p, target_modules=["0"])
    return get_peft_model(nn.Sequential(base), config, autocast_adapter_dtype=float32)


def gate(K: int, N: int, n: int, r: int, p: float, dtype: torch.dtype, device: str, tokens: int = 128) -> None:
    """Raise AssertionError unless the op obeys the 2× rule at these settings, on fewer tokens."""
    case = random_case((tokens, K), N, n, r, dtype=dtype, bias=False, device=device)
    op = partial(multilora_linear, bias=None, scaling_factor=case.scaling_factor)
    if p:
        keep = dropout_mask(torch.tensor([1], device=device), tokens, K, p)
        case.factor = keep.double() * inverse_keep(p)
        op = partial(op, dropout_p=p, seed=1)
    assert_two_times_rule(op, case)


def candidates(K: int, N: int, n: int, r: int, p: float, dtype: torch.dtype, device: str) -> dict[str, nn.Module]:
    """The layers by name, each with its own base layer."""
    bases = [base_layer(K, N, dtype, device) for _ in range(4)]
    return {
        FROZEN: bases[0],
        REFERENCE: multilora(MultiLoRALinear, bases[1], n, r, p),
        LORA: peft_lora(bases[2], n * r, p),
        OURS: multilora(FusedMultiLoRALinear, bases[3], n, r, p),
    }


def measure(
    K: int, N: int, *, tokens: int, n: int, r: int, p: float, dtype: torch.dtype, device: str, rounds: int
) -> dict[str, LayerCost]:
    """The cost of each candidate of total rank n·r, by name: medians of ``rounds``, interleaved.

    Raises:
        AssertionError: the op's result breaks the 2× rule of :mod:`multilora_fast.testing`.
    """
    gate(K, N, n, r, p, dtype, device)
    layers = candidates(K, N, n, r, p, dtype, device)
    x = torch.randn(tokens, K, dtype=dtype, device=device).requires_grad_()
    dy = torch.randn(tokens, N, dtype=dtype, device=device)
    medians: dict[str, dict[str, float]] = {name: {} for name in layers}
    for direction in DIRECTIONS:
        timed = {name: timed_layer(layer, x, dy, direction) for name, layer in layers.items()}
        interleaved(timed, range(2))
        for name, seconds in interleaved(timed, progress(range(rounds), direction)).items():
            medians[name][direction] = statistics.median(seconds)
    return {name: LayerCost(medians[name], *_memory(layer, x, dy)) for name, layer in layers.items()}


def _memory(layer: nn.Module, x: torch.Tensor, dy: torch.Tensor) -> tuple[int, int]:
    one = timed_layer(layer, x, dy, "forward+backward")
    one.prepare()
    peak = peak_bytes(partial(one.run, None), x.device)
    with saved_bytes(layer.parameters()) as saved:
        layer(x)
    return saved.total, peak
