"""Exports: the LoRA that servers load computes what the MultiLoRA adapter does."""

import json
import os
import re
from pathlib import Path

import pytest
import torch
from bad_files import edit_config, edit_tensors
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tiny import assert_differ, assert_same_logits, config, gpt2, llama, logits
from torch import nn

from multilora_fast import MultiLoRALinear, export_lora, fuse
from multilora_fast.adapters.files import CONFIG, WEIGHTS

MIXED = {"rank_pattern": {"q_proj|c_attn": 6}, "lora_num_pattern": {"v_proj|c_fc": 1}, "alpha_pattern": {"k_proj": 9}}


@pytest.mark.parametrize(("make", "scaling"), [(llama, "vector"), (gpt2, "scalar")])
def test_from_a_directory_and_from_a_model(make, scaling, tmp_path):
    model = get_peft_model(make(), config(target_modules="all-linear", scaling=scaling, **MIXED))
    expected = logits(model)
    assert_differ(expected, logits(make()))
    model.save_pretrained(tmp_path / "source")
    report = export_lora(tmp_path / "source", tmp_path / "a")
    assert (report.rank, report.max_lora_rank) == (18, 32)
    assert export_lora(model, tmp_path / "b") == report
    files = [load_file(tmp_path / name / WEIGHTS) for name in "ab"]
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(files[0][key], files[1][key]) for key in files[0])
    for name in "ab":
        lora = PeftModel.from_pretrained(make(), tmp_path / name)
        assert_same_logits(logits(lora), expected)


def test_what_servers_ask_of_the_files(tmp_path):
    model = get_peft_model(llama(), config(**MIXED, target_modules=["q_proj", "k_proj"]))
    model.save_pretrained(tmp_path / "source")
    report = export_lora(tmp_path / "source", tmp_path / "out")
    assert "--max-lora-rank 32" in str(report)
    written = json.loads((tmp_path / "out" / CONFIG).read_text())
    assert (written["peft_type"], written["r"], written["lora_alpha"], written["bias"]) == ("LORA", 18, 18, "none")
    assert written["rank_pattern"] == written["alpha_pattern"] == {}
    assert written["modules_to_save"] is None
    assert not written["use_dora"]
    assert not written["use_rslora"]
    tensors = load_file(tmp_path / "out" / WEIGHTS)
    start = "base_model.model.model.layers.0.self_attn.q_proj."
    assert tensors[start + "lora_A.weight"].shape == (18, 32)
    assert tensors[start + "lora_B.weight"].shape == (32, 18)
    assert {key.rpartition("proj.")[2] for key in tensors} == {"lora_A.weight", "lora_B.weight"}
    assert LoraConfig.from_pretrained(tmp_path / "out").r == 18


@pytest.mark.parametrize(("r", "n", "rank"), [(1, 1, 1), (3, 3, 16), (32, 8, 256), (32, 9, 320), (64, 9, None)])
def test_the_rank_that_vllm_will_need(r, n, rank, tmp_path):
    model = nn.ModuleDict({"lin": MultiLoRALinear(nn.Linear(4, 4), r=r, lora_num=n)})
    report = export_lora(model, tmp_path)
    assert (report.rank, report.max_lora_rank) == (r * n, rank)
    if rank is None:
        assert "vLLM cannot serve it" in str(report)


@pytest.mark.parametrize("fused", [False, True])
def test_from_layers_without_peft(fused, tmp_path):
    model = llama()
    for layer in model.model.layers:
        layer.self_attn.q_proj = MultiLoRALinear(layer.self_attn.q_proj, r=3, lora_num=2, lora_alpha=5)
        nn.init.normal_(layer.self_attn.q_proj.lora_scaling)
    if fused:
        fuse(model)
    expected = logits(model)
    export_lora(model, tmp_path)
    assert_same_logits(logits(PeftModel.from_pretrained(llama(), tmp_path)), expected)


def test_one_of_several_adapters(tmp_path):
    model = get_peft_model(llama(), config())
    model.add_adapter("other", config(r=2))
    model.set_adapter("other")
    expected = logits(model)
    export_lora(model, tmp_path / "active")
    model.set_adapter("default")
    export_lora(model, tmp_path / "named", adapter_name="other")
    for name in ("active", "named"):
        assert_same_logits(logits(PeftModel.from_pretrained(llama(), tmp_path / name)), expected)
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match="default, other: pass adapter_name"):
        export_lora(model, tmp_path / "none")
    with pytest.raises(ValueError, match="'ghost'"):
        export_lora(model, tmp_path / "none", adapter_name="ghost")
    assert not (tmp_path / "none").exists()


