"""Adapters as files."""

import json
import re

import pytest
import torch
from bad_files import cut, edit_config, edit_tensors, without
from safetensors.torch import load_file
from torch import nn

from multilora_fast import FusedMultiLoRALinear, MultiLoRALinear, fuse
from multilora_fast.adapters import load_adapter, save_adapter
from multilora_fast.adapters.files import CONFIG, WEIGHTS


def base():
    torch.manual_seed(0)
    return nn.ModuleDict({"attention": nn.ModuleDict({"q": nn.Linear(8, 6), "k": nn.Linear(8, 6)})})


def adapted(scaling="vector", other=None):
    """``other``: options of the second layer alone."""
    model = base()
    for name in ("q", "k"):
        options = {"r": 2, "lora_num": 3, "lora_alpha": 4, "lora_dropout": 0.1, "scaling": scaling}
        layer = MultiLoRALinear(model["attention"][name], **(options | (other or {} if name == "k" else {})))
        nn.init.normal_(layer.lora_scaling)
        model["attention"][name] = layer
    return model.eval()


@pytest.mark.parametrize(("scaling", "fused"), [("vector", True), ("scalar", False)])
def test_round_trip(fused, scaling, tmp_path):
    model = adapted(scaling)
    if fused:
        fuse(model)
    save_adapter(model, tmp_path / "adapter")
    assert set(load_file(tmp_path / "adapter" / WEIGHTS)) == {
        f"base_model.model.attention.{name}.multilora_branches.{key}"
        for name in ("q", "k")
        for key in ("lora_A", "lora_B", "lora_scaling")
    }
    assert sorted(p.name for p in (tmp_path / "adapter").iterdir()) == [CONFIG, WEIGHTS]
    again = base().eval()
    assert sorted(load_adapter(again, tmp_path / "adapter")) == ["attention.k", "attention.q"]
    x = torch.randn(5, 8)
    for name in ("q", "k"):
        layer = again["attention"][name]
        assert isinstance(layer, FusedMultiLoRALinear)
        assert layer.lora_dropout.p == 0.1
        assert not layer.training
        torch.testing.assert_close(layer(x), model["attention"][name](x))


@pytest.mark.parametrize("other", [{"r": 3}, {"lora_num": 2}, {"lora_alpha": 5}, {"r": 4, "lora_alpha": 4}])
def test_layers_of_different_shapes_round_trip(other, tmp_path):
    model = adapted(other=other)
    save_adapter(model, tmp_path)
    again = base().eval()
    load_adapter(again, tmp_path)
    x = torch.randn(5, 8)
    for name in ("q", "k"):
        layer, source = again["attention"][name], model["attention"][name]
        assert (layer.r, layer.lora_num, layer.scaling_factor) == (source.r, source.lora_num, source.scaling_factor)
        torch.testing.assert_close(layer(x), source(x))


def test_only_models_that_one_config_describes_are_saved(tmp_path):
    with pytest.raises(ValueError, match="no MultiLoRA layer"):
        save_adapter(base(), tmp_path)
    for other in ({"scaling": "scalar"}, {"lora_dropout": 0.2}):
        with pytest.raises(ValueError, match=r"attention\.k differs"):
            save_adapter(adapted(other=other), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_failed_save_leaves_the_good_file(tmp_path, monkeypatch):
    save_adapter(adapted(), tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def fail(tensors, path, metadata):
        with open(path, "w") as file:
            file.write("half")
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr("multilora_fast.adapters.files.save_file", fail)
        with pytest.raises(OSError, match="disk full"):
            save_adapter(adapted(), tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    save_adapter(adapted(other={"r": 3}), tmp_path)
    assert json.loads((tmp_path / CONFIG).read_text())["rank_pattern"]


Q = "base_model.model.attention.q.multilora_branches.lora_A"


def moved(to: str):
    """The tensors of q, under another module's name."""
    return edit_tensors(".", lambda t: t.update({k.replace(".q.", to): t.pop(k) for k in list(t) if ".q." in k}))


DAMAGE = {  # and what the message names
    "no config": (without(CONFIG), "adapter_config.json"),
    "no weights": (without(WEIGHTS), "adapter_model.safetensors"),
    "cut short": (cut(WEIGHTS), "is no readable"),
    "another method": (edit_config(".", peft_type="LORA"), CONFIG),
    "no r": (edit_config(".", r=None), "lacks r"),
    "other shapes": (edit_config(".", r=3), "holds lora_A of shape (3, 2, 8) for attention."),
    "half of it": (edit_tensors(".", lambda t: t.pop(Q)), "lora_A of attention.q"),
    "a foreign tensor": (edit_tensors(".", lambda t: t.update(other=torch.zeros(1))), "holds other"),
    "no such module": (moved(".o."), "attention.o"),
    "no linear module": (moved("."), "attention, which is a ModuleDict"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_bad_files_are_named_and_the_model_stays(case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_adapter(adapted(), ".")
    damage, named = DAMAGE[case]
    damage()
    model = base()
    with pytest.raises(ValueError, match=re.escape(named)):
        load_adapter(model, ".")
    assert all(type(m) in (nn.Linear, nn.ModuleDict) for m in model.modules())
