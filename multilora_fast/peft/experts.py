"""The PEFT layers of a mixture of experts: transformers' experts module, and the branches on its projections."""

from __future__ import annotations

from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook
from torch import Tensor, nn

from multilora_fast.adapters.branches import Branches
from multilora_fast.layers.shared_input import has_hooks, hooked, options_of
from multilora_fast.ops.grouped import inverse, multilora_grouped, route
from multilora_fast.peft.config import MultiLoraConfig
from multilora_fast.peft.layer import MultiLoraBranches, MultiLoraLayer, not_finite
from multilora_fast.peft.quantization import check_writable

# Attributes that transformers' use_experts_implementation sets; only these and the parameters are read.
_MARKS = ("has_gate", "has_bias", "is_transposed", "num_experts", "_apply_gate")
_PER_TOKEN = ("num_experts_per_tok", "top_k_experts", "moe_k", "moe_topk", "moe_top_k", "num_experts_per_token")


def is_experts(module: nn.Module) -> bool:
    """Whether transformers can run this experts module by a grouped product."""
    return all(hasattr(module, mark) for mark in _MARKS) and bool(projections(module))


def projections(experts: Any) -> list[str]:
    """The names of its projections, the first of which reads the hidden states."""
    names = ("gate_up_proj" if experts.has_gate else "up_proj", "down_proj")
    return list(names) if all(getattr(getattr(experts, n, None), "ndim", 0) == 3 for n in names) else []


def experts_per_token(experts: Any) -> int:
    """The experts per token in the config of an experts module; 1 if it does not say."""
    config = getattr(experts, "config", None)
    return next((k for k in (getattr(config, name, None) for name in _PER_TOKEN) if isinstance(k, int)), 1)


class MultiLoraProjection(nn.Module, MultiLoraLayer):
    """One projection of an experts module with any number of MultiLoRA adapters, each of lora_A (E, n, r, K), lora_B
    (E, n, N, r) and lora_scaling (E, n, N) or (E, n, 1)."""

    base_layer: Any

    def __init__(self, experts: nn.Module, parameter_name: str, adapter_name: str, config: MultiLoraConfig, name: str):
        super().__init__()
        self.__dict__["base_layer"] = experts  # registered as a submodule by MultiLoraExperts
        self.parameter_name = parameter_name
        self.num_experts, *sizes = self.weight.shape
        self.fan_in_fan_out = self.base_layer.is_transposed
        self.in_features, self.out_features = sizes if self.fan_in_fan_out else reversed(sizes)
        self.add_first(adapter_name, config, name)

    @property
    def weight(self) -> nn.Parameter:
        """The base's parameter, (E, N, K), or (E, K, N) where the experts keep it transposed."""
        return getattr(self.base_layer, self.parameter_name)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        branches = self.multilora_branches[adapter_name]
        if not branches.lora_A.is_meta:
            branches.to(device or self.weight.device, self.weight.dtype)

    @torch.no_grad()
    def _add_to_weight(self, name: str, sign: float, check: bool = False) -> None:
        """Merge one expert after the other, so that no tensor of the parameter's size is made."""
        self.check_writable()
        A, B, s, factor = Branches.of(self.multilora_branches[name])

        def merged(e: int) -> Tensor:
            own, delta = self.weight[e], self._delta(Branches(A[e], B[e], s[e], factor))
            return torch.add(own, delta, alpha=sign).to(own.dtype)

        everyone = range(len(A))
        if check and not all(torch.isfinite(merged(e)).all() for e in everyone):
            raise not_finite(name)
        for e in everyone:
            self.weight.data[e] = merged(e)

    def check_writable(self) -> None:
        check_writable(self, None)


class MultiLoraExperts(nn.Module):
    """An experts module of transformers with MultiLoRA on one or both of its projections, which are submodules named
    after their parameters. If an adapter is active, it runs by torch's grouped product, whatever implementation the
    model's config names; otherwise it runs as it is."""

    base_layer: Any

    def __init__(self, base_layer: nn.Module):
        super().__init__()
        self.base_layer = base_layer

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        base: Any = self.base_layer
        first, second = projections(base)
        active = {one.parameter_name: one.active_branches() for one in self.projections()}
        if not any(active.values()):
            for projection in self.projections():
                if projection.merged and projection.disable_adapters:
                    projection.unmerge()
            return base(hidden_states, top_k_index, top_k_weights)
        if hooked(base) and not _only_placed(base):
            raise ValueError(
                "MultiLoRA reads the weights of experts, but these have hooks or a forward of their own, as offloading "
                "gives them: keep the experts on one device."
            )
        perm, ends = route(top_k_index, base.num_experts)
        experts = top_k_index.reshape(-1)[perm]

        def projected(name: str, x: Tensor, top_k: int | None = None) -> Tensor:
            y = project(base, name, active.get(name, []), x, perm, ends, top_k)
            return y.add_(getattr(base, f"{name}_bias")[experts]) if base.has_bias else y

        h = projected(first, hidden_states, top_k_index.shape[-1])
        h = base._apply_gate(h) if base.has_gate else base.act_fn(h)
        y = projected(second, h)
        if getattr(base, "has_post_expert_norm", False):
            y = base.post_expert_norm(y)
        y = y * top_k_weights.reshape(-1)[perm].unsqueeze(-1)
        return y[inverse(perm)].view(*top_k_index.shape, y.shape[1]).sum(1).to(hidden_states.dtype)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        for projection in self.projections():
            projection.merge(safe_merge, adapter_names)

    def projections(self) -> list[MultiLoraProjection]:
        return [child for child in self.children() if isinstance(child, MultiLoraProjection)]

    def get_base_layer(self) -> nn.Module:
        return self.base_layer


def _only_placed(base: Any) -> bool:
    """Whether accelerate's hook is the only one and merely moves inputs to the weights' device, as on every module of a
    model that is spread over GPUs."""
    placed = getattr(base, "_hf_hook", None)
    return not has_hooks(base) and isinstance(placed, AlignDevicesHook) and not placed.offload


def project(
    experts: Any, name: str, branches: list[MultiLoraBranches], x: Tensor, perm: Tensor, ends: Tensor,
    top_k: int | None = None,
) -> Tensor:  # fmt: skip
    """One projection of all ``experts`` without its bias, with the adapters ``branches``: of rows (S, K), or of tokens
    (S / top_k, K) that are gathered from, to (S, N)."""
    base: dict = {"weight": getattr(experts, name), "transposed": experts.is_transposed}
    rows: dict = {"perm": perm, "ends": ends, "top_k": top_k}
    if not branches:
        return multilora_grouped(x, lora_A=None, lora_B=None, lora_scaling=None, **base, **rows)
    for one in branches:
        factor, p, training, backend, *_ = options_of(one)
        y = multilora_grouped(
            x, lora_A=one.lora_A, lora_B=one.lora_B, lora_scaling=one.lora_scaling, **base, **rows,
            scaling_factor=factor, dropout_p=p, training=training, backend=backend,
        )  # fmt: skip
        base = {"weight": None, "y": y}
    return y
