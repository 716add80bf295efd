"""A MultiLoRA adapter as one plain LoRA of rank n·r, exactly: what every server of LoRA adapters can load."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from multilora_fast.adapters.branches import CONTAINER, Branches, as_lora, clean, collect
from multilora_fast.adapters.experts import LAYOUTS, Factors, as_experts, as_parameters, missing_half
from multilora_fast.adapters.files import PREFIX, Adapter, check_new_adapter, model_type, read_multilora, write_files
from multilora_fast.adapters.naming import base_model_type, expert_targets, lora_targets
from multilora_fast.console import progress

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # the values vLLM takes for --max-lora-rank
READERS = {
    "peft": "vLLM for models whose experts it keeps as 3-D weights (gpt-oss, Qwen3-VL-MoE); others take per-expert",
    "per-expert": "vLLM for models whose experts it keeps one by one (Qwen3-MoE, Mixtral); others take peft",
}
FIELDS = ("bias", "modules_to_save", "base_model_name_or_path", "revision", "task_type", "fan_in_fan_out")
HEADS: dict[str | None, tuple[str, ...]] = {  # what PEFT adds to modules_to_save by itself, in LoRAs too
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}


@dataclass
class ExportReport:
    """What :func:`export_lora` wrote: the rank of the linear layers, or of the experts where there are no linear
    layers, and the smallest value of vLLM's --max-lora-rank that serves it, or None where there is none. Of an adapter
    on experts also their layout and highest rank, and the bytes of zeros that its layers were padded with."""

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
) -> ExportReport:
    """Write the update of a MultiLoRA adapter as a plain LoRA adapter into ``out_dir``.

    A is the branches' A below each other, B the branches' c·sᵢ ⊙ Bᵢ beside each other, computed in float32 and stored
    in the adapter's own dtypes; linear layers of lower rank are padded with zeros, so that one rank holds for all. The
    head that PEFT trains with a classifier, and embeddings that were resized or adapted, are kept as a LoRA's file
    keeps them.

    Experts keep their own rank, by rank_pattern; vLLM reads it off the tensors. Both of their projections are written,
    with zeros for one that is not adapted. They have two layouts, and a server wants one by type of model. "peft" is
    what PEFT writes for target_parameters, and what vLLM takes for models whose experts it keeps as 3-D weights
    (gpt-oss, Qwen3-VL-MoE, Qwen3.5-MoE). "per-expert" is one LoRA for each expert's gate, up and down projection, as
    vLLM takes them for other models (Qwen3-MoE, Mixtral, DeepSeek-V3). PEFT 0.21 loads both, and 0.19.1 the first.
    Before 0.19.1 it had the experts' in and out swapped, so that no file is right for older and newer versions. Where
    experts have another rank than linear layers, PEFT 0.21 warns that rank_pattern matches no module, and yet follows
    it.

    Args:
        source: a PEFT model, any model with MultiLoRA layers (ours or fused), or the directory of a saved adapter.
        out_dir: made if missing, or that of an earlier export, which is overwritten. On an error nothing in it has
            changed.
        adapter_name: which adapter of a PEFT model; the active one when None.
        layout: "peft" or "per-expert", of experts; linear layers are the same in both.

    Raises:
        ValueError: no MultiLoRA adapter there, or one with other modules_to_save or trained biases, which a plain LoRA
            that any server takes cannot hold; a directory whose adapter is on a shared expert, on down_proj of experts
            alone, or is wanted per expert, and does not say on which type of model; a type of model whose checkpoints
            do not hold experts one by one, wanted per expert; or ``out_dir`` holds a model, a training run or an
            adapter that is no export.
    """
    return write_lora(source, out_dir, adapter_name=adapter_name, layout=layout)


def write_lora(
    source: nn.Module | str | os.PathLike,
    out_dir: str | os.PathLike,
    *,
    adapter_name: str | None = None,
    layout: str = "peft",
    base_model: str | None = None,
    verify: Callable[[Path], None] | None = None,
) -> ExportReport:
    """:func:`export_lora`, undone if ``verify``, given the directory of the finished adapter, raises. ``base_model``
    is the base of a directory's adapter, where it is known."""
    if layout not in LAYOUTS:
        raise ValueError(f'layout must be "peft" or "per-expert", not {layout!r}.')
    check_new_adapter(out_dir, "export")
    if isinstance(source, nn.Module):
        config, modules, whole = _from_model(source, adapter_name)
    else:
        config, modules, whole = read_multilora(source)
        if base_model is not None and not config.get("base_model_type"):
            config = config | {"base_model_type": base_model_type({"base_model_name_or_path": base_model})}
    _check_config(config)
    kind = base_model_type(config)
    factors = {name: as_stored(branches) for name, branches in progress(modules.items(), "export")}
    experts = {name: pair for name, pair in factors.items() if pair[0].dim() == 3}
    linear = {name: pair for name, pair in factors.items() if name not in experts}
    zeros = missing_half(experts, kind)
    rank = max(A.shape[-2] for A, _ in (linear or experts).values())
    ranks = {name: A.shape[-2] for name, (A, _) in (experts | zeros).items()}
    lay_out = as_parameters if layout == "peft" else partial(as_experts, model_type=kind)
    written = {f"{name}.{which}.weight": t for name, pair in linear.items() for which, t in _padded(pair, rank).items()}
    added = sum(t.nbytes for t in written.values()) - sum(A.nbytes + B.nbytes for A, B in linear.values())
    written |= lay_out(experts)
    empty = lay_out(zeros)
    tensors = {f"{PREFIX}{name}": tensor for name, tensor in (whole | written | empty).items()}
    described = _lora_config(config, rank) | lora_targets(linear, kind)
    if ranks:
        described = expert_targets(described, ranks, layout, kind)
    write_files(out_dir, described, tensors, made_by="export", verify=verify)
    highest = max(rank, *ranks.values(), 0)
    return ExportReport(
        rank,
        len(modules),
        next((r for r in VLLM_RANKS if r >= highest), None),
        layout if ranks else None,
        max(ranks.values(), default=None),
        added + sum(t.nbytes for t in empty.values()),
    )


