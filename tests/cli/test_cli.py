"""The command line as a person and as a script meet it: help, JSON, bars, one-line errors, no stray output."""

import fcntl
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from importlib.metadata import version
from pathlib import Path

import pytest
from tiny import llama
from tiny_training import PROMPTS, make_tokenizer, write
from torch import nn
from typer.testing import CliRunner

from multilora_fast import FusedMultiLoRALinear, __version__, cli, fuse
from multilora_fast.adapters import save_adapter
from multilora_fast.cli import app
from multilora_fast.console import progress
from multilora_fast.reference import MultiLoRALinear

ROOT = Path(__file__).parents[2]
COMMANDS = ["demo", "info", "plan", "train", "init", "export", "merge", "spectrum", "bench"]


def run(*words: object) -> str:
    """What a command that ends well writes to stdout."""
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


def test_info_as_json():
    found = json.loads(run("info", "--json", "--arch", "sm_90"))
    assert found["versions"]["torch"] == version("torch")
    assert any(row.startswith("shrink/8192/half/sm_90") for row in found["kernels"])
    assert all(config["BLOCK_M"] >= 16 for config in found["kernels"].values())
    assert found["no_launch_plans"] == "TRITON_INTERPRET is set"
    assert "launch plans    not used: TRITON_INTERPRET is set" in run("info", "--arch", "sm_90")


def test_info_of_any_other_gpu():
    found = json.loads(run("info", "--json", "--arch", "default"))
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


def in_terminal(code: str) -> str:
    """What ``code`` shows on a terminal of its own."""
    parent, child = pty.openpty()
    fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=child, stdout=subprocess.DEVNULL)
    os.close(child)
    shown = b""
    try:
        while part := os.read(parent, 4096):
            shown += part
    except OSError:  # the end of a terminal
        pass
    os.close(parent)
    assert process.wait() == 0
    return shown.decode()


LOOP = """
import time
from multilora_fast.console import progress
for _ in progress(range({count}), "waiting"): time.sleep({pause})
"""


def test_a_bar_is_shown_after_two_seconds_on_a_terminal_alone(capfd):
    assert "waiting" in in_terminal(LOOP.format(count=6, pause=0.5))
    assert "waiting" not in in_terminal(LOOP.format(count=3, pause=0.01))
    assert list(progress(range(3), "waiting")) == [0, 1, 2]
    assert capfd.readouterr() == ("", "")


def test_training_on_a_terminal_shows_a_bar(tmp_path):
    llama().save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    rows = write(tmp_path / "sky.jsonl", PROMPTS)
    words = f"multilora-fast train {rows} --model {tmp_path / 'model'} --output {tmp_path / 'out'} --max-steps 2"
    shown = in_terminal(f"import sys; from multilora_fast.cli import main; sys.argv = {words.split()}; main()")
    assert "2/2" in shown
    assert "{'loss'" not in shown


def test_importing_and_showing_print_nothing_of_their_own():
    code = (
        "import logging; logging.getLogger('bitsandbytes').setLevel(logging.ERROR)\n"  # it speaks when PEFT imports it
        "import multilora_fast, multilora_fast.peft, multilora_fast.adapters.export, multilora_fast.spectrum"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")


def test_representations_are_one_tidy_line():
    layer = FusedMultiLoRALinear(nn.Linear(8, 12), r=2, lora_num=3)
    wanted = "FusedMultiLoRALinear(in_features=8, out_features=12, bias=True, lora_num=3, r=2, backend=None)"
    assert repr(layer) == wanted
    layer.lora_dropout.p = 0.05
    assert repr(layer) == wanted.replace("backend", "lora_dropout=0.05, backend")
    model = nn.Sequential(MultiLoRALinear(nn.Linear(8, 12), r=2, lora_num=3))
    assert str(fuse(model)) == "fused 1 modules, left 0"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("demo --steps 0", "--steps must be at least 1, not 0."),
        ("demo --learning-rate -1", "--learning-rate must be above 0, not -1."),
        ("demo --lora-num 0", "lora_num must be an integer of at least 1, not 0."),
        ("demo --lora-dropout 1", "lora_dropout must be a probability in [0, 1), not 1.0."),
        ("demo --target-modules ,", "--target-modules names no module."),
        ("bench --tokens 0", "--tokens must be an integer of at least 1, not 0."),
        ("bench --r 0", "r must be an integer of at least 1, not 0."),
        ("bench --dtype int8", "--dtype must be auto, float32 or bfloat16, not 'int8'."),
        ("demo --stepz 3", "No such option: --stepz"),
        ("dmo", "No such command 'dmo'."),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(arguments, message, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["multilora-fast", *arguments.split()])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert len(shown.err.splitlines()) == 1
    assert message in shown.err


def test_info_names_device_and_backend(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["multilora-fast", "info"])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert not stopped.value.code
    assert "backend" in capsys.readouterr().out
