"""The experts' op against a loop over tokens and slots, in float64."""

from itertools import product

import pytest
import torch

from multilora_fast import dropout_mask
from multilora_fast.ops.grouped import multilora_grouped, route
from multilora_fast.ops.torch_backend import inverse_keep

E, TOP_K, K, N, BRANCHES, RANK, T = 5, 2, 24, 20, 2, 3, 29
CASES = ("even", "skewed", "one expert", "one token", "empty")
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


def problem(case: str, transposed: bool = False, scalar: bool = False, dtype=torch.float64, device="cpu") -> dict:
    g = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(device, dtype)

    index = chosen(case).to(device)
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


@pytest.mark.parametrize(
    ("backend", "p", "case"),
    [*product(("torch",), (0.0, 0.3), CASES), ("triton", 0.0, "even"), *product(("triton",), (0.3,), CASES)],
)
def test_equals_a_loop_over_tokens_and_slots(backend, p, case):
    if backend == "triton" and torch.cuda.is_available():
        pytest.skip("float64 needs the interpreter")
    transposed, scalar = case == "skewed", case == "even"
    one = problem(case, transposed, scalar)
    perm, ends = route(one["index"], E)
    seed = torch.tensor([7])
    keep = dropout_mask(seed, one["index"].numel(), K, p, backend=backend).double() * inverse_keep(p) if p else None
    want = by_slot(one, transposed, keep)
    branches = [one[name] for name in NAMES[1:]]
    options = {"scaling_factor": FACTOR, "dropout_p": p, "seed": seed, "backend": backend, "transposed": transposed}
    outs = [multilora_grouped(one["x"], one["weight"], *branches, perm, ends, top_k=TOP_K, **options)]
    if backend == "torch":
        rows = one["x"][perm // TOP_K]
        outs.append(multilora_grouped(rows, one["weight"], *branches, perm, ends, **options))
        bare = multilora_grouped(rows, one["weight"], None, None, None, perm, ends, transposed=transposed)
        outs.append(multilora_grouped(rows, None, *branches, perm, ends, y=bare, **(options | {"transposed": False})))
    inputs = [one[name] for name in NAMES]
    wanted = torch.autograd.grad(want, inputs, one["dy"])
    for out in outs:
        assert (out - want[perm]).abs().max() <= 1e-12 * want.abs().max()
        grads = torch.autograd.grad(out, inputs, one["dy"][perm], retain_graph=True)
        for name, ours, exact in zip(NAMES, grads, wanted, strict=True):
            assert ours.shape == exact.shape
            assert (ours - exact).abs().max() <= 1e-12 * exact.abs().max(), name
            if name != "x":
                idle = sorted(set(range(E)) - set(one["index"].flatten().tolist()))
                assert not ours[idle].any()


def test_experts_of_one_output():
    """Rows of one element lie 4 bytes apart, which torch's grouped product refuses."""
    index = chosen("even")
    perm, ends = route(index, E)
    x, A, B, s = (torch.randn(size) for size in ((T, K), (E, 2, 3, K), (E, 2, 1, 3), (E, 2, 1)))
    weight, leaf = torch.randn(E, 1, K), x.clone().requires_grad_()
    out = multilora_grouped(leaf, weight, A, B, s, perm, ends, top_k=TOP_K)
    out.sum().backward()
    dense = weight + torch.einsum("enr,enrk->ek", s * B[:, :, 0], A)[:, None]
    wanted = torch.einsum("tkoi,ti->tko", dense[index], x).flatten()[perm]
    torch.testing.assert_close(out[:, 0], wanted)
    torch.testing.assert_close(leaf.grad, dense[index].sum((1, 2)))


def outputs(function, one: dict, perm: torch.Tensor | None = None) -> list[torch.Tensor]:
    """The output in the order of tokens and slots, and the gradients."""
    out, inputs = function(one), [one[name] for name in NAMES]
    dy = one["dy"] if perm is None else one["dy"][perm]
    grads = torch.autograd.grad(out, inputs, dy)
    if perm is not None:
        out = torch.empty_like(out).index_copy(0, perm, out.detach())
    return [out, *grads]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", ["even", "skewed"])
def test_the_error_is_at_most_twice_that_of_the_loop(case, dtype, device):
    one = problem(case, dtype=dtype, device=device)
    perm, ends = route(one["index"], E)
    exact = {n: t.detach().double().requires_grad_(n in NAMES) if n != "index" else t for n, t in one.items()}

    def op(one):
        branches = [one[name] for name in NAMES[1:]]
        options = {"top_k": TOP_K, "scaling_factor": FACTOR}
        return multilora_grouped(one["x"], one["weight"], *branches, perm, ends, **options)

    def loop(one):
        return by_slot(one, False, None)

    truth, theirs, ours = outputs(loop, exact), outputs(loop, one), outputs(op, one, perm)
    for name, true, their, our in zip(("y", *NAMES), truth, theirs, ours, strict=True):
        assert our.dtype == dtype
        assert (our.double() - true).norm() <= 2 * (their.double() - true).norm(), name


def test_runs_repeat_bit_for_bit_and_a_scale_of_zero_leaves_the_base(device):
    one = problem("skewed", dtype=torch.float32, device=device)
    perm, ends = route(one["index"], E)

    def run(scale=1.0):
        branches = one["lora_A"], one["lora_B"], one["lora_scaling"].detach() * scale
        options = {"top_k": TOP_K, "dropout_p": 0.5, "seed": 3}
        out = multilora_grouped(one["x"], one["weight"], *branches, perm, ends, **options)
        return [out, *torch.autograd.grad(out, (one["x"], one["lora_A"], one["lora_B"]), one["dy"])]

    assert all(map(torch.equal, run(), run()))
    bare = torch.nn.functional.grouped_mm(one["x"][perm // TOP_K], one["weight"].transpose(1, 2), offs=ends)
    assert torch.equal(run(0.0)[0], bare)


@pytest.mark.parametrize(
    ("match", "change"),
    [
        ("^x must have", lambda one: {"x": one["x"][:5]}),
        ("^weight must have", lambda one: {"weight": one["weight"].transpose(1, 2)}),
        ("^weight must be frozen", lambda one: {"weight": one["weight"].requires_grad_()}),
        ("takes a weight, or y", lambda one: {"weight": None}),
        ("^y must have", lambda one: {"weight": None, "y": torch.zeros(4, 3)}),
        ("must be given together", lambda one: {"lora_A": None}),
        ("^lora_A must have", lambda one: {"lora_A": one["lora_A"][0]}),
        ("^lora_B must have", lambda one: {"lora_B": one["lora_A"]}),
        ("^lora_B must be floating", lambda one: {"lora_B": one["lora_B"].detach().long()}),
        ("^lora_scaling must have", lambda one: {"lora_scaling": one["lora_scaling"][..., :7]}),
    ],
)
def test_refusals(match, change):
    one = problem("even")
    one |= change(one)
    perm, ends = route(one["index"], E)
    with pytest.raises(ValueError, match=match):
        multilora_grouped(one["x"], one["weight"], *map(one.get, NAMES[1:]), perm, ends, top_k=TOP_K, y=one.get("y"))
