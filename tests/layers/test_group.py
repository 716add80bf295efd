"""The op of layers that share an input, under all that autograd may ask of it."""

import copy

import pytest
import torch
from peft import get_peft_model
from tiny import config, layers
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from transformers import T5Config, T5ForConditionalGeneration

from multilora_fast import MultiLoRALinear, fuse

pytestmark = pytest.mark.usefixtures("one_seed")

K = 24
SIZES = {"q_proj": 16, "k_proj": 20, "v_proj": 12}


class Projections(nn.Module):
    def __init__(self, ranks=(3, 3, 3), frozen=True, p=0.2):
        super().__init__()
        for (name, N), r in zip(SIZES.items(), ranks, strict=True):
            base = nn.Linear(K, N, bias=name != "v_proj", dtype=torch.float64).requires_grad_(not frozen)
            layer = MultiLoRALinear(base, r=r, lora_num=2, lora_dropout=p)
            nn.init.normal_(layer.lora_scaling)
            self.add_module(name, layer)

    def forward(self, x):
        return [layer(x) for layer in self.children()]


def pair(**options) -> tuple[nn.Module, nn.Module]:
    """Layers alone, and the same in a group."""
    alone = Projections(**options)
    together = copy.deepcopy(alone)
    fuse(alone, share_inputs=False)
    fuse(together)
    return alone, together


