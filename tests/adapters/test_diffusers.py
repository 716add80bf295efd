"""diffusers loads an export, though not what its own save_lora_adapter writes of a MultiLoRA adapter."""

import pytest
import torch
from peft import get_peft_model
from tiny import config

from multilora_fast import export_lora
from multilora_fast.adapters.files import WEIGHTS

diffusers = pytest.importorskip("diffusers")


def unet():
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(4, 8), layers_per_block=1, cross_attention_dim=8, norm_num_groups=2,
        attention_head_dim=2, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    ).eval()  # fmt: skip


@torch.no_grad()
def output(model):
    torch.manual_seed(1)
    return model(torch.randn(2, 4, 8, 8), 3, torch.randn(2, 5, 8)).sample


@pytest.mark.parametrize("source", ["model", "directory"])
def test_an_export_is_loaded_by_load_lora_adapter(source, tmp_path):
    model = unet()
    before = output(model)
    model.add_adapter(config(target_modules=["to_q", "to_k", "to_v"]))
    expected = output(model)
    assert (expected - before).abs().max() > 1e-2 * before.abs().max()
    if source == "directory":
        wrapped = get_peft_model(unet(), config(target_modules=["to_q", "to_k", "to_v"]))
        wrapped.load_state_dict({f"base_model.model.{key}": tensor for key, tensor in model.state_dict().items()})
        wrapped.save_pretrained(tmp_path / "source")
    export_lora(model if source == "model" else tmp_path / "source", tmp_path / "lora")
    loaded = unet()
    loaded.load_lora_adapter(tmp_path / "lora", prefix="base_model.model", weight_name=WEIGHTS)
    assert (output(loaded) - expected).abs().max() <= 1e-6 * expected.abs().max()


def test_the_readmes_limit_still_holds(tmp_path):
    """Once diffusers loads other methods than LoRA, the README need not send to export_lora."""
    model = unet()
    model.add_adapter(config(target_modules=["to_q"]))
    model.save_lora_adapter(tmp_path)
    with pytest.raises(TypeError, match="LoraConfig"):
        unet().load_lora_adapter(tmp_path, prefix=None, weight_name="pytorch_lora_weights.safetensors")
