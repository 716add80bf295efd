"""The model that is trained: a frozen causal LM with a fresh adapter, and what of the data it can read."""

from typing import Any, Literal, cast

import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoTokenizer, BitsAndBytesConfig
from transformers.pytorch_utils import Conv1D

from multilora_fast.devices import choose_dtype
from multilora_fast.models import causal_lm, pretrained
from multilora_fast.peft import MultiLoraConfig
from multilora_fast.training.config import TrainSettings
from multilora_fast.training.data import Example, Row, encode


def tokenizer_of(settings: TrainSettings) -> Any:
    """The model's tokenizer, with the chat template that was asked for."""
    tokenizer = pretrained(AutoTokenizer, settings.model)
    if settings.chat_template is not None:
        tokenizer.chat_template = settings.template()
    return tokenizer


class Encoder:
    """Rows as examples that the model can read, of which only the config is loaded."""

    def __init__(self, tokenizer, settings: TrainSettings):
        config = pretrained(AutoConfig, settings.model).get_text_config()
        self.tokenizer, self.settings = tokenizer, settings
        self.ids = getattr(config, "vocab_size", None)
        self.positions = getattr(config, "max_position_embeddings", None)

    def __call__(self, row: Row) -> list[Example]:
        """:func:`encode` of the row.

        Raises:
            ValueError: also ids that the model does not embed, and more tokens than it has positions.
        """
        examples = encode(row, self.tokenizer, self.settings.max_length, self.settings.learn)
        for ids in (example["input_ids"] for example in examples):
            if self.ids and max(ids) >= self.ids:
                token = self.tokenizer.convert_ids_to_tokens(max(ids))
                raise ValueError(
                    f"{row.where}: the tokenizer gives {token!r} the id {max(ids)}, but --model {self.settings.model} "
                    f"embeds {self.ids} ids only."
                )
            if self.positions and 0 < self.positions < len(ids):
                raise ValueError(
                    f"{row.where} has {len(ids)} tokens, but --model {self.settings.model} has {self.positions} "
                    f"positions: give --max-length {self.positions}."
                )
        return examples


def adapted_model(settings: TrainSettings, device: torch.device) -> PeftModel:
    """The causal LM, frozen, with a fresh float32 adapter.

    Raises:
        ValueError: a model that cannot be loaded or lacks weights, that has none of the target modules, or an adapter
            that does not fit into memory.
    """
    options: dict[str, Any] = {"dtype": choose_dtype(settings.dtype, device)}
    if settings.quantization:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=options["dtype"],
        )
    base = causal_lm(settings.model, **options)
    for config in (base.config, base.config.get_text_config()):
        config.use_cache = False  # a cache would also let the rows of a bin see each other
    targets = settings.target_modules
    names = [f".{name}" for name, _ in base.named_modules()]
    if targets != ("all-linear",) and not any(name.endswith(f".{target}") for name in names for target in targets):
        linear = (name for name, module in base.named_modules() if isinstance(module, (nn.Linear, Conv1D)))
        kinds = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in linear))
        raise ValueError(f"--target-modules {','.join(targets)} match nothing: the linear layers end in {kinds}.")
    config = MultiLoraConfig(
        r=settings.r,
        lora_num=settings.lora_num,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        scaling=cast(Literal["vector", "scalar"], settings.scaling),
        target_modules="all-linear" if targets == ("all-linear",) else list(targets),
        exclude_modules=list(settings.exclude_modules or ()) or None,
        task_type="CAUSAL_LM",
    )
    try:
        return get_peft_model(base, config)
    except (RuntimeError, TypeError, MemoryError) as error:  # torch's, for sizes that it cannot allocate or count
        if not isinstance(error, MemoryError) and not any(
            word in str(error) for word in ("alloc", "memory", "verflow")
        ):
            raise
        raise ValueError(
            f"--lora-num {settings.lora_num} with --r {settings.r} makes an adapter that memory does not hold."
        ) from error
