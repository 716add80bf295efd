"""A MultiLoRA adapter as one plain LoRA of rank n·r, exactly: what every server of LoRA adapters can load."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from multilora_fast.adapters.branches import CONTAINER, Branches, as_lora, collect
from multilora_fast.adapters.files import PREFIX, check_new_adapter, parse_multilora, read_files, write_files
from multilora_fast.console import progress

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # the values vLLM takes for --max-lora-rank


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

    A is the branches' A below each other, B the branches' c·sᵢ ⊙ Bᵢ beside each other, in the adapter's own dtypes;
    modules of lower rank are padded with zeros, so that one rank holds for all.

    Args:
        source: a PEFT model, any model with MultiLoRA layers (ours or fused), or the directory of a saved adapter.
        out_dir: made if missing, or that of an earlier export, which is overwritten. On an error nothing in it has
            changed.
        adapter_name: which adapter of a PEFT model; the active one when None.

    Raises:
        ValueError: no MultiLoRA adapter there, or one with modules_to_save or trained biases, which a plain LoRA that
            any server takes cannot hold; or ``out_dir`` holds a model, a training run or an adapter that is no
            export.
    """
    return write_lora(source, out_dir, adapter_name=adapter_name)


def write_lora(
    source: nn.Module | str | os.PathLike,
    out_dir: str | os.PathLike,
    *,
    adapter_name: str | None = None,
    verify: Callable[[Path], None] | None = None,
) -> ExportReport:
    """:func:`export_lora`, undone if ``verify``, given the directory of the finished adapter, raises."""
    check_new_adapter(out_dir, "export")
    config, modules = _from_model(source, adapter_name) if isinstance(source, nn.Module) else _from_directory(source)
    rank = max(b.lora_num * b.r for b in modules.values())
    tensors = {}
    for name, branches in progress(modules.items(), "export"):
        A, B = as_lora(branches)
        tensors[f"{PREFIX}{name}.lora_A.weight"] = _padded(A, rank, 0)
        tensors[f"{PREFIX}{name}.lora_B.weight"] = _padded(B, rank, 1)
    write_files(out_dir, _lora_config(config, rank, sorted(modules)), tensors, made_by="export", verify=verify)
    return ExportReport(rank, len(modules), next((r for r in VLLM_RANKS if r >= rank), None))


def _from_directory(directory: str | os.PathLike) -> tuple[dict, dict[str, Branches]]:
    config, tensors = read_files(directory, "MultiLoRA")
    _check_config(config)
    return parse_multilora(directory, config, tensors)


def _check_config(config: dict) -> None:
    if config.get("modules_to_save"):
        raise ValueError(f"the adapter has modules_to_save {sorted(config['modules_to_save'])}, which no LoRA holds.")
    if config.get("bias", "none") != "none":
        raise ValueError(f"the adapter has bias={config['bias']!r}, which no LoRA that servers take holds.")


def _from_model(model: Any, adapter_name: str | None) -> tuple[dict, dict[str, Branches]]:
    modules = collect(model, adapter_name)
    if not modules:
        wanted = "" if adapter_name is None else f" called {adapter_name!r}"
        raise ValueError(f"model holds no MultiLoRA adapter{wanted} to export.")
    layers = (module for module in model.modules() if CONTAINER in module._modules)
    name = adapter_name or next((name for layer in layers for name in layer.active_adapters), None)
    peft_config = (getattr(model, "peft_config", None) or {}).get(name)
    fields = ("bias", "modules_to_save", "base_model_name_or_path", "revision", "task_type", "fan_in_fan_out")
    config = {field: getattr(peft_config, field) for field in fields} if peft_config else {}
    _check_config(config)
    if any(getattr(module, "fan_in_fan_out", False) for module in modules.values()):
        config["fan_in_fan_out"] = True
    return config, {name: Branches.of(module) for name, module in modules.items()}


def _padded(t: Tensor, rank: int, dim: int) -> Tensor:
    shape = list(t.shape)
    shape[dim] = rank - shape[dim]
    return torch.cat([t, t.new_zeros(shape)], dim)


def _lora_config(config: dict, rank: int, names: list[str]) -> dict:
    return {
        "peft_type": "LORA",
        "task_type": config.get("task_type"),
        "base_model_name_or_path": config.get("base_model_name_or_path"),
        "revision": config.get("revision"),
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "target_modules": names,
        "fan_in_fan_out": bool(config.get("fan_in_fan_out")),
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
        "rank_pattern": {},
        "alpha_pattern": {},
    }
