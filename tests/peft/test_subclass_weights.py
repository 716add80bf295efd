"""MULTILORA on base layers that are no nn.Linear or whose weight is a tensor subclass: with one of this file's own, and
with those of torchao, HQQ and quanto where they are installed (`make trainers` installs them)."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from steps import Loop
from tiny import IDS, assert_differ, config, layers, llama, logits
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only


class Eighths(Tensor):
    """A frozen weight kept as integers. Whatever is computed with it is computed with a dense copy."""

    @staticmethod
    def __new__(cls, weight: Tensor):
        return Tensor._make_wrapper_subclass(cls, weight.shape, dtype=weight.dtype)

    def __init__(self, weight: Tensor):
        self.kept = (weight * 256).round().to(torch.int16)

    def dequantize(self) -> Tensor:
        return self.kept.float() / 256

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return cls(args[0].dequantize())
        return function(*tree_map_only(cls, cls.dequantize, args), **tree_map_only(cls, cls.dequantize, kwargs or {}))


def projections(model):
    return [name for name, m in model.named_modules() if isinstance(m, nn.Linear) and name != "lm_head"]


def own(model, folder):
    for name in projections(model):
        linear = model.get_submodule(name)
        linear.weight = nn.Parameter(Eighths(linear.weight.data), requires_grad=False)
    return model


def torchao(name: str, **options):
    def quantized(model, folder):
        quantization = pytest.importorskip("torchao.quantization")
        chosen = projections(model)
        quantization.quantize_(model, getattr(quantization, name)(**options), filter_fn=lambda _, path: path in chosen)
        return model

    return quantized


def torchao_config(model, folder):
    quantization = pytest.importorskip("torchao.quantization")
    from transformers import LlamaForCausalLM, TorchAoConfig

    model.save_pretrained(folder)
    how = TorchAoConfig(quantization.Int8WeightOnlyConfig(version=2))
    return LlamaForCausalLM.from_pretrained(folder, quantization_config=how)


def hqq(model, folder):
    quantize = pytest.importorskip("hqq.core.quantize")
    for name in projections(model):
        how = quantize.BaseQuantizeConfig(nbits=8, group_size=32)
        new = quantize.HQQLinear(model.get_submodule(name), how, compute_dtype=torch.float32, device="cpu")
        model.set_submodule(name, new)
    return model


def quanto(kind: str):
    def quantized(model, folder):
        library = pytest.importorskip("optimum.quanto")
        library.quantize(model, weights=getattr(library, kind), exclude="lm_head")
        library.freeze(model)
        return model

    return quantized


UNWRITABLE = {
    "own": own,
    "torchao int8": torchao("Int8WeightOnlyConfig", version=2),
    "torchao int8 activations": torchao("Int8DynamicActivationInt8WeightConfig"),
    "torchao float8": torchao("Float8WeightOnlyConfig"),
    "quanto int8": quanto("qint8"),
    "quanto int4": quanto("qint4"),
}
WRITABLE = {"TorchAoConfig int8": torchao_config, "HQQ int8": hqq}


@pytest.fixture
def base(request, tmp_path):
    """A function that quantizes the tiny Llama, or another model, always to the same weights."""
    return lambda model=None: request.param(model or llama(hidden_size=64), tmp_path / "base").requires_grad_(False)


def each(kinds: dict):
    return pytest.mark.parametrize("base", kinds.values(), ids=kinds.keys(), indirect=True)


def results(layer, module):
    """The output of ``module``, and the gradients of x and the branches."""
    torch.manual_seed(0)
    x, dy = torch.randn(2, 9, layer.in_features, requires_grad=True), torch.randn(2, 9, layer.out_features)
    module.zero_grad()
    y = module(x)
    y.backward(dy)
    return [y, x.grad, *(p.grad for p in module.parameters() if p.requires_grad)]


@each(UNWRITABLE | WRITABLE)
def test_trains_as_loops_on_the_same_base(base):
    model, plain = get_peft_model(base(), config()), logits(base())
    assert_differ(logits(model), plain)
    with model.disable_adapter():
        assert torch.equal(logits(model), plain)
    model.train()(IDS, labels=IDS).loss.backward()
    assert all(p.grad.any() for p in model.parameters() if p.requires_grad)
    for layer in layers(model).values():
        for ours, theirs in zip(results(layer, layer), results(layer, Loop(layer)), strict=True):
            assert (ours - theirs).norm() <= 1e-6 * theirs.norm()


@each(UNWRITABLE | WRITABLE)
def test_comes_back_from_its_file(base, tmp_path):
    model = get_peft_model(base(), config())
    model.save_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(PeftModel.from_pretrained(base(), tmp_path / "adapter")), logits(model))


@each(UNWRITABLE)
@pytest.mark.parametrize("how", ["merge_adapter", "safely", "merge_and_unload"])
def test_a_weight_that_cannot_be_written_is_not_merged_into(base, how):
    """Not even the layers that could be: here a dense one before it."""
    frozen = base()
    frozen.model.layers[0].self_attn.q_proj = nn.Linear(64, 64, bias=False).requires_grad_(False)
    model = get_peft_model(frozen, config())
    adapted, dense = logits(model), frozen.model.layers[0].self_attn.q_proj.base_layer.weight.clone()
    merge = model.merge_and_unload if how == "merge_and_unload" else model.merge_adapter
    with pytest.raises(ValueError, match=r"cannot be merged into a Q?Linear with a weight of class \w+, .*export_lora"):
        merge(**({"safe_merge": True} if how == "safely" else {}))
    assert torch.equal(frozen.model.layers[0].self_attn.q_proj.base_layer.weight, dense)
    assert not any(layer.merged for layer in layers(model).values())
    assert torch.equal(logits(model), adapted)


def test_a_base_quantized_while_an_adapter_is_merged_keeps_it_merged(tmp_path):
    model = get_peft_model(llama(hidden_size=64), config())
    model.merge_adapter()
    for layer in layers(model).values():
        layer.base_layer.weight = nn.Parameter(Eighths(layer.base_layer.weight.data), requires_grad=False)
    with pytest.raises(ValueError, match=r"cannot be merged into a Linear with a weight of class Eighths"):
        model.unmerge_adapter()
    assert all(layer.merged_adapters == ["default"] for layer in layers(model).values())


@each(WRITABLE)
def test_merging_quantizes_the_sum(base):
    model = get_peft_model(base(), config())
    adapted, plain = logits(model), logits(base())
    sums = {}
    for name, layer in layers(model).items():
        sums[name] = layer.quantization_backend.get_base_weight(layer.get_base_layer()) + layer.get_delta_weight(
            "default"
        )
    model.merge_adapter(safe_merge=True)
    for name, layer in layers(model).items():
        written = layer.quantization_backend.get_base_weight(layer.get_base_layer())
        step = (sums[name].abs().amax(1, keepdim=True) / 127) * 0.51 + 1e-6
        assert ((written - sums[name]).abs() <= step).all(), name
    merged = logits(model)
    assert (merged - adapted).norm() < 0.1 * (merged - plain).norm()
    model.unmerge_adapter()
    assert (logits(model) - adapted).norm() < 0.1 * (merged - plain).norm()
    model.merge_adapter()
    again = logits(model)
    assert torch.equal(logits(model.merge_and_unload()), again)
