"""The reference MultiLoRA layer: a loop over branches, which saves one activation per branch.

It is the oracle of the tests and the baseline of the benches. Initialisation after Wang et al. 2023 (arXiv 2311.11501):
A and B Kaiming-uniform, scales zero, so that a new layer computes what its base does.
"""

import math

from torch import Tensor, nn
from torch.nn import functional as F

from multilora_fast.validation import check_alpha, check_hyperparameters


class MultiLoRALinear(nn.Linear):
    """y = W x + b + Σᵢ c·sᵢ ⊙ Bᵢ Aᵢ dropout(x), with c = lora_alpha / r and one dropout for all branches.

    Holds the base layer's own Parameters ``weight`` (N, K) and ``bias`` (N,), and ``lora_A`` (n, r, K), ``lora_B``
    (n, N, r), ``lora_scaling`` (n, N), or (n, 1) with ``scaling="scalar"``.

    Raises:
        ValueError: base is no plain nn.Linear, r or lora_num < 1, lora_dropout outside [0, 1), lora_alpha not finite,
            unknown scaling.
    """

    def __init__(
        self,
        base: nn.Linear,
        *,
        r: int,
        lora_num: int,
        lora_alpha: float | None = None,
        lora_dropout: float = 0.0,
        scaling: str = "vector",
    ):
        if not isinstance(base, nn.Linear):
            raise ValueError(f"base must be an nn.Linear, not {type(base).__name__}.")
        if type(base).forward is not nn.Linear.forward:
            raise ValueError(
                f"base must be a plain nn.Linear, not a {type(base).__name__}, which computes more than W x + b."
            )
        check_hyperparameters(r=r, lora_num=lora_num, lora_dropout=lora_dropout, scaling=scaling)
        check_alpha(lora_alpha)
        nn.Module.__init__(self)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.r, self.lora_num, self.scaling_factor = r, lora_num, (r if lora_alpha is None else lora_alpha) / r
        self.weight = base.weight
        self.register_parameter("bias", base.bias)
        new = base.weight.new_empty
        self.lora_A = nn.Parameter(new(lora_num, r, self.in_features))
        self.lora_B = nn.Parameter(new(lora_num, self.out_features, r))
        self.lora_scaling = nn.Parameter(new(lora_num, self.out_features if scaling == "vector" else 1))
        self.lora_dropout = nn.Dropout(lora_dropout or 0)  # Dynamo specializes on a module's ints, not its floats
        self.train(base.training)
        self.reset_branches()

    def reset_branches(self) -> None:
        """Initialise A and B (Kaiming-uniform, a = √5, per branch), and set the scales to zero."""
        for branch in (*self.lora_A, *self.lora_B):
            nn.init.kaiming_uniform_(branch, a=math.sqrt(5))
        nn.init.zeros_(self.lora_scaling)

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight, self.bias)
        x = self.lora_dropout(x)
        for A, B, s in zip(self.lora_A, self.lora_B, self.lora_scaling, strict=True):
            y += F.linear(F.linear(x, A), B) * (self.scaling_factor * s)
        return y

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"lora_num={self.lora_num}, r={self.r}, scaling_factor={self.scaling_factor:g}"
        )
