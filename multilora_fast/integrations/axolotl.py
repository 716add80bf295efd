"""axolotl: ``plugins: [multilora_fast.integrations.axolotl.MultiLoraPlugin]`` and ``adapter: multilora``.

``lora_r`` is the rank of a branch. The other ``lora_`` options mean the same as for LoRA. Further fields of
MultiLoraConfig go into a block: ``multilora: {lora_num: 3}``.
"""

from typing import Any

from axolotl.integrations.base import AdapterCapabilities, BasePlugin
from axolotl.loaders.adapter import load_lora
from peft import PeftModel, get_peft_model
from pydantic import BaseModel

from multilora_fast.integrations import as_multilora

NAME = "multilora"


class MultiLoraArgs(BaseModel):
    multilora: dict[str, Any] = {}


class MultiLoraPlugin(BasePlugin):
    def get_input_args(self) -> str:
        return f"{__name__}.MultiLoraArgs"

    def get_adapter_capabilities(self) -> list[AdapterCapabilities]:
        return [AdapterCapabilities(name=NAME, lora_like=True)]

    def register(self, cfg) -> None:
        """Raise ValueError for options that axolotl would silently ignore for an unknown adapter."""
        if cfg.get("adapter") != NAME:
            return
        if cfg.get("load_in_4bit") or cfg.get("load_in_8bit"):
            raise ValueError(
                "adapter: multilora has an unquantized base: to train on 4 bits, make an adapter with multilora-fast "
                "init, and give it as lora_model_dir with adapter: qlora (8 bits: adapter: lora)."
            )
        if cfg.get("merge_method", "legacy") != "legacy":
            raise ValueError("adapter: multilora needs merge_method: legacy, as the other one merges LoRA alone.")
        cfg["merge_method"] = "legacy"

    def load_adapter(self, model, cfg, inference=False, config_only=False):
        if cfg.adapter != NAME:
            return None
        config = as_multilora(load_lora(model, cfg, config_only=True)[1], **cfg.multilora or {})
        if config_only:
            return None, config
        cast = cfg.peft_autocast_adapter_dtype
        options = {} if cast is None else {"autocast_adapter_dtype": cast}
        if cfg.lora_model_dir:
            return PeftModel.from_pretrained(model, cfg.lora_model_dir, is_trainable=not inference, **options), config
        return get_peft_model(model, config, **options), config
