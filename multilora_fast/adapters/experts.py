"""The two layouts of LoRA files for the experts of MoE models, as PEFT and servers read them.

E experts, R = n·r. A module of experts has two projections: gate_up_proj (up_proj where there is no gate) reads the
hidden states, and down_proj returns them.

"peft": that of PEFT's target_parameters since 0.19.1. The first projection is {experts}.base_layer.lora_A (E·R, K),
expert slowest, and lora_B (N, R·E), expert fastest; down_proj is {experts}.lora_A and lora_B. A reads the input and B
gives the output, also where the model stores its weights transposed.

"per-expert": one LoRA for each expert's gate, up and down projection, under the checkpoint's names, such as
experts.3.gate_proj or block_sparse_moe.experts.3.w1. Gate and up share A and have half of B each.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

LAYOUTS = ("peft", "per-expert")
GATE_UP, UP, DOWN = "gate_up_proj", "up_proj", "down_proj"
Factors = tuple[Tensor, Tensor]  # of a linear layer (R, K) and (N, R), of experts (E, R, K) and (E, N, R)


def missing_half(modules: Mapping[str, Factors], model_type: str | None) -> dict[str, Factors]:
    """Zeros for the projections of adapted experts that are not in ``modules``: the layouts hold both.

    Raises:
        ValueError: down_proj alone is adapted, and ``model_type``, which tells the other projection, is None.
    """
    missing: dict[str, Factors] = {}
    for name, (A, B) in modules.items():
        path, _, projection = name.rpartition(".")
        (E, R, K), N = A.shape, B.shape[1]
        if projection == DOWN and not {f"{path}.{GATE_UP}", f"{path}.{UP}"} & set(modules):
            if model_type is None:
                raise unknown_type(f"whether the experts {path} have a gate")
            targets = [target for one in _conversions(model_type) for target in one.target_patterns]
            gated = not any(target.endswith(f"experts.{UP}") for target in targets)
            other = f"{path}.{GATE_UP if gated else UP}"
            missing[other] = A.new_zeros(E, R, N), B.new_zeros(E, 2 * K if gated else K, R)
        elif projection != DOWN and f"{path}.{DOWN}" not in modules:
            missing[f"{path}.{DOWN}"] = A.new_zeros(E, R, N // 2 if projection == GATE_UP else N), B.new_zeros(E, K, R)
    return missing


def as_parameters(modules: Mapping[str, Factors]) -> dict[str, Tensor]:
    """The tensors of the layout "peft", by name."""
    tensors = {}
    for name, (A, B) in modules.items():
        path, _, projection = name.rpartition(".")
        wrapper = path if projection == DOWN else f"{path}.base_layer"
        tensors[f"{wrapper}.lora_A.weight"] = A.flatten(0, 1)
        tensors[f"{wrapper}.lora_B.weight"] = B.permute(1, 2, 0).flatten(1)
    return tensors


def as_experts(modules: Mapping[str, Factors], model_type: str | None) -> dict[str, Tensor]:
    """The tensors of the layout "per-expert", by name. Errors are those of :func:`checkpoint_names`."""
    tensors = {}
    for name, (A, B) in modules.items():
        path, _, projection = name.rpartition(".")
        experts, leaves = checkpoint_names(path, model_type)
        ends = leaves[projection]
        for end, part in zip(ends, B.chunk(len(ends), 1), strict=True):
            for e in range(len(A)):
                tensors[f"{experts}.{e}.{end}.lora_A.weight"] = A[e].clone()
                tensors[f"{experts}.{e}.{end}.lora_B.weight"] = part[e].clone()
    return tensors


def checkpoint_names(path: str, model_type: str | None) -> tuple[str, dict[str, list[str]]]:
    """The checkpoint's name of the experts at ``path``, and of each one's parts of gate_up_proj and down_proj.

    Raises:
        ValueError: the type is None, or checkpoints of this type do not hold experts one by one.
    """
    from transformers.core_model_loading import PrefixChange, WeightRenaming

    if model_type is None:
        raise unknown_type(f"what checkpoints call the experts {path}")
    mapping = _conversions(model_type)
    back = [one.reverse_transform() for one in reversed(mapping) if isinstance(one, WeightRenaming)]
    experts = _renamed(f"{path}.", [one for one in back if not isinstance(one, PrefixChange)]).removesuffix(".")
    leaves = {
        end: [pattern.removesuffix(".weight").rpartition("*.")[2] for pattern in conversion.source_patterns]
        for conversion in mapping
        for end in (GATE_UP, DOWN)
        if _stacks_experts(conversion, end)
    }
    reached = {end: [_renamed(f"{experts}.0.{leaf}.weight", mapping) for leaf in leaves[end]] for end in leaves}
    if reached != {GATE_UP: [f"{path}.{GATE_UP}"] * 2, DOWN: [f"{path}.{DOWN}"]}:
        raise ValueError(
            f'layout="per-expert" does not exist for the model type {model_type!r}, whose checkpoints do not hold '
            f'the experts {path} one by one, each with gate, up and down: use layout="peft".'
        )
    return experts, leaves


def is_stacked(name: str, model_type: str | None) -> bool:
    """Whether the model stacks the checkpoint's linear layer ``name`` into a parameter of all experts."""
    return not _renamed(f"{name}.weight", _conversions(model_type)).endswith(".weight")


def unknown_type(what: str) -> ValueError:
    return ValueError(
        f"the adapter does not say of what type its base model is, and so not {what}: export it from the model, or "
        "write the model's model_type as base_model_type into its adapter_config.json."
    )


def _conversions(model_type: str | None) -> list[Any]:
    """transformers' conversions of a checkpoint into a model's parameters, renamings first."""
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping
    from transformers.core_model_loading import WeightConverter

    mapping = (model_type and get_checkpoint_conversion_mapping(model_type)) or []
    return sorted(mapping, key=lambda conversion: isinstance(conversion, WeightConverter))


def _renamed(name: str, conversions: list[Any]) -> str:
    for conversion in conversions:
        name = conversion.rename_source_key(name)[0]
    return name


def _stacks_experts(conversion: Any, end: str) -> bool:
    """Whether it stacks every expert's matrices, in order, into one parameter whose name ends in ``end``."""
    from transformers.core_model_loading import Concatenate, MergeModulelist

    kinds = [type(operation) for operation in getattr(conversion, "operations", ())]
    ends = [target.endswith(end) for target in conversion.target_patterns]
    return kinds in ([MergeModulelist], [MergeModulelist, Concatenate]) and ends == [True]
