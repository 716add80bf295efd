"""What the planner says to mistakes, sizes of memory as people write them, and the command."""

import json

import pytest
import torch
from tiny import gpt2
from transformers import LlamaConfig, T5Config
from typer.testing import CliRunner

from multilora_fast import cli, plan_memory
from multilora_fast.cli.plan import plan as command
from multilora_fast.memory.report import parse_memory
from multilora_fast.memory.step import explained

SMALL = {"batch": 2, "seq_len": 16, "r": 4}


def config() -> LlamaConfig:
    return LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_attention_heads=2, num_hidden_layers=1)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"batch": 0}, "batch must be"),
        ({"seq_len": 1.5}, "seq_len must be"),
        ({"r": 0}, "r must be"),
        ({"gradient_accumulation": 0}, "gradient_accumulation must be"),
        ({"fsdp": 0}, "fsdp must be"),
        ({"lora_dropout": 1.0}, "lora_dropout must be"),
        ({"quantization": "3bit"}, 'quantization must be None, "4bit" or "8bit", not'),
        ({"optimizer": "lion"}, "optimizer must be"),
        ({"device": "tpu"}, "device must be"),
        ({"dtype": "int8"}, "dtype must be"),
        ({"adapter_dtype": torch.int8}, "adapter_dtype must be"),
        ({"headroom": 1}, "headroom must be"),
        ({"scaling": "matrix"}, "scaling must be"),
        ({"nonsense": 1}, "nonsense is no field of MultiLoraConfig"),
        ({"target_modules": ["nowhere"]}, "nowhere"),
        ({"model_or_config": 3}, "model_or_config must be"),
        ({"model_or_config": T5Config()}, "model_or_config must be"),
        ({"model_or_config": "./nowhere"}, "model ./nowhere"),
        ({"model_or_config": "nowhere/"}, "model nowhere/"),
        ({"model_or_config": __file__}, f"model {__file__}"),
        *(({"device_memory": memory}, "device_memory must be a size")
          for memory in ("", "24", "0GiB", "24 apples", "H100", -1, True, 1.5)),
    ],
)  # fmt: skip
def test_mistakes(wrong, says):
    with pytest.raises(ValueError) as error:
        plan_memory(**{"model_or_config": config(), **SMALL, **wrong})
    assert says in str(error.value)


def test_sizes_of_memory():
    assert parse_memory("24GiB") == parse_memory(" 24 gib ") == parse_memory("24576MiB") == parse_memory(24 * 2**30)
    assert parse_memory("80GB") == 80 * 10**9
    assert parse_memory(24) == 24


@pytest.mark.parametrize("wrong", [{"num_attention_heads": 0}, {"hidden_act": "nothing"}])
def test_configs_that_contradict_themselves_name_the_model(wrong):
    contradicted = config()
    for name, value in wrong.items():
        setattr(contradicted, name, value)
    with pytest.raises(ValueError, match="model_or_config is a LlamaConfig, of which no model can be built: "):
        plan_memory(contradicted, **SMALL)


def test_our_own_mistakes_are_not_explained_away():
    with pytest.raises(AssertionError), explained(config(), "of"):
        raise AssertionError


def test_the_command(tmp_path):
    gpt2().config.save_pretrained(tmp_path)
    words = [
        "plan",
        tmp_path,
        "--batch",
        2,
        "--seq-len",
        16,
        "--gpu-memory",
        "1MiB",
        "--exclude-modules",
        "c_fc, c_proj",
    ]
    words += ["--exclude-modules", "c_fc, c_proj", "--plot", tmp_path / "p.png", "--output", tmp_path / "p.json"]
    done = CliRunner().invoke(cli.app, [str(word) for word in words], catch_exceptions=False)
    assert done.exit_code == 0
    assert "largest batch in" in done.stdout
    assert (tmp_path / "p.png").is_file()
    asked = json.loads((tmp_path / "p.json").read_text())["asked"]
    assert asked["device_memory"] == 2**20
    assert asked["options"]["exclude_modules"] == ["c_fc", "c_proj"]


def test_a_plot_needs_matplotlib_before_anything_is_counted(monkeypatch):
    monkeypatch.setattr("multilora_fast.files.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="--plot needs matplotlib"):
        command("./nowhere", plot="a.png")
