"""Task arithmetic: existing LoRA adapters as the branches of one MultiLoRA adapter with learned scales."""

import math
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from multilora_fast.adapters.branches import Branches, clean, stack
from multilora_fast.adapters.config import check_fields, pattern_value
from multilora_fast.adapters.experts import is_stacked
from multilora_fast.adapters.files import CONFIG, Adapter, read_files, sort_tensors, write_multilora
from multilora_fast.adapters.naming import base_model_type
from multilora_fast.files import as_path, check_new_folder
from multilora_fast.validation import check_hyperparameters

# Fields of a LoRA config that add to B A x or hold tensors outside of A and B.
_NOT_PLAIN = (
    "use_dora", "lora_bias", "use_qalora", "use_bdlora", "trainable_token_indices", "layer_replication",
    "alora_invocation_tokens", "arrow_config", "velora_config", "monteclora_config", "kasa_config", "megatron_config",
    "bias",
)  # fmt: skip
# Initialisations that change the base weight too.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga", "mica")


class Lora(NamedTuple):
    """The contents of a LoRA adapter's files: the config, A (r, K) and B (N, r) by module path, in float32 and with
    alpha / r folded into B, and the tensors that PEFT stores whole, by parameter name in the adapted model."""

    directory: str | os.PathLike
    config: dict
    modules: dict[str, tuple[Tensor, Tensor]]
    whole: dict[str, Tensor]


def from_loras(
    directories: Sequence[str | os.PathLike],
    out_dir: str | os.PathLike,
    *,
    weights: Sequence[float] | None = None,
    scaling: str = "vector",
    lora_dropout: float = 0.0,
    seed: int = 0,
    overwrite: bool = False,
) -> Path:
    """Write one MultiLoRA adapter whose branch i is the LoRA adapter ``directories[i]``, and return its directory.

    The adapter computes the weighted sum of the LoRAs' updates, exactly at creation: branch i's scales are
    ``weights[i]``, and its alpha / r (or alpha / √r) is folded into B. Lower ranks are padded with random rows of A and
    zero columns of B, which can learn. Where a LoRA does not adapt a module that others do, its branch is fresh, with
    scale zero. Everything is stored in float32.

    Args:
        directories: LoRA adapters as PEFT saves them, for one base model.
        out_dir: a new or empty directory. Load it with PeftModel.from_pretrained or
            multilora_fast.adapters.load_adapter.
        weights: one number per LoRA; all 1 when None.
        scaling: "vector" or "scalar", the kind of scale to learn from there.
        lora_dropout: of the new adapter, when it is trained.
        seed: of the padding and the fresh branches.
        overwrite: allow an ``out_dir`` that is not empty. An adapter in it is replaced; other files stay.

    Raises:
        ValueError: no directories, another number of weights, adapters that are missing, damaged, no plain LoRA (DoRA,
            biases, modules_to_save, ...) or for modules of different shapes, an ``out_dir`` that is not empty.
    """
    if isinstance(directories, (str, os.PathLike)):
        raise ValueError(f"directories must be a list of LoRA adapters' directories, not {os.fspath(directories)!r}.")
    directories = [os.fspath(directory) for directory in directories]
    try:
        weights = [1.0] * len(directories) if weights is None else [float(weight) for weight in weights]
    except (TypeError, ValueError):
        raise ValueError(f"weights must be a list of numbers or None, not {weights!r}.") from None
    if not directories:
        raise ValueError("directories must name at least one LoRA adapter.")
    if len(weights) != len(directories):
        raise ValueError(f"weights must hold one number per adapter, {len(directories)}, not {len(weights)}.")
    if not all(math.isfinite(weight) for weight in weights):
        raise ValueError(f"weights must be finite, not {weights}.")
    check_hyperparameters(r=1, lora_num=1, lora_dropout=lora_dropout, scaling=scaling)
    out = as_path("the output", out_dir)
    if out.resolve() in [Path(directory).resolve() for directory in directories]:
        raise ValueError(f"the output {out} holds one of the LoRA adapters, which would be overwritten.")
    check_new_folder("the output", out, overwrite)
    loras = [parse_lora(directory, *read_files(directory, "LoRA")) for directory in directories]
    whole: dict[str, Tensor] = {}
    for lora in loras:
        _refuse(lora.directory, "modules_to_save", lora.config.get("modules_to_save"))
        kind = base_model_type(lora.config)
        stacked = next((name for name in lora.modules if is_stacked(name, kind)), None)
        if stacked is not None:
            raise ValueError(
                f"{lora.directory} adapts {stacked}, which {kind} models keep together with other experts: only LoRAs "
                "of linear layers can be merged."
            )
        for name, tensor in lora.whole.items():
            if not torch.equal(whole.setdefault(name, tensor), tensor):
                raise ValueError(f"{lora.directory} holds another {name} than the LoRA adapters before it.")
    generator = torch.Generator().manual_seed(seed)

    def fresh(rows: int, columns: int) -> Tensor:
        return torch.empty(1, rows, columns).uniform_(-(columns**-0.5), columns**-0.5, generator=generator)

    modules = {}
    for name in dict.fromkeys(name for lora in loras for name in lora.modules):
        N, r, K = _shape(name, loras)
        width = N if scaling == "vector" else 1
        parts = []
        for lora, weight in zip(loras, weights, strict=True):
            if name in lora.modules:
                A, B = lora.modules[name]
                parts.append(Branches(A[None], B[None], torch.full((1, width), weight)))
            else:
                parts.append(Branches(fresh(r, K), fresh(N, r), torch.zeros(1, width)))
        modules[name] = stack(parts, generator)
    config = _config([lora.config for lora in loras], scaling, lora_dropout, sorted(modules))
    write_multilora(out, Adapter(config, modules, whole))
    return out


