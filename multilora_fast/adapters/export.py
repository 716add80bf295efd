"""Export of a MultiLoRA adapter as one plain LoRA of rank n·r that computes the same, for every LoRA server."""

import os
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from multilora_fast.adapters.branches import CONTAINER, Branches, as_lora, clean, collect
from multilora_fast.adapters.experts import LAYOUTS, Factors, as_experts, as_parameters, missing_half
from multilora_fast.adapters.files import PREFIX, Adapter, model_type, read_multilora, write_files
from multilora_fast.adapters.naming import base_model_type, expert_targets, lora_targets
from multilora_fast.console import progress
from multilora_fast.files import check_new_folder

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # the values of vLLM's --max-lora-rank
READERS = {
    "peft": "vLLM for models whose experts it keeps as 3-D weights (gpt-oss, Qwen3-VL-MoE); others take per-expert",
    "per-expert": "vLLM for models whose experts it keeps one by one (Qwen3-MoE, Mixtral); others take peft",
}
FIELDS = ("bias", "modules_to_save", "base_model_name_or_path", "revision", "task_type", "fan_in_fan_out")
HEADS: dict[str | None, tuple[str, ...]] = {  # PEFT adds these to modules_to_save itself, for LoRA too
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}


@dataclass
class ExportReport:
    """The rank of the linear layers (of the experts, where no linear layer is adapted), the number of adapted modules,
    and the smallest value of vLLM's --max-lora-rank that serves the adapter, or None. With experts also their layout
    and highest rank. ``padding`` counts the bytes of zeros."""

    rank: int
    modules: int
    max_lora_rank: int | None
    layout: str | None = None
    expert_rank: int | None = None
    padding: int = 0

    def __str__(self) -> str:
        served = (
            f"serve it with --max-lora-rank {self.max_lora_rank}"
            if self.max_lora_rank
            else f"vLLM cannot serve it, because its --max-lora-rank ends at {VLLM_RANKS[-1]}"
        )
        text = f"LoRA of rank {self.rank} on {self.modules} modules: {served}"
        if self.layout is None:
            return text
        text += f"\nexperts: rank {self.expert_rank}, layout {self.layout}, for PEFT and {READERS[self.layout]}"
        if self.expert_rank != self.rank:
            text += "\nSGLang, which takes one rank for all layers, cannot serve it"
        return text + (f"\n{self.padding / 2**20:.3g} MiB of it are zeros" if self.padding else "")


