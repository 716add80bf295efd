"""Models of images, sound, images with text, and diffusers' denoisers."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from building import IDS, SMALL, TOKENS, Architecture, architecture, spread, wave
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCTC,
    AutoModelForImageClassification,
    AutoModelForImageTextToText,
    AutoModelForSpeechSeq2Seq,
)

TOWER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
VISION = {**TOWER, "image_size": 16, "patch_size": 4}
POOLED = {"out_proj": "nn.MultiheadAttention reads its weight and not its output"}
WORDS = {**SMALL, **TOKENS, "num_key_value_heads": 2, "max_position_embeddings": 64}


def pixels(size: int = 16) -> dict[str, Any]:
    return {"pixel_values": wave(2, 3, size, size)}


def image(model_type: str, inputs=pixels, **options) -> Architecture:
    return architecture(model_type, "vision", inputs, **options)


IMAGES = (
    image("vit", auto=AutoModelForImageClassification, **VISION),
    image("dinov2", **VISION),
    image("beit", **VISION),
    image("siglip_vision_model", **VISION, left_out=POOLED),
    image("swin", unlike={"checkpointing": "its embeddings give a tuple, which enable_input_require_grads fails on"},
        image_size=16, patch_size=2, embed_dim=16, depths=[1, 1], num_heads=[2, 4], window_size=4),
    image("convnext", hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, patch_size=2),
    image(
        "segformer", partial(pixels, 32), auto=AutoModelForImageClassification, num_encoder_blocks=2, depths=[1, 1],
            sr_ratios=[2, 1],
        unlike={"checkpointing": "reentrant checkpointing needs an embedding whose output requires a gradient"},
        hidden_sizes=[16, 32], patch_sizes=[3, 3], strides=[2, 2], num_attention_heads=[2, 4], mlp_ratios=[2, 2],
            decoder_hidden_size=16,
    ),
)  # fmt: skip

NO_EMBEDDINGS = "PEFT saves what has embeddings, and transformers cannot say that this has none"
CONVOLVED = {
    **TOWER, "vocab_size": 32, "conv_dim": [8, 8], "conv_stride": [4, 2], "conv_kernel": [8, 4],
    "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 4,
    "apply_spec_augment": False, "do_stable_layer_norm": False,
}  # fmt: skip


def sound() -> dict[str, Any]:
    return {"input_values": wave(2, 400)}


def audio(model_type: str, inputs=sound, *, auto: Any = AutoModelForCTC, **options) -> Architecture:
    return architecture(model_type, "audio", inputs, auto=auto, **options)


SOUNDS = (
    audio("wav2vec2", **CONVOLVED, unlike={"files": NO_EMBEDDINGS}),
    audio("hubert", **CONVOLVED, unlike={"files": NO_EMBEDDINGS}),
    audio(
        "whisper", lambda: {"input_features": wave(2, 8, 32), "decoder_input_ids": IDS[:, :6]},
        auto=AutoModelForSpeechSeq2Seq, vocab_size=64, num_mel_bins=8, d_model=32, encoder_layers=2, decoder_layers=2,
        encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48,
        max_source_positions=16, max_target_positions=32, **TOKENS, decoder_start_token_id=1,
            begin_suppress_tokens=None,
    ),
    audio(
        "audio-spectrogram-transformer", lambda: {"input_values": wave(2, 32, 8)}, auto=AutoModel, **TOWER,
        patch_size=4, max_length=32, num_mel_bins=8, frequency_stride=4, time_stride=4,
    ),
)  # fmt: skip


def looked_at(count: int, token: int = 60, **more) -> dict[str, Any]:
    """Text with the places of ``count`` image tokens, and one image each."""
    ids = torch.cat([torch.full((2, count), token), IDS], 1)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **pixels(), "use_cache": False, **more}


def qwen_inputs() -> dict[str, Any]:
    ids = torch.cat(
        [torch.tensor([[61]]).expand(2, 1), torch.full((2, 4), 60), torch.tensor([[62]]).expand(2, 1), IDS], 1
    )
    return {
        "input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": wave(32, 3 * 2 * 4 * 4),
        "mm_token_type_ids": (ids == 60).int(), "image_grid_thw": torch.tensor([[1, 4, 4]] * 2), "use_cache": False,
    }  # fmt: skip


seen = partial(architecture, family="vision-language", auto=AutoModelForImageTextToText)
LLAVA_TEXT = {**WORDS, "model_type": "llama"}
QWEN = {
    "text_config": {**WORDS, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1,
        2]}},
    "image_token_id": 60, "vision_start_token_id": 61, "vision_end_token_id": 62, "video_token_id": 63,
}  # fmt: skip

SEEN = (
    seen("llava", inputs=partial(looked_at, 16), vision_config={**VISION, "model_type": "clip_vision_model"},
        text_config=LLAVA_TEXT, image_token_index=60, image_seq_length=16, vision_feature_layer=-1),
    seen("paligemma", inputs=lambda: looked_at(16, token_type_ids=torch.zeros(2, 28, dtype=torch.long)),
        vision_config={**VISION, "model_type": "siglip_vision_model", "vision_use_head": False}, text_config={**WORDS,
        "model_type": "gemma", "head_dim": 8}, image_token_index=60, projection_dim=32),
    seen("qwen2_vl", inputs=qwen_inputs, **QWEN, vision_config={"depth": 2, "embed_dim": 32, "hidden_size": 32,
        "num_heads": 4, "mlp_ratio": 2, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2}),
    seen("qwen2_5_vl", inputs=qwen_inputs, **QWEN, vision_config={"depth": 2, "hidden_size": 32, "out_hidden_size": 32,
        "num_heads": 4, "intermediate_size": 48, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2,
        "window_size": 16, "fullatt_block_indexes": [1]}),
    seen("idefics3", inputs=lambda: {**looked_at(4), "pixel_values": wave(2, 1, 3, 16, 16)}, vision_config=VISION,
        text_config=LLAVA_TEXT, image_token_id=60, scale_factor=2),
    seen("clip", inputs=lambda: {"input_ids": IDS, **pixels()}, auto=AutoModel, text_config={**SMALL,
        "max_position_embeddings": 32, **TOKENS}, vision_config=VISION, projection_dim=16),
    seen("siglip", inputs=lambda: {"input_ids": IDS, **pixels()}, auto=AutoModel, text_config={**SMALL,
        "max_position_embeddings": 32, **TOKENS, "projection_size": 32}, vision_config=VISION, left_out=POOLED),
)  # fmt: skip


def denoiser(name: str, inputs: Callable[[], dict[str, Any]], **config) -> Architecture:
    def build() -> nn.Module:
        import diffusers

        torch.manual_seed(0)
        return spread(getattr(diffusers, name)(**config))

    return Architecture(name, "diffusers", build, inputs)


DENOISERS = (
    denoiser(
        "UNet2DConditionModel",
        lambda: {"sample": wave(2, 4, 8, 8), "timestep": torch.tensor([3, 5]), "encoder_hidden_states": wave(2, 6, 16)},
        sample_size=8, block_out_channels=(16, 32), layers_per_block=1, cross_attention_dim=16, attention_head_dim=4,
        norm_num_groups=4, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ),
    denoiser(
        "SD3Transformer2DModel",
        lambda: {"hidden_states": wave(2, 4, 8, 8), "timestep": torch.tensor([3, 5]), "encoder_hidden_states": wave(2,
            6, 16), "pooled_projections": wave(2, 24)},
        sample_size=8, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=4,
        joint_attention_dim=16, caption_projection_dim=32, pooled_projection_dim=24, out_channels=4,
            pos_embed_max_size=8,
    ),
    denoiser(
        "FluxTransformer2DModel",
        lambda: {
            "hidden_states": wave(2, 16, 4), "timestep": torch.tensor([0.3, 0.5]), "encoder_hidden_states": wave(2, 6,
                16),
            "pooled_projections": wave(2, 24), "img_ids": torch.zeros(16, 3), "txt_ids": torch.zeros(6, 3),
        },
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, pooled_projection_dim=24, axes_dims_rope=(4, 4, 8), guidance_embeds=False,
    ),
    denoiser(
        "DiTTransformer2DModel",
        lambda: {"hidden_states": wave(2, 4, 8, 8), "timestep": torch.tensor([3, 5]), "class_labels": torch.tensor([1,
            2])},
        sample_size=8, num_attention_heads=4, attention_head_dim=8, in_channels=4, num_layers=2,
            num_embeds_ada_norm=10, norm_num_groups=4,
    ),
)  # fmt: skip
