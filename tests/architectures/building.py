"""A row of the table of architectures: a tiny model from its config, inputs, targets, and what may differ."""

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

    ``targets`` and ``exclude`` go to both methods' configs. ``left_out`` maps ends of names that LoRA adapts and we do
    not to the reason; ``more`` is the reason why we adapt others. ``unlike`` maps checks that LoRA fails too to the
    reason.
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


OWN = ("exclude", "left_out", "more", "unlike", "targets")


def architecture(
    model_type: str, family: str, inputs: Callable[[], dict[str, Any]], *, auto: Any = AutoModel, name="", **options
) -> Architecture:
    """The model of this type, of its config's class, through transformers' auto class."""
    own = {key: options.pop(key) for key in OWN if key in options}

    def build() -> nn.Module:
        made = undropped(AutoConfig.for_model(model_type, **options))
        torch.manual_seed(0)
        return spread(auto.from_config(made, experts_implementation="eager"))

    return Architecture(name or model_type, family, build, inputs, **own)


def undropped(config: Any) -> Any:
    """The config and those in it, with every dropout probability at zero."""
    for name, value in list(vars(config).items()):
        if hasattr(value, "to_diff_dict"):
            undropped(value)
        elif "drop" in name and isinstance(value, float):
            setattr(config, name, 0.0)
    return config


@torch.no_grad()
def spread(model: nn.Module) -> nn.Module:
    """``model`` in evaluation, with weights large enough for its output to depend on its input."""
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
    """Numbers between -1 and 1 that look random."""
    count = torch.Size(shape).numel()
    return torch.sin(torch.arange(count, dtype=torch.float32) * 1.7 + torch.arange(count) % 11).view(shape)


def decoder(model_type: str, *, small: Mapping = SMALL, **options) -> Architecture:
    return architecture(model_type, "decoder", no_cache, auto=AutoModelForCausalLM, **{**small, **TOKENS, **options})


def encoder(model_type: str, *, small: Mapping = SMALL, inputs=text, **options) -> Architecture:
    return architecture(model_type, "encoder", inputs, **{**small, **options})


def of_family(family: str, *architectures: Architecture) -> tuple[Architecture, ...]:
    return tuple(replace(architecture, family=family) for architecture in architectures)
