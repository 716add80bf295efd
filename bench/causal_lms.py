"""Small causal LMs of many model types: hidden size 256, two layers where the type allows it."""

from transformers import AutoConfig, PreTrainedConfig

V, D, F, H, L = 512, 256, 512, 4, 2
LLAMA = {
    "vocab_size": V,
    "hidden_size": D,
    "intermediate_size": F,
    "num_hidden_layers": L,
    "num_attention_heads": H,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "max_position_embeddings": 2048,
}
OTHERS = {"vocab_size": V, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 128}
ROUTED = EXPERTS | {"n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1}
FALCON = OTHERS | {"hidden_size": D, "num_hidden_layers": L, "num_attention_heads": H}
MLA = {"q_lora_rank": 64, "kv_lora_rank": 64, "qk_nope_head_dim": 32, "qk_rope_head_dim": 32, "v_head_dim": 64}
DEEPSEEK = LLAMA | MLA | ROUTED | {"num_key_value_heads": H, "topk_group": 1, "n_group": 1}
STATE = OTHERS | {"hidden_size": D, "num_hidden_layers": L, "state_size": 16}
HYBRID = LLAMA | {
    "mamba_n_heads": 8,
    "mamba_d_head": 64,
    "mamba_n_groups": 1,
    "mamba_d_state": 16,
    "mamba_chunk_size": 32,
}
TYPES = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA | {"head_dim": 64},
    "gemma": LLAMA | {"head_dim": 64},
    "gemma2": LLAMA | {"head_dim": 64},
    "gemma3_text": LLAMA | {"head_dim": 64},
    "gemma3n_text": LLAMA
    | {
        "head_dim": 64,
        "vocab_size_per_layer_input": V,
        "hidden_size_per_layer_input": 32,
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
        "intermediate_size": [F] * 4,
        "laurel_rank": 16,
        "altup_num_inputs": 2,
        "activation_sparsity_pattern": [0.0] * 4,
    },
    "phi": LLAMA | {"num_key_value_heads": H},
    "phi3": LLAMA,
    "olmo2": LLAMA,
    "cohere": LLAMA,
    "stablelm": LLAMA,
    "starcoder2": LLAMA,
    "smollm3": LLAMA,
    "glm4": LLAMA | {"head_dim": 64},
    "granite": LLAMA,
    "nemotron": LLAMA | {"head_dim": 64},
    "persimmon": LLAMA | {"num_key_value_heads": H},
    "helium": LLAMA | {"head_dim": 64},
    "llama4_text": LLAMA | {"head_dim": 64, "intermediate_size_mlp": F, "num_local_experts": 2, "moe_layers": []},
    "gpt2": OTHERS | {"n_embd": D, "n_layer": L, "n_head": H},
    "gpt_neo": OTHERS
    | {"hidden_size": D, "num_layers": L, "num_heads": H, "attention_types": [[["global", "local"], 1]]},
    "gptj": OTHERS | {"n_embd": D, "n_layer": L, "n_head": H, "rotary_dim": 32},
    "gpt_neox": LLAMA,
    "falcon": FALCON,
    "falcon, new architecture": FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2},
    "mpt": OTHERS | {"d_model": D, "n_layers": L, "n_heads": H},
    "bloom": OTHERS | {"hidden_size": D, "n_layer": L, "n_head": H},
    "opt": OTHERS
    | {"hidden_size": D, "ffn_dim": F, "num_hidden_layers": L, "num_attention_heads": H, "word_embed_proj_dim": D},
    "codegen": OTHERS | {"n_embd": D, "n_layer": L, "n_head": H, "rotary_dim": 32},
    "gpt_bigcode": OTHERS | {"n_embd": D, "n_layer": L, "n_head": H},
    "xglm": OTHERS | {"d_model": D, "ffn_dim": F, "num_layers": L, "attention_heads": H},
    "mixtral": LLAMA | {"num_local_experts": 4},
    "qwen2_moe": LLAMA | EXPERTS | {"num_experts": 4, "shared_expert_intermediate_size": 128},
    "qwen3_moe": LLAMA | EXPERTS | {"num_experts": 4, "head_dim": 64},
    "olmoe": LLAMA | {"num_experts": 4, "num_experts_per_tok": 2},
    "deepseek_v2": DEEPSEEK,
    "deepseek_v3": DEEPSEEK,
    "jetmoe": OTHERS
    | {
        "hidden_size": D,
        "num_hidden_layers": L,
        "num_key_value_heads": 2,
        "kv_channels": 64,
        "intermediate_size": F,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    },
    "phimoe": LLAMA | {"num_local_experts": 4},
    "granitemoe": LLAMA | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "glm4_moe": LLAMA | ROUTED | {"head_dim": 64},
    "ernie4_5_moe": LLAMA
    | {
        "moe_num_experts": 4,
        "moe_k": 2,
        "moe_intermediate_size": 128,
        "moe_layer_start_index": 1,
        "moe_num_shared_experts": 1,
    },
    "gpt_oss": LLAMA
    | {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "head_dim": 64,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "qwen3_next": LLAMA
    | EXPERTS
    | {
        "num_experts": 4,
        "head_dim": 64,
        "shared_expert_intermediate_size": 128,
        "layer_types": ["linear_attention", "full_attention"],
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 32,
        "linear_value_head_dim": 32,
    },
    "mamba": STATE,
    "mamba2": STATE | {"num_heads": 8, "head_dim": 64, "n_groups": 2, "chunk_size": 32},
    "falcon_mamba": STATE,
    "falcon_h1": HYBRID | {"mamba_d_ssm": 512},
    "bamba": HYBRID | {"attn_layer_indices": [1]},
    "rwkv": OTHERS | {"hidden_size": D, "attention_hidden_size": D, "num_hidden_layers": L, "intermediate_size": F},
    "jamba": LLAMA
    | {
        "num_experts": 4,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "mamba_d_state": 16,
        "use_mamba_kernels": False,
    },
    "zamba2": LLAMA
    | {
        "num_hidden_layers": 2,
        "layers_block_type": ["mamba", "hybrid"],
        "mamba_d_state": 16,
        "n_mamba_heads": 8,
        "mamba_ngroups": 1,
        "chunk_size": 32,
        "num_mem_blocks": 1,
        "use_mem_rope": True,
    },
    "recurrent_gemma": LLAMA | {"lru_width": D, "num_hidden_layers": 3, "attention_window_size": 64},
}


# Modules that "all-linear" matches in a type but that cannot hold an adapter.
LEFT_OUT = {
    "mamba": ["out_proj"],
    "mamba2": ["out_proj"],
    "falcon_mamba": ["out_proj"],
    "falcon_h1": ["out_proj"],
    "phimoe": ["router"],
}


def config(kind: str) -> PreTrainedConfig:
    """The config of a type of TYPES; a variant follows the type after a comma."""
    return AutoConfig.for_model(kind.partition(",")[0], **TYPES[kind])
