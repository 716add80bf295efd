"""A MultiLoRA adapter as one plain LoRA of rank n·r, exactly: what every server of LoRA adapters can load."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from multilora_fast.adapters.branches import CONTAINER, Branches, as_lora, clean, collect
from multilora_fast.adapters.files import PREFIX, Adapter, check_new_adapter, model_type, read_multilora, write_files
from multilora_fast.adapters.naming import base_model_type, lora_targets
from multilora_fast.console import progress

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # the values vLLM takes for --max-lora-rank
FIELDS = ("bias", "modules_to_save", "base_model_name_or_path", "revision", "task_type", "fan_in_fan_out")
HEADS: dict[str | None, tuple[str, ...]] = {  # what PEFT adds to modules_to_save by itself, in LoRAs too
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}


@dataclass
class ExportReport:
    """What :func:`export_lora` wrote: the rank of every module, and the smallest value of vLLM's --max-lora-rank that
    serves it, or None where there is none."""

    rank: int
    modules: int
    max_lora_rank: int | None

    def __str__(self) -> str:
        served = (
            f"serve it with --max-lora-rank {self.max_lora_rank}"
            if self.max_lora_rank
            else f"vLLM cannot serve it, because its --max-lora-rank ends at {VLLM_RANKS[-1]}"
        )
        return f"LoRA of rank {self.rank} on {self.modules} modules: {served}"


def export_lora(
    source: nn.Module | str | os.PathLike, out_dir: str | os.PathLike, *, adapter_name: str | None = None
) -> ExportReport:
    """Write the update of a MultiLoRA adapter as a plain LoRA adapter into ``out_dir``.

    A is the branches' A below each other, B the branches' c·sᵢ ⊙ Bᵢ beside each other, computed in float32 and stored
    in the adapter's own dtypes; modules of lower rank are padded with zeros, so that one rank holds for all. The head
    that PEFT trains with a classifier, and embeddings that were resized or adapted, are kept as a LoRA's file keeps
    them.

    Args:
        source: a PEFT model, any model with MultiLoRA layers (ours or fused), or the directory of a saved adapter.
        out_dir: made if missing, or that of an earlier export, which is overwritten. On an error nothing in it has
            changed.
        adapter_name: which adapter of a PEFT model; the active one when None.

    Raises:
        ValueError: no MultiLoRA adapter there, or one with other modules_to_save or trained biases, which a plain LoRA
            that any server takes cannot hold; a directory whose adapter is on a shared expert, and does not say on
            which type of model; or ``out_dir`` holds a model, a training run or an adapter that is no export.
    """
    return write_lora(source, out_dir, adapter_name=adapter_name)


def write_lora(
    source: nn.Module | str | os.PathLike,
    out_dir: str | os.PathLike,
    *,
    adapter_name: str | None = None,
    base_model: str | None = None,
    verify: Callable[[Path], None] | None = None,
) -> ExportReport:
    """:func:`export_lora`, undone if ``verify``, given the directory of the finished adapter, raises. ``base_model``
    is the base of a directory's adapter, where it is known."""
    check_new_adapter(out_dir, "export")
    if isinstance(source, nn.Module):
        config, modules, whole = _from_model(source, adapter_name)
    else:
        config, modules, whole = read_multilora(source)
        if base_model is not None:
            config = {"base_model_type": base_model_type({"base_model_name_or_path": base_model})} | config
    _check_config(config)
    rank = max(b.lora_num * b.r for b in modules.values())
    targets = lora_targets(modules, base_model_type(config))
    tensors = {f"{PREFIX}{name}": tensor for name, tensor in whole.items()}
    for name, branches in progress(modules.items(), "export"):
        A, B = as_lora(branches)
        tensors[f"{PREFIX}{name}.lora_A.weight"] = _padded(A, rank, 0)
        tensors[f"{PREFIX}{name}.lora_B.weight"] = _padded(_rounded(B, branches), rank, 1)
    write_files(out_dir, _lora_config(config, rank, targets), tensors, made_by="export", verify=verify)
    return ExportReport(rank, len(modules), next((r for r in VLLM_RANKS if r >= rank), None))


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


def _rounded(B: Tensor, branches: Branches) -> Tensor:
    """B̃ in the adapter's own dtype, unless that is too narrow for its values."""
    stored = B.to(torch.promote_types(branches.lora_B.dtype, branches.lora_scaling.dtype))
    off = (stored.to(B.dtype) - B).norm()
    return stored if off <= torch.finfo(stored.dtype).eps * B.norm() else B


def _padded(t: Tensor, rank: int, dim: int) -> Tensor:
    shape = list(t.shape)
    shape[dim] = rank - shape[dim]
    return torch.cat([t, t.new_zeros(shape)], dim)


def _lora_config(config: dict, rank: int, targets: dict) -> dict:
    return {
        "peft_type": "LORA",
        "task_type": config.get("task_type"),
        "base_model_name_or_path": config.get("base_model_name_or_path"),
        "revision": config.get("revision"),
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        **targets,
        "fan_in_fan_out": bool(config.get("fan_in_fan_out")),
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": list(dict.fromkeys(config.get("modules_to_save") or ())) or None,
        "rank_pattern": {},
        "alpha_pattern": {},
    }
