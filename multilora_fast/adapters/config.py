"""The fields of an adapter's config that shape each module: ranks, branch counts, alphas, target modules."""

import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping

from multilora_fast.adapters.branches import Branches
from multilora_fast.validation import check_config, check_hyperparameters, check_names, check_switch, check_text

_TEXTS = ("base_model_name_or_path", "base_model_type", "revision", "task_type", "bias")
_SWITCHES = ("fan_in_fan_out", "use_rslora", "use_dora", "lora_bias", "use_qalora", "use_bdlora")


def check_fields(where: os.PathLike, config: Mapping, method: str, needed: Iterable[str]) -> None:
    """Raise ValueError if the config in the file ``where`` is of another method, or naming the first field that is
    missing or has the wrong type. A text such as "false" is no switch: it would count as true."""
    if config.get("peft_type") != method.upper():
        raise ValueError(f"{where} describes a {config.get('peft_type')} adapter, not a {method} adapter.")
    missing = sorted(set(needed) - set(config))
    if missing:
        raise ValueError(f"{where} lacks {', '.join(missing)}.")
    try:
        for field in _TEXTS:
            check_text(field, config.get(field))
        for field in _SWITCHES:
            if config.get(field) is not None:
                check_switch(field, config[field])
        check_names("modules_to_save", config.get("modules_to_save"))
        for field in ("target_modules", "exclude_modules", "target_parameters"):
            if not isinstance(config.get(field), str):
                check_names(field, config.get(field))
        check_config(config)
        shared = {field: config[field] for field in ("lora_dropout", "scaling") if field in needed}
        check_hyperparameters(**{"r": 1, "lora_num": 1, "lora_dropout": 0.0, **shared})
    except ValueError as error:
        raise ValueError(f"{where} is wrong: {error}") from None


def pattern_value(pattern: Mapping[str, object] | None, name: str, default):
    """The value of the first key of ``pattern``, a regular expression, that matches the end of ``name``, as in PEFT."""
    return next((v for key, v in (pattern or {}).items() if re.match(rf"(.*\.)?({key})$", name)), default)


def shape_options(config: Mapping, name: str) -> dict:
    """r, lora_num and lora_alpha of the module ``name``."""
    r = pattern_value(config.get("rank_pattern"), name, config["r"])
    alpha = pattern_value(config.get("alpha_pattern"), name, config["lora_alpha"])
    return {
        "r": r,
        "lora_num": pattern_value(config.get("lora_num_pattern"), name, config["lora_num"]),
        "lora_alpha": r if alpha is None else alpha,
    }


def describe(modules: Mapping[str, Branches]) -> dict:
    """The config fields that give every module its r, lora_num and c: the most common values, and patterns for other
    modules and for the rank of experts, whose default is another than that of linear layers."""
    alpha_is_rank = all(b.scaling_factor == 1.0 for b in modules.values())
    values = {name: (b.r, b.lora_num, b.scaling_factor * b.r) for name, b in modules.items()}
    common = [Counter(column).most_common(1)[0][0] for column in zip(*values.values(), strict=True)]
    own = [{name for name, row in values.items() if row[i] != common[i]} for i in range(3)]
    own[0] |= {name for name, branches in modules.items() if branches.experts is not None}
    patterns = [{f"^{re.escape(n)}": row[i] for n, row in values.items() if n in own[i]} for i in range(3)]
    return {
        "r": common[0],
        "lora_num": common[1],
        "lora_alpha": None if alpha_is_rank else common[2],
        "rank_pattern": patterns[0],
        "lora_num_pattern": patterns[1],
        "alpha_pattern": {} if alpha_is_rank else patterns[2],
    }


def targets(adapted: Iterable[str], everything: Iterable[str] = ()) -> list[str] | str:
    """``target_modules`` that match exactly ``adapted`` among ``everything``: their names, or one regular expression
    where a name is also the end of another module's."""
    adapted = sorted(adapted)
    suffixes = tuple(f".{name}" for name in adapted)
    if any(name.endswith(suffixes) for name in set(everything) - set(adapted)):
        return "|".join(re.escape(name) for name in adapted)
    return adapted
