"""The rows of ``multilora-fast train``: files by task, the held-out split, batches."""

import json

import pytest
from tiny_training import CHATS, PROMPTS, write

from multilora_fast.training.data import IGNORED, Row, collate, read_tasks, split


def row(**fields) -> Row:
    return Row("task", fields, "rows.jsonl, line 1")


def test_collate_fills_up_on_the_right():
    batch = collate([{"input_ids": [1, 2, 3], "labels": [IGNORED, 2, 3]}, {"input_ids": [4], "labels": [4]}], pad=9)
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 9, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[IGNORED, 2, 3], [4, IGNORED, IGNORED]]


@pytest.mark.parametrize(("fraction", "count"), [(0.0, 0), (0.01, 1), (0.3, 3), (0.99, 9)])
def test_split_keeps_equal_rows_together(fraction, count):
    rows = [row(text=str(i % 10)) for i in range(30)]
    train_rows, held_out = split(rows, fraction, seed=0)
    assert len(held_out) == 3 * count
    assert sorted(r.fields["text"] for r in train_rows + held_out) == sorted(r.fields["text"] for r in rows)
    assert not {r.fields["text"] for r in train_rows} & {r.fields["text"] for r in held_out}
    assert split(rows, fraction, seed=0) == (train_rows, held_out)


def test_a_mixture_file_is_read_by_task(tmp_path):
    rows = [{**PROMPTS[0], "task": "a"}, {**CHATS[0], "task": "b"}, {**PROMPTS[1], "task": "a"}]
    mixture = write(tmp_path / "mix.jsonl", rows)
    assert {task: len(rows) for task, rows in read_tasks([mixture], {}).items()} == {"a": 2, "b": 1}
    assert {task: len(rows) for task, rows in read_tasks([], {"all": mixture}).items()} == {"all": 3}


def test_tools_and_calls_are_read_as_they_stand(tmp_path):
    calls = [{"function": {"name": "look", "arguments": {"at": "sky", "how": None}}}]
    messages = [{"role": "assistant", "content": None, "tool_calls": calls}, CHATS[0]["messages"][1]]
    rows = [{"messages": messages, "tools": [{"name": "look"}], "other": 1}]
    [found] = read_tasks([write(tmp_path / "calls.jsonl", rows)], {})["calls"]
    assert found.fields == {"messages": messages, "tools": [{"name": "look"}]}


def chat(**answer) -> str:
    return json.dumps({"messages": [{"role": "assistant", **answer}]})


BAD = [  # a line, and what the message names
    ("{", "JSON: .* column 2"),
    ("[1]", "list"),
    ("{}", "nothing"),
    ('{"prompt": "a", "text": "b"}', "prompt, text"),
    ('{"prompt": "a"}', "completion"),
    ('{"prompt": "a", "completion": ""}', "completion"),
    ('{"text": 3}', "text"),
    ('{"messages": "a"}', "messages"),
    ('{"messages": [{"role": "user"}]}', "messages"),
    ('{"messages": [{"role": "user", "content": "a"}]}', "assistant"),
    (chat(content=None), "messages"),
    (chat(content="a", tool_calls=[1]), "messages"),
    ('{"messages": [{"role": "assistant", "content": "a"}], "tools": "look"}', "tools"),
    (json.dumps({"prompt": "sky", "completion": "\ud800"}), "surrogate"),
    (chat(content="\udfff"), "surrogate"),
    (json.dumps({"text": "sky", "task": "\ud800"}), "surrogate"),
    ("[" * 100_000, "nested too deeply"),
    ('{"a": ' * 100_000, "nested too deeply"),
    (f'{{"text": "sky", "n": {"9" * 5000}}}', "number"),
]


@pytest.mark.parametrize(("line", "named"), BAD, ids=[line[:60] for line, _ in BAD])
def test_a_bad_row_is_named_by_file_and_line(line, named, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{json.dumps(PROMPTS[0])}\n{line}\n")
    with pytest.raises(ValueError, match=rf"^{path}, line 2\b.*{named}") as error:
        read_tasks([path], {})
    assert len(str(error.value)) < 600


def test_bad_files(tmp_path):
    (tmp_path / "again").mkdir()
    one, other = write(tmp_path / "one.jsonl", PROMPTS), write(tmp_path / "again" / "one.jsonl", PROMPTS)
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "bytes.jsonl").write_bytes(b"\xff\xfe")
    (tmp_path / "mixed.jsonl").write_text('{"text": "a"}\n{"task": "a", "text": "b"}\n')
    for files, named in [
        ([tmp_path / "none.jsonl"], "none.jsonl"),
        ([tmp_path / "empty.jsonl"], "empty.jsonl"),
        ([tmp_path / "bytes.jsonl"], "bytes.jsonl .*UTF-8"),
        ([tmp_path / "mixed.jsonl"], "mixed.jsonl, line 1: task"),
        ([one, other], f"--task NAME={other}"),
    ]:
        with pytest.raises(ValueError, match=named):
            read_tasks(files, {})
