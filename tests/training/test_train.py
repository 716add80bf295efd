"""``multilora-fast train`` on a tiny saved model: what it learns, says and writes, and what it refuses."""

import inspect
import json
import re
import sys
from dataclasses import fields

import pytest
import torch
import typer
from huggingface_hub import ModelCard
from peft import PeftModel
from tiny import llama
from tiny_training import CHATS, PROMPTS, make_tokenizer, write

from multilora_fast import cli
from multilora_fast.cli.train import train
from multilora_fast.peft import MultiLoraLinear
from multilora_fast.peft.layer import MultiLoraBranches
from multilora_fast.training.config import RECORD, TrainSettings
from multilora_fast.training.run import TaskLog, adapted_model, run, summary, training_arguments


@pytest.fixture(autouse=True)
def _one_thread():
    """The model is too small for more, which only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    llama().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def data(tmp_path):
    return write(tmp_path / "sky.jsonl", PROMPTS), write(tmp_path / "grass.jsonl", CHATS)


@pytest.fixture
def command(monkeypatch):
    """Runs the command as the shell does; returns its exit code."""
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(train)
    monkeypatch.setattr(cli, "app", app)

    def call(*words) -> int:
        monkeypatch.setattr(sys, "argv", ["multilora-fast", *map(str, words)])
        with pytest.raises(SystemExit) as exit:
            cli.main()
        return exit.value.code or 0

    return call


def settings(model, data, folder, **options) -> TrainSettings:
    defaults = {
        "dtype": "float32", "r": 4, "learning_rate": 3e-2, "max_steps": 8, "save_steps": 4, "eval_fraction": 0.2,
    }  # fmt: skip
    return TrainSettings(model=model, output=folder, files=data, **{**defaults, **options})


def adapter(folder) -> dict[str, torch.Tensor]:
    loaded = PeftModel.from_pretrained(llama(), folder)
    return {name: p for name, p in loaded.named_parameters() if "multilora" in name}


def test_the_command_learns_and_logs_by_task(model, data, tmp_path, command, capsys):
    out = tmp_path / "out"
    words = ["--model", model, "--output", out, data[0], "--task", f"lawn={data[1]}", "--dtype", "float32"]
    assert command(*words, "--max-steps", 20, "--r", 4, "--learning-rate", 3e-2, "--eval-fraction", 0.2) == 0
    said = capsys.readouterr().out
    print(said)
    assert "sky: 16 rows to train on, 4 held out" in said
    heading = (
        f"{model} on cpu, base in float32; 3 branches of rank 4 on 14 layers, 12,480 trainable parameters; "
        "20 steps of 4 rows."
    )
    assert said.index(heading) < said.index("step  0 of 20")
    assert re.search(r"^Took 0:0\d:\d\d, [\d,]+ tokens/s without padding and evaluations\.$", said, re.M)
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


def test_its_peak_on_a_gpu_is_told(monkeypatch):
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 5 * 2**29)
    said = summary(192.4, 1234.5, torch.device("cuda", 0))
    assert said == "Took 0:03:12, 1,234 tokens/s without padding and evaluations, at most 2.50 GiB on cuda:0."


def test_the_card_describes_and_loads_the_adapter(model, data, tmp_path):
    out = tmp_path / "out"
    run(settings(model, data, out, max_steps=1, learning_rate=2e-3, lora_alpha=6.0))
    card = ModelCard.load(out / "README.md")
    assert (card.data.base_model, card.data.library_name) == (model, "peft")
    assert "multilora" in card.data.tags
    assert "3 branches of rank 4 with learned scales (vector), alpha 6, dropout 0, on all-linear\n" in card.text
    assert "Training: steps 1, AdamW, peak learning rate 0.002, 4 rows per process and step" in card.text
    assert "More Information Needed" not in card.text
    names: dict = {}
    exec(re.search(r"```python\n(.*?)```", card.text, re.S)[1], names)
    assert any(isinstance(module, MultiLoraLinear) for module in names["model"].modules())
    assert f"multilora-fast export {out} lora" in card.text


def test_the_options_defaults_are_the_settings(model):
    options = inspect.signature(train).parameters
    ours = {field.name: field.default for field in fields(TrainSettings) if field.name in options}
    others = ("model", "output", "files", "target_modules")
    assert {k: v for k, v in ours.items() if k not in others} == {
        k: options[k].default for k in ours if k not in others
    }
    assert ours["learning_rate"] == 1e-3


def test_where_no_row_can_be_held_out_nothing_is_evaluated(model, tmp_path, capsys):
    trainer = run(settings(model, (write(tmp_path / "one.jsonl", PROMPTS[:1]),), tmp_path / "out"))
    assert "one: 1 rows to train on, 0 held out" in capsys.readouterr().out
    assert not any("eval" in key for entry in trainer.state.log_history for key in entry)


def values(trainer) -> list[dict]:
    """What was logged, without the times."""
    log = [{k: v for k, v in entry.items() if "runtime" not in k and "per_second" not in k}
           for entry in trainer.state.log_history]  # fmt: skip
    return [entry for entry in log if "loss" in entry or any(key.endswith("_accuracy") for key in entry)]


@pytest.fixture
def broken_off(monkeypatch):
    """Calls a function, and breaks its training off after a step, as Ctrl-C does."""

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

    def said() -> str:
        return capsys.readouterr().err.splitlines()[-1]

    assert broken_off(lambda: command(*words), 3) == 130
    assert said() == "Interrupted at step 3 of 8, before its first checkpoint."
    (out / ".unfinished-train.json").write_text("{")
    assert broken_off(lambda: command(*words, "--seed", 1), 3) == 130  # what is there is of no worth
    capsys.readouterr()
    assert broken_off(lambda: command(*words, "--seed", 1, "--resume"), 6) == 130
    shown = capsys.readouterr()
    assert f"{out} holds no checkpoint: the run starts at step 0.\n" in shown.out
    kept = "Interrupted at step 6 of 8: checkpoint-4 is kept, --resume goes on from it."
    assert shown.err.splitlines()[-1] == kept
    assert command(*words, "--seed", 1) == 2
    assert "is not empty: give another directory, or --resume" in said()


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


@pytest.mark.parametrize("step", [3, 6])  # before the first checkpoint, and after it
def test_resume_reaches_what_an_unbroken_run_reaches(step, model, data, tmp_path, broken_off):
    options = {"lora_dropout": 0.1}
    whole = run(settings(model, data, tmp_path / "whole", **options))
    with pytest.raises(KeyboardInterrupt):
        broken_off(lambda: run(settings(model, data, tmp_path / "broken", **options)), step)
    assert not (tmp_path / "broken/adapter_model.safetensors").exists()
    (tmp_path / "broken/checkpoint-5").mkdir()  # as it is where the writing of a checkpoint was broken off
    resumed = run(settings(model, data, tmp_path / "broken", resume=True, **options))
    assert resumed.state.global_step == 8
    assert values(resumed)[-2:] == values(whole)[-2:]  # the evaluations of the last step
    unbroken, again = adapter(tmp_path / "whole"), adapter(tmp_path / "broken")
    assert all(torch.equal(again[name], tensor) for name, tensor in unbroken.items())


def test_resume_of_a_finished_run_can_only_go_further(model, data, tmp_path):
    out = tmp_path / "out"
    run(settings(model, data, out, max_steps=None, epochs=0.2, save_steps=None))
    with pytest.raises(ValueError, match=r"the run has taken its 2 steps, and .*checkpoint-2 holds its adapter"):
        run(settings(model, data, out, max_steps=None, epochs=0.2, save_steps=None, resume=True))
    with pytest.raises(ValueError, match="the run has taken its 2 steps"):
        run(settings(model, data, out, max_steps=2, resume=True))
    assert run(settings(model, data, out, max_steps=3, resume=True)).state.global_step == 3


def test_a_4_bit_base_in_bfloat16_with_checkpointing(model, data, tmp_path, capsys):
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")
    options = {"quantization": "4bit", "dtype": "bfloat16", "gradient_checkpointing": True, "batch_size": 2}
    trainer = run(settings(model, data, tmp_path / "out", gradient_accumulation=2, scaling="scalar", **options))
    assert trainer.model.is_loaded_in_4bit
    assert "base in 4 bits and bfloat16; 3 branches of rank 4 on 14 layers" in capsys.readouterr().out
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


def test_resume_refuses_another_run(model, data, tmp_path):
    out = tmp_path / "out"
    run(settings(model, data, out, max_steps=1))
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=r"--resume: the run in .* had --lora-num 3, not 2."):
        run(settings(model, data, out, resume=True, lora_num=2))
    with pytest.raises(ValueError, match="--resume: the data is not that of the run in"):
        run(settings(model, data[:1], out, resume=True))
    (out / RECORD).write_text("[")
    with pytest.raises(ValueError, match=r"train.json is damaged"):
        run(settings(model, data, out, resume=True))
    (out / RECORD).write_bytes(before[out / RECORD])
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
