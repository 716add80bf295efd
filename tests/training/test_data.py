"""The rows of ``multilora-fast train``: their files by task, what is held out, and what of their tokens is learnt."""

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


GOOD = json.dumps(PROMPTS[0])
BAD = [
    ("{", "line 2 is not JSON: Expecting property name enclosed in double quotes at column 2."),
    ("[1]", "line 2: a row must be a JSON object, not list."),
    ("{}", "line 2: a row must hold prompt and completion, or messages, or text, but it holds nothing."),
    ('{"prompt": "a", "text": "b"}', "but it holds prompt, text."),
    ('{"prompt": "a"}', "line 2: completion is missing."),
    ('{"prompt": "a", "completion": ""}', "line 2: completion must be a text that is not empty, not ''."),
    ('{"text": 3}', "line 2: text must be a text that is not empty, not 3."),
    ('{"messages": "a"}', "line 2: messages must be a list of objects with the texts role and content."),
    ('{"messages": [{"role": "user"}]}', "line 2: messages must be a list of objects with the texts"),
    ('{"messages": [{"role": "user", "content": "a"}]}', "line 2: messages hold no message of the assistant"),
    ('{"task": "a", "text": "b"}', "line 1: task must be a name, as in the other rows of the file, not None."),
]


@pytest.mark.parametrize(("line", "message"), BAD)
def test_a_bad_row_is_named_by_file_and_line(line, message, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{GOOD}\n{line}\n")
    with pytest.raises(ValueError) as error:
        read_tasks([path], {})
    assert str(error.value).startswith(f"{path}, line ")
    assert message in str(error.value)


def test_bad_files(tmp_path):
    one, other = tmp_path / "one.jsonl", tmp_path / "again" / "one.jsonl"
    other.parent.mkdir()
    write(one, PROMPTS), write(other, PROMPTS)
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "bytes.jsonl").write_bytes(b"\xff\xfe")
    for files, message in [
        ([tmp_path / "none.jsonl"], "none.jsonl cannot be read: No such file or directory."),
        ([tmp_path / "empty.jsonl"], "empty.jsonl holds no rows."),
        ([tmp_path / "bytes.jsonl"], "bytes.jsonl cannot be read: it is not UTF-8."),
        ([one, other], f"two files are of a task called one: name one with --task NAME={other}."),
    ]:
        with pytest.raises(ValueError) as error:
            read_tasks(files, {})
        assert message in str(error.value)
