"""MultiLoRA on the experts of whole models: next to PEFT's LoRA on the same parameters, and to the bare model."""

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_moe import BOTH, FAMILIES, IDS, logits, moe

from multilora_fast import MultiLoraConfig
from multilora_fast.adapters.files import read_multilora
from multilora_fast.peft.experts import MultiLoraExperts, MultiLoraProjection


def adapted(family="qwen3_moe", **options):
    torch.manual_seed(1)
    options = {"r": 6, "lora_num": 2, "target_modules": [], "target_parameters": BOTH, "init_weights": False, **options}
    return get_peft_model(moe(family), MultiLoraConfig(**options)).eval()


def layers(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, MultiLoraProjection)}


@pytest.mark.parametrize("family", FAMILIES)
def test_one_branch_of_scale_one_is_lora_of_target_parameters(family):
    lora = get_peft_model(
        moe(family), LoraConfig(r=3, lora_alpha=3, target_modules=[], target_parameters=BOTH, init_lora_weights=False)
    )
    ours = adapted(family, lora_num=1)
    pairs = []
    for name, layer in layers(ours).items():
        experts, _, which = name.rpartition(".")
        theirs = lora.get_submodule(experts if which == "down_proj" else f"{experts}.base_layer")
        A, B = theirs.lora_A["default"].weight, theirs.lora_B["default"].weight
        branches, E = layer.multilora_branches["default"], layer.num_experts

        def by_expert(A, B, E=E):
            return A.view(E, 3, -1)[:, None], B.view(len(B), 3, E).permute(2, 0, 1)[:, None]

        with torch.no_grad():
            for own, value in zip((branches.lora_A, branches.lora_B), by_expert(A, B), strict=True):
                own.copy_(value)
            branches.lora_scaling.fill_(1)
        torch.testing.assert_close(layer.get_delta_weight("default"), theirs.get_delta_weight("default"))
        pairs.append((branches, A, B, by_expert))
    outputs = [model.train()(input_ids=IDS, labels=IDS) for model in (ours, lora)]
    assert (outputs[0].logits - outputs[1].logits).abs().max() <= 5e-6
    for output in outputs:
        output.loss.backward()
    for branches, A, B, by_expert in pairs:
        for own, wanted in zip((branches.lora_A, branches.lora_B), by_expert(A.grad, B.grad), strict=True):
            assert (own.grad - wanted).abs().max() <= 5e-6 * wanted.abs().max()


def test_no_tokens_are_an_empty_output_and_no_gradient():
    experts = next(m for m in adapted().train().modules() if isinstance(m, MultiLoraExperts))
    width = experts.base_layer.config.hidden_size
    x, index = torch.zeros(0, width, requires_grad=True), torch.zeros(0, 2, dtype=torch.int64)
    y = experts(x, index, torch.zeros(0, 2))
    y.sum().backward()
    assert y.shape == x.grad.shape == (0, width)
    branches = layers(experts)["gate_up_proj"].multilora_branches["default"]
    assert not any(p.grad.any() for p in branches.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_zero_scales_keep_the_bits_of_the_grouped_product(family):
    assert torch.equal(logits(adapted(family, init_weights=True)), logits(moe(family)))


@pytest.mark.parametrize("family", FAMILIES)
def test_save_load_merge_disable_unload(family, tmp_path):
    model, bare = adapted(family), logits(moe(family))
    want = logits(model)
    assert (want - bare).abs().max() > 0.01
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(moe(family), tmp_path).eval()
    assert torch.equal(logits(loaded), want)
    branches = read_multilora(tmp_path).modules["model.layers.1.mlp.experts.down_proj"]
    assert branches.experts == model.get_submodule("base_model.model.model.layers.1.mlp.experts.base_layer").num_experts
    assert branches.r == 3  # 6 over two experts per token
    with model.disable_adapter():
        assert torch.equal(logits(model), bare)
    model.merge_adapter(safe_merge=True)
    torch.testing.assert_close(logits(model), want, rtol=0, atol=1e-5)
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model), want, rtol=0, atol=1e-5)
    merged = loaded.merge_and_unload()
    torch.testing.assert_close(logits(merged), want, rtol=0, atol=1e-5)
    assert not any(isinstance(module, (MultiLoraExperts, MultiLoraProjection)) for module in merged.modules())


