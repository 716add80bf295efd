"""Read and write the dense weight of quantized base layers through PEFT's backends, or for bitsandbytes through our own
in versions of PEFT without them."""

from __future__ import annotations

from typing import Any

import torch
from peft.import_utils import is_bnb_available
from peft.utils.integrations import dequantize_bnb_weight
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from multilora_fast.ops.call import no_autocast

try:
    from peft.utils import get_quantization_kwargs, resolve_quantization_backend
except ImportError:  # peft < 0.20

    def get_quantization_kwargs(model: nn.Module) -> dict:  # type: ignore[misc]
        return {}

    def resolve_quantization_backend(base: nn.Module, **_) -> _Bitsandbytes | None:  # type: ignore[misc]
        return _Bitsandbytes() if _is(base, "Linear4bit") or _is(base, "Linear8bitLt") else None


_PLAIN_FUNCTIONS: Any = (Tensor.__torch_function__.__func__, nn.Parameter.__torch_function__)  # type: ignore[attr-defined]


class _Bitsandbytes:
    """A stand-in for PEFT's backend."""

    layer_type = "linear"
    supports_merge = True
    backend_name = "bnb"

    def get_base_weight(self, base: Any) -> Tensor:
        return dequantize_bnb_weight(base.weight, state=base.state)

    def set_base_weight(self, layer: Any, dense: Tensor) -> None:
        base = layer.get_base_layer()
        kept = base.weight
        names = ("blocksize", "compress_statistics", "quant_type", "quant_storage", "module", "has_fp16_weights")
        options = {name: getattr(kept, name) for name in names if hasattr(kept, name)}
        base.weight = type(kept)(dense.cpu(), requires_grad=False, **options).to(kept.device)
        if not is_4bit(base):
            base.state.reset_grads()


def backend_of(base: nn.Module, **quantization) -> Any:
    """PEFT's backend of a base layer, None for a dense one."""
    try:
        return resolve_quantization_backend(base, **quantization)
    except ValueError:  # a weight from torchao's quantize_, whose configuration the model does not hold
        from peft.utils.quantization_utils import ForwardOnlyQuantizationBackend

        return ForwardOnlyQuantizationBackend("torchao")


def check_writable(base: Any, backend) -> None:
    """Raise a ValueError if merging cannot write the weight of ``base``."""
    if backend.supports_merge if backend else _is_dense(base.weight):
        return
    weight = getattr(base, "weight", None)
    kind = "" if weight is None else f" with a weight of class {type(weight).__name__}"
    raise ValueError(
        f"Adapters cannot be merged into a {type(base).__name__}{kind}, which cannot be written: keep them apart, "
        "write them with export_lora, or merge them into the base model before it is quantized."
    )


def _is_dense(weight: Tensor) -> bool:
    """Whether a copy into ``weight`` is kept as it is. A tensor subclass may convert it; a DTensor does not."""
    kind: Any = type(weight)
    function = getattr(kind.__torch_function__, "__func__", kind.__torch_function__)
    plain = kind.__torch_dispatch__ is Tensor.__torch_dispatch__ and function in _PLAIN_FUNCTIONS
    return weight.is_floating_point() and (plain or isinstance(weight, FakeTensor) or hasattr(weight, "device_mesh"))


def is_4bit(base: nn.Module) -> bool:
    return _is(base, "Linear4bit")


def dense_4bit(base: Any) -> Tensor:
    """The weight (N, K) of a bitsandbytes Linear4bit, in the dtype it was quantized from."""
    from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse as unpacked
    from bitsandbytes.nn.modules import fix_4bit_weight_quant_state_from_module as find_lost_state

    find_lost_state(base)
    state = base.weight.quant_state
    if getattr(state, "packing_format_for_cpu", False):  # packed by a CPU inference; cannot be dequantized so
        base.weight.data, base.weight.quant_state = unpacked(base.weight.data, state)
    return dequantize_bnb_weight(base.weight, state=base.weight.quant_state)


def base_weight(base: Any, backend) -> Tensor:
    """The weight of a base layer in its own layout: the tensor itself, or a dense copy of a quantized one."""
    if backend is None:
        return base.weight.data
    return dense_4bit(base) if is_4bit(base) else backend.get_base_weight(base)


def compute_as(base: Any, x: Tensor):
    """x and the context for a product in a 4-bit layer's compute_dtype. A float32 x is not cast here: the op casts it
    under autocast, and saves it uncast."""
    dtype = base.compute_dtype or x.dtype
    if x.dtype == torch.float32 and dtype in (torch.bfloat16, torch.float16):
        return x, torch.autocast(x.device.type, dtype)
    return x.to(dtype), no_autocast(x.device.type)


def _is(base: nn.Module, name: str) -> bool:
    if not is_bnb_available():
        return False
    import bitsandbytes

    return isinstance(base, getattr(bitsandbytes.nn, name))
