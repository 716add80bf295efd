"""q, k and v of one attention block, forward and backward: each shrinking x alone, or all of them in one shrink.

    pytest bench/test_group.py --benchmark-json=OUT.json

Before anything is timed, outputs and gradients of the group must be those of the layers alone, but for rounding.
"""

import pytest
import torch
from torch import nn

from bench.timing import compare
from multilora_fast.benchmark.layer import FROZEN
from multilora_fast.benchmark.timing import Timed
from multilora_fast.memory.methods import LORA, OURS, adapt

ALONE = "ours, each layer alone"
# hidden size, and output sizes of q, k and v: LLaMA-7B's, a 2048-wide block, SmolLM2-135M's
SHAPES = [(4096, (4096, 4096, 4096))] if torch.cuda.is_available() else [(2048, (2048,) * 3), (576, (576, 192, 192))]
NAMES = ("q_proj", "k_proj", "v_proj")
DTYPES = ["bfloat16"] if torch.cuda.is_available() else ["float32", "bfloat16"]


class Projections(nn.Module):
    def __init__(self, K: int, sizes: tuple[int, ...]):
        super().__init__()
        for name, N in zip(NAMES, sizes, strict=True):
            setattr(self, name, nn.Linear(K, N, bias=False))

    def forward(self, x):
        return [getattr(self, name)(x) for name in NAMES]


def candidates(K, sizes, n, r, p, dtype, device) -> dict[str, nn.Module]:
    def base():
        torch.manual_seed(0)
        return Projections(K, sizes).to(device, dtype).requires_grad_(False)

    def adapted(method: str, **options):
        return adapt(base(), method, NAMES, r=r, lora_num=n, lora_dropout=p, **options)

    return {
        FROZEN: base(),
        LORA: adapted(LORA),
        ALONE: adapted(OURS, init_weights=False, share_inputs=False),
        OURS: adapted(OURS, init_weights=False),
    }


def step(model: nn.Module, x, dys):
    torch.autograd.backward(model(x), dys)


def gate(models: dict[str, nn.Module], x, dys, eps: float) -> None:
    """Raise AssertionError unless the group's gradients are those of the layers alone, without dropout."""
    found = []
    for model in (models[ALONE], models[OURS]):
        dropouts = [(m, m.p) for m in model.modules() if isinstance(m, nn.Dropout)]
        for dropout, _ in dropouts:
            dropout.p = 0.0
        x.grad = None
        step(model, x, dys)
        found.append([x.grad, *(p.grad for p in model.parameters() if p.requires_grad)])
        for dropout, p in dropouts:
            dropout.p = p
    assert all((a - b).norm() <= 8 * eps * a.norm() for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("p", [0.0, 0.05])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}")
def test_group(benchmark, shape, dtype, p, tiny, device):
    K, sizes = (32, (32, 16, 16)) if tiny else shape
    n, r = 5, 32
    M, kind = 64 if tiny else 8192 if device == "cuda" else 1024, getattr(torch, dtype)
    models = candidates(K, sizes, n, r, p, kind, device)
    x = torch.randn(M, K, dtype=kind, device=device).requires_grad_()
    dys = [torch.randn(M, N, dtype=kind, device=device) for N in sizes]
    gate(models, x, dys, torch.finfo(kind).eps)

    def timed_step(model: nn.Module) -> Timed:
        def clear():
            x.grad = None
            model.zero_grad()

        return Timed(clear, lambda _: step(model, x, dys))

    medians = compare(benchmark, {name: timed_step(model) for name, model in models.items()}, OURS, rounds=9)
    benchmark.extra_info["settings"] = {
        "M": M, "K": K, "N": list(sizes), "n": n, "r": r, "dropout": p, "dtype": dtype, "direction": "forward+backward",
    }  # fmt: skip
    if not (tiny or benchmark.disabled):
        benchmark.extra_info["median"] = medians
        benchmark.extra_info["ratios"] = {
            "alone / shared": medians[ALONE] / medians[OURS], "ours / PEFT LoRA": medians[OURS] / medians[LORA],
        }  # fmt: skip
