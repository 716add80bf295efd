"""What every architecture of the table is: a tiny model from its config, inputs, targets, and what may differ."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

IDS = (torch.arange(24) * 7 % 53 + 4).view(2, 12)  # above the ids of special tokens
SMALL = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
}  # fmt: skip
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


@dataclass(frozen=True)
class Architecture:
    """``build`` makes the model in float32, the same at every call, and ``inputs`` the arguments of its forward.

    ``targets`` and ``exclude`` go to both methods' configs. Of the modules and parameters that LoRA adapts there,
    ``left_out`` says in one sentence why we adapt those fewer that end in its keys, and ``more`` why we adapt others.
    ``unlike`` says, by the name of a check, why it cannot be asked of this architecture: for LoRA fails too.
    """

    name: str
    family: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, Any]]
    targets: Any = "all-linear"
    exclude: Any = None
    left_out: Mapping[str, str] = field(default_factory=dict)
    more: str = ""
    unlike: Mapping[str, str] = field(default_factory=dict)

    @property
    def generates(self) -> bool:
        return hasattr(self.build(), "generate")


def tiny(
    model_type: str,
    *,
    auto: Any = AutoModelForCausalLM,
    options: Mapping | None = None,
    **config,
) -> Callable[[], nn.Module]:
    """A builder of the model of this type: of its config's class, through transformers' auto class."""

    def build() -> nn.Module:
        made = undropped(AutoConfig.for_model(model_type, **config))
        torch.manual_seed(0)
        return spread(auto.from_config(made, experts_implementation="eager", **(options or {})))

    return build


def undropped(config: Any) -> Any:
    """The config, and those in it, with every probability of dropping something at zero."""
    for name, value in list(vars(config).items()):
        if hasattr(value, "to_diff_dict"):
            undropped(value)
        elif "drop" in name and isinstance(value, float):
            setattr(config, name, 0.0)
    return config


@torch.no_grad()
def spread(model: nn.Module) -> nn.Module:
    """``model`` with weights at which its output depends on its input, in evaluation."""
    for module in model.modules():
        if isinstance(module, (nn.Linear, Conv1D, nn.Embedding)) and module.weight.ndim == 2:
            module.weight.normal_(0, 0.6 * module.weight.shape[1] ** -0.5)
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if hasattr(module, "dropout_prob"):  # of labels, in diffusers
            module.dropout_prob = 0.0
    return model.eval()


def text() -> dict[str, Tensor]:
    return {"input_ids": IDS}


def no_cache() -> dict[str, Any]:
    return {"input_ids": IDS, "use_cache": False}


def sequences() -> dict[str, Tensor]:
    return {"input_ids": IDS, "decoder_input_ids": IDS[:, :8].flip(1)}


def wave(*shape: int) -> Tensor:
    """Numbers between -1 and 1 that look random, of this shape."""
    count = torch.Size(shape).numel()
    return torch.sin(torch.arange(count, dtype=torch.float32) * 1.7 + torch.arange(count) % 11).view(shape)


def decoder(model_type: str, *, small: Mapping = SMALL, **options) -> Architecture:
    own = {name: options.pop(name) for name in ("exclude", "left_out", "more", "unlike", "targets") if name in options}
    name = options.pop("name", model_type)
    build = tiny(model_type, **{**small, **TOKENS, **options})
    return Architecture(name, "decoder", build, no_cache, **own)


def encoder(model_type: str, *, small: Mapping = SMALL, inputs=text, **options) -> Architecture:
    own = {name: options.pop(name) for name in ("exclude", "left_out", "more", "unlike", "targets") if name in options}
    build = tiny(model_type, auto=options.pop("auto", AutoModel), **{**small, **options})
    return Architecture(model_type, "encoder", build, inputs, **own)


def of_family(family: str, *architectures: Architecture) -> tuple[Architecture, ...]:
    return tuple(replace(architecture, family=family) for architecture in architectures)
