"""Every experts module that transformers can run by a grouped product, and next to LoRA in each architecture."""

import importlib
import inspect
import os
import re
import warnings
from pathlib import Path

import pytest
import torch
import transformers
from architectures import ARCHITECTURES
from huggingface_hub.errors import StrictDataclassError
from peft import LoraConfig, get_peft_model

from multilora_fast import MultiLoraConfig
from multilora_fast.peft.experts import MultiLoraProjection, is_experts, projections

ALL = os.environ.get("ARCHITECTURES") == "all"
MIXTURES = [of for of in ARCHITECTURES if of.family == "mixture of experts"]
MODELS = Path(transformers.__file__).parent / "models"
# Sizes that these classes' configs leave open.
OPEN = {"num_experts": 4, "moe_intermediate_size": 8, "top_k_experts": 2, "n_routed_experts": 4, "moe_num_experts": 4}


@pytest.mark.skipif(not ALL, reason="make architectures")
@pytest.mark.parametrize("of", MIXTURES, ids=lambda of: of.name)
def test_one_branch_of_scale_one_is_lora_of_target_parameters(of):
    found = {name: module for name, module in of.build().named_modules() if is_experts(module)}
    if not found:
        pytest.skip("its experts are no parameters of a grouped product")
    wanted = {"target_modules": [], "target_parameters": sorted({p for m in found.values() for p in projections(m)})}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lora = get_peft_model(of.build(), LoraConfig(r=2, lora_alpha=2, init_lora_weights=False, **wanted)).eval()
        ours = get_peft_model(of.build(), MultiLoraConfig(r=2, lora_num=1, rank_pattern={".*": 2}, **wanted)).eval()
        bare = of.build()
    layers = {n: m for n, m in ours.named_modules() if isinstance(m, MultiLoraProjection)}
    assert len(layers) == sum(len(projections(module)) for module in found.values())
    with torch.no_grad():
        zero = ours(**of.inputs())[0]
        torch.testing.assert_close(zero, bare(**of.inputs())[0], rtol=1e-5, atol=1e-5)
        for name, layer in layers.items():
            experts, _, which = name.rpartition(".")
            theirs = lora.get_submodule(experts)
            theirs = theirs if theirs.parameter_name == which else theirs.base_layer
            A, B = theirs.lora_A["default"].weight, theirs.lora_B["default"].weight
            E, branches = layer.num_experts, layer.multilora_branches["default"]
            branches.lora_A.copy_(A.view(E, 1, 2, -1))
            branches.lora_B.copy_(B.view(len(B), 2, E).permute(2, 0, 1)[:, None])
            branches.lora_scaling.fill_(1)
            torch.testing.assert_close(layer.get_delta_weight("default"), theirs.get_delta_weight("default"))
        got, want = ours(**of.inputs())[0], lora(**of.inputs())[0]
    assert (want - zero).abs().max() > 1e-3
    assert (got - want).abs().max() <= 1e-5 * want.abs().max()


def decorated():
    """(module, class) of each class of transformers under use_experts_implementation."""
    for path in sorted(MODELS.glob("*/modeling_*.py")):
        for name in re.findall(r"@use_experts_implementation(?:\([^)]*\))?\nclass (\w+)", path.read_text()):
            yield path, name


@pytest.mark.skipif(not ALL, reason="make architectures")
@pytest.mark.parametrize(("path", "name"), list(decorated()), ids=lambda one: getattr(one, "stem", one))
def test_every_decorated_class_is_recognised(path, name):
    package = f"transformers.models.{path.parent.name}"
    cls = getattr(importlib.import_module(f"{package}.{path.stem}"), name)
    tried = []
    for file in path.parent.glob("configuration_*.py"):
        configuration = importlib.import_module(f"{package}.{file.stem}")
        for _, config in inspect.getmembers(configuration, inspect.isclass):
            if issubclass(config, transformers.PreTrainedConfig) and config.__module__ == configuration.__name__:
                for options, size in (({}, ()), (OPEN, ()), ({}, (8,))):
                    try:
                        with torch.device("meta"):
                            experts = cls(config(**options), *size)
                    except (AttributeError, TypeError, ValueError, StrictDataclassError) as error:
                        tried.append(f"{config.__name__}: {error}")
                        continue
                    assert is_experts(experts)
                    assert projections(experts) == ["gate_up_proj" if experts.has_gate else "up_proj", "down_proj"]
                    return
    raise AssertionError(f"{name} can be built from no config: {tried}")
