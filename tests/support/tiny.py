"""Small random transformers models, equal at every call, and helpers for tests of them."""

import torch
from peft import get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from multilora_fast.peft import MultiLoraConfig, MultiLoraLinear

IDS = (torch.arange(24) * 7 % 61).view(2, 12)
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


def llama(dtype=torch.float32, hidden_size=32) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=hidden_size, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(dtype).eval()


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=64, n_positions=32, n_embd=32, n_layer=2, n_head=4, initializer_range=0.2)
    ).eval()


def config(**options) -> MultiLoraConfig:
    """With non-zero scales, as after training."""
    return MultiLoraConfig(
        **{"r": 4, "lora_num": 3, "target_modules": ATTENTION, "init_weights": False, "lora_alpha": 6, **options}
    )


def two_adapters(**second):
    """A model with the adapters "default", which is active, and "other", of another shape on other modules."""
    model = get_peft_model(llama(), config())
    model.add_adapter("other", config(r=2, lora_num=5, target_modules=["q_proj", "up_proj"], **second))
    return model


def layers(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, MultiLoraLinear)}


def branches(model, adapter="default"):
    return [layer.multilora_branches[adapter] for layer in layers(model).values()]


@torch.no_grad()
def logits(model, **kwargs) -> torch.Tensor:
    model.eval()
    return model(IDS, **kwargs).logits


def assert_same_logits(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-6) -> None:
    difference, largest = (a - b).abs().max().item(), b.abs().max().item()
    print(f"logits differ by {difference:.3g}, of at most {largest:.3g}")
    assert difference <= tolerance * largest


def assert_differ(a: torch.Tensor, b: torch.Tensor) -> None:
    assert (a - b).abs().max() > 1e-2 * b.abs().max()
