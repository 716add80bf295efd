"""Fine-tuning data: prompt/completion, chat and text rows per task, tokenized with labels."""

import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from multilora_fast.training.tables import is_table, table_rows

IGNORED = -100  # label ignored by the loss
KINDS = (("prompt", "completion"), ("messages",), ("text",))
PROBE = "\ue000"  # replaces an answer, to find where the rendered chat depends on it; no answer begins with it

Example = dict[str, list[int]]  # input_ids and labels
Spans = list[tuple[int, int]]  # character ranges [begin, end) of a text


@dataclass(frozen=True)
class Row:
    """One row of a file: its task, the fields of one of KINDS (and tools for a chat), and file and line for errors."""

    task: str
    fields: dict
    where: str


def read_tasks(files: Sequence[Path | str], named: Mapping[str, Path | str]) -> dict[str, list[Row]]:
    """The rows of every task, in the order of the files: JSON Lines, Parquet or data sets on the hub.

    Each of ``files`` is a task named by the file's stem or, if its rows have a ``task`` field, a mixture of tasks.
    ``named`` maps task names to files.

    Raises:
        ValueError: a file is unreadable or empty, a row is not of one of KINDS (file and line are named), or two files
            have one task name.
    """
    tasks: dict[str, list[Row]] = {}
    for path, name in [*((path, None) for path in files), *((path, name) for name, path in named.items())]:
        rows = [(where, _checked(row, where)) for where, row in _rows(path)]
        if not rows:
            raise ValueError(f"{path} holds no rows.")
        is_mixture = name is None and any("task" in row for _, row in rows)
        called = name or Path(path).stem
        if not is_mixture and called in tasks:
            raise ValueError(f"two files are of a task called {called}: name one with --task NAME={path}.")
        for where, row in rows:
            task = row.get("task") if is_mixture else called
            if not isinstance(task, str) or not task:
                raise ValueError(f"{where}: task must be a name, as in the other rows of the file, not {task!r}.")
            fields = {key: row[key] for kind in (*KINDS, ("tools",)) for key in kind if key in row}
            tasks.setdefault(task, []).append(Row(task, fields, where))
    return tasks


def _rows(path: Path | str) -> Iterator[tuple[str, object]]:
    """Each row with its file and line."""
    if is_table(path):
        yield from table_rows(path)
        return
    for number, line in enumerate(text_of(path, str(path)).split("\n"), 1):
        if line.strip():
            where = f"{path}, line {number}"
            try:
                yield where, json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{where} is not JSON: {error.msg} at column {error.colno}.") from error
            except (RecursionError, ValueError) as error:
                reason = "is nested too deeply" if isinstance(error, RecursionError) else "holds too long a number"
                raise ValueError(f"{where} {reason}.") from error


