"""The experts' op against a loop over tokens and slots, in float64."""

import pytest
import torch

from multilora_fast import dropout_mask
from multilora_fast.ops.grouped import multilora_grouped, route
from multilora_fast.ops.torch_backend import inverse_keep

E, TOP_K, K, N, BRANCHES, RANK, T = 5, 2, 24, 20, 2, 3, 29
CASES = ("even", "skewed", "one expert", "one token", "empty")
BACKENDS = ("torch", "triton")
FACTOR = 1.75


def chosen(case: str) -> torch.Tensor:
    """Which experts each token goes to, (T, k)."""
    g = torch.Generator().manual_seed(1)
    if case == "one token":
        return torch.tensor([[E - 1, 0]])
    if case == "one expert":
        return torch.full((T, TOP_K), E - 1)
    if case == "skewed":
        return torch.stack([torch.zeros(T, dtype=torch.long), torch.arange(T) % E], 1)
    return torch.stack([torch.randperm(E if case == "even" else 2, generator=g)[:TOP_K] for _ in range(T)])


def problem(case: str, transposed: bool = False, scalar: bool = False, dtype=torch.float64) -> dict:
    g = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    index = chosen(case)
    return {
        "index": index,
        "x": draw(len(index), K).requires_grad_(),
        "weight": draw(E, K, N) if transposed else draw(E, N, K),
        "lora_A": draw(E, BRANCHES, RANK, K).requires_grad_(),
        "lora_B": draw(E, BRANCHES, N, RANK).requires_grad_(),
        "lora_scaling": draw(E, BRANCHES, 1 if scalar else N).requires_grad_(),
        "dy": draw(index.numel(), N),
    }


def by_slot(one: dict, transposed: bool, keep: torch.Tensor | None) -> torch.Tensor:
    """The output (T·k, N), one token and slot after the other."""
    rows = []
    for place, e in enumerate(one["index"].flatten().tolist()):
        x = one["x"][place // TOP_K]
        weight = one["weight"][e].t() if transposed else one["weight"][e]
        y = weight @ x
        dropped = x if keep is None else x * keep[place]
        for A, B, s in zip(one["lora_A"][e], one["lora_B"][e], one["lora_scaling"][e], strict=True):
            y = y + FACTOR * s * (B @ (A @ dropped))
        rows.append(y)
    return torch.stack(rows)


NAMES = ("x", "lora_A", "lora_B", "lora_scaling")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("case", CASES)
def test_equals_a_loop_over_tokens_and_slots(case, p, backend):
    transposed, scalar = case == "skewed", case == "even"
    one = problem(case, transposed, scalar)
    perm, ends = route(one["index"], E)
    seed = torch.tensor([7])
    keep = dropout_mask(seed, one["index"].numel(), K, p, backend=backend).double() * inverse_keep(p) if p else None
    want = by_slot(one, transposed, keep)
    branches = [one[name] for name in NAMES[1:]]
    options = {"scaling_factor": FACTOR, "dropout_p": p, "seed": seed, "backend": backend, "transposed": transposed}
    gathered = multilora_grouped(one["x"], one["weight"], *branches, perm, ends, top_k=TOP_K, **options)
    rows = one["x"][perm // TOP_K]
    given = multilora_grouped(rows, one["weight"], *branches, perm, ends, **options)
    bare = multilora_grouped(rows, one["weight"], None, None, None, perm, ends, transposed=transposed)
    added = multilora_grouped(rows, None, *branches, perm, ends, y=bare, **(options | {"transposed": False}))
    inputs = [one[name] for name in NAMES]
    wanted = torch.autograd.grad(want, inputs, one["dy"])
    for out in (gathered, given, added):
        assert (out - want[perm]).abs().max() <= 1e-12 * want.abs().max()
        grads = torch.autograd.grad(out, inputs, one["dy"][perm], retain_graph=True)
        for name, ours, exact in zip(NAMES, grads, wanted, strict=True):
            assert ours.shape == exact.shape
            assert (ours - exact).abs().max() <= 1e-12 * exact.abs().max(), name
            if name != "x":
                idle = sorted(set(range(E)) - set(one["index"].flatten().tolist()))
                assert not ours[idle].any()
