"""Tiny mixtures of experts of several families, the same at every call."""

import warnings

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

SIZES = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 8, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "num_experts_per_tok": 2,
}  # fmt: skip
FAMILIES = {  # E is not R, 2I is not H
    "qwen3_moe": {"moe_intermediate_size": 24, "intermediate_size": 48, "num_experts": 5, "norm_topk_prob": True},
    "mixtral": {"intermediate_size": 48, "num_local_experts": 4},
    "gpt_oss": {"intermediate_size": 48, "num_local_experts": 4},
    "olmoe": {"intermediate_size": 24, "num_experts": 5},
}
OTHERS = {  # PEFT leaves a LoRA's target_modules as they are; no gate
    "qwen2_moe": {**FAMILIES["qwen3_moe"], "shared_expert_intermediate_size": 16},
    "nemotron_h": {
        "moe_intermediate_size": 24, "intermediate_size": 48, "n_routed_experts": 5, "n_groups": 1,
        "layers_block_type": ["moe", "full_attention"], "mamba_num_heads": 4, "mamba_head_dim": 16, "ssm_state_size": 8,
    },
}  # fmt: skip
BOTH = ["experts.gate_up_proj", "experts.down_proj"]
IDS = torch.randint(3, 64, (2, 17), generator=torch.Generator().manual_seed(3))


def moe(family="qwen3_moe", **options):
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**SIZES, **(FAMILIES | OTHERS)[family], **options})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.1)
    return model


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=IDS).logits
