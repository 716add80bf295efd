"""Several MULTILORA adapters on one model, and merging them into its weights."""

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model
from tiny import IDS, assert_differ, assert_same_logits, branches, config, gpt2, layers, llama, logits, two_adapters


def test_several_adapters_switch_add_up_and_go(tmp_path):
    model = two_adapters()
    base, first = logits(llama()), logits(model)
    model.set_adapter("other")
    second = logits(model)
    assert_differ(first, second)
    assert all(p.requires_grad == (".other." in n) for n, p in model.named_parameters())
    model.base_model.set_adapter(["default", "other"])
    both = logits(model)
    assert_differ(both, first)
    model.base_model.set_adapter(["other", "default"])
    assert_same_logits(logits(model), both, 1e-5)
    with model.disable_adapter():
        assert torch.equal(logits(model), base)
    assert_same_logits(logits(model), both, 1e-5)
    merged = copy.deepcopy(model)
    merged.merge_adapter(["default", "other"])
    assert_same_logits(logits(merged), both, 1e-4)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(llama(), tmp_path / "other", adapter_name="other")
    assert torch.equal(logits(again), second)
    again.load_adapter(tmp_path, "default")
    again.set_adapter("default")
    assert torch.equal(logits(again), first)
    model.set_adapter("default")
    model.delete_adapter("other")
    assert torch.equal(logits(model), first)
    model.base_model.delete_adapter("default")
    assert torch.equal(logits(model.base_model), base)


def test_mixed_batches():
    model = two_adapters()
    names = ["other", "__base__"]
    mixed = logits(model, adapter_names=names)
    assert_same_logits(mixed[1], logits(llama())[1], 1e-5)
    model.set_adapter("other")
    assert_same_logits(mixed[0], logits(model)[0], 1e-5)
    generated = model.generate(input_ids=IDS, adapter_names=names, num_beams=2, max_new_tokens=3, pad_token_id=0)
    assert generated.shape == (2, 15)
    for wrong, message in ((["other"], "one name per input"), (["other", "ghost"], "do not exist: ghost")):
        with pytest.raises(ValueError, match=message):
            logits(model, adapter_names=wrong)
    with pytest.raises(ValueError, match="training mode"):
        model.train()(IDS, adapter_names=names)
    model.eval()
    model.merge_adapter()
    with pytest.raises(ValueError, match="merged"):
        logits(model, adapter_names=names)


@pytest.mark.parametrize("scaling", ["vector", "scalar"])
def test_weighted_adapters_are_the_exact_sum(scaling, tmp_path):
    model = two_adapters(scaling=scaling)
    model.base_model.add_weighted_adapter(["default", "other"], [0.5, -2.0], "sum")
    assert not any(p.requires_grad for n, p in model.named_parameters() if ".sum." in n)
    model.set_adapter("sum")
    added = logits(model)
    delta = {name: layer.get_delta_weight("sum") for name, layer in layers(model).items()}
    for name, layer in layers(model).items():
        parts = [(0.5, "default"), (-2.0, "other")]
        wanted = sum(w * layer.get_delta_weight(a) for w, a in parts if a in layer.multilora_branches)
        torch.testing.assert_close(delta[name], wanted)
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    assert torch.equal(logits(PeftModel.from_pretrained(llama(), tmp_path / "sum")), added)


def test_weighted_adapter_errors():
    model = two_adapters()
    add = model.base_model.add_weighted_adapter
    for arguments, message in [
        ((["ghost"], [1.0], "sum"), "adapters must"),
        ((["other"], [1.0, 2.0], "sum"), "weights must"),
        ((["other"], [1.0], "default"), "adapter_name must"),
        ((["other"], [1.0], "sum", "svd"), "combination_type must"),
    ]:
        with pytest.raises(ValueError, match=message):
            add(*arguments)


# Merging


@pytest.mark.parametrize(("make", "safe_merge"), [(llama, False), (gpt2, True)])
def test_merge_and_unmerge(make, safe_merge):
    model = get_peft_model(make(), config(target_modules="all-linear"))
    expected = logits(model)
    before = {name: layer.get_base_layer().weight.clone() for name, layer in layers(model).items()}
    model.merge_adapter(safe_merge=safe_merge)
    assert_same_logits(logits(model), expected, 1e-4)
    model.unmerge_adapter()
    for name, layer in layers(model).items():
        error = (layer.get_base_layer().weight - before[name]).abs().max() / before[name].abs().max()
        assert error <= 1e-6, name
    assert_same_logits(logits(model), expected, 1e-5)
    merged = model.merge_and_unload(safe_merge=safe_merge)
    assert not layers(merged)
    assert_same_logits(logits(merged), expected, 1e-4)


def test_disabling_a_merged_adapter_unmerges_it():
    model = get_peft_model(llama(), config())
    model.merge_adapter()
    with model.disable_adapter():
        assert_same_logits(logits(model), logits(llama()), 1e-5)


def test_unload_gives_the_base_back():
    model = get_peft_model(llama(), config())
    assert torch.equal(logits(model.unload()), logits(llama()))


def test_a_safe_merge_refuses_what_is_not_finite():
    model = get_peft_model(llama(), config())
    with torch.no_grad():
        branches(model)[0].lora_B[0, 0, 0] = float("nan")
    weight = next(iter(layers(model).values())).get_base_layer().weight
    before = weight.clone()
    with pytest.raises(ValueError, match="NaNs detected in the merged weights"):
        model.merge_and_unload(safe_merge=True)
    assert torch.equal(weight, before)


def test_scale_layer():
    model = get_peft_model(llama(), config())
    once = next(iter(layers(model).values())).get_delta_weight("default")
    layer = next(iter(layers(model).values()))
    layer.scale_layer(3.0)
    torch.testing.assert_close(layer.get_delta_weight("default"), 3 * once)
    layer.unscale_layer(1.5)
    torch.testing.assert_close(layer.get_delta_weight("default"), 2 * once)
    layer.unscale_layer()
    assert torch.equal(layer.get_delta_weight("default"), once)
    layer.set_scale("default", 0.5)
    torch.testing.assert_close(layer.get_delta_weight("default"), 0.5 * once)
