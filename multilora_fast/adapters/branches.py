"""The branches of one adapted layer as plain tensors: read from models, folded into one LoRA, stacked.

n branches of rank r, K in_features, N out_features, R = n·r, c the constant scaling factor.
"""

from collections.abc import Container, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from multilora_fast.reference import MultiLoRALinear

NAMES = ("lora_A", "lora_B", "lora_scaling")
CONTAINER = "multilora_branches"  # the PEFT layer's dict of one module per adapter
WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")  # attributes of torch's wrappers


class Branches(NamedTuple):
    """lora_A (n, r, K), lora_B (n, N, r), lora_scaling (n, N) or (n, 1), and c: the layer adds Σᵢ c·sᵢ ⊙ Bᵢ Aᵢ x.

    The tensors of E experts have a leading axis: (E, n, r, K) and so on.
    """

    lora_A: Tensor
    lora_B: Tensor
    lora_scaling: Tensor
    scaling_factor: float = 1.0

    @property
    def lora_num(self) -> int:
        return self.lora_A.shape[-3]

    @property
    def r(self) -> int:
        return self.lora_A.shape[-2]

    @property
    def experts(self) -> int | None:
        """E, or None for a linear layer."""
        return self.lora_A.shape[0] if self.lora_A.dim() == 4 else None

    @classmethod
    def of(cls, module: Any) -> "Branches":
        """From any module with these four attributes, without copies."""
        return cls(module.lora_A.detach(), module.lora_B.detach(), module.lora_scaling.detach(), module.scaling_factor)


def clean(name: str) -> str:
    """``name`` without the parts that torch.compile, FSDP and checkpoint wrappers insert."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def as_lora(branches: Branches) -> tuple[Tensor, Tensor]:
    """The same update as one LoRA of rank R: Ã (R, K) and B̃ (N, R), for experts (E, R, K) and (E, N, R). B̃ is computed
    and returned in float32 at least."""
    A, B, s, c = branches
    dtype = torch.promote_types(torch.promote_types(B.dtype, s.dtype), torch.float32)
    B = B.to(dtype) * (c * s.to(dtype)).unsqueeze(-1)
    return A.flatten(-3, -2), B.transpose(-3, -2).flatten(-2)


def stack(parts: Sequence[Branches], generator: torch.Generator | None = None) -> Branches:
    """All branches of ``parts`` as one set, with c folded into the scales. Lower ranks are padded to the highest, with
    random rows of A and zero columns of B: the update stays the same and the padding can learn."""
    r = max(part.r for part in parts)
    width = max(part.lora_scaling.shape[-1] for part in parts)
    As, Bs, scales = [], [], []
    for A, B, s, c in parts:
        *each, rank, K = A.shape
        rows = torch.empty(*each, r - rank, K, dtype=A.dtype, device=A.device)
        As.append(torch.cat([A, rows.uniform_(-(K**-0.5), K**-0.5, generator=generator)], -2))
        Bs.append(torch.cat([B, B.new_zeros(*B.shape[:-1], r - rank)], -1))
        scales.append((c * s).expand(*each, width))
    return Branches(torch.cat(As, -3), torch.cat(Bs, -3), torch.cat(scales, -2))


def collect(model: Any, adapter_name: str | None = None) -> dict[str, nn.Module]:
    """The modules of ``model`` that hold branches, by layer path: our own layers, and the PEFT layers' adapter
    ``adapter_name``, by default the active one.

    Raises:
        ValueError: several PEFT adapters are active and none is named, or the adapter is merged.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    found: dict[str, nn.Module] = {}
    for path, module in base.named_modules():
        name = clean(path)
        if isinstance(module, MultiLoRALinear):
            found[name] = module
        elif CONTAINER in module._modules:
            adapters = getattr(module, CONTAINER)
            adapter = chosen(module, adapters, adapter_name)
            if adapter is None:
                continue
            if adapter in module.merged_adapters:
                raise ValueError(f"model has the adapter {adapter!r} merged into its weights: unmerge it first.")
            found[name] = adapters[adapter]
    return found


def chosen(layer: Any, held: Container[str], adapter_name: str | None) -> str | None:
    """``adapter_name``, or the PEFT ``layer``'s active adapter, if it is one of ``held``."""
    here = [name for name in ([adapter_name] if adapter_name is not None else layer.active_adapters) if name in held]
    if len(here) > 1:
        raise ValueError(f"model has several active adapters, {', '.join(here)}: pass adapter_name.")
    return here[0] if here else None
