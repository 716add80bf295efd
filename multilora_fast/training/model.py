"""The model to train: a frozen causal LM with a fresh adapter, and the encoder of its rows."""

import re
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from transformers import AutoConfig, AutoTokenizer, BitsAndBytesConfig

from multilora_fast.devices import choose_dtype
from multilora_fast.models import causal_lm, pretrained
from multilora_fast.peft import MultiLoraConfig
from multilora_fast.peft.targets import linear_kinds, unmatched
from multilora_fast.training.config import TrainSettings
from multilora_fast.training.data import Example, Row, encode


class Encoder:
    """Turns rows into examples that fit the model. Loads its tokenizer and config only."""

    def __init__(self, settings: TrainSettings):
        self.settings, self.tokenizer = settings, pretrained(AutoTokenizer, settings.model)
        self.tokenizer.chat_template = settings.template() or self.tokenizer.chat_template
        self.config = pretrained(AutoConfig, settings.model).get_text_config()

    def __call__(self, row: Row) -> list[Example]:
        """:func:`encode` the row. Raises ValueError for ids and positions that the model does not have, too."""
        examples = encode(row, self.tokenizer, self.settings.max_length, self.settings.learn)
        known = getattr(self.config, "vocab_size", None)
        positions = getattr(self.config, "max_position_embeddings", None)
        name = f"--model {self.settings.model}"
        for ids in (example["input_ids"] for example in examples):
            if known and max(ids) >= known:
                token = self.tokenizer.convert_ids_to_tokens(max(ids))
                raise ValueError(f"{row.where}: {token!r} has the id {max(ids)}, but {name} embeds {known} ids only.")
            if positions and 0 < positions < len(ids):
                has = f"has {len(ids)} tokens, but {name} has {positions} positions"
                raise ValueError(f"{row.where} {has}: give --max-length {positions}.")
        return examples


def adapted_model(settings: TrainSettings, device: torch.device) -> PeftModel:
    """The frozen causal LM with a fresh float32 adapter.

    Raises:
        ValueError: the model cannot be loaded, lacks weights or has none of the target modules, or the adapter does not
            fit into memory.
    """
    dtype = choose_dtype(settings.dtype, device)
    options: dict[str, Any] = {"dtype": dtype}
    if settings.quantization:
        four_bits = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
        options["quantization_config"] = BitsAndBytesConfig(**four_bits, bnb_4bit_compute_dtype=dtype)
    base = causal_lm(settings.model, **options)
    for config in (base.config, base.config.get_text_config()):
        config.use_cache = False  # a cache would also let the rows of a bin see each other
    targets = list(settings.target_modules)
    everything = targets == ["all-linear"]
    if not everything and len(unmatched(base, targets)) == len(targets):
        kinds = linear_kinds(base)
        raise ValueError(f"--target-modules {','.join(targets)} match nothing: the linear layers end in {kinds}.")
    config = MultiLoraConfig(
        **{name: getattr(settings, name) for name in ("r", "lora_num", "lora_alpha", "lora_dropout", "scaling")},
        target_modules="all-linear" if everything else targets,
        exclude_modules=list(settings.exclude_modules or ()) or None,
        task_type="CAUSAL_LM",
    )
    try:
        return get_peft_model(base, config)
    except (RuntimeError, TypeError, MemoryError) as error:  # torch's, for sizes that it cannot allocate or count
        if not re.search("alloc|memory|overflow", repr(error), re.IGNORECASE):
            raise
        raise ValueError(
            f"--lora-num {settings.lora_num} with --r {settings.r} makes an adapter that memory does not hold."
        ) from error
