"""Untrained adapters for trainers that continue from one: :func:`init_adapter`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import get_peft_model
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn
from transformers import AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from multilora_fast.adapters.files import CONFIG, WEIGHTS
from multilora_fast.files import atomic_dir, check_new_folder
from multilora_fast.models import pretrained
from multilora_fast.peft.config import MultiLoraConfig
from multilora_fast.peft.precision import DTYPES
from multilora_fast.peft.targets import is_all_linear, linear_kinds, unmatched

_AUTO = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "FEATURE_EXTRACTION": "AutoModel",
}


def init_adapter(
    model: str | os.PathLike,
    out: str | os.PathLike,
    config: MultiLoraConfig,
    *,
    seed: int = 0,
    dtype: str | None = None,
    overwrite: bool = False,
) -> dict[str, int]:
    """Write an untrained adapter for ``model`` into the new directory ``out``. Only the model's config is read.

    ``PeftModel.from_pretrained(base, out, is_trainable=True)`` then is, to the bit, ``get_peft_model(base, config)``
    right after ``torch.manual_seed(seed)``.

    Args:
        model: directory or hub id of a transformers model. Module names are those of the class that its config names,
            if transformers has it, else those of the task's auto class.
        config: ``task_type`` None stands for CAUSAL_LM.
        dtype: of the base when it is loaded for training: "float32", "bfloat16" or "float16". PEFT draws the branches
            in it and keeps them in float32. None stands for the dtype of the model's config, and for float32 if the
            model is quantized.
        overwrite: allow an ``out`` that is not empty. An adapter in it is replaced; other files stay.

    Returns: the number of adapted "modules" and of their "parameters".

    Raises:
        ValueError: a model whose config cannot be found or whose code is not in transformers, a filled ``out``,
            targets that match no module, or an adapter with copies of base weights: modules_to_save, biases, new heads.
    """
    check_new_folder("out", out, overwrite)
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype must be float32, bfloat16 or float16, not {dtype!r}.")
    if not isinstance(seed, int) or not 0 <= seed < 2**64:
        raise ValueError(f"seed must be an integer from 0 to 2^64 - 1, not {seed!r}.")
    config.task_type = config.task_type or "CAUSAL_LM"
    if config.task_type not in _AUTO:
        tasks = "CAUSAL_LM, SEQ_2_SEQ_LM or FEATURE_EXTRACTION"
        raise ValueError(f"task_type must be {tasks}, not {config.task_type}, which trains a head whole.")
    if config.modules_to_save:
        raise ValueError("modules_to_save starts from the base's weights, which are not read here: leave it out.")
    if config.bias != "none":
        raise ValueError(
            f'bias must be "none", not {config.bias!r}: biases start from the base\'s, which are not read.'
        )
    base = _without_weights(os.fspath(model), config.task_type, None if dtype is None else DTYPES[dtype])
    _check_targets(base, config)
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(seed)
        made: Any = get_peft_model(base, config)
    with atomic_dir(Path(out), last=CONFIG) as stage:
        made.save_pretrained(stage, save_embedding_layers=False)
        (stage / "README.md").unlink()  # PEFT's template of a model card
        (stage / WEIGHTS).chmod((stage / CONFIG).stat().st_mode)
    adapted = made.base_model.targeted_module_names
    return {"modules": len(adapted), "parameters": made.get_nb_trainable_parameters()[0]}


def _without_weights(name: str, task: str, dtype: torch.dtype | None) -> Any:
    """The model with weights of the right shapes and dtype that take no memory: each is one expanded number."""
    config = pretrained(AutoConfig, name, "model")
    if dtype is None:
        quantized = getattr(config, "quantization_config", None) is not None
        dtype = torch.float32 if quantized else config.dtype or torch.float32
    auto: Any = getattr(transformers, _AUTO[task])
    own: Any = getattr(transformers, (getattr(config, "architectures", None) or [""])[0], None)
    with torch.device("meta"):
        try:
            if task == "CAUSAL_LM" and type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and own is not None:
                base = own._from_config(config, dtype=dtype)  # a model of images and text, say
            else:
                base = auto.from_config(config, dtype=dtype, trust_remote_code=False)
        except Exception as error:  # each model class raises its own
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise ValueError(
                f"model {name} is a {type(config).__name__}, of which no {task} is made: {reason}"
            ) from error
    for module in base.modules():
        for key, weight in module._parameters.items():
            if weight is not None:
                module._parameters[key] = nn.Parameter(torch.zeros((), dtype=weight.dtype).expand(weight.shape))
    return base


def _check_targets(base: nn.Module, config: MultiLoraConfig) -> None:
    """Raise ValueError for targets that match no module."""
    wanted = config.target_modules
    if wanted is None or is_all_linear(config):
        return
    nothing = [] if isinstance(wanted, str) else unmatched(base, wanted)
    if not nothing and not any(check_target_module_exists(config, name) for name, _ in base.named_modules()):
        nothing = [wanted] if isinstance(wanted, str) else sorted(wanted)
    if nothing:
        raise ValueError(
            f"target_modules {', '.join(nothing)} match nothing: the linear layers end in {linear_kinds(base)}."
        )
