"""The PEFT layers of a mixture of experts: the experts of transformers, and the branches on their projections."""

from __future__ import annotations

from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook
from torch import Tensor, nn

from multilora_fast.adapters.branches import Branches, as_lora
from multilora_fast.layers.shared_input import has_hooks, hooked
from multilora_fast.ops.grouped import inverse, multilora_grouped, route
from multilora_fast.peft.layer import MultiLoraBranches, MultiLoraLayer, not_finite
from multilora_fast.peft.quantization import check_writable

# Set by transformers' use_experts_implementation; all that is read of an experts module, beside its parameters.
_MARKS = ("has_gate", "has_bias", "is_transposed", "num_experts", "_apply_gate")
_PER_TOKEN = ("num_experts_per_tok", "top_k_experts", "moe_k", "moe_topk", "moe_top_k", "num_experts_per_token")


def is_experts(module: nn.Module) -> bool:
    """Whether this is an experts module that transformers runs by a grouped product."""
    return all(hasattr(module, mark) for mark in _MARKS) and bool(projections(module))


def projections(experts: Any) -> list[str]:
    """The names of its projections, the first of which reads the hidden states."""
    names = ("gate_up_proj" if experts.has_gate else "up_proj", "down_proj")
    return list(names) if all(getattr(getattr(experts, n, None), "ndim", 0) == 3 for n in names) else []


def experts_per_token(experts: Any) -> int:
    """How many experts the config of an experts module sends a token to; 1 where it does not say."""
    config = getattr(experts, "config", None)
    return next((k for k in (getattr(config, name, None) for name in _PER_TOKEN) if isinstance(k, int)), 1)


class MultiLoraProjection(nn.Module, MultiLoraLayer):
    """One projection of an experts module under any number of MultiLoRA adapters: a branch is lora_A (E, n, r, K),
    lora_B (E, n, N, r) and lora_scaling (E, n, N) or (E, n, 1)."""

    base_layer: Any

    def __init__(self, experts: nn.Module, parameter_name: str, adapter_name: str, **options):
        super().__init__()
        self.__dict__["base_layer"] = experts  # whose owner is MultiLoraExperts
        self.parameter_name = parameter_name
        self.num_experts, *sizes = self.weight.shape
        self.in_features, self.out_features = sizes if self.base_layer.is_transposed else reversed(sizes)
        self.multilora_branches = nn.ModuleDict()
        self._disable_adapters, self._active_adapter, self.merged_adapters = False, adapter_name, []
        self.update_layer(adapter_name, **options)

    @property
    def weight(self) -> nn.Parameter:
        """The base's parameter, (E, N, K), or (E, K, N) where the experts keep it transposed."""
        return getattr(self.base_layer, self.parameter_name)

    def update_layer(self, adapter_name: str, *, inference_mode: bool, **options) -> None:
        """Add an adapter; ``options`` are those of :class:`MultiLoraBranches`."""
        branches = MultiLoraBranches(self.in_features, self.out_features, experts=self.num_experts, **options)
        branches.__dict__["layer"] = self
        if not branches.lora_A.is_meta:
            branches.to(self.weight.device, self.weight.dtype)
        self.multilora_branches[adapter_name] = branches
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def forward(self, x: Tensor, perm: Tensor, ends: Tensor, top_k: int | None = None) -> Tensor:
        """The projection of the rows (S, K), or of the tokens (S / top_k, K) that they are gathered from, to (S, N)."""
        return project(self.base_layer, self.parameter_name, self.active_branches(), x, perm, ends, top_k)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """What merging the adapter adds to the parameter, laid out as it is."""
        return torch.stack([self._delta(adapter, e) for e in range(self.num_experts)])

    def _delta(self, adapter: str, expert: int) -> Tensor:
        A, B, s, c = Branches.of(self.multilora_branches[adapter])
        A, B = as_lora(Branches(A[expert], B[expert], s[expert], c))
        delta = B @ A.to(B.dtype)
        return delta.t() if self.base_layer.is_transposed else delta

    @torch.no_grad()
    def _add_to_weight(self, name: str, sign: float, check: bool = False) -> None:
        """One expert after the other, so that nothing of the parameter's size is made."""
        self.check_writable()
        weight = self.weight.data
        if check:
            merged = (torch.add(own, self._delta(name, e), alpha=sign).to(own.dtype) for e, own in enumerate(weight))
            if not all(torch.isfinite(one).all() for one in merged):
                raise not_finite(name)
        for e, own in enumerate(weight):
            own.copy_(torch.add(own, self._delta(name, e), alpha=sign))

    def check_writable(self) -> None:
        check_writable(self, None)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return False


