"""Existing LoRA adapters as the branches of one MultiLoRA adapter."""

import re
import shutil
from pathlib import Path

import pytest
import torch
import typer
from bad_files import cut, edit_config, edit_tensors
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import ATTENTION, IDS, assert_differ, assert_same_logits, gpt2, llama, logits
from torch import nn
from typer.testing import CliRunner

from multilora_fast import from_loras
from multilora_fast.adapters import load_adapter
from multilora_fast.adapters.files import WEIGHTS
from multilora_fast.cli.adapters import merge

KINDS = {
    "plain": {"r": 4, "lora_alpha": 6, "target_modules": ATTENTION},
    "rslora": {"r": 2, "lora_alpha": 3, "target_modules": ["q_proj", "up_proj"], "use_rslora": True},
    "patterns": {
        "r": 3,
        "lora_alpha": 5,
        "target_modules": ["k_proj", "q_proj"],
        "rank_pattern": {"layers.0.self_attn.q_proj": 6},
        "alpha_pattern": {"k_proj": 1},
    },
}


def lora(path, options, make=llama, seed=0):
    """A saved LoRA adapter with a random B."""
    model = get_peft_model(make(), LoraConfig(**options))
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("loras")
    return [lora(folder / name, options, seed=i) for i, (name, options) in enumerate(KINDS.items())]


@pytest.fixture
def loras(saved, tmp_path):
    return [Path(shutil.copytree(path, tmp_path / path.name)) for path in saved]


def weighted(directories, weights, make=llama):
    """The base with the weighted sum of the LoRAs' updates in its weights."""
    model = make()
    with torch.no_grad():
        for directory, weight in zip(directories, weights, strict=True):
            adapted = PeftModel.from_pretrained(make(), directory)
            for name, layer in adapted.base_model.model.named_modules():
                if hasattr(layer, "get_delta_weight"):
                    model.get_submodule(name).weight += weight * layer.get_delta_weight("default")
    return model


@pytest.mark.parametrize(("weights", "scaling"), [(None, "vector"), ([0.5, -1.0, 2.0], "scalar")])
def test_it_is_the_weighted_sum(weights, scaling, loras, tmp_path):
    out = from_loras(loras, tmp_path / "out", weights=weights, scaling=scaling)
    model = PeftModel.from_pretrained(llama(), out)
    expected = logits(weighted(loras, weights or [1.0] * 3))
    assert_differ(expected, logits(llama()))
    assert_same_logits(logits(model), expected, 1e-5)
    plain = llama()
    load_adapter(plain, out)
    assert torch.equal(logits(plain), logits(model))


@pytest.mark.parametrize("kind", KINDS)
def test_one_alone_is_the_lora(kind, loras, tmp_path):
    directory = loras[list(KINDS).index(kind)]
    out = from_loras([directory], tmp_path / "out")
    expected = logits(PeftModel.from_pretrained(llama(), directory))
    assert_same_logits(logits(PeftModel.from_pretrained(llama(), out)), expected, 2e-6)


