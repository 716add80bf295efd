"""One shrink for layers that read the same x, as q, k and v do, and gate and up.

The first layer of a group that is called computes H for all of them in one pass over x and keeps x once; each of the
others takes its slice. Backward makes all their dÃ in one pass over x and their share of dx in one product. A group
draws one dropout mask. This is for training: in evaluation every layer shrinks x itself, and its bits do not depend on
its neighbours. M tokens, Rᵢ the total rank of layer i.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import TensorWeakRef

from multilora_fast.ops.autograd import ExpandFunction, SharedShrinkFunction
from multilora_fast.ops.checks import check_base, check_base_output
from multilora_fast.ops.equations import OpSettings
from multilora_fast.ops.functional import autocasts, prepare

# What attention and MLP blocks in transformers' and diffusers' models call them.
SIBLINGS = (
    ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("query", "key", "value"), ("q", "k", "v"),
    ("to_q", "to_k", "to_v"), ("w1", "w3"), ("wi_0", "wi_1"),
)  # fmt: skip
Layer = Any  # a fused layer or a PEFT adapter of ours


def assign_groups(modules: Mapping[str, Layer]) -> None:
    """Set ``shared`` of those ``modules``, by path, under one parent whose names say that they read the same x, if
    their K agree."""
    for parent in dict.fromkeys(path.rpartition(".")[0] for path in modules):
        for names in SIBLINGS:
            paths = [f"{parent}.{name}" if parent else name for name in names]
            members = {path: modules[path] for path in paths if path in modules}
            if len(members) > 1 and len({module.lora_A.shape[-1] for module in members.values()}) == 1:
                group = SharedInput(members)
                for member in members.values():
                    member.shared = group


class SharedInput:
    """Modules that read one x, by path; each holds what a fused layer or a PEFT adapter of ours does.

    ``disabled_reason`` is None, or why the group shares no more: its layers were seen to read different tensors.
    """

    def __init__(self, members: dict[str, Layer]):
        self.members = members
        self.disabled_reason: str | None = None
        self._waiting: tuple | None = None  # x, what else must agree, and H by the name of each member to come
        self._abandoned = 0

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_waiting": None}

    def take(self, member: Layer, x: Tensor) -> tuple[Tensor, Tensor] | None:
        """x as :func:`expand_shared` takes it, and H (M, R) of ``member``; None where nothing can be shared, and the
        layer computes it itself."""
        name = next((name for name, other in self.members.items() if other is member), None)
        if (
            name is None
            or self.disabled_reason
            or not member.training
            or torch.compiler.is_compiling()
            or x.is_inference()
        ):
            return None
        way = _way(member)
        state = (x._version, torch.is_grad_enabled(), autocasts(x), way)
        if self._waiting is not None:
            expected, before, passed, H = self._waiting
            if expected() is x and before == state and name in H:
                found = H.pop(name)
                if not H:
                    self._waiting, self._abandoned = None, 0
                return passed, found
        if {_way(other) for other in self.members.values()} != {(x.device, x.shape[-1:], *way[2:])}:
            return None
        if self._waiting is not None:
            self._abandoned += 1
            if name in H or self._abandoned > 1:
                self.disabled_reason, self._waiting = "its layers were not given the same tensor", None
                return None
        settings, seed = _prepared(next(iter(self.members.values())), x, dropout=True)
        passed, *Hs = SharedShrinkFunction.apply(
            x, seed, settings, *(member.lora_A for member in self.members.values())
        )
        passed = passed if x.requires_grad else x
        H = dict(zip(self.members, Hs, strict=True))
        found = H.pop(name)
        self._waiting = (TensorWeakRef(x), state, passed, H)
        return passed, found


def expand_shared(member: Layer, x: Tensor, H: Tensor, *, weight=None, bias=None, y=None) -> Tensor:
    """The output (..., N) of a layer whose H is known: x Wᵀ + b + H B̃ᵀ, or y + H B̃ᵀ."""
    settings, _ = _prepared(member, x, dropout=False)
    N = member.lora_B.shape[1]
    if y is not None:
        check_base_output(x, y, N)
    elif isinstance(weight, Tensor):
        check_base(x, weight, bias, N, autocast=autocasts(x))
    return ExpandFunction.apply(x, y, weight, bias, H, member.lora_B, member.lora_scaling, settings)


def _way(member: Layer) -> tuple:
    """What must agree for one shrink to serve several members. A parameter that FSDP or ZeRO has taken away agrees with
    no x: it has another shape, or is a DTensor."""
    A, dropout = member.lora_A, member.lora_dropout
    K = None if A.dim() != 3 or hasattr(A, "device_mesh") else A.shape[-1:]
    return A.device, K, A.dtype, dropout.p if dropout.training else 0.0, member.backend, member.save_inputs


def _prepared(member: Layer, x: Tensor, *, dropout: bool) -> tuple[OpSettings, Tensor | None]:
    branches = (member.lora_A, member.lora_B, member.lora_scaling)
    p = member.lora_dropout.p if dropout else 0.0
    training = member.lora_dropout.training
    return prepare(x, *branches, member.scaling_factor, p, training, None, member.backend, member.save_inputs)
