"""MULTILORA on bitsandbytes' 4- and 8-bit linear layers, on the CPU too."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import ATTENTION, IDS, assert_differ, config, llama, logits
from torch import nn

from multilora_fast.layers import shared_input
from multilora_fast.memory import saved_bytes
from multilora_fast.peft import MultiLoraConfig, MultiLoraLinear
from multilora_fast.peft.quantization import base_weight
from multilora_fast.testing import random_case, two_times_rule

bnb = pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")


def quantize(linear: nn.Linear, bits: int, compute_dtype=torch.float32) -> nn.Linear:
    options = {"bias": linear.bias is not None}
    if bits == 4:
        new = bnb.nn.Linear4bit(
            linear.in_features, linear.out_features, compute_dtype=compute_dtype, quant_type="nf4", **options
        )
        new.weight = bnb.nn.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4", module=new)
    else:
        new = bnb.nn.Linear8bitLt(linear.in_features, linear.out_features, has_fp16_weights=False, **options)
        new.weight = bnb.nn.Int8Params(linear.weight.data, requires_grad=False, has_fp16_weights=False)
    new.bias = linear.bias
    return new.to("cpu").requires_grad_(False)


def quantized_llama(bits, compute_dtype=torch.float32):
    model = llama(hidden_size=128).requires_grad_(False)
    for layer in model.model.layers:
        for name in ATTENTION:
            setattr(layer.self_attn, name, quantize(getattr(layer.self_attn, name), bits, compute_dtype))
    return model


def dense(layer: MultiLoraLinear) -> torch.Tensor:
    return base_weight(layer.get_base_layer(), layer.quantization_backend)


def prepared(bits, dtype, dropout=0.0):
    """A case whose weight is the quantized layer's, and the layer, also as a function of the case's x and branches."""
    case = random_case((2, 9, 64), 32, 3, 4, dtype=dtype, adapter_dtype=torch.float32)
    linear = nn.Linear(64, 32, dtype=dtype)
    linear.weight.data, linear.bias.data = case.parameters["weight"], case.parameters["bias"]
    options = MultiLoraConfig(r=4, lora_num=3, lora_alpha=8, target_modules=["lin"], lora_dropout=dropout)
    model = get_peft_model(nn.ModuleDict({"lin": quantize(linear, bits, dtype)}), options)
    layer = model.base_model.model["lin"]
    case.parameters["weight"] = dense(layer).to(dtype)

    def op(x, weight, lora_A, lora_B, lora_scaling, bias):
        branches = {"lora_A": lora_A, "lora_B": lora_B, "lora_scaling": lora_scaling}
        layer.multilora_branches["default"]._parameters.update(branches)
        return layer(x) + 0.0 * (weight.sum() + bias.sum()).to(x.dtype)  # frozen: their gradients are not compared

    return case, layer, op


def assert_rule(op, case):
    results = two_times_rule(op, case)
    assert not {k: v for k, v in results.items() if k not in ("weight", "bias") and not v[0] <= v[1]}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_4bit_keeps_the_two_times_rule_through_the_fused_op(dtype, monkeypatch):
    case, layer, op = prepared(4, dtype)
    monkeypatch.setattr(layer.base_layer, "_call_impl", None)  # the base layer must not run itself
    assert_rule(op, case)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_8bit_keeps_the_two_times_rule_added_to_its_own_product(dtype):
    case, _, op = prepared(8, dtype)
    assert_rule(op, case)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize(("dtype", "size"), [(torch.bfloat16, 2), (torch.float32, 4)])
def test_4bit_saves_x_as_it_came_and_the_shrunk(dropout, dtype, size):
    """Also when the layer computes in bfloat16 and x is float32: no cast copy, no dense weight, no mask."""
    _, layer, _ = prepared(4, torch.bfloat16, dropout)
    x = torch.randn(2, 50, 64, dtype=dtype, requires_grad=True)
    with saved_bytes(layer.parameters()) as saved:
        y = layer(x)
    assert y.dtype == dtype
    assert saved.total == 100 * (64 * size + 12 * 2) + (8 if dropout else 0)
    y.sum().backward()
    assert x.grad.dtype == dtype


def test_4bit_training_after_an_evaluation_on_a_cpu():
    """bitsandbytes packs a 4-bit weight at its first inference on some CPUs, and rounds it once more."""
    case, layer, op = prepared(4, torch.float32)
    layer.eval().enable_adapters(False)
    with torch.no_grad():
        layer(case.x)
    layer.enable_adapters(True)
    layer.train()
    y = op(case.x, **case.parameters)
    unpacked = dense(layer)
    assert (unpacked - case.parameters["weight"]).norm() <= 0.01 * unpacked.norm()
    case.parameters["weight"] = unpacked
    assert y.isfinite().all()
    assert_rule(op, case)


@pytest.mark.parametrize(("bits", "low_cpu_mem_usage"), [(4, True), (8, False), (8, True)])
def test_reload_and_two_adapters(bits, low_cpu_mem_usage, tmp_path):
    model = get_peft_model(quantized_llama(bits), config())
    expected = logits(model)
    assert_differ(expected, logits(quantized_llama(bits)))
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(quantized_llama(bits), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(logits(again), expected)
    assert not any(p.requires_grad for p in again.parameters())
    again.load_adapter(tmp_path, "second")
    again.base_model.set_adapter(["default", "second"])
    assert_differ(logits(again), expected)
    model.train()(IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None and p.grad.any() for n, p in model.named_parameters() if "lora_" in n)


@pytest.mark.parametrize("bits", [4, 8])
def test_merge_requantizes_the_sum(bits):
    model = get_peft_model(quantized_llama(bits), config())
    layers = [m for m in model.modules() if isinstance(m, MultiLoraLinear)]
    wanted = [dense(layer) + layer.get_delta_weight("default") for layer in layers]
    model.merge_adapter(safe_merge=True)
    for layer, weight in zip(layers, wanted, strict=True):
        linear = nn.Linear(layer.in_features, layer.out_features, bias=False)
        linear.weight.data = weight
        other = get_peft_model(nn.ModuleDict({"lin": quantize(linear, bits)}), config(target_modules=["lin"]))
        torch.testing.assert_close(dense(layer), dense(other.base_model.model["lin"]))
    merged = logits(model)
    assert torch.equal(logits(model.merge_and_unload()), merged)


@pytest.mark.parametrize(("bits", "step"), [(4, 0.15), (8, 0.01)])
def test_unmerge_goes_back_as_far_as_quantization_lets_it(bits, step):
    _, layer, _ = prepared(bits, torch.float32)
    torch.nn.init.normal_(layer.multilora_branches["default"].lora_scaling, std=0.3)
    before = dense(layer).clone()
    layer.merge()
    assert (dense(layer) - before).norm() > 2 * step * before.norm()
    layer.unmerge()
    assert (dense(layer) - before).norm() < step * before.norm()


HALF, SINGLE = torch.bfloat16, torch.float32


@pytest.mark.parametrize(
    ("kinds", "dtype", "autocast"),
    [
        ((SINGLE,) * 3, SINGLE, HALF), ((HALF,) * 3, SINGLE, HALF), ((HALF,) * 3, SINGLE, torch.float16),
        ((None,) * 3, SINGLE, HALF), ((None, HALF, None), HALF, None), ((SINGLE, None, SINGLE), SINGLE, None),
        (("dense", HALF, HALF), SINGLE, HALF), ((None, "dense", SINGLE), SINGLE, None), ((SINGLE,) * 3, HALF, HALF),
    ],
)  # fmt: skip
def test_4bit_layers_of_any_kinds_compute_together_what_each_computes_alone(kinds, dtype, autocast):
    """q, k and v of these compute dtypes: outputs and gradients in the same dtypes, those of PEFT's LoRA."""
    names = ATTENTION[:3]
    x = torch.randn(2, 9, 64).to(dtype)
    found = []
    for options in (LoraConfig(r=8), config(share_inputs=False), config()):
        torch.manual_seed(0)
        linears = {name: nn.Linear(64, 64) for name in names}
        bases = {name: linears[name] if kind == "dense" else quantize(linears[name], 4, kind)
                 for name, kind in zip(names, kinds, strict=True)}  # fmt: skip
        options.target_modules = names
        model = get_peft_model(nn.ModuleDict(bases), options).train()
        leaf = x.clone().requires_grad_()
        with torch.autocast("cpu", autocast or HALF, enabled=autocast is not None):
            outs = [model.base_model.model[name](leaf) for name in names]
        sum(out.float().sin().sum() for out in outs).backward()
        found.append([*outs, leaf.grad, *(p.grad for p in model.parameters() if p.requires_grad)])
    peft, alone, together = found
    assert [out.dtype for out in peft[:4]] == [out.dtype for out in together[:4]]
    half = {*kinds, dtype, autocast} & {HALF, torch.float16}
    for ours, wanted in zip(together, alone, strict=True):
        assert ours.dtype == wanted.dtype
        assert (ours - wanted).norm() <= (0.02 if half else 1e-5) * wanted.norm()


def test_4bit_layers_share_their_input(monkeypatch):
    """As dense layers do: one op for q, k and v, and the gradients of layers alone."""
    served, apply = [], shared_input.apply_group
    monkeypatch.setattr(shared_input, "apply_group", lambda *args: served.append((len(args) - 4) // 5) or apply(*args))
    found = []
    for share in (False, True):
        torch.manual_seed(0)
        model = get_peft_model(quantized_llama(4), config(share_inputs=share)).train()
        model(IDS, labels=IDS).loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert served == [3, 3]
    for name, wanted in found[0].items():
        torch.testing.assert_close(found[1][name], wanted, rtol=1e-4, atol=1e-6)
