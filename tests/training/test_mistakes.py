"""Mistakes of ``multilora-fast train``: one line, exit code 2, nothing written."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import gpt2, llama
from tiny_training import PROMPTS, settings

from multilora_fast.training.run import adapted_model, run

WRONG = {  # words, and what the message names: the first of them where it is None
    "--quantization 8bit": None,
    "--batch-size 0": None,
    "--learning-rate nan": None,
    "--max-length 1": None,
    "--eval-fraction 1": None,
    "--target-modules ,": None,
    "--target-modules queries": "queries",
    "--task lawn": None,
    "--task a=b --task a=c": "--task a",
    "--dtype float8": None,
    "--max-length 3": None,
    "--model ./nowhere": "./nowhere",
    "--resume": None,
    "--output=": "--output",
    "--r 0": "r must",
    "--rank 0": "r must",
    "--scaling matrix": "scaling must",
    f"--r {10**12}": None,  # sizes that torch cannot allocate, count or represent
    f"--r {10**18}": None,
    f"--r {10**30}": None,
    "--learn prompts": None,
    "--eval-file lawn": None,
    "--eval-file lawn=nowhere.jsonl": "nowhere.jsonl",
    "--chat-template nowhere.jinja": "--chat-template nowhere.jinja",
    "--report-to paper": None,
    "--report-to swanlab": "swanlab",
    "hf://name": "hf://OWNER/NAME",
    "nowhere.parquet": None,
}


def refused(command, capsys, out, *words) -> str:
    """The one line of a command that is refused and writes nothing."""
    assert command("--output", out, *words) == 2
    assert not out.exists()
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("multilora-fast: ")
    assert len(said) < 600
    return said


@pytest.mark.parametrize(("words", "named"), WRONG.items(), ids=WRONG)
def test_a_mistake_is_one_line_and_writes_nothing(words, named, model, data, tmp_path, command, capsys):
    words = words.split()
    assert (named or words[0]) in refused(command, capsys, tmp_path / "out", "--model", model, data[0], *words)


def test_a_bad_row_is_one_line_and_writes_nothing(model, tmp_path, command, capsys):
    (tmp_path / "sky.jsonl").write_text(f"{json.dumps(PROMPTS[0])}\n{'[' * 100_000}\n")
    said = refused(command, capsys, tmp_path / "out", "--model", model, tmp_path / "sky.jsonl")
    assert f"{tmp_path / 'sky.jsonl'}, line 2" in said


@pytest.mark.parametrize(("package", "what"), [("accelerate", "train"), ("bitsandbytes", "--quantization 4bit")])
def test_a_missing_package_is_named(package, what, model, data, tmp_path, monkeypatch):
    monkeypatch.setattr("multilora_fast.training.config.find_spec", lambda name: None if name == package else name)
    with pytest.raises(ValueError, match=f"{what} .*pip install {package}"):
        settings(model, data, tmp_path / "out", quantization="4bit").check()


def test_an_output_is_never_written_over(model, data, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").write_text("text")
    with pytest.raises(ValueError, match="--output"):
        run(settings(model, data, out))
    with pytest.raises(ValueError, match="--resume"):
        run(settings(model, data, out, resume=True))
    with pytest.raises(ValueError, match="--output"):
        run(settings(model, data, out / "precious"))
    assert [path.name for path in out.iterdir()] == ["precious"]


@pytest.fixture
def changed(model, tmp_path):
    """Saves a model with changed weights or config beside the tokenizer, and returns its directory."""

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
WIDER = {"intermediate_size": 52}  # than the weights
BASES = [  # a model, what is changed of it, words, and what the message names
    (llama, {"lose": LACKING}, [], "lacks 2 of its weights, .*model.layers.1.mlp.up_proj.weight"),
    (llama, WIDER, [], r"model.layers.0.mlp.down_proj.weight .*\(32, 52\)"),
    (llama, WIDER, ["--quantization", "4bit"], "model.layers.0.mlp"),
    (llama, {"hidden_size": 33}, [], "--model"),
    (small_vocabulary, {}, [], "sky.jsonl, line 1: 'w0' .* 12"),
    (gpt2, {"n_positions": 4}, [], "sky.jsonl, line 1 .* --max-length 4"),
]


@pytest.mark.parametrize(("base", "change", "words", "named"), BASES)
def test_a_base_that_does_not_fit_is_one_line_and_writes_nothing(
    base, change, words, named, changed, data, tmp_path, command, capsys
):
    if words:
        pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")
    words = ["--model", changed(base(), **change), data[0], "--dtype", "float32", *words]
    assert re.search(named, refused(command, capsys, tmp_path / "out", *words))


@pytest.mark.parametrize("base", [tied, gpt2])
def test_a_base_whose_files_hold_less_than_its_state_lacks_nothing(base, changed, data):
    made = adapted_model(settings(str(changed(base())), data, ""), torch.device("cpu"))
    assert made.get_nb_trainable_parameters()[0] > 0
