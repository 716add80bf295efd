"""The command line: help, JSON output, tables, progress bars."""

import io
import json
import logging
import re
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from tiny import llama
from tiny_training import PROMPTS, make_tokenizer, write
from torch import nn
from typer.testing import CliRunner

from multilora_fast import FusedMultiLoRALinear, __version__, fuse
from multilora_fast.adapters import save_adapter
from multilora_fast.cli import app
from multilora_fast.console import progress
from multilora_fast.reference import MultiLoRALinear

COMMANDS = ["demo", "info", "plan", "train", "init", "export", "merge", "spectrum", "bench"]


def run(*words: object) -> str:
    """The stdout of a command that succeeds."""
    result = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture
def adapter(tmp_path) -> Path:
    model = nn.ModuleDict({"q_proj": MultiLoRALinear(nn.Linear(8, 12), r=2, lora_num=3)})
    nn.init.normal_(model["q_proj"].lora_scaling)
    save_adapter(model, tmp_path / "adapter")
    return tmp_path / "adapter"


def test_the_list_of_commands_is_whole_and_each_fits_its_line():
    shown = re.findall(r"^  (\w+) +(.+)$", run("--help").partition("Commands:")[2], re.M)
    assert [name for name, _ in shown] == COMMANDS
    assert not [text for _, text in shown if text.endswith("...")]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_shows_examples_whose_options_exist(command):
    text = run(command, "--help")
    body, _, examples = text.partition("\n  Example")
    lines = re.findall(rf"^ +multilora-fast {command}\b(.*)$", examples, re.M)
    assert lines
    for option in re.findall(r"--[a-z-]+", " ".join(lines)):
        assert re.search(rf"{option}\b", body), option


def test_version():
    assert run("--version") == f"multilora-fast {__version__}\n"


def test_commands_silence_bitsandbytes(adapter, tmp_path):
    logging.getLogger("bitsandbytes").setLevel(logging.NOTSET)
    run("export", adapter, tmp_path / "lora")
    assert logging.getLogger("bitsandbytes").level == logging.ERROR


def test_info():
    found = json.loads(run("info", "--json", "--arch", "sm_90"))
    assert found["versions"]["torch"] == version("torch")
    assert any(row.startswith("shrink/8192/half/sm_90") for row in found["kernels"])
    assert all(config["BLOCK_M"] >= 16 for config in found["kernels"].values())
    assert found["no_launch_plans"] == "TRITON_INTERPRET is set"
    said = run("info", "--arch", "sm_90")
    assert re.search(r"^backend +\w+$", said, re.M)
    assert "TRITON_INTERPRET is set" in said
    found = json.loads(run("info", "--json", "--arch", "default"))  # any other GPU
    assert {row.split("/")[3] for row in found["kernels"]} == {"default"}


def test_export_and_spectrum_as_json(adapter, tmp_path):
    found = json.loads(run("export", adapter, tmp_path / "lora", "--json"))
    assert found == {"output": str(tmp_path / "lora"), "rank": 6, "modules": 1, "max_lora_rank": 8}
    found = json.loads(run("spectrum", adapter, tmp_path / "lora", "--json", "--plot", tmp_path / "one.png"))
    first, second = found["updates"]
    assert (first["update"], first["projection"], first["modules"], first["rank"]) == ("adapter", "q_proj", 1, 6)
    assert first["largest"] == pytest.approx(second["largest"], rel=1e-6)
    assert found["overlaps"][0]["input"] == pytest.approx(1.0)


def test_merge_as_json(adapter, tmp_path):
    loras = [tmp_path / "a", tmp_path / "b"]
    for lora in loras:
        run("export", adapter, lora)
    found = json.loads(run("merge", *loras, "--output", tmp_path / "sum", "--weights", "1,0.5", "--json"))
    assert found == {"output": str(tmp_path / "sum"), "adapters": [str(p) for p in loras], "weights": [1.0, 0.5]}


def test_without_json_the_same_commands_speak_to_people(adapter, tmp_path):
    assert run("export", adapter, tmp_path / "lora").startswith(f"{tmp_path / 'lora'}: LoRA of rank 6 on 1 modules")
    said = run("spectrum", adapter, tmp_path / "lora")
    assert said.splitlines()[0].split("   ")[0].strip() == "update"
    assert re.search(r"^adapter +q_proj +1 +6 +\d\.\d +0\.\d{3} +\S+$", said, re.M)
    assert re.search(r"^adapter / lora +q_proj +1\.000 +1\.000$", said, re.M)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("stream", "pause", "shown"), [(Terminal, 0.5, True), (Terminal, 0.3, False), (io.StringIO, 0.5, False)]
)
def test_a_bar_is_shown_after_two_seconds_on_a_terminal_alone(stream, pause, shown, monkeypatch):
    now = 0.0
    monkeypatch.setattr("tqdm.std.time", lambda: now)
    monkeypatch.setattr(sys, "stderr", stream())
    for _ in progress(range(6), "waiting"):
        now += pause
    assert ("waiting" in sys.stderr.getvalue()) == shown


def test_training_on_a_terminal_shows_a_bar(tmp_path, monkeypatch, capsys):
    llama().save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    rows = write(tmp_path / "sky.jsonl", PROMPTS)
    monkeypatch.setattr(sys, "stderr", Terminal())
    words = ("train", rows, "--model", tmp_path / "model", "--output", tmp_path / "out", "--max-steps", 2)
    app(list(map(str, words)), standalone_mode=False)
    assert "2/2" in sys.stderr.getvalue()
    assert "{'loss'" not in sys.stderr.getvalue() + capsys.readouterr().out


def test_representations_are_one_tidy_line():
    layer = FusedMultiLoRALinear(nn.Linear(8, 12), r=2, lora_num=3)
    wanted = "FusedMultiLoRALinear(in_features=8, out_features=12, bias=True, lora_num=3, r=2, backend=None)"
    assert repr(layer) == wanted
    layer.lora_dropout.p = 0.05
    assert repr(layer) == wanted.replace("backend", "lora_dropout=0.05, backend")
    model = nn.Sequential(MultiLoRALinear(nn.Linear(8, 12), r=2, lora_num=3))
    assert str(fuse(model)) == "fused 1 modules, left 0"
