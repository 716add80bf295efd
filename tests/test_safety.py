"""No file runs code: no adapter, base model, checkpoint, config, template or row of data."""

import ast
import importlib
import json
import pickle
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tiny import config, llama, logits
from tiny_training import CHATS, PROMPTS, make_tokenizer, write

import multilora_fast
from multilora_fast import export_lora, from_loras, singular_values
from multilora_fast.adapters import load_adapter
from multilora_fast.adapters.files import CONFIG, WEIGHTS
from multilora_fast.training.config import TrainSettings
from multilora_fast.training.run import run


class Bomb:
    """Makes a file called ``ran`` when it is unpickled."""

    def __reduce__(self):
        return open, ("ran", "w")


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    """Everything happens in an empty directory, in which nothing ran at the end."""
    monkeypatch.chdir(tmp_path)
    yield
    assert not Path("ran").exists()


def test_the_bomb_works():
    pickle.loads(pickle.dumps(Bomb()))
    Path("ran").unlink()


READERS = {
    "load_adapter": lambda: load_adapter(llama(), "adapter"),
    "export_lora": lambda: export_lora("adapter", "out"),
    "from_loras": lambda: from_loras(["adapter"], "out"),
    "singular_values": lambda: singular_values("adapter"),
}


@pytest.mark.parametrize(
    ("reader", "name"),
    [
        *((reader, "adapter_model.bin") for reader in READERS),
        ("load_adapter", "adapter_model.pt"),
        ("export_lora", WEIGHTS),
    ],
)
def test_pickled_weights_are_refused_unread(reader, name):
    get_peft_model(llama(), config()).save_pretrained("adapter")
    Path("adapter", WEIGHTS).unlink()
    Path("adapter", name).write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ValueError, match="is no readable" if name == WEIGHTS else f"{name} is pickled"):
        READERS[reader]()
    assert not Path("out").exists()


def test_who_asks_peft_for_its_own_loading_gets_it():
    """PEFT reads its older format too, as tensors alone."""
    model = get_peft_model(llama(), config())
    model.save_pretrained("adapter")
    torch.save(load_file(Path("adapter", WEIGHTS)), Path("adapter", "adapter_model.bin"))
    Path("adapter", WEIGHTS).unlink()
    assert torch.equal(logits(PeftModel.from_pretrained(llama(), "adapter")), logits(model))
    Path("adapter", "adapter_model.bin").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(pickle.UnpicklingError):
        PeftModel.from_pretrained(llama(), "adapter")


def test_an_adapters_config_names_no_code(monkeypatch):
    Path("bomb.py").write_text("open('ran', 'w')\nclass Model: pass\n")
    monkeypatch.syspath_prepend(".")
    model = get_peft_model(llama(), config())
    model.save_pretrained("adapter")
    named = {
        "auto_mapping": {"base_model_class": "Model", "parent_library": "bomb"},
        "auto_map": {"AutoModel": "bomb.Model"},
        "runtime_config": {"bomb": "bomb"},
        "trust_remote_code": True,
        "custom_module": "bomb",
    }
    text = json.loads(Path("adapter", CONFIG).read_text()) | named
    Path("adapter", CONFIG).write_text(json.dumps(text))
    export_lora("adapter", "out")
    load_adapter(llama(), "adapter")
    assert not set(named) & (set(json.loads(Path("out", CONFIG).read_text())))
    with pytest.warns(UserWarning, match="Unexpected keyword arguments"):
        assert not hasattr(PeftConfig.from_pretrained("adapter"), "custom_module")
    with pytest.warns(UserWarning, match="Unexpected keyword arguments"):
        assert torch.equal(logits(PeftModel.from_pretrained(llama(), "adapter")), logits(model))
    Path("adapter", CONFIG).write_text(json.dumps(text | {"init_weights": "bomb.Model"}))
    with pytest.raises(ValueError, match="init_weights must be True or False"):
        PeftModel.from_pretrained(llama(), "adapter")
    assert "bomb" not in sys.modules
    importlib.import_module("bomb")  # it was there to be found
    Path("ran").unlink()


def base() -> None:
    """A model, its data, and code that its config asks for."""
    llama().save_pretrained("base")
    make_tokenizer().save_pretrained("base")
    Path("base/bomb.py").write_text("open('ran', 'w')\nclass Model: pass\nConfig = Tokenizer = Model\n")
    classes = {"AutoConfig": "bomb.Config", "AutoModelForCausalLM": "bomb.Model", "AutoTokenizer": "bomb.Tokenizer"}
    for name in ("config.json", "tokenizer_config.json"):
        text = json.loads(Path("base", name).read_text())
        Path("base", name).write_text(json.dumps(text | {"auto_map": classes}))
    write(Path("rows.jsonl"), PROMPTS)


def settings(**options) -> TrainSettings:
    small = {"r": 2, "dtype": "float32", "max_steps": 2, "save_steps": 1, "eval_fraction": 0.0, **options}
    return TrainSettings("./base", Path("out"), (Path("rows.jsonl"),), **small)


def test_a_checkpoint_brings_no_code():
    base()
    run(settings())
    state = Path("out/checkpoint-2/optimizer.pt")
    state.write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ValueError, match=r"optimizer\.pt is damaged"):
        run(settings(resume=True, max_steps=4))
    torch.save(Bomb(), state)
    with pytest.raises(ValueError, match="holds more than tensors"):
        run(settings(resume=True, max_steps=4))


def test_a_chat_template_reaches_nothing():
    base()
    write(Path("rows.jsonl"), CHATS)
    Path("base/chat_template.jinja").write_text("{{ cycler.__init__.__globals__.os.mknod('ran') }}")
    with pytest.raises(ValueError, match="the model's chat template refuses the messages"):
        run(settings())


def test_rows_are_data():
    """Fields that are not asked for are not looked at, and a task's name is no path."""
    base()
    rows = [{**row, "task": "../../ran", "!!python/object/apply:open": ["ran", "w"]} for row in PROMPTS]
    write(Path("rows.jsonl"), rows)
    run(settings(eval_fraction=0.2))
    assert {path.name for path in Path().iterdir()} == {"base", "rows.jsonl", "out"}


# Launch plans, whose source test_plan.py holds to a few forms, and the program that a user asks to run.
ALLOWED = {"kernels/plan.py exec", "peft/__main__.py compile", "peft/__main__.py exec"}
FORBIDDEN = {"eval", "exec", "compile", "__import__", "system", "popen"}


def test_the_library_unpickles_and_evaluates_nothing():
    root = Path(multilora_fast.__file__).parent
    found = []
    for path in [*root.rglob("*.py"), *(root / "kernels").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                name, of = getattr(node.func, "id", None), getattr(node.func, "attr", None)
                owner = getattr(getattr(node.func, "value", None), "id", None)
                if (name in FORBIDDEN and f"{path.relative_to(root)} {name}" not in ALLOWED) or (owner, of) in {
                    ("torch", "load"),
                    ("os", "system"),
                    ("os", "popen"),
                }:
                    found.append(f"{path.name}:{node.lineno}")
                if owner in {"pickle", "marshal", "shelve", "subprocess", "yaml", "joblib", "dill"}:
                    found.append(f"{path.name}:{node.lineno}")
                if of == "from_pretrained" and owner != "PeftModel":
                    given = {keyword.arg: keyword.value for keyword in node.keywords}
                    assert given["trust_remote_code"].value is False, f"{path.name}:{node.lineno}"
    assert not found
