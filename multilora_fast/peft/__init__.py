"""MultiLoRA as a PEFT method. Importing this package registers it.

``get_peft_model(model, MultiLoraConfig(...))``, save_pretrained, PeftModel.from_pretrained, AutoPeftModel and
transformers' load_adapter then work as with LoraConfig. ``python -m multilora_fast.peft PROGRAM`` registers it for a
program that does not import this package.
"""

from multilora_fast.peft.config import MultiLoraConfig
from multilora_fast.peft.layer import MultiLoraLinear
from multilora_fast.peft.model import MultiLoraModel
from multilora_fast.peft.precision import restore_float32
from multilora_fast.peft.register import register
from multilora_fast.peft.untrained import init_adapter

register(MultiLoraConfig, MultiLoraModel)

__all__ = ["MultiLoraConfig", "MultiLoraLinear", "MultiLoraModel", "init_adapter", "restore_float32"]
