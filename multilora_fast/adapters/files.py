"""Adapters as files: branches in safetensors, with a config in JSON beside them.

The layout is PEFT's: ``adapter_config.json`` and ``adapter_model.safetensors``, with keys
``base_model.model.<module path>.multilora_branches.lora_A | lora_B | lora_scaling``. PeftModel.from_pretrained loads
what is saved here, and :func:`load_adapter` what a PeftModel saved, on nn.Linear modules.
"""

import json
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from multilora_fast.adapters.branches import CONTAINER, NAMES, Branches, clean, collect
from multilora_fast.adapters.config import check_fields, describe, shape_options, targets
from multilora_fast.files import as_path, atomic_dir, check_folder
from multilora_fast.layers.fused import FusedMultiLoRALinear
from multilora_fast.reference import MultiLoRALinear

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
RECORD = "train.json"  # the settings of a training run, in its output directory
PICKLED = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
PREFIX = "base_model.model."
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_SUFFIX = f".{CONTAINER}."


class Adapter(NamedTuple):
    """The contents of a MultiLoRA adapter's files: the config, the branches by module path, and the tensors that PEFT
    stores whole (heads, embeddings, biases) by parameter name in the adapted model."""

    config: dict
    modules: dict[str, Branches]
    whole: dict[str, Tensor]


def save_adapter(model: nn.Module, directory: str | os.PathLike) -> None:
    """Write the branches of every MultiLoRA layer of ``model``, in their own dtypes, into ``directory``.

    Files of an earlier adapter are replaced; a failed save leaves them.

    Raises:
        ValueError: the model holds no MultiLoRA layer, or layers that differ in dropout or kind of scale.
    """
    layers = {name: m for name, m in collect(model).items() if isinstance(m, MultiLoRALinear)}
    if not layers:
        raise ValueError("model holds no MultiLoRA layer to save.")
    options = {name: (layer.lora_dropout.p, layer.lora_scaling.shape[1] == 1) for name, layer in layers.items()}
    dropout, scalar = first = next(iter(options.values()))
    for name, other in options.items():
        if other != first:
            raise ValueError(f"model must have one lora_dropout and kind of scale in all layers, but {name} differs.")
    config = {
        "lora_dropout": dropout,
        "scaling": "scalar" if scalar else "vector",
        "target_modules": targets(layers, [name for name, _ in model.named_modules()]),
        "base_model_type": model_type(model),
    }
    write_multilora(directory, Adapter(config, {name: Branches.of(layer) for name, layer in layers.items()}, {}))


def load_adapter(model: nn.Module, directory: str | os.PathLike) -> list[str]:
    """Load the adapter in ``directory`` onto ``model``'s nn.Linear modules, in place, and return their names.

    Raises:
        ValueError: a file is missing, damaged or foreign, or does not fit the model, which is then unchanged.
    """
    config, modules, whole = read_multilora(directory)
    places = {_parameter(model, directory, name, tensor): tensor for name, tensor in whole.items()}
    layers: dict[str, FusedMultiLoRALinear] = {}
    for name, branches in modules.items():
        if branches.experts is not None:
            raise ValueError(f"{directory} adapts experts, {name}: load it with peft.PeftModel.from_pretrained.")
        try:
            base = model.get_submodule(name)
        except AttributeError:
            raise ValueError(f"{directory} adapts {name}, which the model does not have.") from None
        if not isinstance(base, nn.Linear) or isinstance(base, MultiLoRALinear):
            raise ValueError(f"{directory} adapts {name}, which is a {type(base).__name__}, not an nn.Linear.")
        shapes = {"r": branches.r, "lora_num": branches.lora_num, "scaling": config["scaling"]}
        _check_shapes(directory, name, branches, base.in_features, base.out_features, **shapes)
        with torch.device("meta"):
            bare = nn.Linear(base.in_features, base.out_features)
            layer = FusedMultiLoRALinear(bare, lora_dropout=config["lora_dropout"], **shapes)
        layer.scaling_factor = branches.scaling_factor
        for key in NAMES:
            setattr(layer, key, nn.Parameter(getattr(branches, key).to(base.weight.device)))
        layer.weight = base.weight
        layer.register_parameter("bias", base.bias)
        layers[name] = layer.train(base.training)
    with torch.no_grad():
        for parameter, tensor in places.items():
            parameter.copy_(tensor)
    for name, layer in layers.items():
        model.set_submodule(name, layer)
    return list(layers)


