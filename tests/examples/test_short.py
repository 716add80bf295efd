"""The short examples, on a tiny model."""

import json
import subprocess
import sys

import pytest
from tiny import llama
from tiny_training import make_tokenizer

from examples import experts, finetune_peft, fuse_existing, serve_export


@pytest.fixture
def model(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    for part in (llama(), tokenizer):
        part.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def test_fine_tuned_with_the_trainer_and_served_as_a_lora(model, tmp_path):
    adapter, lora, data = (str(tmp_path / name) for name in ("adapter", "lora", "data.jsonl"))
    rows = [{"prompt": f"{a} + 1 is", "completion": f" {a + 1}."} for a in range(5)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert finetune_peft.main(model, data, adapter) > 0
    command = [sys.executable, serve_export.__file__, model, adapter, lora]  # nothing else has registered the method
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert float(found.split()[-1]) < 1e-5


def test_sft_with_trl(model, tmp_path):
    pytest.importorskip("trl")
    from examples import sft_trl

    assert sft_trl.main(model, str(tmp_path / "adapter")) > 0
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()


def test_fused(tmp_path):
    assert fuse_existing.main(str(tmp_path / "adapter")) == 0


def test_experts_beside_lora(tmp_path, capsys):
    try:
        losses = experts.main(str(tmp_path))
    except TypeError as error:  # its version and transformers' do not fit together
        pytest.skip(f"PEFT cannot load a LoRA on a MoE model: {error}")
    assert float(capsys.readouterr().out.split()[-1]) < 1e-5
    assert max(losses.values()) < 4.05  # log(64) is 4.16
