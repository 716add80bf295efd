"""adapt: each method changes nothing at first, trains the same total rank in the base's dtype, and shares the base."""

import pytest
import torch
from tiny import IDS, assert_same_logits, gpt2, llama, logits

from multilora_fast import FusedMultiLoRALinear, MultiLoRALinear
from multilora_fast.memory.methods import FULL, LORA, METHODS, OURS, REFERENCE, adapt, draw_scales
from multilora_fast.models import shallow_copy


@pytest.mark.parametrize(
    ("make", "targets"),
    [(llama, ("q_proj", "down_proj")), (llama, "all-linear"), (gpt2, ["c_attn"]), (gpt2, "all-linear")],
)
def test_methods_differ_in_what_they_train(make, targets):
    base = make().to(torch.bfloat16)
    before, own = logits(base), {p.data_ptr() for p in base.parameters()}
    sizes = {}
    for method in METHODS:
        model = adapt(shallow_copy(base), method, targets, r=2, lora_num=3, lora_dropout=0.1)
        assert_same_logits(logits(model), before, 1e-2)
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        assert {p.dtype for p in trained.values()} == {torch.bfloat16}
        assert own <= {p.data_ptr() for p in model.parameters()}
        sizes[method] = sum(p.numel() for name, p in trained.items() if not name.endswith("lora_scaling"))
    assert sizes[FULL] > sizes[LORA] == sizes[REFERENCE] == sizes[OURS]


def test_the_class_of_the_loop_its_scaling_and_its_scales():
    model = adapt(
        llama(), REFERENCE, ["q_proj"], r=2, lora_num=3, lora_alpha=4, loop=FusedMultiLoRALinear, scaling="scalar"
    )
    found = [module for module in model.modules() if isinstance(module, MultiLoRALinear)]
    assert {(type(m), m.scaling_factor, tuple(m.lora_scaling.shape)) for m in found} == {
        (FusedMultiLoRALinear, 2.0, (3, 1))
    }
    draw_scales(model)
    model(IDS).logits.sum().backward()
    assert all(p.grad.abs().max() > 0 for p in model.parameters() if p.requires_grad)