def test_from_a_model_that_transformers_loaded(tmp_path):
    get_peft_model(llama(), config()).save_pretrained(tmp_path / "source")
    model = llama()
    model.load_adapter(str(tmp_path / "source"))
    export_lora(model, tmp_path / "out")
    assert_same_logits(logits(PeftModel.from_pretrained(llama(), tmp_path / "out")), logits(model))


# Errors


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


Q_BIAS = "base_model.model.model.layers.0.self_attn.q_proj.bias"
REFUSED = {
    "modules_to_save": edit_config("source", modules_to_save=["lm_head"]),
    "bias='all'": edit_config("source", bias="all"),
    "q_proj.bias": edit_tensors("source", lambda tensors: tensors.update({Q_BIAS: torch.zeros(2)})),
    "lora_A of shape (3, 4, 32)": edit_config("source", lora_num=2),
    "source": lambda: Path("source", CONFIG).unlink(),
}


@pytest.mark.parametrize("named", REFUSED)
def test_refusals_leave_the_destination_alone(named, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    get_peft_model(llama(), config(target_modules=["q_proj"])).save_pretrained("source")
    export_lora("source", "out")
    before = contents(Path("out"))
    REFUSED[named]()
    for out in ("out", "new"):
        with pytest.raises(ValueError, match=re.escape(named)):
            export_lora("source", out, overwrite=True)
    assert contents(Path("out")) == before
    assert not Path("new").exists()


def test_models_that_cannot_be_exported(tmp_path):
    with pytest.raises(ValueError, match="holds no MultiLoRA adapter"):
        export_lora(llama(), tmp_path)
    with pytest.raises(ValueError, match="modules_to_save"):
        export_lora(get_peft_model(llama(), config(modules_to_save=["lm_head"])), tmp_path)
    model = get_peft_model(llama(), config())
    model.merge_adapter()
    with pytest.raises(ValueError, match="unmerge it first"):
        export_lora(model, tmp_path)
    assert not contents(tmp_path)


def test_only_on_request_is_a_directory_overwritten(tmp_path):
    model = get_peft_model(llama(), config())
    (tmp_path / ".unfinished-1").mkdir()  # of an export that was killed
    export_lora(model, tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    before = contents(tmp_path)
    with pytest.raises(ValueError, match="overwrite=True"):
        export_lora(get_peft_model(llama(), config(r=2)), tmp_path)
    assert contents(tmp_path) == before
    export_lora(get_peft_model(llama(), config(r=2)), tmp_path, overwrite=True)
    assert json.loads((tmp_path / CONFIG).read_text())["r"] == 6
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("nth", range(4))
@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_move_that_fails_leaves_both_files_as_they_were(nth, error, tmp_path, monkeypatch):
    """Two files are set aside and two take their places: whichever of these moves fails."""
    export_lora(get_peft_model(llama(), config()), tmp_path)
    before = contents(tmp_path)
    moves = []
    replace = os.replace

    def fail(source, target):
        moves.append(target)
        if len(moves) == nth + 1:
            raise error
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        with pytest.raises(error):
            export_lora(get_peft_model(llama(), config(r=2)), tmp_path, overwrite=True)
    assert len(moves) > nth
    assert contents(tmp_path) == before


def test_what_is_read_meanwhile_is_never_of_two_exports(tmp_path, monkeypatch):
    """At every moment that the config is there, it is there with the weights that it describes."""
    export_lora(get_peft_model(llama(), config()), tmp_path)
    seen = []
    replace = os.replace

    def look(source, target):
        replace(source, target)
        if (tmp_path / CONFIG).exists():
            r = json.loads((tmp_path / CONFIG).read_text())["r"]
            tensors = load_file(tmp_path / WEIGHTS)
            seen.append({tensor.shape[0] for key, tensor in tensors.items() if "lora_A" in key} == {r})

    monkeypatch.setattr(os, "replace", look)
    export_lora(get_peft_model(llama(), config(r=2)), tmp_path, overwrite=True)
    assert seen
    assert all(seen)
