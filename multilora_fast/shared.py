"""One shrink for layers that read the same x, as q, k and v do, and gate and up.

The first layer of a group that is called computes H for all of them in one pass over x and keeps x once; each of the
others takes its slice. Backward makes all their dÃ in one pass over x and their share of dx in one product. A group
draws one dropout mask. This is for training: in evaluation every layer shrinks x itself, and its bits do not depend on
its neighbours. M tokens, Rᵢ the total rank of layer i.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.weak import TensorWeakRef

from multilora_fast.checks import check_base, check_output
from multilora_fast.functional import autocasts, prepare
from multilora_fast.inputs import Kept
from multilora_fast.op import (
    Needs,
    Settings,
    dense_weight,
    finish,
    finish_backward,
    no_autocast,
    project,
    project_backward,
    rows,
)

# What attention and MLP blocks in transformers' and diffusers' models call them.
SIBLINGS = (
    ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("query", "key", "value"), ("q", "k", "v"),
    ("to_q", "to_k", "to_v"), ("w1", "w3"), ("wi_0", "wi_1"),
)  # fmt: skip
_NOTHING = Needs(*[False] * 6)
Layer = Any  # a fused layer or a PEFT adapter of ours


def find_groups(modules: Mapping[str, Layer]) -> list["SharedInput"]:
    """Of modules by path, those under one parent whose names say that they read the same x, and have the same K."""
    groups = []
    for parent in dict.fromkeys(path.rpartition(".")[0] for path in modules):
        for names in SIBLINGS:
            paths = [f"{parent}.{name}" if parent else name for name in names]
            members = {path: modules[path] for path in paths if path in modules}
            if len(members) > 1 and len({module.lora_A.shape[-1] for module in members.values()}) == 1:
                groups.append(SharedInput(members))
    return groups


class SharedInput:
    """Modules that read one x, by path; each holds what a fused layer or a PEFT adapter of ours does.

    ``left`` is None, or why the group shares no more: its layers were seen to read different tensors.
    """

    def __init__(self, members: dict[str, Layer]):
        self.members = members
        for member in members.values():
            member.shared = self
        self.left: str | None = None
        self._waiting: tuple | None = None  # x, what else must agree, and H by the name of each member to come
        self._deserted = 0

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_waiting": None}

    def take(self, member: Layer, x: Tensor) -> tuple[Tensor, Tensor] | None:
        """x as :func:`finish_shared` takes it, and H (M, R) of ``member``; None where nothing can be shared, and the
        layer computes it itself."""
        name = next((name for name, other in self.members.items() if other is member), None)
        if name is None or self.left or not member.training or torch.compiler.is_compiling() or x.is_inference():
            return None
        way = _way(member)
        state = (x._version, torch.is_grad_enabled(), autocasts(x), way)
        if self._waiting is not None:
            expected, before, passed, H = self._waiting
            if expected() is x and before == state and name in H:
                found = H.pop(name)
                if not H:
                    self._waiting, self._deserted = None, 0
                return passed, found
        if {_way(other) for other in self.members.values()} != {(x.device, x.shape[-1:], *way[2:])}:
            return None
        if self._waiting is not None:
            self._deserted += 1
            if name in H or self._deserted > 1:
                self.left, self._waiting = "its layers were not given the same tensor", None
                return None
        settings, seed = _prepared(next(iter(self.members.values())), x, dropout=True)
        passed, *Hs = Project.apply(x, seed, settings, *(member.lora_A for member in self.members.values()))
        passed = passed if x.requires_grad else x
        H = dict(zip(self.members, Hs, strict=True))
        found = H.pop(name)
        self._waiting = (TensorWeakRef(x), state, passed, H)
        return passed, found


def finish_shared(member: Layer, x: Tensor, H: Tensor, *, weight=None, bias=None, y=None) -> Tensor:
    """The output (..., N) of a layer whose H is known: x Wᵀ + b + H B̃ᵀ, or y + H B̃ᵀ."""
    settings, _ = _prepared(member, x, dropout=False)
    N = member.lora_B.shape[1]
    if y is not None:
        check_output(x, y, N)
    elif isinstance(weight, Tensor):
        check_base(x, weight, bias, N, autocast=autocasts(x))
    return Finish.apply(x, y, weight, bias, H, member.lora_B, member.lora_scaling, settings)


def _way(member: Layer) -> tuple:
    """What must agree for one shrink to serve several members. A parameter that FSDP or ZeRO has taken away agrees with
    no x: it has another shape, or is a DTensor."""
    A, dropout = member.lora_A, member.lora_dropout
    K = None if A.dim() != 3 or hasattr(A, "device_mesh") else A.shape[-1:]
    return A.device, K, A.dtype, dropout.p if dropout.training else 0.0, member.backend, member.save_inputs


def _prepared(member: Layer, x: Tensor, *, dropout: bool) -> tuple[Settings, Tensor | None]:
    branches = (member.lora_A, member.lora_B, member.lora_scaling)
    p = member.lora_dropout.p if dropout else 0.0
    training = member.lora_dropout.training
    return prepare(x, *branches, member.scaling_factor, p, training, None, member.backend, member.save_inputs)


def _beside(lora_As: Sequence[Tensor]) -> Tensor:
    """All branches of all layers as one of rank Σ Rᵢ, (1, Σ Rᵢ, K)."""
    return torch.cat([A.flatten(0, 1) for A in lora_As])[None]


class Project(torch.autograd.Function):
    """x itself, and the H (M, Rᵢ) of every layer of a group, as slices of one tensor.

    The layers take the x that comes out: the sum of their dy W comes back here, and grows in place.
    """

    @staticmethod
    def forward(ctx, x, seed, settings, *lora_As):
        ctx.set_materialize_grads(False)
        x_needed, _, _, *A_needed = ctx.needs_input_grad
        ctx.settings, ctx.needs = settings, _NOTHING._replace(x=x_needed, lora_A=any(A_needed))
        with no_autocast(x.device.type):
            H = project(x, _beside(lora_As), seed, settings)
        ctx.shape = x.shape
        ctx.save_for_backward(*ctx.needs.kept_x(x, settings), seed, *lora_As)
        return x, *H.split([A.shape[:2].numel() for A in lora_As], dim=1)

    @staticmethod
    @once_differentiable
    def backward(ctx, dx, *dHs):
        x, scale, seed, *lora_As = ctx.saved_tensors
        given = next((dH for dH in dHs if dH is not None), None)
        if given is None:
            return dx, None, None, *[None] * len(lora_As)
        sizes = [A.shape[:2].numel() for A in lora_As]
        whole = torch.cat(
            [given.new_zeros(len(given), R) if dH is None else dH for dH, R in zip(dHs, sizes, strict=True)], 1
        )
        with no_autocast(whole.device.type):
            grows = dx is not None and dx.dtype == ctx.settings.dtype  # it is wider under autocast
            own = rows(dx) if grows else None
            own, dA = project_backward(whole, Kept(x, scale), own, _beside(lora_As), seed, ctx.settings, ctx.needs)
            if own is not None:
                own = own.view(ctx.shape)
                dx = own if grows or dx is None else dx.add_(own)
        grads = [None] * len(lora_As) if dA is None else dA[0].split(sizes)
        dAs = (
            g.view(A.shape) if needed and dH is not None else None
            for g, A, dH, needed in zip(grads, lora_As, dHs, ctx.needs_input_grad[3:], strict=True)
        )
        return dx, None, None, *dAs


class Finish(torch.autograd.Function):
    """The rest of a layer whose H is given. ``weight`` may be a function that returns the dense weight."""

    @staticmethod
    def forward(ctx, x, y, weight, bias, H, lora_B, lora_scaling, settings):
        ctx.dense, ctx.settings = weight if callable(weight) else None, settings
        x_needed, ctx.y_needed, w_needed, b_needed, H_needed, B_needed, s_needed, _ = ctx.needs_input_grad
        ctx.needs = Needs(x_needed, w_needed, b_needed, H_needed, B_needed, s_needed)
        with no_autocast(x.device.type):
            dense = dense_weight(weight, x, bias, lora_B)
            out = finish(x, y, dense, bias, H, lora_B, lora_scaling, settings)
        kept = None if callable(weight) else weight
        ctx.save_for_backward(x if w_needed else None, ctx.needs.kept_H(H), kept, lora_B, lora_scaling)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, H, weight, lora_B, lora_scaling = ctx.saved_tensors
        with no_autocast(dy.device.type):
            if ctx.dense is not None and ctx.needs.x:
                weight = ctx.dense()
            tokens = rows(dy.to(ctx.settings.dtype))
            dw, db, dB, ds, dH = finish_backward(tokens, x, H, lora_B, lora_scaling, ctx.settings, ctx.needs)
            dx = None
            if ctx.needs.x and weight is not None:
                dx = tokens @ weight.to(ctx.settings.dtype)
                dx = dx.view(*dy.shape[:-1], dx.shape[1])
        return dx, dy if ctx.y_needed else None, dw, db, dH, dB, ds, None
