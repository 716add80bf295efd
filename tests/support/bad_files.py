"""The directory in which every row of bad_inputs.py runs, and the damage done to its files.

``base`` and ``other`` are models of different widths, ``adapter`` a MultiLoRA adapter of base, ``lora-a`` and
``lora-b`` LoRAs of base, ``lora-other`` of other, ``exported`` an export, ``run`` a training run with its data
``sky.jsonl``.
"""

import json
import os
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import config, llama
from tiny_training import PROMPTS, make_tokenizer, write

from multilora_fast import export_lora
from multilora_fast.adapters.files import CONFIG, WEIGHTS
from multilora_fast.training.config import TrainSettings
from multilora_fast.training.run import run


def prepare(root: Path) -> None:
    for name, width in (("base", 32), ("other", 48)):
        llama(hidden_size=width).save_pretrained(root / name)
        make_tokenizer().save_pretrained(root / name)
    get_peft_model(llama(), config(target_modules=["q_proj"])).save_pretrained(root / "adapter")
    export_lora(root / "adapter", root / "exported")
    for name, width in (("lora-a", 32), ("lora-b", 32), ("lora-other", 48)):
        lora = LoraConfig(r=2, target_modules=["q_proj"])
        get_peft_model(llama(hidden_size=width), lora).save_pretrained(root / name)
    write(root / "sky.jsonl", PROMPTS)
    (root / "tmp").mkdir()
    options = {"r": 4, "target_modules": ("q_proj",), "dtype": "float32", "eval_fraction": 0.0}
    run(TrainSettings(str(root / "base"), root / "run", (root / "sky.jsonl",), max_steps=2, save_steps=1, **options))


def edit_config(folder: str | Path, **new):
    """Set fields of the config; None removes one."""

    def edit():
        path = Path(folder, CONFIG)
        changed = {k: v for k, v in {**json.loads(path.read_text()), **new}.items() if v is not None}
        path.write_text(json.dumps(changed))

    return edit


def edit_tensors(folder: str, change):
    """Apply ``change`` to the dict of tensors, in place."""

    def edit():
        tensors = load_file(Path(folder, WEIGHTS))
        change(tensors)
        save_file(tensors, Path(folder, WEIGHTS))

    return edit


def each(change):
    return lambda tensors: tensors.update({key: change(tensor.clone()) for key, tensor in tensors.items()})


def with_first(value: float):
    return each(lambda t: t.index_fill_(0, torch.tensor([0]), value))


def cut(path: str, at: int = -10):
    return lambda: Path(path).write_bytes(Path(path).read_bytes()[:at])


def text(path: str, content: str):
    return lambda: Path(path).write_text(content)


def directory(path: str):
    """Replace the file by a directory."""

    def edit():
        Path(path).unlink()
        Path(path).mkdir()

    return edit


def pipe(path: str):
    """Replace the file by a pipe without a writer."""

    def edit():
        Path(path).unlink()
        os.mkfifo(path)

    return edit


def without(path: str):
    return lambda: Path(path).unlink()


def pickled(folder: str, name: str = "adapter_model.bin"):
    """Replace the weights by those that torch.save writes."""

    def edit():
        tensors = load_file(Path(folder, WEIGHTS))
        Path(folder, WEIGHTS).unlink()
        torch.save(tensors, Path(folder, name))

    return edit


def no_permission():
    """Deny writing, as to another user; permission bits do not bind root. The test restores os.access."""
    os.access = lambda path, mode: mode != os.W_OK


def no_tokenizer():
    for path in Path("base").glob("*token*"):
        path.unlink()


def remote_code():
    path = Path("base/config.json")
    named = {"auto_map": {"AutoModelForCausalLM": "evil.Model", "AutoConfig": "evil.Config"}, "model_type": "evil"}
    path.write_text(json.dumps(json.loads(path.read_text()) | named))
    Path("base/evil.py").write_text("open('ran', 'w')\n")