class MultiLoraExperts(nn.Module):
    """An experts module of transformers with MultiLoRA on one or both of its projections, which are its submodules of
    the parameters' names. Where no adapter is active the experts run as they are; elsewhere by torch's grouped product,
    whatever implementation the model's config names."""

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
        self._check(base)
        top_k = top_k_index.shape[-1]
        perm, ends = route(top_k_index, base.num_experts)
        experts = top_k_index.reshape(-1)[perm]
        h = project(base, first, active.get(first, []), hidden_states, perm, ends, top_k)
        h = _add_bias(base, first, h, experts)
        h = base._apply_gate(h) if base.has_gate else base.act_fn(h)
        y = project(base, second, active.get(second, []), h, perm, ends)
        y = _add_bias(base, second, y, experts)
        if getattr(base, "has_post_expert_norm", False):
            y = base.post_expert_norm(y)
        y = y * top_k_weights.reshape(-1)[perm].unsqueeze(-1)
        return y[inverse(perm)].view(*top_k_index.shape, -1).sum(1).to(hidden_states.dtype)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        for projection in self.projections():
            projection.merge(safe_merge, adapter_names)

    def projections(self) -> list[MultiLoraProjection]:
        return [child for child in self.children() if isinstance(child, MultiLoraProjection)]

    def get_base_layer(self) -> nn.Module:
        return self.base_layer

    @staticmethod
    def _check(base: Any) -> None:
        if getattr(base, "_is_expert_parallel", False):
            raise ValueError("MultiLoRA does not support expert parallelism: load the model without it.")
        if hooked(base) and not _only_placed(base):
            raise ValueError(
                "MultiLoRA reads the weights of experts, but these have hooks or a forward of their own, as offloading "
                "gives them: keep the experts on one device."
            )


def _only_placed(base: Any) -> bool:
    """Whether all that a call of ``base`` does more is accelerate's, which moves the inputs to the device of weights
    that are there: a model over several GPUs has that on every module."""
    placed = getattr(base, "_hf_hook", None)
    return not has_hooks(base) and isinstance(placed, AlignDevicesHook) and not placed.offload


def project(
    experts: Any, name: str, branches: list[MultiLoraBranches], x: Tensor, perm: Tensor, ends: Tensor,
    top_k: int | None = None,
) -> Tensor:  # fmt: skip
    """One projection of all ``experts`` without its bias, under the adapters ``branches``."""
    weight = getattr(experts, name)
    options: dict = {"perm": perm, "ends": ends, "top_k": top_k}
    if not branches:
        return multilora_grouped(x, weight, None, None, None, **options, transposed=experts.is_transposed)
    y = None
    for one in branches:
        base = {"weight": weight, "transposed": experts.is_transposed} if y is None else {"weight": None, "y": y}
        y = multilora_grouped(
            x, lora_A=one.lora_A, lora_B=one.lora_B, lora_scaling=one.lora_scaling, **base, **options,
            scaling_factor=one.scaling_factor, dropout_p=one.lora_dropout.p, training=one.training, backend=one.backend,
        )  # fmt: skip
    assert y is not None
    return y


def _add_bias(base: Any, name: str, y: Tensor, experts: Tensor) -> Tensor:
    return y.add_(getattr(base, f"{name}_bias")[experts]) if base.has_bias else y
