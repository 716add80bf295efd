"""How the config of a LoRA names the modules it adapts, so that PEFT puts it on these and no others.

For some MoE models PEFT rewrites a LoRA's target_modules as it loads them: what ends in gate_proj, up_proj, down_proj
(w1, w2, w3) becomes the experts' parameters, as such names meant in the models' first versions, and a dense layer or a
shared expert of that name stays without its LoRA. PEFT leaves target_parameters as they are, and a LoRA on the
parameter ``weight`` of a linear layer is the same function as one on the layer.
"""

import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from multilora_fast.adapters.experts import checkpoint_names


def lora_targets(names: Iterable[str], model_type: str | None) -> dict[str, list[str] | None]:
    """target_modules and target_parameters that put a LoRA on the modules ``names`` of a model of ``model_type``.

    Raises:
        ValueError: ``model_type`` is None, and some modules are experts, whose names mean other things by model.
    """
    names = sorted(names)
    expert = next((name for name in names if "expert" in name), None)
    if model_type is None and expert is not None:
        raise ValueError(
            f"the adapter does not say of what type its base model is, and on some PEFT takes {expert} for a parameter "
            "of the experts: export it from the model, or write the model's model_type as base_model_type into its "
            "adapter_config.json."
        )
    moved = {end for end in {name.rpartition(".")[2] for name in names} if is_rewritten(end, model_type)}
    parameters = [f"{name}.weight" for name in names if name.rpartition(".")[2] in moved]
    modules = [name for name in names if name.rpartition(".")[2] not in moved]
    return {"target_modules": modules, "target_parameters": parameters or None}


def expert_targets(config: dict, ranks: Mapping[str, int], layout: str, model_type: str | None) -> dict:
    """``config``, of a LoRA on linear layers, with the projections of experts beside them, whose ``ranks`` are given by
    name.

    Per expert, PEFT joins the LoRAs of gate and up to one of twice the rank. Where it rewrites their names, it takes
    twice the common rank if no pattern says otherwise.
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
    """The model type of an adapter's base model: what its config says, else that of the model it names, where that is
    on this machine."""
    if config.get("base_model_type"):
        return config["base_model_type"]
    model = config.get("base_model_name_or_path")
    if not model:
        return None
    path: Path | None = Path(model, "config.json")
    if not Path(model).is_dir():
        path = _cached(model, config.get("revision"))
    try:
        found = json.loads(path.read_text()) if path is not None and path.is_file() else None
    except (OSError, ValueError, RecursionError):
        return None
    found = found.get("model_type") if isinstance(found, dict) else None
    return found if isinstance(found, str) else None


def _cached(model: str, revision: str | None) -> Path | None:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        path = try_to_load_from_cache(model, "config.json", revision=revision)
    except HFValidationError:  # no name of a repository
        return None
    return Path(path) if isinstance(path, (str, os.PathLike)) else None


def is_rewritten(end: str, model_type: str | None) -> bool:
    """Whether PEFT, for a model of this type, would make something else of a target module whose name ends so."""
    from peft import LoraConfig
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    probe = LoraConfig(target_modules=[end])
    model: Any = SimpleNamespace(config=SimpleNamespace(model_type=model_type))
    try:
        convert_peft_config_for_transformers(probe, model, None)
    except ValueError:  # it would rewrite this one together with another
        return True
    return probe.target_modules != {end}
