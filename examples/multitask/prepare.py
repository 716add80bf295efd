"""Write the model and the tasks of the GPU profile as plain files: ``python -m examples.multitask.prepare FOLDER``.

FOLDER then holds ``model/`` (safetensors), token ids in ``train/TASK.jsonl``, ``validation/TASK.jsonl`` and
``test/TASK.jsonl``, and ``prepared.json``, their index. The profile reads nothing else: it needs neither ``datasets``
nor ``gguf`` nor a tokenizer.
"""

import argparse
import json
import random
import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path

from examples.multitask.data import Items
from examples.multitask.plan import Study
from examples.multitask.profile import gpu
from examples.multitask.tasks import all_tasks, first_line
from multilora_fast.demo.scoring import Encoded, encode
from multilora_fast.demo.tasks import Example, Task
from multilora_fast.files import atomic_dir

PARTS = ("train", "validation", "test")
LAST = "prepared.json"  # written last: its presence means a complete folder


def prepare(folder: Path, model: Path, tasks: Sequence[Task], study: Study, tokenizer) -> dict:
    """Write ``folder`` atomically, and return the contents of its prepared.json.

    Raises:
        ValueError: the folder is prepared already, or a task has no item for one of the parts.
    """
    if (folder / LAST).exists():
        raise ValueError(f"{folder} is prepared already: name another folder, or remove it.")
    said: dict = {"model": model.name, "max_length": study.max_length, "tasks": {}}
    with atomic_dir(folder, LAST) as unfinished:
        shutil.copytree(model, unfinished / "model")
        for task in tasks:
            parts = divide(task, study, tokenizer)
            for part, rows in parts.items():
                if not rows:
                    raise ValueError(f"{task.name} has no {part} item of at most {study.max_length} tokens.")
                _write(unfinished / part / f"{task.name}.jsonl", rows)
            tokens = sum(len(row.prompt) + len(row.options[row.answer]) - 1 for row in parts["train"])
            said["tasks"][task.name] = {part: len(rows) for part, rows in parts.items()} | {"train_tokens": tokens}
        (unfinished / LAST).write_text(json.dumps(said, indent=1) + "\n")
    return said


def divide(task: Task, study: Study, tokenizer) -> dict[str, list[Encoded]]:
    """The rows of at most ``max_length`` tokens by part. No two held-out items share a first line, and none shares it
    with a training example. Validation takes at most a quarter of them."""
    held_out = {first_line(example): example for example in task.held_out}
    first = min(study.validation_items, len(held_out) // 4)
    drawn = _short(random.Random(0).sample(list(held_out.values()), len(held_out)), study, tokenizer)
    drawn = list(islice(drawn, first + study.test_items))
    train = [example for example in task.train if first_line(example) not in held_out]
    return {
        "train": list(_short(train, study, tokenizer)),
        "validation": drawn[:first],
        "test": drawn[first:],
    }


def read(folder: Path, study: Study) -> Items:
    """Read what :func:`prepare` wrote, cut to what ``study`` takes.

    Raises:
        ValueError: the folder is missing or incomplete, or an item is in two parts.
    """
    if not (folder / LAST).is_file():
        raise ValueError(f"--prepared {folder} holds no {LAST}: make it with python -m examples.multitask.prepare.")
    names = list(json.loads((folder / LAST).read_text())["tasks"])
    parts = {part: {name: list(_read(folder / part / f"{name}.jsonl")) for name in names} for part in PARTS}
    for name in names:
        seen = [{tuple(row.prompt) for row in parts[part][name]} for part in PARTS]
        if seen[0] & seen[1] or seen[0] & seen[2] or seen[1] & seen[2]:
            raise ValueError(f"--prepared {folder}: {name} has one prompt in two of its parts.")
    cut = {
        "train": lambda rows: [row for row in rows if _fits(row, study)],
        "validation": lambda rows: [row for row in rows if _fits(row, study)][: study.validation_items],
        "test": lambda rows: [row for row in rows if _fits(row, study)][: study.test_items],
    }
    return Items(**{part: {name: cut[part](rows) for name, rows in parts[part].items()} for part in PARTS})


def _short(examples: Iterable[Example], study: Study, tokenizer) -> Iterator[Encoded]:
    encoded = (encode(example, tokenizer) for example in examples)
    return (row for row in encoded if _fits(row, study))


def _fits(row: Encoded, study: Study) -> bool:
    return len(row.prompt) + max(map(len, row.options)) <= study.max_length


def _write(path: Path, rows: Iterable[Encoded]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(asdict(row)) + "\n" for row in rows))


def _read(path: Path) -> Iterator[Encoded]:
    with path.open() as lines:
        yield from (Encoded(**json.loads(line)) for line in lines)


def main() -> None:
    from multilora_fast.models import load_tokenizer, packaged_model

    parser = argparse.ArgumentParser(prog="python -m examples.multitask.prepare", description=__doc__)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    try:
        said = prepare(folder, packaged_model(), all_tasks(), gpu("bfloat16"), load_tokenizer(None))
    except ValueError as error:
        print(f"prepare: {error}", file=sys.stderr)
        sys.exit(2)
    for task, counts in said["tasks"].items():
        print(f"{task}: " + ", ".join(f"{count:,} {part.replace('_', ' ')}" for part, count in counts.items()))


if __name__ == "__main__":
    main()
