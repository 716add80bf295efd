"""The layer on the fused op."""

from torch import Tensor

from multilora_fast.layers.shared_input import Base, SharedInput, branches_of, hooked, options_of, parameter
from multilora_fast.ops.functional import apply
from multilora_fast.reference import MultiLoRALinear


class FusedMultiLoRALinear(MultiLoRALinear):
    """:class:`MultiLoRALinear`, with the same parameters, at about the time and memory of one LoRA of rank n·r.

    The attributes ``backend``, ``save_inputs`` and ``exact_base``, which :func:`fuse` sets, are arguments of
    :func:`~multilora_fast.multilora_linear`; ``shared`` is the group that the layer shares its input with, if any.
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
        weight = parameter(self, "weight")
        weight = weight.t() if self.fan_in_fan_out else weight
        return apply(x, None, weight, parameter(self, "bias"), *branches_of(self), None, options_of(self))

    def base(self, x: Tensor) -> Base | None:
        """The base layer for the group, or None if this layer must run itself."""
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
        """One line: nn.Module's would show the dropout on lines of its own."""
        return f"{type(self).__name__}({self.extra_repr()})"