def x_of(seed=0) -> torch.Tensor:
    return torch.randn(2, 5, K, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def loss(outputs, used=(0, 1, 2)):
    return sum(outputs[i].sin().sum() for i in used)


def gradients(model, x) -> dict:
    return {"x": x.grad, **{name: p.grad for name, p in model.named_parameters()}}


def assert_same(ours: dict, theirs: dict) -> None:
    for name, wanted in theirs.items():
        torch.testing.assert_close(ours[name], wanted, rtol=1e-12, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}")


def compare(use, served, wanted_calls=(3,), **options) -> None:
    """The gradients of ``use(model, x)`` alone and in a group."""
    found = []
    for model in pair(**options):
        x = x_of()
        use(model, x)
        found.append(gradients(model, x))
    assert_same(found[1], found[0])
    assert served == list(wanted_calls)


@pytest.mark.parametrize(("ranks", "frozen"), [((3, 3, 3), False), ((3, 1, 4), True)])
def test_one_backward(ranks, frozen, served):
    compare(lambda model, x: loss(model(x)).backward(), served, ranks=ranks, frozen=frozen)


def test_two_backwards_through_one_graph(served):
    def use(model, x):
        total = loss(model(x))
        total.backward(retain_graph=True)
        total.backward()

    compare(use, served)


@pytest.mark.parametrize(
    ("used", "ranks"), [((0,), (3, 1, 4)), ((1,), (3, 3, 3)), ((1, 2), (3, 1, 4)), ((0, 2), (3, 3, 3))]
)
def test_unused_members_get_no_gradients(used, ranks, served):
    compare(lambda model, x: loss(model(x), used).backward(), served, ranks=ranks)


def test_one_member_at_a_time(served):
    def use(model, x):
        outputs = model(x)
        for i in range(3):
            loss(outputs, (i,)).backward(retain_graph=i < 2)

    compare(use, served)


@pytest.mark.parametrize(
    "names", [["x"], ["q_proj.lora_A"], ["k_proj.lora_B", "v_proj.lora_scaling"], ["x", "v_proj.lora_A"]]
)
def test_gradients_of_a_subset_and_then_of_everything(names, served):
    first = []

    def use(model, x):
        total, inputs = loss(model(x)), {"x": x, **dict(model.named_parameters())}
        first.append(torch.autograd.grad(total, [inputs[name] for name in names], retain_graph=True))
        total.backward()

    compare(use, served)
    for ours, wanted in zip(first[1], first[0], strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant, served):
    def use(model, x):
        loss(checkpoint(lambda x: tuple(model(x)), x, use_reentrant=reentrant)).backward()

    compare(use, served, [3, 3])


def test_frozen_members(served):
    def use(model, x):
        model.q_proj.requires_grad_(False)
        model.k_proj.lora_A.requires_grad_(False)
        loss(model(x.detach())).backward()

    compare(use, served)


class Large(TorchDispatchMode):
    """Collects the operations that make or change a tensor of ``size`` elements."""

    def __init__(self, size: int):
        super().__init__()
        self.size, self.names = size, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.numel() == self.size and not func.is_view:
            self.names.append(func.name().removeprefix("aten::"))
        return result


def test_dx_is_written_once_and_grows_in_place():
    _, model = pair(p=0.0)
    x = x_of()
    outputs = model(x)
    with Large(x.numel()) as large:
        torch.autograd.backward(outputs, [torch.ones_like(out) for out in outputs])
    names = [name for name in large.names if name != "detach"]
    assert names == ["new_empty", "mm.out", "addmm_", "addmm_", "addmm_"]


def test_outputs_are_tensors_of_their_own():
    _, model = pair()
    outputs = model(x_of())
    assert all(out._base is None and out.is_contiguous() for out in outputs)
    assert len({out.untyped_storage().data_ptr() for out in outputs}) == 3


def test_an_output_whose_graph_is_gone_is_not_served():
    found = []
    for model in pair():
        x = x_of()
        model.q_proj(x).sum().backward()
        model.k_proj(x).sum().backward()
        found.append(gradients(model, x))
    assert_same(found[1], found[0])


def test_what_waits_for_members_that_do_not_come_is_dropped():
    _, model = pair()
    model.q_proj(x_of())
    first = model.q_proj.shared._thread.waiting
    model.q_proj(x_of(1))
    assert model.q_proj.shared._thread.waiting is not first
    model.eval()
    model.q_proj(x_of())
    assert model.q_proj.shared._thread.waiting is None


def another_adapter(model, layer):
    model.add_adapter("other", config(target_modules=["v_proj"]))
    layer.set_adapter(["other", "default"])


OBSTACLES = {
    "hook": lambda model, layer: branches_of(layer).register_forward_pre_hook(lambda module, args: None),
    "base hook": lambda model, layer: layer.base_layer.register_forward_hook(lambda module, args, out: None),
    "disabled": lambda model, layer: layer.enable_adapters(False),
    "merged": lambda model, layer: layer.merge(),
    "another adapter": another_adapter,
    "evaluation": lambda model, layer: layer.eval(),
    "dropout": lambda model, layer: setattr(branches_of(layer).lora_dropout, "p", 0.2),
}


def branches_of(layer):
    return layer.multilora_branches["default"]


@pytest.mark.parametrize("obstacle", OBSTACLES)
def test_a_member_that_has_to_run_itself_keeps_all_alone(obstacle, served):
    model = nn.Module()
    for name, N in SIZES.items():
        model.add_module(name, nn.Linear(K, N))
    model = get_peft_model(model, config(target_modules=list(SIZES), lora_dropout=0.1)).train()
    found = layers(model)
    OBSTACLES[obstacle](model, next(layer for name, layer in found.items() if "v_proj" in name))
    x = torch.randn(3, K)
    for layer in found.values():
        layer(x)
    assert not served
    assert set(model.base_model.shared_inputs().values()) == {None}


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_a_first_forward_that_finds_different_tensors_can_be_recomputed(reentrant):
    torch.manual_seed(0)
    shape = T5Config(
        vocab_size=100, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0, pad_token_id=0
    )
    base = T5ForConditionalGeneration(shape).double()
    ids = torch.arange(1, 13).view(2, 6)
    found = []
    for share in (False, True):
        options = config(target_modules=["q", "k", "v"], lora_dropout=0.1, share_inputs=share, task_type="SEQ_2_SEQ_LM")
        torch.manual_seed(0)
        model = get_peft_model(copy.deepcopy(base), options, autocast_adapter_dtype=False).train()
        for module in model.modules():
            if isinstance(module, nn.Dropout) and module.p == shape.dropout_rate and "lora" not in str(module):
                module.p = 0.0
        for module in layers(model).values():
            branches_of(module).lora_dropout.p = 0.1
        if reentrant is not None:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        steps = []
        for _ in range(3):
            model.zero_grad()
            model(input_ids=ids, labels=ids).loss.backward()
            steps.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
        found.append(steps)
    for ours, wanted in zip(found[1], found[0], strict=True):
        for name in wanted:
            assert torch.linalg.norm(ours[name] - wanted[name]) <= 1e-5 * torch.linalg.norm(wanted[name]), name
    reasons = model.base_model.shared_inputs()
    assert {names[0].split(".")[-2]: reason for names, reason in reasons.items()} == {
        "SelfAttention": None, "EncDecAttention": "its layers were not given the same tensor",
    }  # fmt: skip
