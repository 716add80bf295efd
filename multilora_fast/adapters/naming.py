"""The fields of a LoRA's config that name its modules, so that PEFT adapts these and no others.

On some MoE models PEFT rewrites a LoRA's target_modules as it loads them: names that end in gate_proj, up_proj,
down_proj (w1, w2, w3) become the experts' parameters, and dense layers and shared experts of that name lose their LoRA.
PEFT leaves target_parameters alone, and a LoRA on a linear layer's parameter ``weight`` computes the same.
"""

import re
from collections.abc import Iterable, Mapping
from types import SimpleNamespace
from typing import Any

from multilora_fast.adapters.experts import checkpoint_names, unknown_type


def lora_targets(names: Iterable[str], model_type: str | None) -> dict[str, list[str] | None]:
    """target_modules and target_parameters of a LoRA on the modules ``names`` of a model of ``model_type``.

    Raises:
        ValueError: ``model_type`` is None, and some modules are experts.
    """
    names = sorted(names)
    expert = next((name for name in names if "expert" in name), None)
    if model_type is None and expert is not None:
        raise unknown_type(f"whether PEFT takes {expert} for a parameter of the experts")
    moved = {end for end in {name.rpartition(".")[2] for name in names} if is_rewritten(end, model_type)}
    parameters = [f"{name}.weight" for name in names if name.rpartition(".")[2] in moved]
    modules = [name for name in names if name.rpartition(".")[2] not in moved]
    return {"target_modules": modules, "target_parameters": parameters or None}


def expert_targets(config: dict, ranks: Mapping[str, int], layout: str, model_type: str | None) -> dict:
    """``config`` of a LoRA on linear layers, extended by the projections of experts, whose ``ranks`` are given by name.

    In the layout "per-expert" PEFT joins the LoRAs of gate and up to one of twice the rank. Where it rewrites their
    names, twice the common rank is its default.
    """
    ends: set[str] = set()
    patterns: dict[str, int] = {}
    for name in sorted(ranks):
        path, _, projection = name.rpartition(".")
        r, usual = ranks[name], config["r"]
        if layout == "per-expert":
            experts, leaves = checkpoint_names(path, model_type)
            here = leaves[projection]
            ends.update(here)
            if r != usual:
                patterns |= {rf"^{re.escape(experts)}\.\d+\.{end}": r for end in here}
            r *= len(here)
            usual *= len(here) if all(is_rewritten(end, model_type) for end in here) else 1
        if r != usual:
            patterns[f"^{re.escape(name)}"] = r
    if ends and all(is_rewritten(end, model_type) for end in ends):
        found = {"target_modules": [*config["target_modules"], *sorted(ends)]}
    else:
        found = {"target_parameters": sorted({*(config["target_parameters"] or ()), *ranks})}
    return config | found | {"rank_pattern": patterns, "alpha_pattern": patterns}


def base_model_type(config: dict) -> str | None:
    """The model type of an adapter's base model, from its config or that of a base model on this machine."""
    from transformers import PretrainedConfig

    if config.get("base_model_type"):
        return config["base_model_type"]
    model, revision = config.get("base_model_name_or_path"), config.get("revision")
    if not model:
        return None
    try:
        found = PretrainedConfig.get_config_dict(model, revision=revision, local_files_only=True)[0].get("model_type")
    except (OSError, AttributeError, RecursionError):  # not on this machine, or no object of JSON
        return None
    return found if isinstance(found, str) else None


def is_rewritten(end: str, model_type: str | None) -> bool:
    """Whether PEFT rewrites target modules whose name ends in ``end`` on a model of this type."""
    from peft import LoraConfig
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    probe = LoraConfig(target_modules=[end])
    model: Any = SimpleNamespace(config=SimpleNamespace(model_type=model_type))
    try:
        convert_peft_config_for_transformers(probe, model, None)
    except ValueError:  # raised where it rewrites ``end`` only together with another
        return True
    return probe.target_modules != {end}
