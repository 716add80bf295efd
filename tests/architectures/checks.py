"""What must hold of every architecture, each against PEFT's LoRA or the plain loop on the same model."""

import copy
import warnings
from contextlib import nullcontext
from typing import Any

import torch
from building import Architecture
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from multilora_fast import MultiLoraConfig, export_lora
from multilora_fast.peft import MultiLoraLinear

RANK = {"r": 2, "lora_alpha": 3}


class Loop(nn.Module):
    """The reference's loop over branches on a base layer of any kind, with new tensors at every step."""

    def __init__(self, layer: MultiLoraLinear):
        super().__init__()
        branches = layer.multilora_branches["default"]
        self.base_layer, self.factor, self.dropout = layer.base_layer, branches.scaling_factor, branches.lora_dropout
        self.lora_A, self.lora_B, self.lora_scaling = branches.lora_A, branches.lora_B, branches.lora_scaling

    @property
    def weight(self) -> Tensor:  # which some models read the dtype of
        return self.base_layer.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base_layer.bias

    def forward(self, x: Tensor) -> Tensor:
        y, x = self.base_layer(x), self.dropout(x)
        if not torch.is_autocast_enabled(x.device.type):
            x = x.to(self.lora_A.dtype)
        for A, B, s in zip(self.lora_A, self.lora_B, self.lora_scaling, strict=True):
            y = y + (nn.functional.linear(nn.functional.linear(x, A), B) * (self.factor * s)).to(y.dtype)
        return y


def multilora(of: Architecture, model: nn.Module | None = None, *, double: bool = True, **options):
    """The architecture under MultiLoRA with scales as after training, in float64."""
    torch.manual_seed(1)
    model = of.build() if model is None else model
    settings = {"targets": of.targets, "exclude": of.exclude, "init_weights": False, **RANK, **options}
    config = MultiLoraConfig(
        lora_num=3, target_modules=settings.pop("targets"), exclude_modules=settings.pop("exclude"), **settings
    )
    return get_peft_model(model.double() if double else model, config)


def lora(of: Architecture, *, double: bool = True, **options):
    torch.manual_seed(1)
    model = of.build()
    options = {
        "target_modules": of.targets,
        "exclude_modules": of.exclude,
        "init_lora_weights": False,
        **RANK,
        **options,
    }
    config = LoraConfig(**options)
    return get_peft_model(model.double() if double else model, config)


def loop(model: Any):
    """A copy of the model with the loop in place of each of our layers, and the same values."""
    twin = copy.deepcopy(model)
    for name, layer in list(twin.named_modules()):
        if isinstance(layer, MultiLoraLinear):
            twin.set_submodule(name, Loop(layer))
    return twin


def ran(of: Architecture, model: nn.Module, *, seed: int = 0, autocast: bool = False) -> list[Tensor]:
    """The floating tensors of what the model answers, largest depths first in its own order."""
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    inputs = {k: v.to(dtype) if _floating(v) else copy.deepcopy(v) for k, v in of.inputs().items()}
    torch.manual_seed(seed)
    with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
        return tensors(model(**inputs))


def tensors(out: Any) -> list[Tensor]:
    if isinstance(out, Tensor):
        return [out] if out.is_floating_point() else []
    if hasattr(out, "values"):
        out = list(out.values())
    return [t for value in out for t in tensors(value)] if isinstance(out, (list, tuple)) else []


def applies(of: Architecture, check: str) -> bool:
    """Whether the model can be asked this at all."""
    if check == "generate":
        return of.generates
    if check == "checkpointing":
        model = of.build()
        names = ("supports_gradient_checkpointing", "_supports_gradient_checkpointing")
        return any(getattr(model, name, False) for name in names)
    return True


def loss_of(outputs: list[Tensor]) -> Tensor:
    """A number that depends on every output in its own way."""
    total = torch.zeros(())
    for out in outputs:
        if out.requires_grad:
            weights = torch.cos(torch.arange(out.numel(), dtype=torch.float64) * 0.7).view(out.shape)
            total = total + (out.double() * weights).mean()
    return total


