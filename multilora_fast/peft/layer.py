"""The PEFT layer: a linear base layer of any kind, and the branches of every adapter on it."""

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
from multilora_fast.layers.shared_input import Base, SharedInput, branches_of, hooked, options_of, parameter
from multilora_fast.ops.functional import apply
from multilora_fast.peft.quantization import backend_of, base_weight, check_writable, compute_as, dense_4bit, is_4bit

_PLAIN = (nn.Linear, Conv1D)
_DENSE = (nn.Parameter, Tensor, FakeTensor)  # weights that are what their layer multiplies by


class MultiLoraBranches(nn.Module):
    """One adapter on one layer: lora_A (n, r, K), lora_B (n, N, r), lora_scaling (n, N) or (n, 1); on ``experts`` all
    with the experts in front.

    A and B start Kaiming-uniform (a = √5), each branch on its own. The scales start at zero; ``init_weights=False``
    draws them instead. ``shared`` is the group that this adapter reads its input with, if any; ``layer`` is the layer
    that holds it, outside of its own submodules.
    """

    backend: str | None = None
    shared: SharedInput | None = None
    layer: MultiLoraLinear

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        r: int,
        lora_num: int,
        lora_alpha: float,
        lora_dropout: float,
        scaling: str,
        init_weights: bool,
        save_inputs: str,
        exact_base: bool,
        experts: int | None = None,
    ):
        super().__init__()
        self.save_inputs, self.exact_base = save_inputs, exact_base
        each = (lora_num,) if experts is None else (experts, lora_num)
        self.lora_A = nn.Parameter(torch.empty(*each, r, in_features))
        self.lora_B = nn.Parameter(torch.empty(*each, out_features, r))
        self.lora_scaling = nn.Parameter(torch.empty(*each, out_features if scaling == "vector" else 1))
        self.lora_dropout = nn.Dropout(lora_dropout or 0)  # Dynamo compiles in the integers of a module, and no floats
        self.scaling_factor = self.initial_factor = lora_alpha / r
        for branch in (*self.lora_A.flatten(0, -3), *self.lora_B.flatten(0, -3)):
            nn.init.kaiming_uniform_(branch, a=math.sqrt(5))
        if init_weights:
            nn.init.zeros_(self.lora_scaling)
        else:
            nn.init.normal_(self.lora_scaling)

    def forward(
        self, x: Tensor, weight=None, bias: Tensor | None = None, *, y: Tensor | None = None, alone: bool = False
    ) -> Tensor:
        """The adapted layer's output: from its weight and bias, or added to ``y``, its output without the branches.
        ``alone`` says that x is this layer's own."""
        taken = self.shared.take(self, x) if self.shared is not None and y is None and not alone else None
        if taken is not None:
            return taken
        return apply(x, y, weight, bias, *branches_of(self), None, options_of(self))

    def base(self, x: Tensor) -> Base | None:
        """What the group needs of the base layer, None where the layer would not run as this adapter's fused op."""
        layer = self.layer
        if not self.training or hooked(self) or next(iter(layer.active_branches()), None) is not self:
            return None
        return layer.fused_base(x)

    def delta(self) -> Tensor:
        """The update B̃ Ã (N, K) of the weight, in float32 at least."""
        A, B = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in as_lora(Branches.of(self)))
        return B @ A

    def extra_repr(self) -> str:
        *_, n, r, K = self.lora_A.shape
        return (
            f"in_features={K}, out_features={self.lora_B.shape[-2]}, lora_num={n}, r={r}, "
            f"scaling_factor={self.scaling_factor:g}"
        )


class MultiLoraLayer(BaseTunerLayer):
    """What an adapted layer does with its adapters, of which the active ones add up."""

    adapter_layer_names = ("multilora_branches",)
    other_param_names = ()
    multilora_branches: Any  # an nn.ModuleDict, a MultiLoraBranches by the name of each adapter
    _modules: Any

    def active_branches(self) -> list[MultiLoraBranches]:
        """The adapters that add up now."""
        if self._disable_adapters or self.merged_adapters:
            return []
        known: Any = self._modules["multilora_branches"]
        known, names = known._modules, self._active_adapter
        return [known[name] for name in ([names] if isinstance(names, str) else names) if name in known]

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the active adapters, or ``adapter_names``, to the base weight. With ``safe_merge`` a weight that would
        not be finite is a ValueError, and the base stays as it was."""
        for name in check_adapters_to_merge(self, adapter_names):
            if name in self.multilora_branches:
                self._add_to_weight(name, 1.0, safe_merge)
                self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Take the merged adapters out of the base weight again."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
        while self.merged_adapters:
            self._add_to_weight(self.merged_adapters[-1], -1.0)
            self.merged_adapters.pop()

    def check_writable(self) -> None:
        """Raise a ValueError where merging cannot write the base weight."""
        raise NotImplementedError

    def _add_to_weight(self, name: str, sign: float, check: bool = False) -> None:
        raise NotImplementedError

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return True

    def set_scale(self, adapter: str, scale: float) -> None:
        """Set the constant factor of an adapter to ``scale`` times lora_alpha / r."""
        if adapter in self.multilora_branches:
            branches = self.multilora_branches[adapter]
            branches.scaling_factor = scale * branches.initial_factor

    def scale_layer(self, scale: float) -> None:
        """Multiply the constant factor of the active adapters by ``scale``."""
        for name in self.active_adapters:
            if name in self.multilora_branches:
                self.multilora_branches[name].scaling_factor *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the constant factor of the active adapters by ``scale``, or set it back."""
        for name in self.active_adapters:
            if name in self.multilora_branches:
                branches = self.multilora_branches[name]
                branches.scaling_factor = branches.initial_factor if scale is None else branches.scaling_factor / scale


