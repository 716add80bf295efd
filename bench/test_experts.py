"""The experts of one layer, forward and backward, interleaved with their peers.

    pytest bench/test_experts.py --benchmark-json=OUT.json

Before timing, the error of the output and every gradient, those of the routing weights included, must be at most twice
that of the branches by autograd, relative to float64. Calls are synchronized; on a GPU, replays of captured graphs give
the device time. PEFT's LoRA on parameters has no dropout and is compared without.
"""

import copy

import pytest
import torch

from bench.experts import FROZEN, SIZES, TINY, ByAutograd, Routed, Size, layers
from bench.timing import add_clocks, compare, device_seconds, drop_failing
from multilora_fast.benchmark.timing import Timed, timed_layer
from multilora_fast.memory.methods import LORA, OURS

SMALL = Size(32, 4, 512, 192, 24)
QWEN, MIXTRAL = SIZES.values()
# (size, tokens, dropout), most important first on a GPU
CASES = [(SMALL, tokens, p) for tokens in (1024, 64) for p in (0.0, 0.05)]
if torch.cuda.is_available():
    CASES = [(QWEN, 4096, 0.0), (QWEN, 4096, 0.05), (QWEN, 512, 0.0), (MIXTRAL, 4096, 0.0)]
DTYPE = torch.bfloat16 if torch.cuda.is_available() else torch.float32


def gate(experts: torch.nn.Module, size: Size, device: str) -> None:
    """Raise AssertionError if the experts, without dropout, are less exact than twice autograd's error."""

    def errors(way, exact=None) -> list[torch.Tensor]:
        dtype = torch.float64 if exact is None else DTYPE
        layer = Routed(way(copy.deepcopy(experts).eval().to(dtype)), size, 48)
        g = torch.Generator().manual_seed(5)
        x, dy = (torch.randn(48, size.H, generator=g).to(device, DTYPE).to(dtype) for _ in range(2))
        y = layer(x.requires_grad_())
        found = torch.autograd.grad(y, [x, *(p for p in layer.parameters() if p.requires_grad)], dy)
        return [t if exact is None else (t - e).norm() for t, e in zip((y, *found), exact or (y, *found), strict=True)]

    exact = errors(ByAutograd)
    for ours, theirs in zip(errors(lambda layer: layer, exact), errors(ByAutograd, exact), strict=True):
        assert ours <= 2 * theirs


@pytest.mark.parametrize(
    ("size", "tokens", "p"), CASES, ids=lambda s: f"{s.E}x{s.H}" if isinstance(s, Size) else f"{s:g}"
)
def test_experts(benchmark, size, tokens, p, tiny, device):
    size, tokens = (TINY, 48) if tiny else (size, tokens)
    n = 3
    found = {name: make() for name, make in layers(size, n, p, DTYPE, device).items()}
    gate(found[OURS], size, device)

    def timed_layers() -> dict[str, Timed]:
        x = torch.randn(tokens, size.H, dtype=DTYPE, device=device).requires_grad_()
        dy = torch.randn(tokens, size.H, dtype=DTYPE, device=device)
        every = {name: Routed(layer, size, tokens) for name, layer in found.items()}
        return {name: timed_layer(layer, x, dy, "forward+backward") for name, layer in every.items()}

    every = timed_layers()
    failed = drop_failing(every, (FROZEN, LORA, OURS))
    medians = compare(benchmark, every, OURS, rounds=15)
    dtype = str(DTYPE).removeprefix("torch.")
    benchmark.extra_info["settings"] = {**vars(size), "tokens": tokens, "n": n, "dropout": p, "dtype": dtype}
    if failed:
        benchmark.extra_info["failed"] = failed
    if tiny or benchmark.disabled:
        return
    clocks = {}
    if device == "cuda":
        sets = [every, timed_layers()]
        clocks["device"] = device_seconds({name: [each[name] for each in sets] for name in every})
    add_clocks(benchmark.extra_info, medians, **clocks)
    benchmark.extra_info["median"] = medians
    benchmark.extra_info["ratios"] = {
        "ours / PEFT LoRA": medians[OURS] / medians[LORA], "ours / frozen": medians[OURS] / medians[FROZEN],
    }  # fmt: skip
