"""The fused layer, fuse and unfuse."""

import copy
import re

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch.nn import functional as F

from multilora_fast import FusedMultiLoRALinear, MultiLoraConfig, MultiLoRALinear, fuse, unfuse
from multilora_fast.ops.functional import apply
from multilora_fast.testing import random_case, reference_op


def branches(K=16, N=12, *, r=4, lora_num=3, cls=MultiLoRALinear, scales=True, **options):
    layer = cls(nn.Linear(K, N), r=r, lora_num=lora_num, **options)
    if scales:
        nn.init.normal_(layer.lora_scaling)
    return layer


class ThirdParty(nn.Linear):
    """A layer with the attributes that the MTL-LoRA project's baseline has, einsum and all."""

    def __init__(self, K, N, r=4, lora_num=3, p=0.0, fan_in_fan_out=False, factor=2.0, wrong=False):
        super().__init__(K, N)
        self.lora_num, self.scaling_factor, self.fan_in_fan_out, self.wrong = lora_num, factor, fan_in_fan_out, wrong
        self.merged = False
        self.lora_A = nn.Parameter(torch.randn(lora_num, r, K))
        self.lora_B = nn.Parameter(torch.randn(lora_num, N, r))
        self.lora_scaling = nn.Parameter(torch.zeros(lora_num, N))
        self.lora_dropout = nn.Dropout(p) if p else (lambda x: x)
        if fan_in_fan_out:
            self.weight.data = self.weight.data.t()

    def forward(self, x):
        result = F.linear(x, self.weight.t() if self.fan_in_fan_out else self.weight, self.bias)
        H = torch.einsum("bsd,nrd->nbsr", self.lora_dropout(x), self.lora_A)
        for i in range(self.lora_num):
            update = (H[i] @ self.lora_B[i].t()) * self.lora_scaling[i]
            result = result + update * (1.0 if self.wrong else self.scaling_factor)
        return result


@pytest.mark.parametrize("cls", [MultiLoRALinear, FusedMultiLoRALinear])
@pytest.mark.parametrize("scaling", ["vector", "scalar"])
def test_a_new_layer_is_its_base_with_the_bases_own_parameters(cls, scaling):
    base = nn.Linear(16, 12).eval()
    base.weight.requires_grad_(False)
    layer = cls(base, r=4, lora_num=3, lora_alpha=8, lora_dropout=0.1, scaling=scaling)
    assert layer.weight is base.weight
    assert layer.bias is base.bias
    assert not layer.weight.requires_grad
    assert not layer.training
    assert layer.scaling_factor == 2.0
    assert {k: tuple(v.shape) for k, v in layer.state_dict().items()} == {
        "weight": (12, 16), "bias": (12,), "lora_A": (3, 4, 16), "lora_B": (3, 12, 4),
        "lora_scaling": (3, 12 if scaling == "vector" else 1),
    }  # fmt: skip
    assert layer.lora_A.std() > 0
    assert layer.lora_B.std() > 0
    assert not layer.lora_scaling.any()
    x = torch.randn(2, 5, 16)
    assert torch.equal(layer(x), base(x))
    assert "lora_num=3, r=4" in repr(layer)


def test_one_branch_with_a_constant_scale_is_lora():
    layer = branches(r=4, lora_num=1, lora_alpha=8, cls=FusedMultiLoRALinear, scaling="scalar")
    layer.lora_scaling.data.fill_(1.0)
    x = torch.randn(7, 16)
    wanted = F.linear(x, layer.weight + 2.0 * layer.lora_B[0] @ layer.lora_A[0], layer.bias)
    torch.testing.assert_close(layer(x), wanted)


def test_the_reference_is_the_oracle_of_the_op():
    layer = branches(lora_alpha=8)
    case = random_case((2, 5, 16), 12, 3, 4)
    layer.load_state_dict(case.parameters)
    assert torch.equal(layer(case.x), reference_op(case)(case.x, **case.parameters))


def test_fuse_keeps_parameters_keys_sharing_and_output():
    shared = branches(16, 16, lora_dropout=0.2)
    model = nn.Sequential(nn.Linear(16, 16), shared, nn.Sequential(shared, branches(16, 8))).eval()
    keys, parameters, originals = list(model.state_dict()), list(model.parameters()), [model[1], model[2][1]]
    x = torch.randn(3, 16)
    before = model(x)
    report = fuse(model)
    assert report.swapped == ["1", "2.0", "2.1"]
    assert report.left == {}
    assert str(report) == "fused 3 modules, left 0"
    assert isinstance(model[1], FusedMultiLoRALinear)
    assert model[1] is model[2][0]
    assert model[1].lora_dropout.p == 0.2
    assert list(model.state_dict()) == keys
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    torch.testing.assert_close(model(x), before)
    assert fuse(model).swapped == []
    model.train()
    assert unfuse(model) == ["1", "2.0", "2.1"]
    assert [model[1], model[2][1]] == originals
    assert model[2][0] is model[1]
    assert model[1].training
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))


def test_unfuse_brings_back_what_was_learned_and_loaded():
    model = nn.Sequential(branches())
    fuse(model)
    new = {k: torch.randn_like(v) for k, v in model.state_dict().items()}
    model.load_state_dict(new, assign=True)
    model[0].scaling_factor *= 3
    x = torch.randn(2, model[0].in_features)
    learned = model(x)
    unfuse(model)
    assert all(torch.equal(v, new[k]) for k, v in model.state_dict().items())
    torch.testing.assert_close(model(x), learned)


