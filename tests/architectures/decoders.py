"""Decoders, mixtures of experts and state-space models."""

from building import SMALL, Architecture, decoder, of_family

GROUPED = {"num_key_value_heads": 2}
EXPERTS = {
    "gate_up_proj": "experts are one parameter, not a linear layer",
    "down_proj": "experts are one parameter, not a linear layer",
    "gate.weight": "a router is not a linear layer",
}
DENSE = "PEFT takes gate_proj, up_proj and down_proj for experts, so LoRA leaves out these linear layers"
MIXTURE = {**GROUPED, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "left_out": EXPERTS}
LATENT = {
    "q_lora_rank": 16, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8,
    "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
    "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "left_out": EXPERTS, "more": DENSE,
}  # fmt: skip
GPT = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32}

DECODERS: tuple[Architecture, ...] = (
    decoder("llama", **GROUPED),
    decoder("mistral", **GROUPED),
    decoder("qwen2", **GROUPED),
    decoder("qwen3", **GROUPED, head_dim=8),
    decoder("gemma", **GROUPED, head_dim=8),
    decoder("gemma2", **GROUPED, head_dim=8),
    decoder("gemma3_text", **GROUPED, head_dim=8),
    decoder(
        "gemma3n_text",
        **GROUPED,
        head_dim=8,
        vocab_size_per_layer_input=64,
        hidden_size_per_layer_input=8,
        laurel_rank=4,
        altup_num_inputs=2,
        num_kv_shared_layers=0,
        activation_sparsity_pattern=[0.0, 0.0],
        layer_types=["sliding_attention", "full_attention"],
    ),
    decoder("gpt2", small=GPT),
    decoder("gptj", small=GPT, rotary_dim=4),
    decoder("codegen", small=GPT, rotary_dim=4),
    decoder("gpt_bigcode", small=GPT),
    decoder("gpt_neo", small={**SMALL, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]}),
    decoder("gpt_neox"),
    decoder("falcon"),
    decoder("falcon", name="falcon, new architecture", new_decoder_architecture=True, num_kv_heads=2),
    decoder("bloom", small={"vocab_size": 64, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
    decoder("mpt", small={"vocab_size": 64, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 32}),
    decoder("opt", small={**SMALL, "ffn_dim": 48, "word_embed_proj_dim": 16}),
    decoder("phi"),
    decoder("phi3", **GROUPED),
    decoder("stablelm", **GROUPED),
    decoder("starcoder2", **GROUPED),
    decoder("cohere", **GROUPED),
    decoder("olmo2", **GROUPED),
    decoder("granite", **GROUPED),
    decoder("glm4", **GROUPED, head_dim=8),
    decoder("nemotron", **GROUPED),
    decoder("smollm3", **GROUPED),
    decoder("persimmon"),
)

MIXTURES = of_family(
    "mixture of experts",
    decoder("mixtral", **GROUPED, num_local_experts=4, left_out=EXPERTS),
    decoder("qwen2_moe", **{**MIXTURE, "left_out": {}}, shared_expert_intermediate_size=16),
    decoder("qwen3_moe", **MIXTURE, head_dim=8, mlp_only_layers=[0], more=DENSE),
    decoder(
        "qwen3_next", **MIXTURE, head_dim=8, shared_expert_intermediate_size=16, linear_num_key_heads=2,
        linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=8, more=DENSE,
        layer_types=["linear_attention", "full_attention"],
    ),
    decoder("olmoe", **MIXTURE),
    decoder("deepseek_v2", **LATENT),
    decoder("deepseek_v3", **LATENT),
    decoder(
        "glm4_moe", **GROUPED, head_dim=8, n_routed_experts=4, n_shared_experts=1, num_experts_per_tok=2,
        moe_intermediate_size=16, first_k_dense_replace=1, n_group=1, topk_group=1, left_out=EXPERTS, more=DENSE,
    ),
    decoder(
        "ernie4_5_moe", **GROUPED, moe_num_experts=4, moe_k=2, moe_intermediate_size=16, moe_num_shared_experts=1,
        moe_layer_start_index=1, left_out=EXPERTS, more=DENSE,
    ),
    decoder("gpt_oss", **GROUPED, head_dim=8, num_local_experts=4, num_experts_per_tok=2),
    decoder("granitemoe", **GROUPED, num_local_experts=4, num_experts_per_tok=2),
    decoder(
        "llama4_text", **GROUPED, head_dim=8, intermediate_size_mlp=48, num_local_experts=4,
        interleave_moe_layer_step=2, exclude=["router"],
    ),
    decoder("jetmoe", small={**SMALL, "kv_channels": 8}, num_key_value_heads=2, num_local_experts=4),
)  # fmt: skip

STATE = {"state_size": 8, "num_hidden_layers": 2, "vocab_size": 64, "hidden_size": 32}
STATE_SPACES = of_family(
    "state space",
    decoder("mamba", small=STATE, exclude=["out_proj", "dt_proj"]),
    decoder("falcon_mamba", small=STATE, exclude=["out_proj", "dt_proj"]),
    decoder("mamba2", small=STATE, num_heads=8, head_dim=8, n_groups=2, chunk_size=4, exclude=["out_proj"]),
    decoder(
        "falcon_h1", **GROUPED, head_dim=8, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=8,
        mamba_n_groups=1, mamba_chunk_size=4, exclude=["out_proj"],
    ),
    decoder("bamba", **GROUPED, mamba_n_heads=8, mamba_d_head=8, mamba_d_state=8, mamba_chunk_size=4,
        attn_layer_indices=[1]),
    decoder("rwkv", small={"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "attention_hidden_size": 32,
        "context_length": 32}),
)  # fmt: skip
