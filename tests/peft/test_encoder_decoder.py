"""Encoder-decoders: an adapter per row of the batch, under beams, which repeat the rows in the decoder alone."""

import torch
from peft import get_peft_model
from transformers import T5Config, T5ForConditionalGeneration

from multilora_fast import MultiLoraConfig


def test_beams_repeat_the_adapters_names_in_the_decoder_alone():
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    base = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0, pad_token_id=0))
    config = MultiLoraConfig(r=2, target_modules=["q", "v"], init_weights=False, lora_alpha=20)
    model = get_peft_model(base, config).eval()
    ids = torch.arange(3, 15).view(2, 6)
    options = {"num_beams": 3, "max_new_tokens": 4, "min_new_tokens": 4}
    mixed = model.generate(input_ids=ids, adapter_names=["default", "__base__"], **options)
    alone = model.generate(input_ids=ids[:1], **options)
    with model.disable_adapter():
        without = model.generate(input_ids=ids[1:], **options)
    assert torch.equal(mixed, torch.cat([alone, without]))
