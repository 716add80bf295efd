"""Fine-tuning data: JSON Lines of prompts and completions, chats, or texts, by task; and its tokens with labels."""

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

IGNORED = -100  # a label that takes no part in the loss
KINDS = (("prompt", "completion"), ("messages",), ("text",))


@dataclass(frozen=True)
class Row:
    """One line of a file: the fields of one of KINDS, the task, and where it stands, for errors."""

    task: str
    fields: dict
    where: str


def read_tasks(files: Sequence[Path], named: Mapping[str, Path]) -> dict[str, list[Row]]:
    """The rows of every task, in the order of the files.

    ``files`` each hold one task, called as the file is without its ending, or, where rows have a ``task`` field, a
    mixture. ``named`` gives a file's task its name.

    Raises:
        ValueError: a file that cannot be read or is empty, a row that is not of one of KINDS, two files of one name.
            Of a row, the file and the line are named.
    """
    tasks: dict[str, list[Row]] = {}
    for path, name in [*((path, None) for path in files), *((path, name) for name, path in named.items())]:
        rows = [(number, _checked(row, f"{path}, line {number}")) for number, row in _lines(path)]
        if not rows:
            raise ValueError(f"{path} holds no rows.")
        is_mixture = name is None and any("task" in row for _, row in rows)
        if not is_mixture and (name or path.stem) in tasks:
            raise ValueError(f"two files are of a task called {name or path.stem}: name one with --task NAME={path}.")
        for number, row in rows:
            where = f"{path}, line {number}"
            task = row.get("task") if is_mixture else name or path.stem
            if not isinstance(task, str) or not task:
                raise ValueError(f"{where}: task must be a name, as in the other rows of the file, not {task!r}.")
            fields = {key: row[key] for kind in KINDS for key in kind if key in row}
            tasks.setdefault(task, []).append(Row(task, fields, where))
    return tasks


def _lines(path: Path) -> Iterator[tuple[int, object]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise ValueError(f"{path} cannot be read: {reason}.") from error
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number} is not JSON: {error.msg} at column {error.colno}.") from error


def _checked(row: object, where: str) -> dict:
    if not isinstance(row, dict):
        raise ValueError(f"{where}: a row must be a JSON object, not {type(row).__name__}.")
    kinds = [kind for kind in KINDS if any(key in row for key in kind)]
    if len(kinds) != 1:
        found = ", ".join(sorted(row)) or "nothing"
        raise ValueError(f"{where}: a row must hold prompt and completion, or messages, or text, but it holds {found}.")
    for key in kinds[0]:
        if key not in row:
            raise ValueError(f"{where}: {key} is missing.")
        if key == "messages":
            _check_messages(row[key], where)
        elif not isinstance(row[key], str) or (not row[key] and key != "prompt"):
            raise ValueError(f"{where}: {key} must be a text that is not empty, not {row[key]!r}.")
    return row


def _check_messages(messages: Any, where: str) -> None:
    wanted = "a list of objects with the texts role and content"
    good = isinstance(messages, list) and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in messages
    )
    if not good:
        raise ValueError(f"{where}: messages must be {wanted}.")
    if not any(message["role"] == "assistant" for message in messages):
        raise ValueError(f"{where}: messages hold no message of the assistant to learn from.")


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


def encode(row: Row, tokenizer, max_length: int) -> dict[str, list[int]] | None:
    """input_ids and labels of at most ``max_length`` tokens, cut at the end; None where no label is left.

    Learnt are completions, the assistant's messages, or the whole of a text; with the end-of-text token after
    completions and texts. A chat is rendered by the tokenizer's template.

    Raises:
        ValueError: a chat that the template, or the lack of one, does not let be rendered.
    """
    fields = row.fields
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    if "messages" in fields:
        parts = [(_ids(tokenizer, text), learn) for text, learn in _rendered(row, tokenizer)]
    elif "text" in fields:
        parts = [(tokenizer(fields["text"])["input_ids"] + end, True)]
    else:
        prompt = tokenizer(fields["prompt"])["input_ids"]
        parts = [(prompt, False), (_ids(tokenizer, fields["completion"]) + end, True)]
    ids = [token for part, _ in parts for token in part][:max_length]
    labels = [token if learn else IGNORED for part, learn in parts for token in part][:max_length]
    if all(label == IGNORED for label in labels[1:]):
        return None
    return {"input_ids": ids, "labels": labels}


def _ids(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _rendered(row: Row, tokenizer) -> Iterator[tuple[str, bool]]:
    """The chat in pieces, each with whether it is the assistant's."""
    messages = row.fields["messages"]
    if not tokenizer.chat_template:
        raise ValueError(f"{row.where} holds messages, but the model's tokenizer has no chat template.")

    def render(count: int, **options) -> str:
        try:
            return tokenizer.apply_chat_template(messages[:count], tokenize=False, **options)
        except Exception as error:  # templates raise what they like
            raise ValueError(f"{row.where}: the model's chat template refuses the messages: {error}.") from error

    whole, done = render(len(messages)), 0
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            before, after = render(i, add_generation_prompt=True) if i else "", render(i + 1)
            if not whole.startswith(after) or not after.startswith(before) or len(before) < done:
                raise ValueError(
                    f"{row.where}: the model's chat template writes earlier messages otherwise once others follow: "
                    "give each answer a row of its own, as the last message."
                )
            yield whole[done : len(before)], False
            yield whole[len(before) : len(after)], True
            done = len(after)
    yield whole[done:], False


def collate(rows: Sequence[dict[str, list[int]]], pad: int) -> dict[str, Tensor]:
    """A batch (B, T), filled up on the right."""

    def filled(name: str, value: int) -> Tensor:
        tensors = [torch.tensor(row[name]) for row in rows]
        return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=value)

    ids = filled("input_ids", pad)
    lengths = torch.tensor([len(row["input_ids"]) for row in rows])
    mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
    return {"input_ids": ids, "attention_mask": mask, "labels": filled("labels", IGNORED)}