def _parameter(model: nn.Module, directory, name: str, tensor: Tensor) -> nn.Parameter:
    """The parameter of the base model that the whole tensor ``name`` replaces."""
    try:
        parameter = model.get_parameter(name.replace(".base_layer.", "."))
    except AttributeError:
        raise ValueError(f"{directory} holds {name}, which the model does not have.") from None
    if parameter.shape != tensor.shape:
        shapes = f"{tuple(tensor.shape)}, where the model has {tuple(parameter.shape)}"
        raise ValueError(f"{directory} holds {name} of shape {shapes}.")
    return parameter


def write_multilora(directory: str | os.PathLike, adapter: Adapter) -> None:
    """Write an adapter. Its config holds only what the branches do not say."""
    config, modules, whole = adapter
    tensors = {f"{PREFIX}{name}{_SUFFIX}{key}": getattr(b, key) for name, b in modules.items() for key in NAMES}
    tensors |= {f"{PREFIX}{name}": tensor for name, tensor in whole.items()}
    write_files(directory, {"peft_type": "MULTILORA", **describe(modules), **config}, tensors)


def read_multilora(directory: str | os.PathLike) -> Adapter:
    """The adapter in ``directory``."""
    return parse_multilora(directory, *read_files(directory, "MultiLoRA"))


def parse_multilora(directory: str | os.PathLike, config: dict, tensors: Mapping[str, Tensor]) -> Adapter:
    """The adapter in ``directory``, from its config and tensors."""
    needed = ("r", "lora_num", "lora_alpha", "lora_dropout", "scaling")
    check_fields(Path(directory, CONFIG), config, "MultiLoRA", needed)
    # PEFT before 0.20 also saves the model's other adapters, by name.
    own = {key: t for key, t in tensors.items() if key.rpartition(_SUFFIX)[2].partition(".")[2] not in NAMES}
    found, whole = sort_tensors(directory, config, own, {f"{_SUFFIX}{name}": name for name in NAMES})
    modules = {}
    for name, branches in found.items():
        r, lora_num, alpha = shape_options(config, name).values()
        modules[clean(name)] = one = Branches(**branches, scaling_factor=alpha / r)
        K, N = ((0, 0, *t.shape)[axis] for t, axis in ((one.lora_A, -1), (one.lora_B, -2)))
        _check_shapes(directory, name, one, K, N, r=r, lora_num=lora_num, scaling=config["scaling"])
    return Adapter(config, modules, whole)


