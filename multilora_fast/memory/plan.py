"""Estimate the memory of a training step before it is run: :func:`plan_memory`.

Only a config is read, and nothing is allocated. The model takes a step on fake tensors (``step.py``) with 3 and with 4
decoder layers. If all layers are equal, every figure is linear in their number and is extrapolated to the config's
depth. A model with unequal layers is counted whole.
"""

import copy
import os
import warnings
from collections.abc import Callable
from dataclasses import fields, replace
from functools import cache

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from multilora_fast.console import progress
from multilora_fast.memory import fsdp as sharding
from multilora_fast.memory.methods import FULL, METHODS, CannotPlan
from multilora_fast.memory.report import MemoryPlan, MethodPlan, parse_memory
from multilora_fast.memory.step import OPTIMIZERS, PACKED, PHASES, Step, StepSettings, build, decoder_layers
from multilora_fast.models import pretrained
from multilora_fast.peft import MultiLoraConfig
from multilora_fast.peft.precision import DTYPES
from multilora_fast.peft.targets import Bypassed
from multilora_fast.validation import check_hyperparameters, check_integer

POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
FEW = (3, 4)  # layers: a first, a last and one or two between


def plan_memory(
    model_or_config: nn.Module | PreTrainedConfig | str | os.PathLike,
    *,
    batch: int,
    seq_len: int,
    r: int = 32,
    lora_num: int = 3,
    dtype: str | torch.dtype = "bfloat16",
    lora_dropout: float = 0.0,
    target_modules: list[str] | str | None = None,
    quantization: str | None = None,
    checkpointing: bool = False,
    optimizer: str = "adamw",
    adapter_dtype: str | torch.dtype | None = None,
    device: str = "cuda",
    device_memory: int | str | None = None,
    headroom: float = 0.05,
    gradient_accumulation: int = 1,
    fsdp: int | None = None,
    **options,
) -> MemoryPlan:
    """Estimate the memory of one training step of a causal LM by full fine-tuning, PEFT LoRA of rank lora_num·r, the
    reference loop and the fused op.

    All methods adapt the modules that a MultiLoraConfig of these arguments adapts. The plan's ``refused`` says why a
    method cannot. The step keeps no key-value cache (``use_cache=False``), like transformers' Trainer.

    Args:
        model_or_config: a transformers config, a model (only its config is read), a directory or a hub id.
        batch, seq_len: rows per forward on each GPU, and tokens per row, without padding.
        r, lora_num, lora_dropout, target_modules: the adapter; target_modules None stands for "all-linear".
        dtype: of the base, and of everything in full fine-tuning.
        quantization: "4bit" (bitsandbytes' NF4, double quantization), "8bit" or None. Full fine-tuning and the loop
            cannot use it; their base stays in ``dtype``. A quantized base is counted with packed weights, and the
            largest dense weight while it is used.
        checkpointing: recompute each decoder layer in backward.
        optimizer: "adamw", "adamw_8bit" (bitsandbytes'), "adafactor" or "sgd" (without momentum).
        adapter_dtype: of LoRA's and our adapter. None is PEFT's default: float32 on a half-precision base. The
            reference loop keeps its branches in the base's dtype.
        device: "cuda" counts what FlashAttention-2, CUDA's dropout and the fused AdamW hold, "cpu" what the CPU
            holds. Where transformers' default for a model is eager attention, eager attention is counted. Eager experts
            are counted as transformers' grouped_mm, because what they hold depends on the routing.
        device_memory: a size such as "24GiB", or an int of bytes; adds the largest batch that fits.
        headroom: the share of device_memory left free for the CUDA context, the allocator's fragments and cuBLAS's
            workspaces. The workspaces are counted only if this machine's GPU is a Hopper (H100, H200), on which they
            take 64 MiB.
        gradient_accumulation: forwards and backwards per optimizer step. Under FSDP2 gradients stay whole on every GPU
            until the last backward, as in transformers' Trainer.
        fsdp: number of GPUs that shard weights, gradients and optimizer state under FSDP2: fully_shard on each decoder
            layer, then on the rest. All figures are then those of the first GPU. None: no sharding.
        options: further fields of MultiLoraConfig.

    Returns: the plan. Print it, or use ``.to_dict()``, ``.plot(path)``, or a method's row by name: "ours", "PEFT LoRA",
        "reference loop" or "full fine-tuning".

    Raises:
        ValueError: an argument out of its range, more tokens than the model has a table of positions for, or a config
            that cannot be found, is not a causal LM's, or whose step depends on the values of its tensors.
    """
    given = dict(locals())
    check_hyperparameters(r=r, lora_num=lora_num, lora_dropout=lora_dropout, scaling=options.get("scaling", "vector"))
    for name in ("batch", "seq_len", "gradient_accumulation", *(() if fsdp is None else ("fsdp",))):
        check_integer(name, given[name], least=1)
    if fsdp is not None and quantization is not None:
        raise ValueError("fsdp cannot be planned with a quantized base: give one of fsdp and quantization.")
    unknown = sorted(set(options) - ({field.name for field in fields(MultiLoraConfig)} - {"inference_mode"}))
    if unknown:
        raise ValueError(f"{unknown[0]} is no field of MultiLoraConfig that training has.")
    if not isinstance(headroom, (int, float)) or not 0.0 <= headroom < 1.0:
        raise ValueError(f"headroom must be a share in [0, 1), not {headroom!r}.")
    _check_choice("quantization", quantization, (None, *PACKED))
    _check_choice("optimizer", optimizer, OPTIMIZERS)
    _check_choice("device", device, ("cuda", "cpu"))
    given["dtype"] = base = _dtype("dtype", dtype)
    given["adapter_dtype"] = _dtype("adapter_dtype", adapter_dtype or torch.promote_types(base, torch.float32))
    given["target_modules"] = "all-linear" if target_modules is None else target_modules
    available = None if device_memory is None else parse_memory(device_memory)
    budget = None if available is None else int(available * (1 - headroom))
    config = load_config(model_or_config)
    settings = StepSettings(**{field.name: given[field.name] for field in fields(StepSettings)})
    notes = _check_positions(config, settings)
    whole = not _equal_layers(config, settings)
    with sharding.world(fsdp):
        rows = {m: _plan(config, m, settings, whole, batch, budget) for m in progress(METHODS, "counting steps")}
    plans = [row for row in rows.values() if isinstance(row, MethodPlan)]
    refused = {method: row for method, row in rows.items() if isinstance(row, str)}
    shown = {
        key: str(v).removeprefix("torch.") if isinstance(v, torch.dtype) else v for key, v in vars(settings).items()
    }
    asked = {
        "model": str(model_or_config) if isinstance(model_or_config, (str, os.PathLike)) else config.model_type,
        "layers": _depth(config),
        "batch": batch,
        **shown,
        "device_memory": available,
        "headroom": headroom,
    }
    return MemoryPlan(asked, plans, refused, notes)