def test_a_dropout_that_was_taken_out_drops_nothing():
    model = nn.Sequential(branches(lora_dropout=0.5))
    fuse(model)
    model[0].lora_dropout = nn.Identity()
    x = torch.randn(2, model[0].in_features)
    found = model(x)
    unfuse(model)
    torch.testing.assert_close(found, model.eval()(x))


def test_a_fused_model_copies_and_its_copy_unfuses():
    model = nn.Sequential(branches())
    fuse(model)
    twin = copy.deepcopy(model)
    assert twin[0].lora_A is not model[0].lora_A
    unfuse(twin)
    assert type(twin[0]) is MultiLoRALinear
    assert isinstance(model[0], FusedMultiLoRALinear)


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("fan_in_fan_out", [False, True])
def test_fuse_swaps_third_party_layers_of_the_same_formula(fan_in_fan_out, p):
    model = nn.Sequential(ThirdParty(16, 12, p=p, fan_in_fan_out=fan_in_fan_out))
    original = model[0]
    report = fuse(model)
    assert report.swapped == ["0"], report
    fused = model[0]
    assert fused.lora_dropout.p == p
    assert fused.training
    nn.init.normal_(fused.lora_scaling)
    model.eval()
    if p:
        original.lora_dropout.eval()
    x = torch.randn(2, 5, 16, requires_grad=True)
    torch.testing.assert_close(fused(x), original(x))
    fused(x).sum().backward()
    ours = fused.weight.grad.clone()
    fused.weight.grad = None
    original(x).sum().backward()
    torch.testing.assert_close(ours, original.weight.grad)
    unfuse(model)
    assert model[0] is original


def test_a_bias_may_be_none_without_being_a_parameter():
    layer = ThirdParty(16, 12)
    del layer.bias
    layer.bias = None
    model = nn.Sequential(layer)
    x = torch.randn(2, 5, 16)
    wanted, keys = layer(x), set(model.state_dict())
    assert fuse(model).swapped == ["0"]
    assert torch.equal(model(x), wanted)
    assert set(model.state_dict()) == keys
    assert unfuse(model) == ["0"]
    assert model[0] is layer
    assert torch.equal(model(x), wanted)


def changed(change):
    layer = branches()
    change(layer)
    return layer


def set_to(**values):
    return lambda layer: [setattr(layer, name, value) for name, value in values.items()]


LEFT = [
    (set_to(merged=True), "merged"),
    (lambda layer: layer.register_forward_hook(lambda *_: None), "hooks"),
    (nn.utils.parametrizations.weight_norm, "weight is not a plain Parameter"),
    (set_to(forward=lambda x: x), "forward was replaced"),
    (lambda layer: layer.register_buffer("mask", torch.ones(2)), "holds mask"),
    (set_to(lora_dropout=nn.AlphaDropout(0.1)), "AlphaDropout"),
    (set_to(lora_scaling=nn.Parameter(torch.zeros(2, 12))), "lora_scaling must have shape"),
    (set_to(weight=nn.Parameter(torch.zeros(12, 15))), "weight has shape (12, 15)"),
]
LEFT = [(lambda change=change: changed(change), reason) for change, reason in LEFT] + [
    (lambda: ThirdParty(16, 12, wrong=True), "another formula"),
    (lambda: ThirdParty(16, 12).to("meta"), "meta device"),
]


@pytest.mark.parametrize(("make", "reason"), LEFT, ids=[reason for _, reason in LEFT])
def test_fuse_leaves_alone_and_says_why(make, reason):
    layer = make()
    model = nn.ModuleDict({"left": layer, "swapped": branches()})
    report = fuse(model)
    assert model["left"] is layer
    assert report.swapped == ["swapped"]
    assert list(report.left) == ["left"]
    assert reason in report.left["left"]
    assert reason in str(report)


def test_fuse_reports_the_model_itself():
    assert "the model itself" in fuse(branches()).left[""]


def test_a_report_of_nothing_says_what_fuse_looks_for():
    said = str(fuse(nn.Sequential(nn.Linear(3, 3), nn.Conv1d(1, 1, 1))))
    assert said.startswith("fused 0 modules: ")
    names = re.search(r"\((.+)\)", said)[1].split(", ")
    assert len(names) == 8
    for name in names:
        assert re.search(rf"\b{name}\b", fuse.__doc__)
        report = fuse(nn.Sequential(changed(lambda layer, name=name: delattr(layer, name))))
        assert not report.swapped
        assert not report.left


def test_a_peft_model_needs_no_fuse(monkeypatch):
    model = get_peft_model(nn.Sequential(nn.Linear(16, 12)), MultiLoraConfig(r=2, target_modules=["0"]))
    assert str(fuse(model)).startswith("fused 0 modules: ")
    called = []
    monkeypatch.setattr("multilora_fast.peft.layer.apply", lambda *args: called.append(args) or apply(*args))
    model(torch.randn(3, 16))
    assert len(called) == 1


def test_fuse_tries_a_third_party_layer_without_touching_it():
    layer = ThirdParty(16, 12, p=0.5)
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    state = torch.get_rng_state()
    fuse(nn.Sequential(layer))
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert layer.lora_dropout.training


def test_eval_and_train_never_change_the_weights_and_eval_has_no_dropout():
    layer = branches(cls=FusedMultiLoRALinear, lora_dropout=0.5)
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    x = torch.randn(4, 16)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))
    layer.train()
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())