def gradients(of: Architecture, model: nn.Module, **options) -> dict[str, Tensor | None]:
    """The gradients of a training step, by the names of the trainable parameters, which are the loop's too."""
    model.train()
    model.zero_grad()
    loss_of(ran(of, model, **options)).backward()
    return {
        name.replace("multilora_branches.default.", ""): p.grad
        for name, p in model.named_parameters()
        if p.requires_grad
    }


def assert_equal(ours: dict[str, Tensor | None], wanted: dict[str, Tensor | None], tolerance: float = 1e-8) -> None:
    """Relative to each gradient's norm, but for what a float64 of the largest one is rounded by."""
    assert ours.keys() == wanted.keys()
    largest = max(g.norm().item() for g in wanted.values() if g is not None)
    assert largest > 0
    for name, exact in wanted.items():
        got = ours[name]
        assert (got is None) == (exact is None), f"{name} has {'no' if got is None else 'a'} gradient"
        if got is not None and exact is not None:
            error, bound = (got - exact).norm().item(), tolerance * exact.norm().item() + 1e-13 * largest
            assert error <= bound, f"{name} is off by {error:.3g}, of {exact.norm():.3g}"


def assert_close(ours: list[Tensor], wanted: list[Tensor], tolerance: float = 1e-9) -> None:
    assert len(ours) == len(wanted) > 0
    for a, b in zip(ours, wanted, strict=True):
        assert torch.isfinite(b).all()
        assert (a - b).abs().max() <= tolerance * b.abs().max(), f"off by {(a - b).abs().max():.3g}"


def assert_differ(ours: list[Tensor], others: list[Tensor]) -> None:
    assert any((a - b).abs().max() > 1e-6 * b.abs().max() for a, b in zip(ours, others, strict=True))


# The checks


def check_modules(of: Architecture, folder) -> str:
    """The modules that LoRA adapts, or the table and a warning say which are left out, and those that learn learn."""
    theirs = lora(of)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ours = multilora(of)
    wanted, got = set(theirs.base_model.targeted_module_names), set(ours.base_model.targeted_module_names)
    wanted |= set(theirs.base_model.targeted_parameter_names)
    left = {name for name in wanted - got if not name.endswith(tuple(of.left_out))}
    assert not left, f"LoRA adapts {sorted(left)}"
    assert of.more or not got - wanted, f"LoRA leaves out {sorted(got - wanted)}"
    assert not of.more or got - wanted, "the table says that we adapt more"
    missing = [key for key in of.left_out if not any(name.endswith(key) for name in wanted - got)]
    assert not missing, f"{missing} are not left out"
    warned = [str(w.message) for w in caught if issubclass(w.category, UserWarning)]
    if of.left_out or of.family == "mixture of experts":
        assert [w for w in warned if "not adapted" in w or "leaves out" in w], f"no warning but {warned}"
    else:
        assert not [w for w in warned if "not adapted" in w or "leaves out" in w], warned
    learning = [
        {name.split(".lora_")[0].split(".multilora_")[0] for name, g in found.items() if g is not None}
        for found in (gradients(of, theirs), gradients(of, ours))
    ]
    still = {name for name in learning[0] - learning[1] if any(name.endswith(f".{module}") for module in got & wanted)}
    assert not still, f"of LoRA's modules {sorted(still)} have no gradient"
    return f"{len(got)}"


def check_start(of: Architecture, folder) -> None:
    """A fresh adapter leaves the bits of what the model answers."""
    with torch.no_grad():
        before = ran(of, of.build())
        model = multilora(of, double=False, init_weights=True)
        for mode in (model.eval(), model.train()):
            for a, b in zip(ran(of, mode), before, strict=True):
                assert torch.equal(a, b)


def check_gradients(of: Architecture, folder, adapt=multilora) -> None:
    """Every gradient of two steps in float64 is the loop's; the second is after a change of the parameters."""
    model = adapt(of)
    for _ in range(2):
        assert_equal(gradients(of, model), gradients(of, loop(model)))
        with torch.no_grad():
            for p in model.parameters():
                if p.grad is not None:
                    p.sub_(p.grad.sign() * 0.01)