def _plan(config, method: str, settings: StepSettings, whole: bool, batch: int, budget: int | None) -> MethodPlan | str:
    """The plan of a method, or the reason why it has none."""
    try:
        count = cache(counter(config, method, settings, whole=whole))
        plan = MethodPlan.of(method, count(batch))
    except (Bypassed, CannotPlan) as error:
        if method == FULL:  # then no method can be counted
            raise
        return str(error)
    if budget is None:
        return plan
    return replace(plan, largest_batch=largest_batch(lambda rows: [count(rows)[p] for p in PHASES], budget, batch))


def counter(
    config: PreTrainedConfig, method: str, settings: StepSettings, *, whole: bool
) -> Callable[[int], dict[str, int]]:
    """A function from a batch size to the figures of :meth:`Step.count`; ``whole`` counts all layers."""
    if whole:
        return Step(config, method, settings).count
    steps = [Step(shallow(config, layers), method, settings) for layers in FEW]

    def count(batch: int) -> dict[str, int]:
        few, more = (step.count(batch) for step in steps)
        return {key: few[key] + (_depth(config) - FEW[0]) * (more[key] - few[key]) for key in few}

    return count


def largest_batch(peaks_of: Callable[[int], list[int]], budget: int, start: int) -> int:
    """The most rows whose peaks, by phase, are within ``budget``; 0 for none.

    Each guess continues the line through two counts, because peaks grow almost linearly with the rows.
    """
    points = {rows: peaks_of(rows) for rows in (1, max(start, 2))}
    while True:
        low = max((rows for rows, peaks in points.items() if max(peaks) <= budget), default=0)
        high = min((rows for rows, peaks in points.items() if max(peaks) > budget), default=None)
        if high == low + 1:
            return low
        a, b = sorted(points)[-2:] if high is None else (low, high)
        lines = zip(points[a], points[b], strict=True)
        guess = min((a + (budget - p) * (b - a) // (q - p) for p, q in lines if q > p), default=2 * b)
        guess = max(guess, low + 1) if high is None else min(max(guess, low + 1), high - 1)
        points[guess] = peaks_of(guess)


def load_config(model_or_config: nn.Module | PreTrainedConfig | str | os.PathLike) -> PreTrainedConfig:
    """The config of a model, a directory or a hub id.

    Raises:
        ValueError: it cannot be found, or is not a causal LM's.
    """
    config = getattr(model_or_config, "config", model_or_config)
    if isinstance(config, (str, os.PathLike)):
        config = pretrained(AutoConfig, os.fspath(config), "model")
    if not isinstance(config, PreTrainedConfig):
        raise ValueError(
            "model_or_config must be a transformers config, a model, a directory or a hub id, not "
            f"{type(model_or_config).__name__}."
        )
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(f"model_or_config must be a causal LM's, which a {type(config).__name__} is not.")
    return config


def shallow(config: PreTrainedConfig, layers: int) -> PreTrainedConfig:
    """A copy of ``config`` with fewer decoder layers."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    text.num_hidden_layers = layers
    if vars(text).get("layer_types"):
        text.layer_types = text.layer_types[:layers]
    return config


def _depth(config: PreTrainedConfig) -> int:
    return config.get_text_config().num_hidden_layers


def _equal_layers(config: PreTrainedConfig, settings: StepSettings) -> bool:
    """Whether there are more than FEW layers, all of the same kind and shapes."""
    if _depth(config) <= max(FEW) or len(set(getattr(config.get_text_config(), "layer_types", None) or ())) > 1:
        return False
    layers = decoder_layers(build(config, FULL, settings), config)
    return len({(type(x), tuple((name, p.shape) for name, p in x.named_parameters())) for x in layers}) == 1


def _check_positions(config: PreTrainedConfig, settings: StepSettings) -> list[str]:
    """Warn of more tokens than the model was made for; returns the warnings.

    Raises:
        ValueError: it has a table of positions, which ends.
    """
    text, asked = config.get_text_config(), settings.seq_len
    name = next((name for name in POSITIONS if isinstance(getattr(text, name, None), int)), "")
    positions = getattr(text, name, asked)
    if asked <= positions:
        return []
    longer = shallow(config, 1)
    setattr(longer.get_text_config(), name, positions + 1)
    models = [build(c, FULL, settings) for c in (shallow(config, 1), longer)]
    few, more = ([t.shape for t in (*model.parameters(), *model.buffers())] for model in models)
    kind = type(config).__name__
    if few != more:
        raise ValueError(f"seq_len must be at most {positions}, the positions of this {kind}, not {asked}.")
    said = f"seq_len {asked} is beyond the {positions} positions that this {kind} is made for."
    warnings.warn(said, stacklevel=3)
    return [said]


def _check_choice(name: str, value, choices) -> None:
    if value not in choices:
        *most, last = (f'"{choice}"' if isinstance(choice, str) else str(choice) for choice in choices)
        raise ValueError(f"{name} must be {', '.join(most)} or {last}, not {value!r}.")


def _dtype(name: str, value: str | torch.dtype) -> torch.dtype:
    chosen = str(value).removeprefix("torch.")
    _check_choice(name, chosen, DTYPES)
    return DTYPES[chosen]