def parse_lora(directory: str | os.PathLike, config: dict, tensors: Mapping[str, Tensor]) -> Lora:
    """The LoRA adapter in ``directory``, from its config and tensors."""
    check_fields(Path(directory, CONFIG), config, "LoRA", ("r", "lora_alpha"))
    for field in _NOT_PLAIN:
        _refuse(directory, field, config.get(field))
    init = str(config.get("init_lora_weights")).lower()
    if init.startswith(_CHANGES_BASE):
        raise ValueError(f"{directory} was made with init_lora_weights={init!r}, which changes the base weights too.")
    found, whole = sort_tensors(directory, config, tensors, {f".{name}.weight": name for name in ("lora_A", "lora_B")})
    parameters = config.get("target_parameters") or ()
    if set(parameters) - {f"{name}.weight" for name in found}:  # the others are linear layers under another name
        _refuse(directory, "target_parameters", parameters)
    lora = {}
    for name, pair in found.items():
        A, B = pair["lora_A"].float(), pair["lora_B"].float()
        r = pattern_value(config.get("rank_pattern"), name, config.get("r"))
        alpha = pattern_value(config.get("alpha_pattern"), name, config.get("lora_alpha"))
        if alpha is None:
            raise ValueError(f"{directory} has a config without lora_alpha for {name}.")
        if not (A.dim() == B.dim() == 2 and len(A) == B.shape[1] == r):
            shapes = f"{tuple(A.shape)} and {tuple(B.shape)}"
            raise ValueError(f"{directory} holds A and B {shapes} for {name}: no LoRA of a linear layer with r={r}.")
        lora[clean(name)] = A, B * (alpha / (math.sqrt(r) if config.get("use_rslora") else r))
    return Lora(directory, config, lora, whole)


def _refuse(directory: str | os.PathLike, field: str, value: object) -> None:
    if value and value != "none":
        raise ValueError(f"{directory} has {field}={value!r}, which MultiLoRA branches cannot hold.")


def _shape(name: str, loras: Sequence[Lora]) -> tuple[int, int, int]:
    """N, the highest rank, and K of the module ``name``."""
    found = [(lora.directory, *lora.modules[name]) for lora in loras if name in lora.modules]
    first, A, B = found[0]
    K, N = A.shape[1], len(B)
    for directory, A, B in found:
        if (A.shape[1], len(B)) != (K, N):
            there = f"{A.shape[1]} to {len(B)} in {directory}"
            raise ValueError(f"{name} maps {K} to {N} features in {first}, but {there}.")
    return N, max(len(A) for _, A, _ in found), K


def _config(configs: Sequence[dict], scaling: str, lora_dropout: float, names: list[str]) -> dict:
    def common(field: str):
        values = {config.get(field) for config in configs}
        return values.pop() if len(values) == 1 else None

    bases = sorted({config["base_model_name_or_path"] for config in configs if config.get("base_model_name_or_path")})
    if len(bases) > 1:
        warnings.warn(f"the LoRA adapters name different base models: {', '.join(bases)}.", stacklevel=3)
    return {
        "base_model_name_or_path": bases[0] if len(bases) == 1 else None,
        "revision": common("revision"),
        "task_type": common("task_type"),
        "fan_in_fan_out": any(config.get("fan_in_fan_out") for config in configs),
        "scaling": scaling,
        "lora_dropout": lora_dropout,
        "target_modules": names,
    }
