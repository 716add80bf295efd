"""What must hold of every architecture, each against PEFT's LoRA or the plain loop on the same model."""

import re
import warnings

import torch
from building import Architecture
from peft import PeftModel
from steps import (
    assert_close,
    assert_differ,
    assert_equal,
    distance,
    gradients,
    is_floating,
    loop,
    lora,
    multilora,
    ran,
)  # fmt: skip
from torch import Tensor

from multilora_fast import export_lora


def applies(of: Architecture, check: str) -> bool:
    """Whether the model can be asked this at all."""
    if check == "generate":
        return of.generates
    if check == "checkpointing":
        model = of.build()
        names = ("supports_gradient_checkpointing", "_supports_gradient_checkpointing")
        return any(getattr(model, name, False) for name in names)
    return True


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
    inputs = {k: v.to(dtype) if is_floating(v) else v for k, v in of.inputs().items() if k not in left}
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
def check_export(of: Architecture, folder, adapt=multilora) -> str:
    """The export loads into plain PEFT and answers the same. Where PEFT takes linear layers for experts, the whole may
    be refused; attention alone, and shared experts alone, are not."""
    model = adapt(of).eval()
    try:
        export_lora(model, folder / "whole")
        kept = "yes"
    except ValueError:
        if not of.more:
            raise
        kept = "in parts"
    if kept == "yes":
        assert_loads_as_lora(of, model, folder / "whole")
    for part, expression in PARTS.items() if of.more else ():
        if any(re.fullmatch(expression, name) for name, _ in of.build().named_modules()):
            model = adapt(of, targets=expression).eval()
            export_lora(model, folder / part)
            assert_loads_as_lora(of, model, folder / part)
    return kept


PARTS = {
    "attention": r".*(self|linear)_attn\.\w+_proj\w*",
    "shared experts": r".*\.shared_experts?\.\w+_proj",
}


def assert_loads_as_lora(of: Architecture, model, folder) -> None:
    plain = PeftModel.from_pretrained(of.build().double(), folder).eval()
    assert_close(ran(of, plain), ran(of, model))


CHECKS = {name.removeprefix("check_"): check for name, check in list(globals().items()) if name.startswith("check_")}
