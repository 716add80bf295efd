"""The PEFT layer: a linear base layer of any kind and its adapters' branches."""

from __future__ import annotations

import math
import warnings
from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features, check_adapters_to_merge
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from transformers.pytorch_utils import Conv1D

from multilora_fast.adapters.branches import Branches, as_lora
from multilora_fast.adapters.config import shape_options
from multilora_fast.layers.shared_input import Base, SharedInput, branches_of, hooked, options_of, parameter
from multilora_fast.ops.functional import apply
from multilora_fast.peft.config import MultiLoraConfig
from multilora_fast.peft.quantization import backend_of, base_weight, check_writable, compute_as, dense_4bit, is_4bit

_PLAIN = (nn.Linear, Conv1D)
_DENSE = (nn.Parameter, Tensor, FakeTensor)  # classes of weights that are used as they are


class MultiLoraBranches(nn.Module):
    """One adapter on one layer: lora_A (n, r, K), lora_B (n, N, r), lora_scaling (n, N) or (n, 1). For experts,
    each has a leading axis E.

    A and B start Kaiming-uniform (a = √5), each branch on its own, and the scales at zero; ``init_weights=False`` draws
    the scales too. ``shared`` is the group of layers that read one input, or None. ``layer`` is the layer that holds
    this adapter, which is not registered as a submodule.
    """

    backend: str | None = None
    shared: SharedInput | None = None
    layer: MultiLoraLinear

    def __init__(self, layer: MultiLoraLayer, config: MultiLoraConfig, name: str):
        """``name`` is the layer's in the model, by which the config's patterns choose its options."""
        super().__init__()
        self.__dict__["layer"] = layer
        self.save_inputs: str = config.save_inputs
        self.exact_base = config.exact_base
        r, lora_num, lora_alpha = shape_options(vars(config), name).values()
        each = (lora_num,) if layer.num_experts is None else (layer.num_experts, lora_num)
        self.lora_A = nn.Parameter(torch.empty(*each, r, layer.in_features))
        self.lora_B = nn.Parameter(torch.empty(*each, layer.out_features, r))
        self.lora_scaling = nn.Parameter(torch.empty(*each, layer.out_features if config.scaling == "vector" else 1))
        self.lora_dropout = nn.Dropout(config.lora_dropout or 0)  # as in MultiLoRALinear
        self.scaling_factor = self.initial_factor = lora_alpha / r
        for branch in (*self.lora_A.flatten(0, -3), *self.lora_B.flatten(0, -3)):
            nn.init.kaiming_uniform_(branch, a=math.sqrt(5))
        if config.init_weights:
            nn.init.zeros_(self.lora_scaling)
        else:
            nn.init.normal_(self.lora_scaling)

    def forward(self, x: Tensor, weight=None, bias: Tensor | None = None, *, y: Tensor | None = None) -> Tensor:
        """The adapted layer's output, from its weight and bias, or from ``y``, its output without the branches."""
        return apply(x, y, weight, bias, *branches_of(self), None, options_of(self))

    def base(self, x: Tensor) -> Base | None:
        """The base layer for the group, or None if the layer would not run as this adapter's fused op."""
        layer = self.layer
        if not self.training or hooked(self) or next(iter(layer.active_branches()), None) is not self:
            return None
        return layer.fused_base(x)

    def extra_repr(self) -> str:
        *_, n, r, K = self.lora_A.shape
        return (
            f"in_features={K}, out_features={self.lora_B.shape[-2]}, lora_num={n}, r={r}, "
            f"scaling_factor={self.scaling_factor:g}"
        )


