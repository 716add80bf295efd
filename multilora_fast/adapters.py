"""Adapters as files: the branches of a model's MultiLoRA layers in safetensors, with a config in JSON beside them.

The directory is laid out as a PEFT adapter: ``adapter_config.json`` and ``adapter_model.safetensors``, with keys
``base_model.model.<module path>.multilora_branches.lora_A | lora_B | lora_scaling``.
"""

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from multilora_fast.layers import FusedMultiLoRALinear
from multilora_fast.reference import MultiLoRALinear

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX, _SUFFIX = "base_model.model.", ".multilora_branches."
_BRANCHES = ("lora_A", "lora_B", "lora_scaling")


def save_adapter(model: nn.Module, directory: str | os.PathLike) -> None:
    """Write the branches of every MultiLoRA layer of ``model``, in their own dtypes, into ``directory``.

    Each file is complete or not there: a failed save leaves what stood there before.

    Raises:
        ValueError: the model holds no MultiLoRA layer, or layers that differ in r, lora_num, scaling_factor, kind of
            scale or dropout, which one config cannot describe.
    """
    layers = {name: m for name, m in model.named_modules() if isinstance(m, MultiLoRALinear)}
    if not layers:
        raise ValueError("model holds no MultiLoRA layer to save.")
    configs = {name: _config(layer) for name, layer in layers.items()}
    first = next(iter(configs.values()))
    for name, config in configs.items():
        if config != first:
            raise ValueError(f"model must have the same r, lora_num and options in all layers, but {name} differs.")
    config = {"peft_type": "MULTILORA", **first, "target_modules": sorted(layers)}
    tensors = {
        f"{_PREFIX}{name}{_SUFFIX}{key}": getattr(layer, key).detach().cpu().contiguous()
        for name, layer in layers.items()
        for key in _BRANCHES
    }
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    replace_file(directory / WEIGHTS, lambda path: save_file(tensors, path, metadata={"format": "pt"}))
    replace_file(directory / CONFIG, lambda path: Path(path).write_text(json.dumps(config, indent=2) + "\n"))


def load_adapter(model: nn.Module, directory: str | os.PathLike) -> list[str]:
    """Put the adapter of ``directory`` on ``model``'s nn.Linear modules, in place, and return their names.

    The model is changed only if every tensor fits.

    Raises:
        ValueError: a file that is missing, damaged or foreign, or that does not fit this model.
    """
    config, tensors = _read(Path(directory))
    layers: dict[str, FusedMultiLoRALinear] = {}
    for name, branches in tensors.items():
        try:
            base = model.get_submodule(name)
        except AttributeError:
            raise ValueError(f"{directory} adapts {name}, which the model does not have.") from None
        if not isinstance(base, nn.Linear) or isinstance(base, MultiLoRALinear):
            raise ValueError(f"{directory} adapts {name}, which is a {type(base).__name__}, not an nn.Linear.")
        options = {k: config[k] for k in ("r", "lora_num", "lora_alpha", "lora_dropout", "scaling")}
        with torch.device("meta"):
            layer = FusedMultiLoRALinear(nn.Linear(base.in_features, base.out_features), **options)
        for key in _BRANCHES:
            wanted, came = tuple(getattr(layer, key).shape), tuple(branches[key].shape)
            if wanted != came:
                raise ValueError(f"{directory} holds {key} of shape {came} for {name}, which needs {wanted}.")
            setattr(layer, key, nn.Parameter(branches[key].to(base.weight.device)))
        layer.weight = base.weight
        layer.register_parameter("bias", base.bias)
        layers[name] = layer.train(base.training)
    for name, layer in layers.items():
        model.set_submodule(name, layer)
    return list(layers)


def replace_file(path: Path, write: Callable[[str], None]) -> None:
    """``write`` a new file beside ``path`` and put it in its place once it is complete."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        write(temporary)
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _config(layer: MultiLoRALinear) -> dict:
    return {
        "r": layer.r,
        "lora_num": layer.lora_num,
        "lora_alpha": layer.scaling_factor * layer.r,
        "lora_dropout": layer.lora_dropout.p,
        "scaling": "scalar" if layer.lora_scaling.shape[1] == 1 else "vector",
    }


def _read(directory: Path) -> tuple[dict, dict[str, dict[str, torch.Tensor]]]:
    """The config, and the branch tensors by module name."""
    try:
        config = json.loads((directory / CONFIG).read_text())
        tensors = load_file(directory / WEIGHTS)
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(f"{directory} is no readable MultiLoRA adapter: {error}.") from error
    if not isinstance(config, dict) or config.get("peft_type") != "MULTILORA":
        raise ValueError(f"{directory / CONFIG} does not describe a MultiLoRA adapter.")
    missing = {"r", "lora_num", "lora_alpha", "lora_dropout", "scaling"} - set(config)
    if missing:
        raise ValueError(f"{directory / CONFIG} lacks {', '.join(sorted(missing))}.")
    modules: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        name, suffix, branch = key.removeprefix(_PREFIX).rpartition(_SUFFIX)
        if not key.startswith(_PREFIX) or not suffix or branch not in _BRANCHES:
            raise ValueError(f"{directory / WEIGHTS} holds {key}, which is no MultiLoRA tensor.")
        modules.setdefault(name, {})[branch] = tensor
    for name, branches in modules.items():
        lacking = sorted(set(_BRANCHES) - set(branches))
        if lacking:
            raise ValueError(f"{directory / WEIGHTS} lacks {', '.join(lacking)} of {name}.")
    return config, modules