def text_of(path: Path | str, name: str) -> str:
    """The text of a file, without a byte order mark. Errors call it ``name``."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise ValueError(f"{name} cannot be read: {reason}.") from error


def _checked(row: object, where: str) -> dict:
    if not isinstance(row, dict):
        raise ValueError(f"{where}: a row must be a JSON object, not {type(row).__name__}.")
    kinds = [kind for kind in KINDS if any(key in row for key in kind)]
    if len(kinds) != 1:
        found = ", ".join(sorted(row)) or "nothing"
        raise ValueError(f"{where}: a row must hold prompt and completion, or messages, or text, but it holds {found}.")
    try:
        json.dumps({key: row.get(key) for key in (*kinds[0], "task", "tools")}, ensure_ascii=False).encode()
    except (RecursionError, TypeError, ValueError) as error:  # deep nesting, types of a table, half a surrogate pair
        raise ValueError(f"{where} holds what JSON cannot: {error}.") from error
    for key in kinds[0]:
        if key not in row:
            raise ValueError(f"{where}: {key} is missing.")
        if key == "messages":
            _check_messages(row[key], where)
        elif not isinstance(row[key], str) or (not row[key] and key != "prompt"):
            raise ValueError(f"{where}: {key} must be a text that is not empty, not {row[key]!r}.")
    if not _are_objects(row.get("tools") or []):
        raise ValueError(f"{where}: tools must be a list of objects.")
    return row


def _check_messages(messages: Any, where: str) -> None:
    def is_message(message: dict) -> bool:
        content, calls = message.get("content"), message.get("tool_calls") or []
        has_content = isinstance(content, str) or (content is None and bool(calls))
        return isinstance(message.get("role"), str) and has_content and _are_objects(calls)

    if not _are_objects(messages) or not all(map(is_message, messages)):
        raise ValueError(f"{where}: messages must be a list of objects with the texts role and content.")
    if not any(message["role"] == "assistant" for message in messages):
        raise ValueError(f"{where}: messages hold no message of the assistant to learn from.")


def _are_objects(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, dict) for item in value)


def split(rows: Sequence[Row], fraction: float, seed: int) -> tuple[list[Row], list[Row]]:
    """Rows to train on and rows held out: ``fraction`` of the distinct ones, at least one and never all. Equal rows go
    to one side."""
    keys = [json.dumps(row.fields, sort_keys=True) for row in rows]
    distinct = list(dict.fromkeys(keys))
    random.Random(seed).shuffle(distinct)
    count = min(max(1, round(fraction * len(distinct))), len(distinct) - 1) if fraction else 0
    held_out = set(distinct[:count])
    sides: tuple[list[Row], list[Row]] = ([], [])
    for row, key in zip(rows, keys, strict=True):
        sides[key in held_out].append(row)
    return sides


def encode(row: Row, tokenizer, max_length: int, learn: str = "answers") -> list[Example]:
    """Tokenize a row into examples truncated to ``max_length`` tokens. Examples left without a label are dropped.

    A row is rendered as one text and tokenized once; the chat template renders a chat. If the template rewrites earlier
    messages once others follow, a chat becomes one example per answer: the chat up to its end, as at inference.

    Labels cover the completion, the assistant's messages with their end markers, or the whole text. Completions and
    texts end with one EOS, which is labelled too. With ``learn="all"`` every token is labelled.

    Raises:
        ValueError: the chat template is missing, fails or drops an answer; the tokenizer gives no offsets.
    """
    if not tokenizer.is_fast:
        raise ValueError(
            f"{row.where}: the model's tokenizer, {type(tokenizer).__name__}, does not say where its tokens stand in a "
            "text, so answers cannot be told from prompts: a fast tokenizer is needed."
        )
    fields = row.fields
    if "messages" in fields:
        texts = _rendered(row, tokenizer, whole=learn == "all")
    else:
        text = fields["text"] if "text" in fields else fields["prompt"] + fields["completion"]
        texts = [(text, [(len(fields.get("prompt", "")), len(text))])]
    found = []
    for text, spans in texts:
        encoded = tokenizer(text, add_special_tokens="messages" not in fields, return_offsets_mapping=True)
        ids, labels = encoded["input_ids"], _labels(encoded, spans)
        if "messages" not in fields and tokenizer.eos_token_id is not None:
            if ids[-1:] != [tokenizer.eos_token_id]:  # some tokenizers append it
                ids, labels = [*ids, tokenizer.eos_token_id], [*labels, IGNORED]
            labels[-1] = ids[-1]
        found.append({"input_ids": ids[:max_length], "labels": (ids if learn == "all" else labels)[:max_length]})
    return [example for example in found if any(label != IGNORED for label in example["labels"][1:])]


def _labels(encoded, spans: Spans) -> list[int]:
    """Label each span from the first token that reaches into it to the last that begins in it."""
    ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
    labels = [IGNORED] * len(ids)
    for begin, end in spans:
        first = next((i for i, (_, last) in enumerate(offsets) if last > begin), len(ids))
        after = next((i for i in range(first, len(ids)) if offsets[i][0] >= end), len(ids))
        labels[first:after] = ids[first:after]
    return labels


def _rendered(row: Row, tokenizer, whole: bool) -> list[tuple[str, Spans]]:
    """The chat with the spans of its answers or, if the template rewrites earlier messages, the chat up to each answer
    with the span of that answer."""
    messages, tools = row.fields["messages"], row.fields.get("tools")
    if not tokenizer.chat_template:
        raise ValueError(f"{row.where} holds messages, but the model's tokenizer has no chat template.")

    def render(*messages: dict, **options) -> str:
        try:
            return tokenizer.apply_chat_template(list(messages), tools=tools, tokenize=False, **options)
        except Exception as error:  # templates raise anything
            raise ValueError(f"{row.where}: the model's chat template refuses the messages: {error}.") from error

    text, parts = render(*messages), []
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            until = render(*messages[: i + 1])
            parts.append((until, [(_begin(row, render, messages[: i + 1], until), len(until))]))
    if whole or all(text.startswith(until) for until, _ in parts):
        return [(text, [span for _, spans in parts for span in spans])]
    return parts


def _begin(row: Row, render: Callable[..., str], messages: list[dict], text: str) -> int:
    """Where inference takes over in ``text``, the rendering of ``messages``, whose last is an answer."""
    *earlier, answer = messages
    calls, content = answer.get("tool_calls"), answer.get("content") or ""
    bare = {key: value for key, value in answer.items() if key != "tool_calls"}
    another = render(*earlier, {**bare, "content": PROBE})
    if content.strip() and text == (render(*earlier, {**answer, "content": PROBE}) if calls else another):
        raise ValueError(f"{row.where}: the model's chat template drops the text of an answer.")
    if calls and text == render(*earlier, {**bare, "content": content}):
        raise ValueError(f"{row.where}: the model's chat template drops the tool calls of an answer.")
    begin = _shared(text, another)
    if not earlier:
        return begin
    asked = render(*earlier, add_generation_prompt=True)
    if text.startswith(asked):
        return len(asked)
    # The generation prompt may diverge from the text, for example in a thinking block that it opens: inference takes
    # over where they diverge. A prompt that differs already in the earlier messages tells nothing.
    ends = _shared(asked, render(*earlier))
    return min(begin, _shared(asked, text)) if text.startswith(asked[:ends]) else begin


def _shared(one: str, other: str) -> int:
    """The length of the common prefix."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def collate(rows: Sequence[Example], pad: int) -> dict[str, Tensor]:
    """A batch (B, T), padded on the right."""
    columns = {"input_ids": pad, "attention_mask": 0, "labels": IGNORED}
    masked = [{**row, "attention_mask": [1] * len(row["input_ids"])} for row in rows]
    return {
        name: pad_sequence([torch.tensor(row[name]) for row in masked], batch_first=True, padding_value=value)
        for name, value in columns.items()
    }
