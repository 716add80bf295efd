"""The layer on the fused op."""

from torch import Tensor

from multilora_fast.layers.shared_input import Base, SharedInput, branches_of, hooked, options_of, parameter
from multilora_fast.ops.functional import apply
from multilora_fast.reference import MultiLoRALinear


class FusedMultiLoRALinear(MultiLoRALinear):
    """:class:`MultiLoRALinear`, with the same parameters, at about the time and memory of one LoRA of rank n·r.

    Attributes, which :func:`fuse` sets: ``backend`` is "triton", "torch", or None for Triton on a CUDA device and torch
    elsewhere; ``save_inputs`` "exact", or "fp8" to keep x for backward in 8 bits; ``exact_base`` whether the base
    product is always the library's; ``shared`` the group of layers that it reads its input with, if any.
    """

    backend: str | None = None
    save_inputs: str = "exact"
    exact_base: bool = False
    shared: SharedInput | None = None
    fan_in_fan_out: bool = False  # a weight stored as (K, N)

    def forward(self, x: Tensor) -> Tensor:
        taken = None if self.shared is None else self.shared.take(self, x)
        if taken is not None:
            return taken
        weight, bias = parameter(self, "weight"), parameter(self, "bias")
        return apply(
            x, None, weight.t() if self.fan_in_fan_out else weight, bias, *branches_of(self), None, options_of(self)
        )

    def base(self, x: Tensor) -> Base | None:
        """What the group needs of the base layer, None where this layer must be called."""
        if not self.training or hooked(self):
            return None
        weight = parameter(self, "weight")
        return Base(weight.t() if self.fan_in_fan_out else weight, parameter(self, "bias"))

    def extra_repr(self) -> str:
        dropout = f", lora_dropout={self.lora_dropout.p:g}" if self.lora_dropout.p else ""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"lora_num={self.lora_num}, r={self.r}{dropout}, backend={self.backend!r}"
        )

    def __repr__(self) -> str:
        """One line, where nn.Module's would show the dropout on lines of its own."""
        return f"{type(self).__name__}({self.extra_repr()})"
