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
PROBE = "\ue000"  # stands for an answer, to see what of a chat's text depends on it; no text begins with it

Example = dict[str, list[int]]  # input_ids and labels
Spans = list[tuple[int, int]]  # of a text: begin, and end behind the last character


@dataclass(frozen=True)
class Row:
    """One row of a file: the fields of one of KINDS, tools for a chat, the task, and where it stands, for errors."""

    task: str
    fields: dict
    where: str


def read_tasks(files: Sequence[Path | str], named: Mapping[str, Path | str]) -> dict[str, list[Row]]:
    """The rows of every task, in the order of the files, which are JSON Lines, Parquet or data sets on the hub.

    ``files`` each hold one task, called as the file is without its ending, or, where rows have a ``task`` field, a
    mixture. ``named`` gives a file's task its name.

    Raises:
        ValueError: a file that cannot be read or is empty, a row that is not of one of KINDS, two files of one name.
            Of a row, the file and the line are named.
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
    """Each row with where it stands."""
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
    """What the file says, which is called ``name`` if it cannot be read."""
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
    except UnicodeEncodeError as error:
        raise ValueError(f"{where} holds half of a surrogate pair, which is no character.") from error
    except (RecursionError, TypeError, ValueError) as error:  # it is nested too deeply, or has a table's types
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
    """Rows to train on and rows held out: ``fraction`` of the distinct ones, at least one, never all. Equal rows go
    together."""
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
    """What a row becomes: examples of at most ``max_length`` tokens, cut at the end, those with a label left.

    A row is one text, which is tokenized once. A chat is the text that the tokenizer's template makes of it. Where that
    writes earlier messages otherwise once others follow, a chat becomes one example for each answer, which is the text
    up to its end: as at inference.

    Learnt are completions, the assistant's messages with their end, or the whole of a text; with the end-of-text token,
    once, after completions and texts. With ``learn="all"`` everything is.

    Raises:
        ValueError: a chat that the template, or the lack of one, does not let be rendered, or an answer that it drops;
            a tokenizer that does not say where its tokens stand.
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
            if ids[-1:] != [tokenizer.eos_token_id]:  # there are tokenizers that append it
                ids, labels = [*ids, tokenizer.eos_token_id], [*labels, IGNORED]
            labels[-1] = ids[-1]
        found.append({"input_ids": ids[:max_length], "labels": (ids if learn == "all" else labels)[:max_length]})
    return [example for example in found if any(label != IGNORED for label in example["labels"][1:])]


def _labels(encoded, spans: Spans) -> list[int]:
    """Learnt is, of each span, from the first token that reaches into it to the last that begins in it."""
    ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
    labels = [IGNORED] * len(ids)
    for begin, end in spans:
        first = next((i for i, (_, last) in enumerate(offsets) if last > begin), len(ids))
        after = next((i for i in range(first, len(ids)) if offsets[i][0] >= end), len(ids))
        labels[first:after] = ids[first:after]
    return labels


def _rendered(row: Row, tokenizer, whole: bool) -> list[tuple[str, Spans]]:
    """The whole chat with the spans of its answers, or, where the template does not keep what it wrote, the chat up to
    each answer with the span of that one."""
    messages, tools = row.fields["messages"], row.fields.get("tools")
    if not tokenizer.chat_template:
        raise ValueError(f"{row.where} holds messages, but the model's tokenizer has no chat template.")

    def render(*messages: dict, **options) -> str:
        try:
            return tokenizer.apply_chat_template(list(messages), tools=tools, tokenize=False, **options)
        except Exception as error:  # templates raise what they like
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
    """Where in ``text``, the rendering of messages of which the last is an answer, begins what inference produces."""
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
    # A prompt may end otherwise than the text goes on, say in thinking that it opens: inference takes over where they
    # part. One that differs before its end does not say where the answer begins.
    ends = _shared(asked, render(*earlier))
    return min(begin, _shared(asked, text)) if text.startswith(asked[:ends]) else begin


def _shared(one: str, other: str) -> int:
    """How many characters two texts begin with together."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def collate(rows: Sequence[dict[str, list[int]]], pad: int) -> dict[str, Tensor]:
    """A batch (B, T), filled up on the right."""

    def filled(name: str, value: int) -> Tensor:
        return pad_sequence([torch.tensor(row[name]) for row in rows], batch_first=True, padding_value=value)

    ids = filled("input_ids", pad)
    lengths = torch.tensor([len(row["input_ids"]) for row in rows])
    mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
    return {"input_ids": ids, "attention_mask": mask, "labels": filled("labels", IGNORED)}