def test_several_adapters_add_up_and_can_be_summed():
    model = adapted()
    first = logits(model)
    torch.manual_seed(2)
    model.add_adapter(
        "second", MultiLoraConfig(r=4, lora_num=1, target_modules=[], target_parameters=BOTH[:1], init_weights=False)
    )
    assert torch.equal(logits(model), first)
    model.set_adapter("second")
    second = logits(model)
    assert (second - first).abs().max() > 0.01
    model.base_model.set_adapter(["default", "second"])
    both = logits(model)
    model.base_model.add_weighted_adapter(["default", "second"], [1.0, 1.0], "sum")
    model.set_adapter("sum")
    torch.testing.assert_close(logits(model), both, rtol=0, atol=1e-5)
    model.delete_adapter("second")
    model.set_adapter("default")
    assert torch.equal(logits(model), first)


def test_the_rank_of_experts():
    model = adapted(r=9, lora_alpha=18)
    ranks = {layer.multilora_branches["default"].lora_A.shape[-2] for layer in layers(model).values()}
    assert ranks == {4}
    assert {layer.multilora_branches["default"].scaling_factor for layer in layers(model).values()} == {2.0}
    one = adapted(rank_pattern={"experts.down_proj": 5})
    assert {n.rpartition(".")[2]: x.multilora_branches["default"].lora_A.shape[-2] for n, x in layers(one).items()} == {
        "gate_up_proj": 3,
        "down_proj": 5,
    }


def test_dropout_is_drawn_anew_and_repeats_with_the_seed():
    model = adapted(lora_dropout=0.5).train()
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        model.zero_grad()
        model(input_ids=IDS, labels=IDS).loss.backward()
        runs.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert all(map(torch.equal, runs[0], runs[1]))
    assert not all(map(torch.equal, runs[0], runs[2]))


def test_checkpointing_gives_the_same_gradients():
    grads = []
    for checkpointing in (False, True):
        model = adapted(lora_dropout=0.5).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
        torch.manual_seed(5)
        model(input_ids=IDS, labels=IDS).loss.backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad)


def test_an_idle_expert_gets_zero_gradients():
    model = adapted().train()
    experts = next(module for module in model.modules() if isinstance(module, MultiLoraExperts))
    x = torch.randn(5, 32)
    experts(x, torch.tensor([[0, 2]] * 5), torch.rand(5, 2)).sum().backward()
    grad = experts.gate_up_proj.multilora_branches["default"].lora_A.grad
    assert grad[[0, 2]].abs().amin(0).max() > 0
    assert not grad[[1, 3, 4]].any()


def test_linear_layers_beside_and_target_parameters_of_their_weights():
    model = adapted(target_modules=["q_proj"], target_parameters=[*BOTH, "v_proj.weight"])
    named = {name.rpartition(".")[2] for name, module in model.named_modules() if hasattr(module, "multilora_branches")}
    assert named == {"q_proj", "v_proj", "gate_up_proj", "down_proj"}


def test_experts_that_accelerate_places_run_and_those_it_offloads_are_refused():
    model = adapted()
    want = logits(model)
    for experts in (module for module in model.modules() if isinstance(module, MultiLoraExperts)):
        add_hook_to_module(experts.base_layer, AlignDevicesHook("cpu"))
    assert torch.equal(logits(model), want)
    add_hook_to_module(experts.base_layer, AlignDevicesHook("cpu", offload=True, weights_map={}))
    refused(lambda: logits(model), "hooks or a forward of their own")


def refused(make, match):
    with pytest.raises(ValueError, match=match):
        make()


def test_refusals():
    refused(lambda: adapted(target_parameters=["mlp.gate.weight"]), "target_parameters names .*gate.weight")
    refused(lambda: adapted(target_parameters=["experts.nothing"]), "target")
    refused(lambda: adapted(target_parameters="experts.down_proj"), "target_parameters must be a list")
    refused(lambda: adapted(save_inputs="fp8"), "save_inputs='fp8' does not work on experts")
    parallel = moe()
    parallel.model.layers[0].mlp.experts._is_expert_parallel = True
    config = MultiLoraConfig(target_modules=[], target_parameters=BOTH)
    refused(lambda: get_peft_model(parallel, config), "expert or tensor parallelism")
    model = adapted()
    refused(lambda: model(input_ids=IDS, adapter_names=["default"] * 2), "adapter_names cannot be used with")
    experts = next(module for module in model.modules() if isinstance(module, MultiLoraExperts))
    experts.base_layer.register_forward_pre_hook(lambda *_: None)
    refused(lambda: logits(model), "hooks or a forward of their own")
