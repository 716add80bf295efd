"""MultiLoRA as a PEFT method: importing this package makes it known to PEFT.

``get_peft_model(model, MultiLoraConfig(...))`` then works as with LoraConfig, and so do save_pretrained,
PeftModel.from_pretrained, AutoPeftModel and transformers' load_adapter. A program that does not import this package
knows the method too when it is run by ``python -m multilora_fast.peft PROGRAM``.
"""

from multilora_fast.peft.config import MultiLoraConfig
from multilora_fast.peft.layer import MultiLoraLinear
from multilora_fast.peft.model import MultiLoraModel
from multilora_fast.peft.precision import restore_float32
from multilora_fast.peft.register import register
from multilora_fast.peft.untrained import init_adapter

register(MultiLoraConfig, MultiLoraModel)

__all__ = ["MultiLoraConfig", "MultiLoraLinear", "MultiLoraModel", "init_adapter", "restore_float32"]