class MultiLoraLayer(BaseTunerLayer):
    """A layer with any number of adapters, of which the active ones add up."""

    adapter_layer_names = ("multilora_branches",)
    other_param_names = ()
    in_features: Any
    out_features: Any
    fan_in_fan_out: bool  # whether the weight is stored as (…, K, N)
    num_experts: int | None = None
    quantization_backend: Any
    multilora_branches: Any  # an nn.ModuleDict: the MultiLoraBranches of each adapter by its name
    _modules: Any

    def add_first(self, adapter_name: str, config: MultiLoraConfig, name: str) -> None:
        """Set up PEFT's attributes and :meth:`update_layer`."""
        self.multilora_branches = nn.ModuleDict()
        self._disable_adapters, self._active_adapter, self.merged_adapters = False, adapter_name, []
        self.update_layer(adapter_name, config, name)

    def update_layer(self, adapter_name: str, config: MultiLoraConfig, name: str) -> None:
        """Add an adapter to this layer, which is called ``name`` in the model."""
        self.multilora_branches[adapter_name] = MultiLoraBranches(self, config, name)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def active_branches(self) -> list[MultiLoraBranches]:
        """The adapters that the forward adds: none if disabled or merged."""
        return [] if self._disable_adapters or self.merged_adapters else self.chosen()

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the active adapters, or ``adapter_names``, to the base weight. With ``safe_merge``, a weight that would
        not be finite raises a ValueError and is left unchanged."""
        for name in check_adapters_to_merge(self, adapter_names):
            if name in self.multilora_branches:
                self._add_to_weight(name, 1.0, safe_merge)
                self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Subtract the merged adapters from the base weight."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
        while self.merged_adapters:
            self._add_to_weight(self.merged_adapters[-1], -1.0)
            self.merged_adapters.pop()

    def get_delta_weight(self, adapter: str) -> Tensor:
        """The update that merging adds to the weight, in the weight's layout and in float32 at least."""
        return self._delta(Branches.of(self.multilora_branches[adapter]))

    def _delta(self, branches: Branches) -> Tensor:
        A, B = as_lora(branches)
        delta = B @ A.to(B.dtype)
        return delta.mT if self.fan_in_fan_out else delta

    def check_writable(self) -> None:
        """Raise a ValueError if merging cannot write the base weight."""
        check_writable(self.get_base_layer(), self.quantization_backend)

    def _add_to_weight(self, name: str, sign: float, check: bool = False) -> None:
        raise NotImplementedError

    def set_scale(self, adapter: str, scale: float) -> None:
        """Set the constant factor of an adapter to ``scale`` times lora_alpha / r."""
        if adapter in self.multilora_branches:
            branches = self.multilora_branches[adapter]
            branches.scaling_factor = scale * branches.initial_factor

    def scale_layer(self, scale: float) -> None:
        """Multiply the constant factor of the active adapters by ``scale``."""
        for branches in self.chosen():
            branches.scaling_factor *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the constant factor of the active adapters by ``scale``; reset it for None."""
        for branches in self.chosen():
            branches.scaling_factor = branches.initial_factor if scale is None else branches.scaling_factor / scale

    def chosen(self) -> list[MultiLoraBranches]:
        """The active adapters that are on this layer, also if disabled or merged."""
        known, names = self._modules["multilora_branches"]._modules, self._active_adapter
        return [known[name] for name in ([names] if isinstance(names, str) else names) if name in known]


def named_layers(model: nn.Module) -> list[tuple[str, MultiLoraLayer]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, MultiLoraLayer)]


def not_finite(adapter: str) -> ValueError:
    return ValueError(f"NaNs detected in the merged weights. The adapter {adapter} seems to be broken")


class MultiLoraLinear(nn.Module, MultiLoraLayer):
    """A linear layer with any number of MultiLoRA adapters, of which the active ones add up.

    On nn.Linear, Conv1D and bitsandbytes' 4-bit layer, the base product and the first active adapter are one fused op.
    Other base layers, and those with hooks or a forward of their own, run themselves, and the branches are added to
    their output.
    """

    base_layer: Any

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: MultiLoraConfig, name: str, quantization):
        super().__init__()
        self.base_layer = base_layer
        base = self.get_base_layer()
        self.in_features, self.out_features = _get_in_out_features(base)
        self.fan_in_fan_out = isinstance(base, Conv1D)
        self._quantization = quantization
        self.add_first(adapter_name, config, name)

    @property
    def quantization_backend(self) -> Any:  # type: ignore[override]  # an attribute in some versions of PEFT
        """PEFT's reader and writer of a quantized base weight, None for a dense layer. It is looked up at each use,
        because training does not need it."""
        return backend_of(self.get_base_layer(), **self._quantization)

    def forward(self, x: Tensor, *args, adapter_names: list[str] | None = None, **kwargs) -> Tensor:
        if self._disable_adapters and self.merged_adapters:
            self.unmerge()
        active = self.active_branches()
        if adapter_names is not None and not self._disable_adapters:
            return self._mixed_batch(x, adapter_names, *args, **kwargs)
        y = self._fused(x, active[0]) if active and not args and not kwargs else None
        if y is None:
            y = self.base_layer(x, *args, **kwargs)
        else:
            active = active[1:]
        for branches in active:
            y = branches(x, y=y)
        return y

    def fused_base(self, x: Tensor) -> Base | None:
        """The base layer as arguments of the fused op, or None if it must run itself."""
        base: Any = self._modules["base_layer"]
        if hooked(base):
            return None
        if type(base) in _PLAIN:
            weight = parameter(base, "weight")
            if type(weight) in _DENSE:
                return Base(weight.t() if self.fan_in_fan_out else weight, parameter(base, "bias"))
        # Decoding on a GPU keeps bitsandbytes' kernels, which read the packed weight.
        decoding = not torch.is_grad_enabled() and x.device.type != "cpu"
        if not is_4bit(base) or decoding or torch.compiler.is_compiling():
            return None
        return Base(partial(dense_4bit, base), base.bias, base.compute_dtype or x.dtype)

    def _fused(self, x: Tensor, branches: MultiLoraBranches) -> Tensor | None:
        """The output of the fused op, or None if the base layer must run itself."""
        shared = branches.shared
        if shared is not None and type(self._modules["base_layer"]) in _PLAIN:
            taken = shared.take(branches, x)
            if taken is not None:
                return taken
        found = self.fused_base(x)
        if found is None:
            return None
        weight, bias, compute_dtype = found
        if compute_dtype is None:
            return branches(x, weight, bias)
        inner, context = compute_as(self.base_layer, x)
        with context:
            taken = shared.take(branches, x) if shared is not None and inner is x else None
            return (branches(inner, weight, bias) if taken is None else taken).to(x.dtype)

    def _mixed_batch(self, x: Tensor, adapter_names: list[str], *args, **kwargs) -> Tensor:
        """Each row of the batch under its own adapter; "__base__" stands for none."""
        if len(x) != len(adapter_names):
            raise ValueError(f"adapter_names must hold one name per input, but got {len(adapter_names)} for {len(x)}.")
        if self.merged:
            raise ValueError("adapter_names cannot be used while adapters are merged: call unmerge_adapter first.")
        y = self.base_layer(x, *args, **kwargs)
        for name in dict.fromkeys(adapter_names):
            if name in self.multilora_branches:
                rows = torch.tensor([i for i, other in enumerate(adapter_names) if other == name], device=x.device)
                y = y.index_copy(0, rows, self.multilora_branches[name](x[rows], y=y[rows]))
        return y

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return True

    @torch.no_grad()
    def _add_to_weight(self, name: str, sign: float, check: bool = False) -> None:
        self.check_writable()
        base, backend = self.get_base_layer(), self.quantization_backend
        weight = base_weight(base, backend)
        merged = torch.add(weight, self.get_delta_weight(name), alpha=sign).to(weight.dtype)
        if check and not torch.isfinite(merged).all():
            raise not_finite(name)
        if backend is None:
            weight.copy_(merged)
        else:
            backend.set_base_weight(self, merged)