def not_finite(adapter: str) -> ValueError:
    return ValueError(f"NaNs detected in the merged weights. The adapter {adapter} seems to be broken")


class MultiLoraLinear(nn.Module, MultiLoraLayer):
    """A linear layer under any number of MultiLoRA adapters, of which the active ones add up.

    On nn.Linear, Conv1D and bitsandbytes' 4-bit layer the first active adapter and the base layer's product are one
    fused op. Other base layers, and those with hooks or a forward of their own, run as they are, and the branches are
    added to their output.
    """

    base_layer: Any
    in_features: Any
    out_features: Any

    def __init__(self, base_layer: nn.Module, adapter_name: str, *, quantization: dict, **options):
        super().__init__()
        self.base_layer = base_layer
        base = self.get_base_layer()
        self.in_features, self.out_features = _get_in_out_features(base)
        self.fan_in_fan_out = isinstance(base, Conv1D)
        self._quantization = quantization
        self.multilora_branches = nn.ModuleDict()
        self._disable_adapters, self._active_adapter, self.merged_adapters = False, adapter_name, []
        self.update_layer(adapter_name, **options)

    @property
    def quantization_backend(self) -> Any:  # type: ignore[override]  # an attribute in some versions of PEFT
        """What reads and writes a quantized base weight, None for a dense layer: found when it is asked for, because
        training does not need it."""
        return backend_of(self.get_base_layer(), **self._quantization)

    def update_layer(self, adapter_name: str, *, inference_mode: bool, **options) -> None:
        """Add an adapter; ``options`` are those of :class:`MultiLoraBranches`."""
        branches = MultiLoraBranches(self.in_features, self.out_features, **options)
        branches.__dict__["layer"] = self
        self.multilora_branches[adapter_name] = branches
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        adapter_names = kwargs.pop("adapter_names", None)
        if adapter_names is not None:
            self._check_names(x, adapter_names)
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
        """The base layer as the fused op takes it, or None where it must run itself."""
        base: Any = self._modules["base_layer"]
        if hooked(base):
            return None
        if type(base) in _PLAIN:
            weight = parameter(base, "weight")
            if type(weight) in _DENSE:
                return Base(weight.t() if self.fan_in_fan_out else weight, parameter(base, "bias"))
        # Decoding on a GPU keeps bitsandbytes' own kernels, which read the 4-bit weight as it is.
        decoding = not torch.is_grad_enabled() and x.device.type != "cpu"
        if not is_4bit(base) or decoding or torch.compiler.is_compiling():
            return None
        return Base(partial(dense_4bit, base), base.bias, base.compute_dtype or x.dtype)

    def _fused(self, x: Tensor, branches: MultiLoraBranches) -> Tensor | None:
        """The output through the fused op, or None for a base layer that must run itself."""
        shared, plain = branches.shared, type(self._modules["base_layer"]) in _PLAIN
        taken = None if shared is None else shared.take(branches, x) if plain else shared.finished(branches, x)
        if taken is not None:
            return taken
        found = self.fused_base(x)
        if found is None:
            return None
        weight, bias, compute_dtype = found
        if compute_dtype is None:
            return branches(x, weight, bias, alone=plain)
        inner, context = compute_as(self.base_layer, x)
        with context:
            return branches(inner, weight, bias, alone=inner is not x).to(x.dtype)

    def _check_names(self, x: Tensor, adapter_names: list[str]) -> None:
        if len(x) != len(adapter_names):
            raise ValueError(f"adapter_names must hold one name per input, but got {len(adapter_names)} for {len(x)}.")
        if self.merged:
            raise ValueError("adapter_names cannot be used while adapters are merged: call unmerge_adapter first.")

    def _mixed_batch(self, x: Tensor, adapter_names: list[str], *args, **kwargs) -> Tensor:
        """Each row of the batch under its own adapter; "__base__" stands for none."""
        y = self.base_layer(x, *args, **kwargs)
        for name in dict.fromkeys(adapter_names):
            if name in self.multilora_branches:
                rows = torch.tensor([i for i, other in enumerate(adapter_names) if other == name], device=x.device)
                y = y.index_copy(0, rows, self.multilora_branches[name](x[rows], y=y[rows], alone=True))
        return y

    def get_delta_weight(self, adapter: str) -> Tensor:
        """What merging the adapter adds to the weight, laid out as the weight is."""
        delta = self.multilora_branches[adapter].delta()
        return delta.t() if self.fan_in_fan_out else delta

    def check_writable(self) -> None:
        check_writable(self.get_base_layer(), self.quantization_backend)

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
