"""q, k and v of one attention block, forward and backward: one shrink of x per layer against one for all.

    pytest bench/test_group.py --benchmark-json=OUT.json

Before timing, outputs and gradients of the group must equal those of separate layers up to rounding. All candidates are
interleaved and synchronized; on a GPU, replays of captured graphs give the device time, and sixteen tokens without
synchronization the host time.
"""

import pytest
import torch
from torch import nn

from bench.candidates import ADDMM, LORA_COMPILED, OURS_COMPILED, OURS_TORCH, AddmmLoRA, can_compile, on_torch
from bench.timing import ENQUEUED_TOKENS, add_clocks, compare, device_seconds, drop_failing, enqueue_seconds
from multilora_fast.benchmark.layer import FROZEN
from multilora_fast.benchmark.timing import Timed
from multilora_fast.memory.methods import LORA, OURS, REFERENCE, adapt, draw_scales

ALONE = "ours, each layer alone"
# hidden size, and output sizes of q, k and v: LLaMA-7B's, a 2048-wide block, SmolLM2-135M's
SHAPES = [(4096, (4096, 4096, 4096))] if torch.cuda.is_available() else [(2048, (2048,) * 3), (576, (576, 192, 192))]
NAMES = ("q_proj", "k_proj", "v_proj")
DTYPES = ["bfloat16"] if torch.cuda.is_available() else ["float32", "bfloat16"]
# (tokens, branches), widest first on a GPU
CASES = [(8192, 3), (2048, 3), (8192, 5)] if torch.cuda.is_available() else [(1024, 5)]


class Projections(nn.Module):
    def __init__(self, K: int, sizes: tuple[int, ...]):
        super().__init__()
        for name, N in zip(NAMES, sizes, strict=True):
            setattr(self, name, nn.Linear(K, N, bias=False))

    def forward(self, x):
        return [getattr(self, name)(x) for name in NAMES]


def candidates(K, sizes, n, r, p, dtype, device, compiled: bool) -> dict[str, nn.Module]:
    def base():
        torch.manual_seed(0)
        return Projections(K, sizes).to(device, dtype).requires_grad_(False)

    def adapted(method: str, **options):
        return adapt(base(), method, NAMES, r=r, lora_num=n, lora_dropout=p, **options)

    found = {
        FROZEN: base(),
        REFERENCE: adapted(REFERENCE),
        LORA: adapted(LORA),
        ALONE: adapted(OURS, init_weights=False, share_inputs=False),
        OURS: adapted(OURS, init_weights=False),
    }
    draw_scales(found[REFERENCE])
    if p == 0:
        found[ADDMM] = base()
        for name in NAMES:
            setattr(found[ADDMM], name, AddmmLoRA(getattr(found[ADDMM], name), n * r))
    if device == "cuda":  # elsewhere "ours" already runs on torch
        found[OURS_TORCH] = on_torch(adapted(OURS, init_weights=False))
    if compiled and can_compile(device):
        found[LORA_COMPILED] = torch.compile(adapted(LORA))
        found[OURS_COMPILED] = torch.compile(adapted(OURS, init_weights=False))
    return found


def step(model: nn.Module, x, dys):
    torch.autograd.backward(model(x), dys)


def gate(models: dict[str, nn.Module], x, dys, eps: float) -> None:
    """Raise AssertionError if the group's gradients differ from those of separate layers, without dropout."""
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
@pytest.mark.parametrize(("tokens", "n"), CASES)
def test_group(benchmark, tokens, n, shape, dtype, p, tiny, device):
    K, sizes = (32, (32, 16, 16)) if tiny else shape
    M, r, kind = 64 if tiny else tokens, 32, getattr(torch, dtype)
    models = candidates(K, sizes, n, r, p, kind, device, compiled=(tokens, n) == CASES[0])

    def drawn(tokens: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
        x = torch.randn(tokens, K, dtype=kind, device=device).requires_grad_()
        return x, [torch.randn(tokens, N, dtype=kind, device=device) for N in sizes]

    x, dys = drawn(M)
    gate(models, x, dys, torch.finfo(kind).eps)

    def timed_steps(x, dys) -> dict[str, Timed]:
        def timed_step(model: nn.Module) -> Timed:
            def clear():
                x.grad = None
                model.zero_grad()

            return Timed(clear, lambda _: step(model, x, dys))

        return {name: timed_step(model) for name, model in models.items()}

    every = timed_steps(x, dys)
    failed = drop_failing(every, (FROZEN, LORA, ALONE, OURS))
    models = {name: model for name, model in models.items() if name in every}
    medians = compare(benchmark, every, OURS, rounds=9)
    benchmark.extra_info["settings"] = {
        "M": M, "K": K, "N": list(sizes), "n": n, "r": r, "dropout": p, "dtype": dtype, "direction": "forward+backward",
    }  # fmt: skip
    if failed:
        benchmark.extra_info["failed"] = failed
    if not (tiny or benchmark.disabled):
        clocks = {}
        if device == "cuda":
            sets = [every, timed_steps(*drawn(M))]
            clocks["device"] = device_seconds({name: [each[name] for each in sets] for name in every})
            if (tokens, n) == CASES[0]:
                clocks["host"] = enqueue_seconds(timed_steps(*drawn(ENQUEUED_TOKENS)))
        add_clocks(benchmark.extra_info, medians, **clocks)
        benchmark.extra_info["median"] = medians
        benchmark.extra_info["ratios"] = {
            "alone / shared": medians[ALONE] / medians[OURS], "ours / PEFT LoRA": medians[OURS] / medians[LORA],
        }  # fmt: skip
