"""What ``multilora-fast train`` refuses, in one line that writes nothing."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import gpt2, llama
from tiny_training import PROMPTS, settings

from multilora_fast.training.run import adapted_model, run

WRONG = [
    (["--r", 0], "r must be an integer of at least 1, not 0."),
    (["--scaling", "matrix"], "scaling must be"),
    (["--quantization", "8bit"], "--quantization must be 4bit, not '8bit'."),
    (["--batch-size", 0], "--batch-size must be more than 0, not 0."),
    (["--learning-rate", "nan"], "--learning-rate must be more than 0, not nan."),
    (["--max-length", 1], "--max-length must be at least 2, not 1."),
    (["--eval-fraction", 1], "--eval-fraction must be in [0, 1), not 1.0."),
    (["--target-modules", ","], "--target-modules must name a module or be all-linear."),
    (["--target-modules", "queries"], "queries"),
    (["--task", "lawn"], "--task must be NAME=FILE, not 'lawn'."),
    (["--task", "a=b", "--task", "a=c"], "--task a is given twice."),
    (["--dtype", "float8"], "--dtype must be auto, float32 or bfloat16, not 'float8'."),
    (["--max-length", 3], "task sky has no row whose answer begins within --max-length 3."),
    (["--model", "./nowhere"], "--model ./nowhere: no such directory."),
    (["--resume"], "holds no earlier run of multilora-fast train."),
    (["--output", ""], "'--output': an empty text; give a path."),
    (["--rank", 0], "r must be an integer of at least 1, not 0."),
    (["--r", 10**12], "--lora-num 3 with --r 1000000000000 makes an adapter that memory does not hold."),
    (["--r", 10**18], "makes an adapter that memory does not hold."),
    (["--r", 10**30], "makes an adapter that memory does not hold."),
    (["--learn", "prompts"], "--learn must be answers or all, not 'prompts'."),
    (["--eval-file", "lawn"], "--eval-file must be NAME=FILE, not 'lawn'."),
    (["--eval-file", "lawn=nowhere.jsonl"], "nowhere.jsonl cannot be read: No such file or directory."),
    (["--chat-template", "nowhere.jinja"], "--chat-template nowhere.jinja cannot be read: No such file or directory."),
    (["--report-to", "paper"], "--report-to: paper is not supported, only azure_ml"),
    (["--report-to", "swanlab"], "--report-to: SwanLabCallback requires swanlab to be installed."),
    (["hf://name"], "hf://name must be hf://OWNER/NAME, hf://OWNER/NAME/CONFIG or either with :SPLIT."),
    (["nowhere.parquet"], "nowhere.parquet cannot be read: No such file or directory."),
]


@pytest.mark.parametrize(("words", "message"), WRONG)
def test_a_mistake_is_one_line_and_writes_nothing(words, message, model, data, tmp_path, command, capsys):
    assert command("--model", model, "--output", tmp_path / "out", data[0], *words) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("multilora-fast: ")
    assert message in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("package", "what"), [("accelerate", "train"), ("bitsandbytes", "--quantization 4bit")])
def test_a_missing_package_is_named(package, what, model, data, tmp_path, monkeypatch):
    monkeypatch.setattr("multilora_fast.training.config.find_spec", lambda name: None if name == package else name)
    with pytest.raises(ValueError, match=f"{what} needs {package}: run pip install {package}"):
        settings(model, data, tmp_path / "out", quantization="4bit").check()


def test_a_damaged_model_is_one_line(data, tmp_path, command, capsys):
    (tmp_path / "model").mkdir()
    assert command("--model", tmp_path / "model", "--output", tmp_path / "out", data[0]) == 2
    assert f"--model {tmp_path / 'model'} could not be loaded: " in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_output_is_never_written_over(model, data, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").write_text("text")
    with pytest.raises(ValueError, match="is not empty: give another directory, or --resume"):
        run(settings(model, data, out))
    with pytest.raises(ValueError, match="holds no earlier run"):
        run(settings(model, data, out, resume=True))
    with pytest.raises(ValueError, match="is a file; give a directory"):
        run(settings(model, data, out / "precious"))
    assert [path.name for path in out.iterdir()] == ["precious"]


ROWS = [
    (json.dumps({"prompt": "sky", "completion": "\ud800"}), "line 2 holds half of a surrogate pair"),
    (json.dumps({"messages": [{"role": "assistant", "content": "\udfff"}]}), "line 2 holds half of a surrogate pair"),
    (json.dumps({"text": "sky", "task": "\ud800"}), "line 2 holds half of a surrogate pair"),
    ("[" * 100_000, "line 2 is nested too deeply."),
    ('{"a": ' * 100_000, "line 2 is nested too deeply."),
    (f'{{"text": "sky", "n": {"9" * 5000}}}', "line 2 holds too long a number."),
    ('{"messages": [{"role": "assistant", "content": null}]}', "line 2: messages must be a list of objects with the"),
    ('{"messages": [{"role": "assistant", "content": "a", "tool_calls": [1]}]}', "line 2: messages must be a list"),
    ('{"messages": [{"role": "assistant", "content": "a"}], "tools": "look"}', "line 2: tools must be a list of obj"),
]


@pytest.mark.parametrize(("line", "message"), ROWS)
def test_a_bad_row_is_one_line_with_its_place_and_writes_nothing(line, message, model, tmp_path, command, capsys):
    data = tmp_path / "sky.jsonl"
    data.write_text(f"{json.dumps(PROMPTS[0])}\n{line}\n")
    assert command("--model", model, "--output", tmp_path / "out", data) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith(f"multilora-fast: {data}, {message}")
    assert len(said) < 600
    assert not (tmp_path / "out").exists()


@pytest.fixture
def changed(model, tmp_path):
    """Saves a model with other weights and fields of its config beside the tokenizer, and returns its directory."""

    def save(base, lose=(), **fields):
        folder = tmp_path / "changed"
        base.save_pretrained(folder)
        for path in Path(model).glob("token*"):
            shutil.copy(path, folder)
        weights = load_file(folder / "model.safetensors")
        save_file({k: v for k, v in weights.items() if k not in lose}, folder / "model.safetensors", {"format": "pt"})
        config = folder / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | fields))
        return folder

    return save


def tied():
    base = llama()
    base.config.tie_word_embeddings = True
    base.tie_weights()
    return base


def small_vocabulary():
    base = llama()
    base.resize_token_embeddings(10)
    return base


LACKING = ("model.layers.1.mlp.up_proj.weight", "model.norm.weight")
BASES = [
    (llama, {"lose": LACKING}, [], "lacks 2 of its weights, the first of them model.layers.1.mlp.up_proj.weight."),
    (
        llama,
        {"intermediate_size": 52},
        [],
        "wants model.layers.0.mlp.down_proj.weight of shape (32, 52), but the ",
    ),
    (llama, {"intermediate_size": 52}, ["--quantization", "4bit"], "its config.json wants model.layers.0.mlp."),
    (llama, {"hidden_size": 33}, [], "could not be loaded: "),
    (small_vocabulary, {}, [], "sky.jsonl, line 1: 'w0' has the id 12, but --model"),
    (gpt2, {"n_positions": 4}, [], "sky.jsonl, line 1 has 7 tokens, but --model"),
]


@pytest.mark.parametrize(("base", "change", "words", "message"), BASES)
def test_a_base_that_does_not_fit_is_one_line_and_writes_nothing(
    base, change, words, message, changed, data, tmp_path, command, capsys
):
    if words:
        pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")
    folder = changed(base(), **change)
    assert command("--model", folder, "--output", tmp_path / "out", data[0], "--dtype", "float32", *words) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("multilora-fast: ")
    assert message in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("base", [tied, gpt2])
def test_a_base_whose_files_hold_less_than_its_state_lacks_nothing(base, changed, data):
    made = adapted_model(settings(str(changed(base())), data, ""), torch.device("cpu"))
    assert made.get_nb_trainable_parameters()[0] > 0
