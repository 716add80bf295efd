"""Options of ``multilora-fast train`` for data, labels and reports."""

import pytest
import torch
import typer
from tiny import config
from tiny_training import CHATS, PROMPTS, make_tokenizer, settings, write
from transformers import TrainerCallback
from transformers.integrations import integration_utils

from multilora_fast.cli import app
from multilora_fast.peft import MultiLoraLinear
from multilora_fast.training.data import read_tasks
from multilora_fast.training.model import Encoder
from multilora_fast.training.run import adapted_model, run, tokens, training_arguments


def encoded(model, data, **options):
    made = settings(model, data, "", **options)
    return tokens(read_tasks(made.files, made.named), read_tasks((), made.eval_files), Encoder(made))


def test_eval_file_is_evaluated_in_place_of_a_share_and_beside_it(model, data, tmp_path, command, capsys):
    other = write(tmp_path / "other.jsonl", PROMPTS[:3])
    words = ["--model", model, "--output", tmp_path / "out", *data, "--max-steps", 1, "--r", 2, "--dtype", "float32"]
    assert command(*words, "--eval-file", f"sky={other}", "--eval-file", f"lake={other}") == 0
    said = capsys.readouterr().out
    for task, rows, held_out in (("sky", 20, 3), ("grass", 19, 1), ("lake", 0, 3)):
        assert f"{task}: {rows} rows to train on, {held_out} held out\n" in said
    [start] = [log for log in said.splitlines() if log.startswith("step 0 of 1  lake")]
    assert start.replace("lake ", "sky  ") in said
    with pytest.raises(ValueError, match="--resume: the data"):
        run(settings(model, data, tmp_path / "out", r=2, eval_fraction=0.05, learning_rate=1e-3, resume=True))


def test_eval_file_is_evaluated_where_no_share_is(model, data, tmp_path):
    other = write(tmp_path / "other.jsonl", PROMPTS[:3])
    train, held_out = encoded(model, data[:1], eval_fraction=0.0, eval_files={"o": other})
    assert len(train) == 20
    assert {task: len(rows) for task, rows in held_out.items()} == {"o": 3}


def test_learn_all(model, data):
    rows, _ = encoded(model, data, learn="all")
    answers, _ = encoded(model, data)
    assert all(row["labels"] == row["input_ids"] for row in rows)
    assert all(row["labels"][0] == -100 for row in answers)


def test_chat_template_takes_the_place_of_the_models(model, data, tmp_path, command):
    template = tmp_path / "template.jinja"
    template.write_text(make_tokenizer().chat_template.replace("[{{ m.role }}]", "[{{ m.role }}] w1"))
    out, words = tmp_path / "out", ["--r", 2, "--dtype", "float32", "--save-steps", 1]
    command_words = ["--model", model, "--output", out, data[1], "--chat-template", template, *words]
    assert command(*command_words, "--max-steps", 1) == 0
    rows, _ = encoded(model, data[1:], chat_template=template)
    assert make_tokenizer().decode(rows[0]["input_ids"]).startswith("[user] w1 the grass")
    assert "w1" in (out / "chat_template.jinja").read_text()
    template.write_text(template.read_text().replace("w1", "w2"))
    assert command(*command_words, "--max-steps", 2, "--resume") == 2  # another run
    (tmp_path / "broken.jinja").write_text("{% if %}")
    with pytest.raises(ValueError, match=r"grass.jsonl, line 1: .*chat template"):
        encoded(model, data[1:], chat_template=tmp_path / "broken.jinja")


def test_rows_that_become_several_examples_are_counted(model, tmp_path, capsys):
    template = tmp_path / "template.jinja"
    template.write_text("{% for m in messages %}[{{ m.role }}] {{ 'w1 ' if loop.last }}{{ m.content }} {% endfor %}")
    rows = [{"messages": CHATS[i]["messages"] * 2} for i in range(5)]
    train, held_out = encoded(
        model, (write(tmp_path / "grass.jsonl", rows),), chat_template=template, eval_fraction=0.2
    )
    assert (len(train), len(held_out["grass"])) == (8, 2)
    assert "grass: 4 rows to train on, 1 held out; as 8 and 2 examples, one for each answer" in capsys.readouterr().out


def test_report_to_tells_a_tracker(model, data, tmp_path, monkeypatch):
    told = []

    class Tracker(TrainerCallback):
        def on_log(self, args, state, control, logs, **kwargs):
            told.append(logs)

    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "paper", Tracker)
    run(settings(model, data, tmp_path / "out", max_steps=1, report_to=("paper",)))
    assert any("loss" in logs for logs in told)
    assert any("eval_sky_accuracy" in logs for logs in told)
    assert training_arguments(settings(model, data, "")).report_to == []


