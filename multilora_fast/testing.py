"""Exactness is judged against the reference loop in float64, by PyTorch's own error.

The 2× rule, for the output and every gradient, same dropout mask, Frobenius norms:
‖error‖ ≤ 2·‖error of the reference in that dtype‖ + eps·‖the same formula on absolute values‖.
"""

from collections.abc import Callable, Collection
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from multilora_fast.reference import MultiLoRALinear

NAMES = ("weight", "bias", "lora_A", "lora_B", "lora_scaling")


@dataclass
class Case:
    """Inputs of the op: x (..., K), dy (..., N), and parameters by name."""

    x: Tensor
    dy: Tensor
    parameters: dict[str, Tensor]  # by NAMES; bias may be missing
    scaling_factor: float = 1.0
    factor: Tensor | None = None  # (M, K): mask/(1−p), by which dropout multiplies x

    def map(self, f: Callable[[Tensor], Tensor]) -> "Case":
        parameters = {k: f(v) for k, v in self.parameters.items()}
        return Case(f(self.x), f(self.dy), parameters, self.scaling_factor, self.factor)


def random_case(
    shape: tuple[int, ...], N: int, n: int, r: int, *, dtype=torch.float32, adapter_dtype=None, bias=True,
    scaling="vector", scaling_factor=2.0, seed=0, device="cpu",
) -> Case:  # fmt: skip
    """A case with x of ``shape`` (..., K) and non-zero scales, drawn in float64 and rounded."""
    g = torch.Generator().manual_seed(seed)
    K = shape[-1]

    def draw(*size, scale=1.0, to=dtype):
        return (torch.randn(*size, generator=g, dtype=torch.float64) * scale).to(device, to)

    own = adapter_dtype or dtype
    parameters = {
        "weight": draw(N, K, scale=K**-0.5),
        "lora_A": draw(n, r, K, scale=K**-0.5, to=own),
        "lora_B": draw(n, N, r, scale=r**-0.5, to=own),
        "lora_scaling": draw(n, N if scaling == "vector" else 1, to=own),
    }
    if bias:
        parameters["bias"] = draw(N)
    return Case(draw(*shape), draw(*shape[:-1], N), parameters, scaling_factor)


def run(op: Callable[..., Tensor], case: Case, wanted: Collection[str] | None = None) -> dict[str, Tensor]:
    """The output of ``op(x, **parameters)`` as "out", and the gradients of x and every parameter, or of those
    ``wanted`` alone, in float64."""
    leaves = {"x": case.x, **case.parameters}
    leaves = {k: v.detach().requires_grad_(wanted is None or k in wanted) for k, v in leaves.items()}
    out = op(leaves["x"], **{k: v for k, v in leaves.items() if k != "x"})
    out.backward(case.dy.to(out.dtype))
    found: dict[str, Any] = {"out": out.detach()} | {k: v.grad for k, v in leaves.items() if v.requires_grad}
    return {k: v.double() for k, v in found.items()}


def reference_op(case: Case) -> Callable[..., Tensor]:
    """The reference's forward as a function of x and the parameters, with the case's dropout."""

    def op(x, weight, lora_A, lora_B, lora_scaling, bias=None):
        n, r, _ = lora_A.shape
        base = nn.Linear(1, 1, bias=False)
        layer = MultiLoRALinear(base, r=r, lora_num=n, lora_alpha=r * case.scaling_factor)
        factor = case.factor
        if factor is not None:
            layer.lora_dropout.forward = lambda x: x * factor.to(x.dtype).view(x.shape)  # type: ignore
        layer._parameters = {  # the caller's own tensors, for their gradients
            "weight": weight, "bias": bias, "lora_A": lora_A, "lora_B": lora_B, "lora_scaling": lora_scaling,
        }  # fmt: skip
        return layer(x)

    return op


def truth(case: Case) -> dict[str, Tensor]:
    """The reference's result in float64."""
    return run(reference_op(case), case.map(Tensor.double))


def two_times_rule(
    op: Callable[..., Tensor], case: Case, *, autocast: torch.dtype | None = None, wanted: Collection[str] | None = None
) -> dict[str, tuple]:
    """(error, bound) of ``op`` for the output and every gradient, or those of the leaves ``wanted`` alone. The
    reference runs in the case's dtype, or under autocast if its dtypes are mixed or ``autocast`` is given; ``op`` runs
    under autocast only if it is given."""
    device = case.x.device.type
    mixed = case.x.dtype if case.parameters["lora_A"].dtype != case.x.dtype else None
    exact = truth(case)
    absolute = run(reference_op(case), case.map(lambda t: t.double().abs()))

    def under(dtype):
        return nullcontext() if dtype is None else torch.autocast(device, dtype)

    with under(autocast or mixed):
        pytorch = run(reference_op(case), case)
    with under(autocast):
        ours = run(op, case, wanted)
    eps = torch.finfo(autocast or case.x.dtype).eps
    return {
        k: ((ours[k] - exact[k]).norm().item(), (2 * (pytorch[k] - exact[k]).norm() + eps * absolute[k].norm()).item())
        for k in ours
    }


def assert_two_times_rule(op: Callable[..., Tensor], case: Case, **options) -> None:
    """Raise AssertionError naming each tensor that breaks the 2× rule; ``options`` as in :func:`two_times_rule`."""
    broken = {k: f"{e:.3e} > {b:.3e}" for k, (e, b) in two_times_rule(op, case, **options).items() if not e <= b}
    assert not broken, f"error beyond the 2x rule: {broken}"