def test_conv1d(tmp_path):
    options = {"r": 4, "target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}
    directories = [lora(tmp_path / str(i), options, gpt2, seed=i) for i in range(2)]
    out = from_loras(directories, tmp_path / "out", weights=[1, 3])
    expected = logits(weighted(directories, [1, 3], gpt2))
    assert_same_logits(logits(PeftModel.from_pretrained(gpt2(), out)), expected, 1e-5)


def test_branches_stay_in_place_and_everything_can_learn(loras, tmp_path):
    out = from_loras(loras, tmp_path / "out", weights=[1.0, 2.0, 3.0])
    model = PeftModel.from_pretrained(llama(), out, is_trainable=True)
    model(IDS, labels=IDS).loss.backward()
    modules = {n: m.multilora_branches["default"] for n, m in model.named_modules() if hasattr(m, "multilora_branches")}
    for name, module in modules.items():
        assert module.lora_A.shape[0] == 3
        scales = module.lora_scaling.detach()
        adapted = [any(name.endswith(target) for target in options["target_modules"]) for options in KINDS.values()]
        for i, there in enumerate(adapted):
            assert (scales[i] == (i + 1.0 if there else 0.0)).all()
            assert module.lora_scaling.grad[i].any()
            if there:  # each rank of a padded branch has a gradient, through A or through B
                moved = module.lora_A.grad[i].any(1) | module.lora_B.grad[i].any(0)
                assert moved.all()


def test_the_same_seed_gives_the_same_file(loras, tmp_path):
    files = [(from_loras(loras, tmp_path / str(i), seed=i // 2) / WEIGHTS).read_bytes() for i in range(3)]
    assert files[0] == files[1] != files[2]


def test_only_on_request_is_an_adapter_overwritten(loras, tmp_path):
    out = from_loras(loras, tmp_path / "out")
    before = (out / WEIGHTS).read_bytes()
    with pytest.raises(ValueError, match="overwrite=True"):
        from_loras(loras, out, weights=[0.5] * 3)
    assert (out / WEIGHTS).read_bytes() == before
    from_loras(loras, out, weights=[0.5] * 3, overwrite=True)
    expected = logits(weighted(loras, [0.5] * 3))
    assert_same_logits(logits(PeftModel.from_pretrained(llama(), out)), expected, 1e-5)
    with pytest.raises(ValueError, match="holds one of the LoRA adapters"):
        from_loras(loras, loras[0], overwrite=True)


Q = "base_model.model.model.layers.0.self_attn.q_proj."
REFUSED = {  # what the message names
    **{
        f"{field}={value!r}": edit_config("plain", **{field: value})
        for field, value in {
            "use_dora": True, "use_qalora": True, "use_bdlora": True, "lora_bias": True, "bias": "lora_only",
            "modules_to_save": ["lm_head"], "target_parameters": ["experts.up"], "trainable_token_indices": [1],
            "layer_replication": [1], "alora_invocation_tokens": [1], "arrow_config": [1], "velora_config": [1],
            "monteclora_config": [1], "kasa_config": [1], "megatron_config": [1],
        }.items()
    },
    **{
        f"init_lora_weights={init!r}": edit_config("plain", init_lora_weights=init)
        for init in ("pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga", "mica")
    },
    "IA3": edit_config("plain", peft_type="IA3"),
    "lora_embedding_A": edit_tensors("plain", lambda t: t.update({Q + "lora_embedding_A": t.pop(Q + "lora_A.weight")})),
    "lora_A of": edit_tensors("plain", lambda t: t.pop(Q + "lora_B.weight")),
    "r=7": edit_config("plain", r=7),
    "plain is no readable": cut(f"plain/{WEIGHTS}"),
    "q_proj maps 9 to 32 features in plain, but 32 to 32 in rslora": edit_tensors(
        "plain", lambda t: t.update({Q + "lora_A.weight": torch.zeros(4, 9)})
    ),
    "no LoRA of a linear layer": edit_tensors(
        "plain", lambda t: t.update({f"{Q}lora_A.weight": torch.zeros(4, 32, 1, 1)})
    ),
}  # fmt: skip


@pytest.mark.parametrize("named", REFUSED)
def test_refusals_write_nothing(named, loras, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    REFUSED[named]()
    with pytest.raises(ValueError, match=re.escape(named)):
        from_loras(list(KINDS), "out")
    assert not Path("out").exists()


def test_loras_of_different_bases_are_merged_with_a_warning(loras, tmp_path):
    edit_config(loras[0], base_model_name_or_path="one")()
    edit_config(loras[1], base_model_name_or_path="two")()
    with pytest.warns(UserWarning, match="different base models: one, two"):
        from_loras(loras, tmp_path / "out")


def test_the_command(loras, tmp_path):
    app = typer.Typer()
    app.command()(merge)
    arguments = [*map(str, loras), "--weights", "1,-0.5,2", "--output", str(tmp_path / "out")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "3 LoRA adapters as the branches" in result.output
    result = CliRunner().invoke(app, [str(loras[0]), "--output", str(tmp_path / "one")])
    assert "1 LoRA adapter as the branch" in result.output
    expected = logits(weighted(loras, [1, -0.5, 2]))
    assert_same_logits(logits(PeftModel.from_pretrained(llama(), tmp_path / "out")), expected, 1e-5)
    result = CliRunner().invoke(app, [*arguments, "--overwrite"])
    assert result.exit_code == 0, result.output