def test_liger_where_it_is_installed(model, data, monkeypatch):
    wanted = settings(model, data, "", liger=True)
    found = {"liger_kernel": None}
    monkeypatch.setattr("multilora_fast.training.config.find_spec", lambda name: found.get(name, name))
    with pytest.raises(ValueError, match=r"--liger .*pip install liger-kernel"):
        wanted.check()
    found.clear()
    assert training_arguments(wanted).use_liger_kernel
    assert not training_arguments(settings(model, data, "")).use_liger_kernel


def test_exclude_modules_are_left_alone(model, data):
    made = adapted_model(settings(model, data, "", exclude_modules=("up_proj", "k_proj")), torch.device("cpu"))
    names = {name.rpartition(".")[2] for name, m in made.named_modules() if isinstance(m, MultiLoraLinear)}
    assert names == {"q_proj", "v_proj", "o_proj", "gate_proj", "down_proj"}
    assert config().exclude_modules is None


def options() -> list[str]:
    train = typer.main.get_command(app).commands["train"]
    return [name for option in train.params for name in option.opts if name.startswith("--") and name != "--help"]


def test_launchers_of_processes_let_every_option_pass():
    from accelerate.commands.launch import launch_command_parser
    from torch.distributed.run import get_args_parser

    names = [name for name in options() if name != "--r"]
    assert {"--rank", "--packing", "--learn"} <= set(names)
    for parser, begin in ((get_args_parser(), ["-m"]), (launch_command_parser(), ["-m"])):
        for name in names:
            words = ["train", "rows.jsonl", name, "4", "--model", "base"]
            parsed = parser.parse_args([*begin, "multilora_fast.cli", *words])
            assert parsed.training_script_args == words
    with pytest.raises(SystemExit):
        get_args_parser().parse_args(["-m", "multilora_fast.cli", "train", "--r", "4"])


def test_rank_is_r(model, data, tmp_path, command, monkeypatch):
    seen = []
    monkeypatch.setattr("multilora_fast.training.run.run", seen.append)
    for name in ("--r", "--rank"):
        assert command("--model", model, "--output", tmp_path / name, data[0], name, 5) == 0
    assert [settings.r for settings in seen] == [5, 5]


CALLS = [{"type": "function", "function": {"name": "look", "arguments": {"at": "sky"}}}]
CALLED = [{"role": "user", "content": "?"}, {"role": "assistant", "content": None, "tool_calls": CALLS}]


def test_parquet_rows_are_those_of_jsonl(tmp_path):
    datasets = pytest.importorskip("datasets", reason="needs datasets")
    rows = [{**CHATS[0], "task": "grass"}, {"messages": CALLED, "task": "calls"}, {**CHATS[1], "task": "grass"}]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    found = read_tasks([tmp_path / "rows.parquet"], {})
    wanted = read_tasks([write(tmp_path / "rows.jsonl", rows)], {})
    assert {task: [row.fields for row in rows] for task, rows in found.items()} == {
        task: [row.fields for row in rows] for task, rows in wanted.items()
    }
    assert found["calls"][0].where == f"{tmp_path / 'rows.parquet'}, row 2"
    (tmp_path / "bad.parquet").write_text("PAR1")
    with pytest.raises(ValueError, match=r"bad.parquet cannot be read: ") as error:
        read_tasks([tmp_path / "bad.parquet"], {})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "asked", "task"),
    [
        ("hf://owner/name", ("owner/name", None, "train"), "name"),
        ("hf://owner/name/main:test[:9]", ("owner/name", "main", "test[:9]"), "main"),
    ],
)
def test_hub_data_sets_are_read_by_datasets(name, asked, task, monkeypatch):
    datasets = pytest.importorskip("datasets", reason="needs datasets")
    seen = []

    def load(path, config, *, split, streaming):
        seen.append((path, config, split))
        return iter(PROMPTS)

    monkeypatch.setattr(datasets, "load_dataset", load)
    rows = read_tasks([name], {})
    assert seen == [asked]
    assert [row.fields for row in next(iter(rows.values()))] == PROMPTS
    assert next(iter(rows.values()))[0].where == f"{name}, row 1"
    monkeypatch.setattr("multilora_fast.training.tables.find_spec", lambda _: None)
    with pytest.raises(ValueError, match="pip install datasets"):
        read_tasks([name], {})
    with pytest.raises(ValueError, match="OWNER/NAME"):  # a mistake is named before what is missing
        read_tasks(["hf://name"], {})
