"""What the planner says to mistakes, sizes of memory as people write them, and the command."""

import json
import subprocess
import sys

import pytest
import torch
from tiny import gpt2
from transformers import LlamaConfig, T5Config

from bench.causal_lms import config as sized
from multilora_fast import plan_memory
from multilora_fast.memory.report import parse_memory, shown_memory
from multilora_fast.memory.step import explained

CONFIG = "model_or_config must be"
SMALL = {"batch": 2, "seq_len": 16, "r": 4}


def config() -> LlamaConfig:
    return LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_attention_heads=2, num_hidden_layers=1)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"batch": 0}, "batch must be an integer of at least 1, not 0."),
        ({"seq_len": 1.5}, "seq_len must be an integer of at least 1, not 1.5."),
        ({"r": 0}, "r must be an integer of at least 1, not 0."),
        ({"lora_dropout": 1.0}, "lora_dropout must be a probability in [0, 1), not 1.0."),
        ({"quantization": "3bit"}, 'quantization must be None, "4bit" or "8bit", not \'3bit\'.'),
        ({"optimizer": "lion"}, 'optimizer must be "adamw", "adamw_8bit", "adafactor" or "sgd", not \'lion\'.'),
        ({"device": "tpu"}, 'device must be "cuda" or "cpu", not \'tpu\'.'),
        ({"dtype": "int8"}, 'dtype must be "float32", "bfloat16" or "float16", not \'int8\'.'),
        ({"adapter_dtype": torch.int8}, 'adapter_dtype must be "float32", "bfloat16" or "float16", not \'int8\'.'),
        ({"headroom": 1}, "headroom must be a share in [0, 1), not 1."),
        ({"scaling": "matrix"}, 'scaling must be "vector" or "scalar", not \'matrix\'.'),
        ({"nonsense": 1}, "nonsense is no field of MultiLoraConfig that training has."),
        ({"model_or_config": 3}, f"{CONFIG} a transformers config, a model, a directory or a hub id, not int."),
        ({"model_or_config": T5Config()}, f"{CONFIG} a causal LM's, which a T5Config is not."),
        ({"model_or_config": "./nowhere"}, "model ./nowhere: no such directory."),
        ({"model_or_config": "nowhere/"}, "model nowhere/: no such directory."),
        ({"model_or_config": __file__}, f"model {__file__} is a file; give a directory or a hub id."),
    ],
)  # fmt: skip
def test_mistakes(wrong, message):
    with pytest.raises(ValueError) as error:
        plan_memory(**{"model_or_config": config(), **SMALL, **wrong})
    assert str(error.value) == message


@pytest.mark.parametrize("memory", ["", "24", "0GiB", "24 apples", "H1000", -1, True, 1.5])
def test_memory_that_is_no_size(memory):
    with pytest.raises(ValueError, match="device_memory must be a size"):
        parse_memory(memory)


def test_sizes_and_names_of_memory():
    assert parse_memory("24GiB") == parse_memory(" 24 gib ") == parse_memory("24576MiB") == parse_memory(24 * 2**30)
    assert parse_memory("80GB") == 80 * 10**9
    assert parse_memory(24) == 24
    assert parse_memory("NVIDIA H100") == parse_memory("h100") > parse_memory("rtx4090")


def test_targets_that_match_nothing():
    with pytest.raises(ValueError, match="nowhere"):
        plan_memory(config(), target_modules=["nowhere"], **SMALL)


@pytest.mark.parametrize(
    ("asked", "shown"), [("24GiB", "24 GiB"), ("24GB", "22.35 GiB"), ("1536MiB", "1.5 GiB"), ("64KiB", "65,536 bytes")]
)
def test_memory_is_shown_as_it_is(asked, shown):
    assert shown_memory(parse_memory(asked)) == shown


def run(*arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "multilora_fast.cli", "plan", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_a_model_that_cannot_be_counted_is_one_line_without_a_traceback(tmp_path):
    sized("jetmoe").save_pretrained(tmp_path)
    done = run(tmp_path, "--batch", 2, "--seq-len", 16)
    assert (done.returncode, done.stdout) == (2, "")
    assert "model_or_config is a JetMoeConfig, whose step cannot be counted without its values" in done.stderr
    assert "Traceback" not in done.stderr


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
    files = ("--plot", tmp_path / "p.png", "--output", tmp_path / "p.json")
    done = run(tmp_path, "--batch", 2, "--seq-len", 16, "--gpu", "L4", "--exclude-modules", "c_fc, c_proj", *files)
    assert done.returncode == 0, done.stderr
    assert "largest batch in 22 GiB" in done.stdout
    assert (tmp_path / "p.png").is_file()
    asked = json.loads((tmp_path / "p.json").read_text())["asked"]
    assert asked["device_memory"] == 22 * 2**30
    assert asked["options"]["exclude_modules"] == ["c_fc", "c_proj"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["./nowhere"], "model ./nowhere: no such directory."),
        (["./nowhere", "--gpu", "H100", "--gpu-memory", "2GiB"], "--gpu and --gpu-memory both say"),
        (["./nowhere", "--plot", "no/such/place.png"], "--plot no/such/place.png: its directory does not exist."),
        (["./nowhere", "--plot", ""], "--plot is an empty text; give a path."),
        (["./nowhere", "--output", ""], "--output is an empty text; give a path."),
    ],
)
def test_mistakes_of_the_command_are_one_line(arguments, message):
    done = run(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
