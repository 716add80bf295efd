"""What a training step will hold, before it is run: :func:`plan_memory`.

Nothing is allocated and nothing but a config is read. The model is built with 3 and with 4 decoder layers, each takes a
step on fake tensors (``step.py``), and the figures are continued to the config's depth: every one is linear in the
number of layers, which are equal. Models with unequal layers are counted whole.
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

from multilora_fast import devices
from multilora_fast.console import progress
from multilora_fast.memory import fsdp as sharding
from multilora_fast.memory.methods import FULL, METHODS, CannotAdapt
from multilora_fast.memory.report import MemoryPlan, MethodPlan, cublas_workspaces, parse_memory
from multilora_fast.memory.step import (
    OPTIMIZERS,
    PACKED,
    PHASES,
    CannotCount,
    Step,
    StepSettings,
    build,
    decoder_layers,
)
from multilora_fast.models import model_source
from multilora_fast.peft import MultiLoraConfig
from multilora_fast.validation import check_hyperparameters, check_integer

DTYPES = devices.DTYPES | {"float16": torch.float16}
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
    """The memory of one training step of a causal LM, beside each other for full fine-tuning, PEFT LoRA of rank
    lora_num·r, the reference loop and the fused op.

    All methods adapt the same modules, those that a MultiLoraConfig of these arguments takes; one that cannot is in the
    plan's ``refused``, with the reason. The step keeps no cache of keys and values: ``use_cache`` is False, as in
    transformers' Trainer.

    Args:
        model_or_config: a transformers config, a model (of which the config is read), a directory or a hub id.
        batch, seq_len: rows per forward, on each GPU, and tokens per row, without padding.
        r, lora_num, lora_dropout, target_modules: of the adapters; target_modules None stands for "all-linear".
        dtype: of the base, and of all that full fine-tuning trains.
        quantization: "4bit" (bitsandbytes' NF4, double quantization), "8bit" or None. The first and third method cannot
            use it; their base stays in ``dtype``. Such a base is counted as a dense one with packed weights, and the
            largest dense weight while it is used.
        checkpointing: recompute each decoder layer in backward.
        optimizer: "adamw", "adamw_8bit" (bitsandbytes'), "adafactor" or "sgd" (without momentum).
        adapter_dtype: of LoRA's and our adapter. None is what PEFT does: float32 on a half-precision base. The
            reference loop keeps its branches in the base's dtype.
        device: "cuda" counts what FlashAttention-2, CUDA's dropout and the fused AdamW hold; "cpu" what the CPU does.
            Where transformers' default for a model is eager attention, it is eager here.
        device_memory: an int of bytes, a size such as "24GiB" or a GPU's name such as "H100": adds the largest batch.
        headroom: the share of device_memory that is left free, for the CUDA context and the allocator's fragments, and
            for cuBLAS's workspaces where they are not counted. They are on an H100 or H200, named or in this machine.
        gradient_accumulation: forwards and backwards per optimizer step, the gradients of which add up; under FSDP2
            they stay whole on every GPU until the last, as transformers' Trainer has it.
        fsdp: GPUs that share weights, gradients and the optimizer's state under FSDP2, each decoder layer and the rest
            sharded by fully_shard. All figures are then those of the first GPU. None: each holds all of them.
        options: further fields of MultiLoraConfig.

    Returns: the plan. Print it, or take ``.to_dict()``, ``.plot(path)``, or a method's row by its name: "ours",
        "PEFT LoRA", "reference loop" or "full fine-tuning".

    Raises:
        ValueError: an argument out of its range, more tokens than the model has a table of positions for, a config that
            cannot be found, is no causal LM's, or whose step depends on the values of its tensors.
    """
    check_hyperparameters(r=r, lora_num=lora_num, lora_dropout=lora_dropout, scaling=options.get("scaling", "vector"))
    counts = {"batch": batch, "seq_len": seq_len, "gradient_accumulation": gradient_accumulation}
    for name, value in (counts if fsdp is None else {**counts, "fsdp": fsdp}).items():
        check_integer(name, value, least=1)
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
    base_dtype = _dtype("dtype", dtype)
    own = _dtype("adapter_dtype", adapter_dtype or torch.promote_types(base_dtype, torch.float32))
    available = None if device_memory is None else parse_memory(device_memory)
    config = load_config(model_or_config)
    settings = StepSettings(
        seq_len=seq_len,
        r=r,
        lora_num=lora_num,
        dtype=base_dtype,
        adapter_dtype=own,
        lora_dropout=lora_dropout,
        target_modules="all-linear" if target_modules is None else target_modules,
        quantization=quantization,
        checkpointing=checkpointing,
        optimizer=optimizer,
        device=device,
        gradient_accumulation=gradient_accumulation,
        fsdp=fsdp,
        options=options,
    )
    notes = [*_check_positions(config, settings), *_check_experts(config, settings)]
    workspace = cublas_workspaces(device_memory) if device == "cuda" else 0
    budget = None if available is None else int(available * (1 - headroom)) - workspace
    whole = not _equal_layers(config, settings)
    with sharding.world(fsdp):
        rows = {
            method: _plan(config, method, settings, whole, batch, budget, workspace)
            for method in progress(METHODS, "counting steps")
        }
    plans = [row for row in rows.values() if isinstance(row, MethodPlan)]
    refused = {method: row for method, row in rows.items() if isinstance(row, str)}
    asked = {
        "model": str(model_or_config) if isinstance(model_or_config, (str, os.PathLike)) else config.model_type,
        "layers": _depth(config),
        "batch": batch,
        **{
            key: str(v).removeprefix("torch.") if isinstance(v, torch.dtype) else v for key, v in vars(settings).items()
        },
        "device_memory": available,
        "headroom": headroom,
    }
    return MemoryPlan(asked, plans, refused, notes)


def _plan(
    config, method: str, settings: StepSettings, whole: bool, batch: int, budget: int | None, workspace: int
) -> MethodPlan | str:
    """The plan of a method, or why it has none."""
    try:
        count = cache(counter(config, method, settings, whole=whole))
        plan = MethodPlan.of(method, count(batch), workspace)
    except CannotAdapt as error:
        return str(error)
    except CannotCount as error:
        if method == FULL:  # which is the first
            raise
        return _reason(config, settings, error)
    if budget is None:
        return plan
    return replace(plan, largest_batch=largest_batch(lambda rows: [count(rows)[p] for p in PHASES], budget, batch))


def _reason(config: PreTrainedConfig, settings: StepSettings, error: CannotCount) -> str:
    """Why a model whose full step can be counted has none with these modules adapted."""
    linears = [m for m in build(config, FULL, settings).named_modules() if isinstance(m[1], nn.Linear)]
    own = sorted({name.rpartition(".")[2] for name, m in linears if type(m).forward is not nn.Linear.forward})
    if not own:
        return str(error)
    return (
        f"of these modules {', '.join(own)} computes something else than a linear layer does "
        f"({error.__cause__}): leave it out with exclude_modules."
    )


def counter(
    config: PreTrainedConfig, method: str, settings: StepSettings, *, whole: bool
) -> Callable[[int], dict[str, int]]:
    """A function from a batch size to bytes by kind and by phase; ``whole`` counts all layers."""
    if whole:
        return Step(config, method, settings).count
    steps = [Step(shallow(config, layers), method, settings) for layers in FEW]

    def count(batch: int) -> dict[str, int]:
        few, more = (step.count(batch) for step in steps)
        return {key: few[key] + (_depth(config) - FEW[0]) * (more[key] - few[key]) for key in few}

    return count


def largest_batch(peaks_of: Callable[[int], list[int]], budget: int, start: int) -> int:
    """The most rows whose peaks, by phase, are within ``budget``; 0 for none. The peaks grow with the rows, almost
    linearly, so that few counts find it."""
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
    """The config of what was given.

    Raises:
        ValueError: it cannot be found, or is no causal LM's.
    """
    config = getattr(model_or_config, "config", model_or_config)
    if isinstance(config, (str, os.PathLike)):
        name = os.fspath(config)
        source = model_source("model", name)
        try:
            config = AutoConfig.from_pretrained(source, trust_remote_code=False)
        except (OSError, ValueError, KeyError) as error:
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise ValueError(f"model {name} has no config that could be read: {reason}") from error
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
    """What there is to say of more tokens than the model was made for.

    Raises:
        ValueError: it has a table of positions, which ends.
    """
    text, asked = config.get_text_config(), settings.seq_len
    name = next((name for name in POSITIONS if isinstance(getattr(text, name, None), int)), None)
    positions = asked if name is None else getattr(text, name)
    if name is None or asked <= positions:
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


def _check_experts(config: PreTrainedConfig, settings: StepSettings) -> list[str]:
    """What there is to say of experts that are not counted as they are."""
    asked = getattr(config.get_text_config(), "_experts_implementation", None)
    modules = build(config, FULL, settings).modules() if asked == "eager" else ()
    if not any(type(module).__name__.endswith("Experts") for module in modules):
        return []
    return ["Eager experts hold what depends on the tokens of each: they are counted as transformers' grouped_mm."]


def _check_choice(name: str, value, choices) -> None:
    if value not in choices:
        *most, last = (f'"{choice}"' if isinstance(choice, str) else str(choice) for choice in choices)
        raise ValueError(f"{name} must be {', '.join(most)} or {last}, not {value!r}.")


def _dtype(name: str, value: str | torch.dtype) -> torch.dtype:
    chosen = str(value).removeprefix("torch.")
    _check_choice(name, chosen, DTYPES)
    return DTYPES[chosen]
