"""``multilora-fast export``, which compares logits, and adapters in half precision."""

import pytest
import torch
import typer
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from tiny import config, layers, llama
from torch import nn
from transformers import LlamaForCausalLM, LlamaForSequenceClassification
from typer.testing import CliRunner

from multilora_fast import MultiLoRALinear, export_lora
from multilora_fast.adapters.branches import Branches, as_lora
from multilora_fast.adapters.files import WEIGHTS
from multilora_fast.cli.adapters import export


def run(*arguments):
    app = typer.Typer()
    app.command()(export)
    return CliRunner().invoke(app, [str(a) for a in arguments])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_adapter_in_half_precision(dtype, tmp_path, monkeypatch):
    """B is multiplied by the scales in float32, rounded once, and compared as it is stored."""
    llama().save_pretrained(tmp_path / "base")
    model = get_peft_model(llama(), config(target_modules="all-linear"))
    for name, parameter in model.named_parameters():
        if "multilora" in name:
            parameter.data = parameter.data.to(dtype)
    model.save_pretrained(tmp_path / "source")
    for source in (model, tmp_path / "source"):
        export_lora(source, tmp_path / "out", overwrite=True)
        tensors = load_file(tmp_path / "out" / WEIGHTS)
        assert {tensor.dtype for tensor in tensors.values()} == {dtype}
        for path, layer in layers(model).items():
            A, B, s, c = Branches.of(layer.multilora_branches["default"])
            exact = torch.cat([c * s_i[:, None].double() * B_i.double() for s_i, B_i in zip(s, B, strict=True)], 1)
            assert torch.equal(tensors[f"{path}.lora_A.weight"], A.flatten(0, 1))
            off = (tensors[f"{path}.lora_B.weight"] - exact).abs()
            assert (off <= exact.abs() * torch.finfo(dtype).eps * 0.501 + 2**-25).all()
    result = run(tmp_path / "source", tmp_path / "new", "--model", tmp_path / "base")
    assert result.exit_code == 0, result.output
    assert PeftModel.from_pretrained(llama(), tmp_path / "new")

    def wrong(*arguments, **options):  # by the rounding of a second step in half precision
        A, B = as_lora(*arguments, **options)
        return A, B * (1 + torch.finfo(dtype).eps)

    monkeypatch.setattr("multilora_fast.adapters.export.as_lora", wrong)
    result = run(tmp_path / "source", tmp_path / "new", "--model", tmp_path / "base", "--overwrite")
    assert "logits differ" in str(result.exception)


def test_half_precision_that_cannot_hold_b_is_left(tmp_path):
    model = nn.ModuleDict({"lin": MultiLoRALinear(nn.Linear(4, 4), r=2, lora_num=2).half()})
    nn.init.constant_(model["lin"].lora_scaling, 1e-5)
    export_lora(model, tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    exact = model["lin"].lora_B[0].double() * model["lin"].lora_scaling[0, :, None].double()
    torch.testing.assert_close(tensors["base_model.model.lin.lora_B.weight"][:, :2].double(), exact, rtol=1e-6, atol=0)


@pytest.mark.parametrize("task", ["CAUSAL_LM", "SEQ_CLS", "resized"])
def test_the_command_compares_what_the_adapter_is_for(task, tmp_path):
    llama().save_pretrained(tmp_path / "base")
    auto = LlamaForSequenceClassification if task == "SEQ_CLS" else LlamaForCausalLM
    base = auto.from_pretrained(tmp_path / "base", **({"num_labels": 3} if task == "SEQ_CLS" else {}))
    if task == "resized":
        base.resize_token_embeddings(70, mean_resizing=False)
    model = get_peft_model(base, config(**({"task_type": task} if task == "SEQ_CLS" else {})))
    model.save_pretrained(tmp_path / "source")
    result = run(tmp_path / "source", tmp_path / "out", "--model", tmp_path / "base")
    assert result.exit_code == 0, (result.output, result.exception)
    assert "logits differ by" in result.output
    assert "--max-lora-rank 16" in result.output


def test_the_command_writes_nothing_when_the_check_fails(tmp_path, monkeypatch):
    get_peft_model(llama(), config()).save_pretrained(tmp_path / "source")
    result = run(tmp_path / "source", tmp_path / "out", "--model", tmp_path / "nowhere")
    assert "--model" in str(result.exception)
    monkeypatch.setattr("multilora_fast.cli.adapters._compare", lambda *_: (0.1, 1.0))
    result = run(tmp_path / "source", tmp_path / "out", "--model", "any")
    assert "logits differ from the source's by 0.1" in str(result.exception)
    assert not (tmp_path / "out").exists()
