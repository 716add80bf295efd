"""``multilora-fast train`` on a tiny saved model: what it learns, says and writes."""

import inspect
import json
import re
from dataclasses import fields
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel
from tiny import llama
from tiny_training import PROMPTS, adapter, make_tokenizer, settings, write

from multilora_fast.cli.train import train
from multilora_fast.peft import MultiLoraLinear
from multilora_fast.peft.layer import MultiLoraBranches
from multilora_fast.training.config import TrainSettings
from multilora_fast.training.run import TaskLog, adapted_model, run, summary, training_arguments


def test_the_command_learns_and_logs_by_task(model, data, tmp_path, command, capsys):
    out = tmp_path / "out"
    words = ["--model", model, "--output", out, data[0], "--task", f"lawn={data[1]}", "--dtype", "float32"]
    assert command(*words, "--max-steps", 20, "--r", 4, "--learning-rate", 3e-2, "--eval-fraction", 0.2) == 0
    said = capsys.readouterr().out
    print(said)
    assert "sky: 16 rows to train on, 4 held out" in said
    heading = f"{model} on cpu.*float32.* 14 layers, 12,480 trainable parameters; 20 steps of 4 rows"
    assert re.search(rf"{heading}.*step  0 of 20.*Took 0:0\d:\d\d, [\d,]+ tokens/s", said, re.S)
    log = json.loads((out / "trainer_state.json").read_text())["log_history"]
    for task in ("sky", "lawn"):
        losses = [entry[f"eval_{task}_loss"] for entry in log if f"eval_{task}_loss" in entry]
        accuracies = [entry[f"eval_{task}_accuracy"] for entry in log if f"eval_{task}_accuracy" in entry]
        assert losses[-1] < 0.5 * losses[0]
        assert accuracies[0] <= 0.5 < accuracies[-1]
        assert f"{task:<4}  held-out loss {losses[-1]:.4f}  accuracy {accuracies[-1]:.4f}" in said
    loaded = PeftModel.from_pretrained(llama(), out)
    tokenizer = make_tokenizer()
    ids = torch.tensor([tokenizer("the sky is w3 ?")["input_ids"]])
    assert tokenizer.decode(loaded(ids).logits[0, -1].argmax()) == "blue"
    assert len([m for m in loaded.modules() if isinstance(m, MultiLoraLinear)]) == 14
    assert (out / "tokenizer.json").exists()
    assert not list(out.glob(".unfinished*"))


def test_its_tokens_are_counted_without_padding_and_its_evaluations_timed(model, data, tmp_path):
    options = {"max_steps": 3, "batch_size": 8, "gradient_accumulation": 4, "eval_fraction": 0.2}
    trainer = run(settings(model, data, tmp_path / "out", **options))
    rows = trainer.train_dataset
    assert len({len(row["input_ids"]) for row in rows}) == 2
    assert trainer.all_tokens() == 3 * sum(len(row["input_ids"]) for row in rows)  # each step takes all of them
    log = next(callback for callback in trainer.callback_handler.callbacks if isinstance(callback, TaskLog))
    seconds = [v for entry in trainer.state.log_history for k, v in entry.items() if re.match("eval_.*_runtime", k)]
    assert log.evaluating == pytest.approx(sum(seconds))
    assert log.evaluated_at == 3  # save_steps is 4


def test_slow_steps_are_told_once_a_minute(monkeypatch, capsys):
    log, clock = TaskLog(["sky"], "heading"), iter(range(0, 1000, 40))
    monkeypatch.setattr("multilora_fast.training.trainer.time.monotonic", lambda: next(clock))
    for step in range(1, 6):
        log.on_step_end(None, SimpleNamespace(global_step=step, max_steps=10), None)
    assert capsys.readouterr().out.split("\n") == ["step  3 of 10", "step  5 of 10", ""]


def test_its_peak_on_a_gpu_is_told(monkeypatch):
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 5 * 2**29)
    said = summary(192.4, 1234.5, torch.device("cuda", 0))
    assert all(part in said for part in ("0:03:12", "1,234 tokens/s", "2.50 GiB on cuda:0"))


def test_the_options_defaults_are_the_settings(model):
    options = inspect.signature(train).parameters
    ours = {field.name: field.default for field in fields(TrainSettings) if field.name in options}
    for name in ours.keys() - {"model", "output", "files", "target_modules"}:
        assert ours[name] == options[name].default, name


def test_where_no_row_can_be_held_out_nothing_is_evaluated(model, tmp_path, capsys):
    trainer = run(settings(model, (write(tmp_path / "one.jsonl", PROMPTS[:1]),), tmp_path / "out"))
    assert "one: 1 rows to train on, 0 held out" in capsys.readouterr().out
    assert not any("eval" in key for entry in trainer.state.log_history for key in entry)


def test_a_4_bit_base_in_bfloat16_with_checkpointing(model, data, tmp_path, capsys):
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")
    options = {"quantization": "4bit", "dtype": "bfloat16", "gradient_checkpointing": True, "batch_size": 2}
    trainer = run(settings(model, data, tmp_path / "out", gradient_accumulation=2, scaling="scalar", **options))
    assert trainer.model.is_loaded_in_4bit
    assert "4 bits and bfloat16" in capsys.readouterr().out
    assert {p.dtype for p in trainer.model.parameters() if p.requires_grad} == {torch.float32}
    losses = [entry["eval_sky_loss"] for entry in trainer.state.log_history if "eval_sky_loss" in entry]
    assert losses[-1] < losses[0]
    assert all(t.shape == (3, 1) for name, t in adapter(tmp_path / "out").items() if name.endswith("lora_scaling"))


def test_the_adapter_is_what_was_asked_for(model, data):
    options = {"lora_num": 2, "lora_alpha": 8.0, "lora_dropout": 0.25, "target_modules": ("q_proj", "up_proj")}
    made = adapted_model(settings(model, data, "", **options), torch.device("cpu"))
    found = [m for m in made.modules() if isinstance(m, MultiLoraBranches)]
    assert len(found) == 4
    assert all(m.lora_A.shape[:2] == (2, 4) and m.scaling_factor == 2 and m.lora_dropout.p == 0.25 for m in found)


def test_processes_without_a_gpu_form_a_group(model, data, tmp_path):
    arguments = training_arguments(settings(model, data, tmp_path))
    assert arguments.use_cpu == (not torch.accelerator.is_available())