def sort_tensors(
    directory: str | os.PathLike, config: Mapping, tensors: Mapping[str, Tensor], ends: Mapping[str, str]
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """By module the tensors whose keys have one of ``ends``, under its name, and those that PEFT stores whole."""
    found: dict[str, dict[str, Tensor]] = {}
    whole: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        name = key.removeprefix(PREFIX)
        end = next((end for end in ends if key != name and name.endswith(end)), None)
        if end is None:
            whole[key] = tensor
        else:
            found.setdefault(name.removesuffix(end), {})[ends[end]] = tensor
    where = Path(directory, WEIGHTS)
    for key, tensor in whole.items():
        if not _is_whole(key, config, found):
            raise ValueError(f"{where} holds {key} {tuple(tensor.shape)}, which is no {config['peft_type']} tensor.")
    if not found:
        raise ValueError(f"{where} holds no {config['peft_type']} tensor.")
    for name, parts in found.items():
        lacking = sorted(set(ends.values()) - set(parts))
        if lacking:
            raise ValueError(f"{where} lacks {', '.join(lacking)} of {name}, but holds {', '.join(parts)} of it.")
    return found, {clean(key).removeprefix(PREFIX): tensor for key, tensor in whole.items()}


def _is_whole(key: str, config: Mapping, adapted: Collection[str]) -> bool:
    """Whether ``key`` is a tensor that PEFT stores whole: of modules_to_save, a trained bias, or an embedding that is
    adapted or resized. Those of ``adapted`` modules are keyed by their base layer."""
    module, _, name = key.removeprefix(PREFIX).rpartition(".")
    if not key.startswith(PREFIX) or CONTAINER in key or ".lora_" in key:
        return False
    if any(f".{saved}." in f".{module}." for saved in config.get("modules_to_save") or ()):
        return True
    base = module.removesuffix(".base_layer")
    return name in ("weight", "bias") and (base in adapted) == (base != module)


def read_files(directory: str | os.PathLike, kind: str) -> tuple[dict, dict[str, Tensor]]:
    """The config and the tensors of an adapter of any method. Reads safetensors only: a pickle can run code."""
    directory = as_path(f"the {kind} adapter's directory", directory)
    try:
        if not directory.is_dir():
            raise ValueError("it is a file" if directory.exists() else "no such directory")
        for path in (directory / CONFIG, directory / WEIGHTS):
            if path.exists() and not path.is_file():  # reading a pipe would block
                raise ValueError(f"its {path.name} is no file")
        config = json.loads((directory / CONFIG).read_text())
        if not (directory / WEIGHTS).exists():
            pickled = [path.name for path in sorted(directory.iterdir()) if path.suffix in PICKLED]
            if pickled:
                raise ValueError(f"{pickled[0]} is pickled, which could run code, and there is no {WEIGHTS}")
        tensors = load_file(directory / WEIGHTS)
    except (OSError, ValueError, RecursionError, SafetensorError) as error:
        raise ValueError(f"{directory} is no readable {kind} adapter: {' '.join(str(error).split())}.") from error
    if not isinstance(config, dict):
        raise ValueError(f"{directory / CONFIG} does not describe a {kind} adapter.")
    check_values(directory / WEIGHTS, tensors)
    return config, tensors


def check_values(where: object, tensors: Mapping[str, Tensor]) -> None:
    """Raise ValueError naming the first of ``tensors`` that is not finite or of another dtype than DTYPES."""
    for key, tensor in tensors.items():
        if tensor.dtype not in DTYPES:
            wanted = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
            raise ValueError(f"{where} holds {key} of {tensor.dtype}, not of one of {wanted}.")
        if not tensor.isfinite().all():
            raise ValueError(f"{where} holds values that are not finite, in {key}.")


def write_files(directory: str | os.PathLike, config: dict, tensors: Mapping[str, Tensor]) -> None:
    """Write both files of an adapter, or on an error neither.

    Raises:
        ValueError: ``directory`` is a file, or a tensor is not finite.
        OSError: the files cannot be written, such as on a full disk.
    """
    check_folder("the output", directory)
    directory = Path(directory)
    tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    check_values("the adapter", tensors)
    with atomic_dir(directory, last=CONFIG) as stage:
        weights, text = stage / WEIGHTS, stage / CONFIG
        try:
            save_file(tensors, weights, metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(f"{directory} cannot be written: {error}") from error
        text.write_text(json.dumps(config, indent=2) + "\n")
        os.chmod(weights, text.stat().st_mode)


def model_type(model: nn.Module) -> str | None:
    """transformers' name of the architecture of ``model``, None for other models."""
    return getattr(getattr(model, "config", None), "model_type", None)


def _check_shapes(
    directory, name: str, branches: Branches, K: int, N: int, *, r: int, lora_num: int, scaling: str
) -> None:
    each = (lora_num,) if branches.experts is None else (branches.experts, lora_num)
    shapes = ((*each, r, K), (*each, N, r), (*each, N if scaling == "vector" else 1))
    for key, tensor, wanted in zip(NAMES, branches[:3], shapes, strict=True):
        if tuple(tensor.shape) != wanted:
            raise ValueError(
                f"{directory} holds {key} of shape {tuple(tensor.shape)} for {name}, which needs {wanted}."
            )
