"""Interruption and resumption of ``multilora-fast train``."""

import sys

import pytest
import torch
import typer
from tiny_training import adapter, settings

from multilora_fast import cli
from multilora_fast.training.config import RECORD
from multilora_fast.training.run import TaskLog, run


def values(trainer) -> list[dict]:
    """The logs without times."""
    log = [{k: v for k, v in entry.items() if "runtime" not in k and "per_second" not in k}
           for entry in trainer.state.log_history]  # fmt: skip
    return [entry for entry in log if "loss" in entry or any(key.endswith("_accuracy") for key in entry)]


@pytest.fixture
def broken_off(monkeypatch):
    """Calls a function and interrupts its training after a step, as Ctrl-C does."""

    def call(function, step: int):
        class Broken(TaskLog):
            def on_step_end(self, args, state, control, **kwargs):
                if state.global_step == step:
                    raise KeyboardInterrupt

        with monkeypatch.context() as patched:
            patched.setattr("multilora_fast.training.run.TaskLog", Broken)
            return function()

    return call


def test_ctrl_c_says_what_is_kept(model, data, tmp_path, command, broken_off, capsys):
    out = tmp_path / "out"
    words = ["--model", model, "--output", out, data[0], "--max-steps", 8, "--save-steps", 4, "--r", 4]
    words += ["--dtype", "float32"]

    def said() -> str:
        return capsys.readouterr().err.splitlines()[-1]

    assert broken_off(lambda: command(*words), 3) == 130
    assert "at step 3 of 8, before its first checkpoint" in said()
    (out / ".unfinished-train.json").write_text("{")
    assert broken_off(lambda: command(*words, "--seed", 1), 3) == 130  # nothing there is worth keeping
    capsys.readouterr()
    assert broken_off(lambda: command(*words, "--seed", 1, "--resume"), 6) == 130
    shown = capsys.readouterr()
    assert "starts at step 0" in shown.out
    assert "at step 6 of 8: checkpoint-4 is kept" in shown.err.splitlines()[-1]
    assert command(*words, "--seed", 1) == 2
    assert f"--output {out}" in said()


def test_ctrl_c_elsewhere_is_one_line(model, data, tmp_path, command, monkeypatch, capsys):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("multilora_fast.training.run.read_tasks", interrupt)
    assert command("--model", model, "--output", tmp_path / "out", data[0]) == 130
    assert capsys.readouterr().err == "Interrupted.\n"
    monkeypatch.setattr(cli, "app", other := typer.Typer())
    other.command()(lambda: interrupt())
    monkeypatch.setattr(sys, "argv", ["multilora-fast", "--"])
    with pytest.raises(SystemExit, match="130"):
        cli.main()
    assert capsys.readouterr().err == "Interrupted.\n"


@pytest.mark.parametrize(("step", "packing"), [(3, False), (6, True)])  # before the first checkpoint, and after it
def test_resume_reaches_what_an_unbroken_run_reaches(step, packing, model, data, tmp_path, broken_off):
    options = {"lora_dropout": 0.1, "packing": packing, "max_length": 40, "batch_size": 2 if packing else 4}
    whole = run(settings(model, data, tmp_path / "whole", **options))
    with pytest.raises(KeyboardInterrupt):
        broken_off(lambda: run(settings(model, data, tmp_path / "broken", **options)), step)
    assert not (tmp_path / "broken/adapter_model.safetensors").exists()
    (tmp_path / "broken/checkpoint-5").mkdir()  # a checkpoint whose write was interrupted
    resumed = run(settings(model, data, tmp_path / "broken", resume=True, **options))
    assert resumed.state.global_step == 8
    assert values(resumed)[-2:] == values(whole)[-2:]  # the evaluations of the last step
    unbroken, again = adapter(tmp_path / "whole"), adapter(tmp_path / "broken")
    assert all(torch.equal(again[name], tensor) for name, tensor in unbroken.items())


def test_resume_of_a_finished_run_can_only_go_further(model, data, tmp_path):
    out = tmp_path / "out"
    run(settings(model, data, out, max_steps=None, epochs=0.2, save_steps=None))
    for limit in ({"max_steps": None, "epochs": 0.2, "save_steps": None}, {"max_steps": 2}):
        with pytest.raises(ValueError, match=r"--resume: .* 2 steps, .*checkpoint-2.*--max-steps"):
            run(settings(model, data, out, resume=True, **limit))
    assert run(settings(model, data, out, max_steps=3, resume=True)).state.global_step == 3


def test_an_epoch_that_is_just_over_is_over(model, data, tmp_path):
    whole = {"max_steps": None, "epochs": 1, "save_steps": None}
    assert run(settings(model, data, tmp_path / "out", **whole)).state.epoch == 1.0
    with pytest.raises(ValueError, match="--resume"):
        run(settings(model, data, tmp_path / "out", resume=True, **whole))


def test_resume_refuses_another_run(model, data, tmp_path):
    out = tmp_path / "out"
    run(settings(model, data, out, max_steps=1))
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    for name, value in (("lora_num", 2), ("seed", 5), ("learning_rate", 0.5)):
        with pytest.raises(ValueError, match=rf"--resume: .* --{name.replace('_', '-')} .* {value}"):
            run(settings(model, data, out, resume=True, **{name: value}))
    with pytest.raises(ValueError, match=r"--resume: .* data"):
        run(settings(model, data[:1], out, resume=True))
    (out / RECORD).write_text("[")
    with pytest.raises(ValueError, match=RECORD):
        run(settings(model, data, out, resume=True))
    (out / RECORD).write_bytes(before[out / RECORD])
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
