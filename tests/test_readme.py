"""Every Python block of the README runs, in order, in one namespace."""

import re
from pathlib import Path

import pytest
import torch
from tiny import llama
from torch import nn

from multilora_fast import MultiLoRALinear

TEXT = (Path(__file__).parent.parent / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, re.S)


def test_blocks(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    peft, saved, fused, one_layer, plan = BLOCKS
    names = {"model": llama(), "base": llama()}
    exec(peft, names)
    exec(saved, names)
    ids = torch.arange(8)[None]
    assert torch.equal(names["model"](ids).logits, names["base"](ids).logits)
    names["model"] = nn.Sequential(MultiLoRALinear(nn.Linear(8, 8), r=2, lora_num=2))
    exec(fused, names)
    assert names["report"].swapped == ["0"]
    exec(one_layer, names)
    assert names["layer"].lora_scaling.grad is not None
    exec(plan, names)
    assert "largest batch in 24 GiB" in str(names["plan"])


@pytest.mark.parametrize("command", sorted(set(re.findall(r"multilora-fast (\w+)", TEXT))))
def test_commands_it_names_exist(command):
    from typer.testing import CliRunner

    from multilora_fast.cli import app

    assert CliRunner().invoke(app, [command, "--help"]).exit_code == 0