def export_lora(
    source: nn.Module | str | os.PathLike,
    out_dir: str | os.PathLike,
    *,
    adapter_name: str | None = None,
    layout: str = "peft",
    overwrite: bool = False,
) -> ExportReport:
    """Write the update of a MultiLoRA adapter as a plain LoRA adapter into ``out_dir``.

    A stacks the branches' A, and B the branches' c·sᵢ ⊙ Bᵢ, computed in float32 and stored in the adapter's own dtypes.
    Linear layers of lower rank are padded with zeros to one rank. Classification heads and resized or adapted
    embeddings are stored as PEFT's LoRA stores them.

    Experts keep their own rank, through rank_pattern. Both of their projections are written, with zeros for one that is
    not adapted, in one of two layouts. "peft" is PEFT's for target_parameters; vLLM reads it for models whose experts
    it keeps as 3-D weights (gpt-oss, Qwen3-VL-MoE, Qwen3.5-MoE). "per-expert" is one LoRA for each expert's gate, up
    and down projection; vLLM reads it for other models (Qwen3-MoE, Mixtral, DeepSeek-V3). PEFT 0.21 loads both, and
    0.19.1 "peft"; versions before 0.19.1 had the experts' inputs and outputs swapped. PEFT 0.21 warns that the
    rank_pattern of experts matches no module, and applies it nevertheless.

    Args:
        source: a PEFT model, any model with MultiLoRA layers (ours or fused), or the directory of a saved adapter.
        out_dir: a new or empty directory. On an error it is left as it was.
        adapter_name: which adapter of a PEFT model; the active one when None.
        layout: of experts, "peft" or "per-expert"; linear layers are the same in both.
        overwrite: allow an ``out_dir`` that is not empty. An adapter in it is replaced; other files stay.

    Raises:
        ValueError: no MultiLoRA adapter in ``source``; trained biases, or modules_to_save other than a task's head,
            which a plain LoRA cannot hold; an adapter on experts that does not name the type of its base model; a type
            whose checkpoints do not hold experts one by one, with "per-expert"; an ``out_dir`` that is not empty.
    """
    if layout not in LAYOUTS:
        raise ValueError(f'layout must be "peft" or "per-expert", not {layout!r}.')
    check_new_folder("the output", out_dir, overwrite)
    if isinstance(source, nn.Module):
        config, modules, whole = _from_model(source, adapter_name)
    else:
        config, modules, whole = read_multilora(source)
    whole_modules = sorted(set(config.get("modules_to_save") or ()) - set(HEADS.get(config.get("task_type"), ())))
    if whole_modules:
        raise ValueError(f"the adapter has modules_to_save {whole_modules}, which no LoRA holds.")
    if (config.get("bias") or "none") != "none":
        raise ValueError(f"the adapter has bias={config['bias']!r}, which no LoRA that servers take holds.")
    kind = base_model_type(config)
    factors: dict[str, Factors] = {}
    for name, branches in progress(modules.items(), "export"):
        A, B = as_lora(branches)
        factors[name] = A, rounded(B, branches)
    experts = {name: pair for name, pair in factors.items() if pair[0].dim() == 3}
    linear = {name: pair for name, pair in factors.items() if name not in experts}
    zeros = missing_half(experts, kind)
    rank = max(A.shape[-2] for A, _ in (linear or experts).values())
    ranks = {name: A.shape[-2] for name, (A, _) in (experts | zeros).items()}
    lay_out = as_parameters if layout == "peft" else partial(as_experts, model_type=kind)
    padded, padding = {}, 0
    for name, (A, B) in linear.items():
        missing = rank - len(A)
        padded[f"{name}.lora_A.weight"] = functional.pad(A, (0, 0, 0, missing))
        padded[f"{name}.lora_B.weight"] = functional.pad(B, (0, missing))
        padding += missing * (A[0].nbytes + B[:, 0].nbytes)
    empty = lay_out(zeros)
    tensors = {f"{PREFIX}{name}": t for name, t in (whole | padded | lay_out(experts) | empty).items()}
    described = _lora_config(config, rank) | lora_targets(linear, kind)
    if ranks:
        described = expert_targets(described, ranks, layout, kind)
    write_files(out_dir, described, tensors)
    highest = max(rank, *ranks.values(), 0)
    return ExportReport(
        rank,
        len(modules),
        next((r for r in VLLM_RANKS if r >= highest), None),
        layout if ranks else None,
        max(ranks.values(), default=None),
        padding + sum(t.nbytes for t in empty.values()),
    )


def _from_model(model: Any, adapter_name: str | None) -> Adapter:
    modules = collect(model, adapter_name)
    if not modules:
        wanted = "" if adapter_name is None else f" called {adapter_name!r}"
        raise ValueError(f"model holds no MultiLoRA adapter{wanted} to export.")
    layers = (module for module in model.modules() if CONTAINER in module._modules)
    name = adapter_name or next((name for layer in layers for name in layer.active_adapters), None)
    peft_config = (getattr(model, "peft_config", None) or {}).get(name)
    config = {field: getattr(peft_config, field) for field in FIELDS} if peft_config else {}
    config["base_model_type"] = model_type(model)
    if any(getattr(module, "fan_in_fan_out", False) for module in modules.values()):
        config["fan_in_fan_out"] = True
    whole = _kept_whole(model, name) if peft_config else {}
    return Adapter(config, {name: Branches.of(module) for name, module in modules.items()}, whole)


def _kept_whole(model: Any, adapter_name: Any) -> dict[str, Tensor]:
    """The tensors that PEFT saves beside the branches: heads, embeddings that were resized or adapted."""
    from peft import get_peft_model_state_dict

    try:
        model.get_input_embeddings()
        embeddings: Any = "auto"
    except (AttributeError, NotImplementedError):  # audio models have none
        embeddings = False
    tensors = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=embeddings)
    others = {clean(key).removeprefix(PREFIX): t for key, t in tensors.items() if f".{CONTAINER}." not in key}
    return {name: tensor.detach().clone() for name, tensor in others.items()}  # tied ones share memory


def rounded(B: Tensor, branches: Branches) -> Tensor:
    """B̃ in the adapter's own dtype, unless that is too narrow for its values."""
    stored = B.to(torch.promote_types(branches.lora_B.dtype, branches.lora_scaling.dtype))
    off = (stored.to(B.dtype) - B).norm()
    return stored if off <= torch.finfo(stored.dtype).eps * B.norm() else B


def _lora_config(config: dict, rank: int) -> dict:
    return {
        "peft_type": "LORA",
        **{field: config.get(field) for field in ("task_type", "base_model_name_or_path", "revision")},
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "fan_in_fan_out": bool(config.get("fan_in_fan_out")),
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": list(dict.fromkeys(config.get("modules_to_save") or ())) or None,
        "rank_pattern": {},
        "alpha_pattern": {},
    }