def _check_config(config: dict) -> None:
    heads = HEADS.get(config.get("task_type"), ())
    whole = sorted(set(config.get("modules_to_save") or ()) - set(heads))
    if whole:
        raise ValueError(f"the adapter has modules_to_save {whole}, which no LoRA holds.")
    if (config.get("bias") or "none") != "none":
        raise ValueError(f"the adapter has bias={config['bias']!r}, which no LoRA that servers take holds.")


def _from_model(model: Any, adapter_name: str | None) -> Adapter:
    modules = collect(model, adapter_name)
    if not modules:
        wanted = "" if adapter_name is None else f" called {adapter_name!r}"
        raise ValueError(f"model holds no MultiLoRA adapter{wanted} to export.")
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    layers = (module for module in model.modules() if CONTAINER in module._modules)
    name = adapter_name or next((name for layer in layers for name in layer.active_adapters), None)
    peft_config = (getattr(model, "peft_config", None) or {}).get(name)
    config = {field: getattr(peft_config, field) for field in FIELDS} if peft_config else {}
    config["base_model_type"] = model_type(base)
    _check_config(config)
    if any(getattr(module, "fan_in_fan_out", False) for module in modules.values()):
        config["fan_in_fan_out"] = True
    whole = _kept_whole(model, name) if peft_config else {}
    return Adapter(config, {name: Branches.of(module) for name, module in modules.items()}, whole)


def _kept_whole(model: Any, adapter_name: Any) -> dict[str, Tensor]:
    """What PEFT puts into the adapter's file beside the branches: heads, embeddings that were resized or adapted."""
    from peft import get_peft_model_state_dict

    try:
        model.get_input_embeddings()
        embeddings: Any = "auto"
    except (AttributeError, NotImplementedError):  # models of sound have none
        embeddings = False
    tensors = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=embeddings)
    others = {clean(key).removeprefix(PREFIX): t for key, t in tensors.items() if f".{CONTAINER}." not in key}
    return {name: tensor.detach().clone() for name, tensor in others.items()}  # tied ones share memory


def as_stored(branches: Branches) -> Factors:
    """Ã and B̃, both in the adapter's own dtypes."""
    A, B = as_lora(branches)
    return A, rounded(B, branches)


def rounded(B: Tensor, branches: Branches) -> Tensor:
    """B̃ in the adapter's own dtype, unless that is too narrow for its values."""
    stored = B.to(torch.promote_types(branches.lora_B.dtype, branches.lora_scaling.dtype))
    off = (stored.to(B.dtype) - B).norm()
    return stored if off <= torch.finfo(stored.dtype).eps * B.norm() else B


def _padded(factors: Factors, rank: int) -> dict[str, Tensor]:
    A, B = factors
    missing = rank - len(A)
    return {"lora_A": functional.pad(A, (0, 0, 0, missing)), "lora_B": functional.pad(B, (0, missing))}


def _lora_config(config: dict, rank: int) -> dict:
    return {
        "peft_type": "LORA",
        "task_type": config.get("task_type"),
        "base_model_name_or_path": config.get("base_model_name_or_path"),
        "revision": config.get("revision"),
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