def check_checkpointing(of: Architecture, folder, adapt=multilora) -> None:
    """Both modes of checkpointing give the gradients that a step without it gives. With dropout, from the second step
    on: in the first, layers may find out that they do not read the same tensor, and then draw other masks."""
    for dropout in (0.0, 0.2):
        plain = adapt(of, lora_dropout=dropout)
        wanted = [gradients(of, plain) for _ in range(3)]
        for use_reentrant in (False, True):
            model = adapt(of, lora_dropout=dropout)
            enable(model, use_reentrant)
            for step in range(3):
                got = gradients(of, model)
                if step or not dropout:
                    assert_equal(got, wanted[step])


def enable(model, use_reentrant: bool) -> None:
    inner = model.get_base_model()
    if hasattr(inner, "gradient_checkpointing_enable"):
        inner.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        inner.enable_input_require_grads()
    else:
        inner.enable_gradient_checkpointing()


def check_dropout(of: Architecture, folder, adapt=multilora) -> None:
    """One seed, one mask; another, another; in evaluation, none."""
    model, plain = adapt(of, lora_dropout=0.3), adapt(of)
    first = gradients(of, model, seed=0)
    assert_equal(gradients(of, model, seed=0), first, 1e-12)
    other = gradients(of, model, seed=1)
    assert all(torch.isfinite(g).all() for g in other.values() if g is not None)
    assert any((g - other[name]).norm() > 1e-3 * g.norm() for name, g in first.items() if g is not None)
    with torch.no_grad():
        assert_close(ran(of, model.eval()), ran(of, plain.eval()), 0)


def check_autocast(of: Architecture, folder, adapt=multilora) -> None:
    """In bfloat16 the gradients are no farther from float64 than the loop's: twice their distance, and a rounding."""
    model = adapt(of, double=False)
    twin = loop(model)
    pairs = [gradients(of, module, autocast=True) for module in (model, twin)]
    exact = gradients(of, twin.double())
    far = [distance(found, exact) for found in pairs]
    assert far[0] <= 2 * far[1] + 2**-8, f"{far[0]:.3g} from float64, the loop {far[1]:.3g}"


def distance(found: dict, exact: dict) -> float:
    total = sum(g.norm() ** 2 for g in exact.values() if g is not None)
    off = sum((found[name] - g).norm() ** 2 for name, g in exact.items() if g is not None)
    return ((off / total) ** 0.5).item()


def check_generate(of: Architecture, folder, adapt=multilora) -> None:
    """A model that is left in train mode generates what the loop does, and trains on as before."""
    model = adapt(of).train()
    wanted = gradients(of, model)
    answers = [generated(of, module) for module in (model, loop(model), model.eval())]
    assert torch.equal(answers[0], answers[1])
    assert torch.equal(answers[0], answers[2])
    assert_equal(gradients(of, model), wanted, 1e-12)


def generated(of: Architecture, model) -> Tensor:
    dtype = next(model.parameters()).dtype
    left = ("use_cache", "decoder_input_ids")
    inputs = {k: v.to(dtype) if _floating(v) else v for k, v in of.inputs().items() if k not in left}
    return model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False)


@torch.no_grad()
def check_files(of: Architecture, folder, adapt=multilora) -> None:
    """What is saved loads into PEFT on a new model, and answers the same."""
    model = adapt(of).eval()
    model.save_pretrained(folder)
    again = PeftModel.from_pretrained(of.build().double(), folder).eval()
    wanted = ran(of, model)
    assert_close(ran(of, again), wanted, 0)
    assert_differ(ran(of, of.build().double()), wanted)


@torch.no_grad()
def check_merge(of: Architecture, folder, adapt=multilora) -> None:
    model = adapt(of).eval()
    wanted = ran(of, model)
    assert_close(ran(of, model.merge_and_unload()), wanted)


@torch.no_grad()
def check_export(of: Architecture, folder, adapt=multilora) -> None:
    """The export loads into plain PEFT and answers the same."""
    model = adapt(of).eval()
    export_lora(model, folder)
    plain = PeftModel.from_pretrained(of.build().double(), folder).eval()
    assert_close(ran(of, plain), ran(of, model))


def _floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


CHECKS = {name.removeprefix("check_"): check for name, check in list(globals().items()) if name.startswith("check_")}
