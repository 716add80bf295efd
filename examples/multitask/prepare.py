"""Write the model and the tasks of the GPU profile as plain files: ``python -m examples.multitask.prepare FOLDER``.

FOLDER then holds ``model/`` (safetensors, see ``compact.py``), token ids in ``train/TASK.jsonl.gz``,
``validation/TASK.jsonl.gz`` and ``test/TASK.jsonl.gz``, and ``prepared.json``, their index. The profile reads nothing
else: it needs neither ``datasets`` nor ``gguf`` nor a tokenizer. No file is larger than ``--shard-size``.
"""

import argparse
import gzip
import json
import random
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path

from examples.multitask import compact
from examples.multitask.data import Items
from examples.multitask.plan import Study
from examples.multitask.profile import gpu
from examples.multitask.tasks import all_tasks, first_line
from multilora_fast.demo.scoring import Encoded, encode
from multilora_fast.demo.tasks import Example, Task
from multilora_fast.files import atomic_dir

PARTS = ("train", "validation", "test")
LAST = "prepared.json"  # written last: its presence means a complete folder
SHARD_SIZE = "50MB"


def prepare(
    folder: Path, model: Path, tasks: Sequence[Task], study: Study, tokenizer, shard_size: str = SHARD_SIZE
) -> dict:
    """Write ``folder`` atomically, and return the contents of its prepared.json. No file is larger than ``shard_size``.

    Raises:
        ValueError: the folder is prepared already, a task has no item for one of the parts, or one matrix or one part
            of a task is larger than ``shard_size``.
    """
    limit = _bytes(shard_size)
    if (folder / LAST).exists():
        raise ValueError(f"{folder} is prepared already: name another folder, or remove it.")
    said: dict = {"model": model.name, "max_length": study.max_length, "tasks": {}}
    with atomic_dir(folder, LAST) as unfinished:
        said["weights"] = compact.write(model, unfinished / "model", limit)
        for task in tasks:
            parts = divide(task, study, tokenizer)
            for part, rows in parts.items():
                if not rows:
                    raise ValueError(f"{task.name} has no {part} item of at most {study.max_length} tokens.")
                _write(unfinished / part / f"{task.name}.jsonl.gz", rows)
            tokens = sum(len(row.prompt) + len(row.options[row.answer]) - 1 for row in parts["train"])
            said["tasks"][task.name] = {part: len(rows) for part, rows in parts.items()} | {"train_tokens": tokens}
        (unfinished / LAST).write_text(json.dumps(said, indent=1) + "\n")
        for path in _files(unfinished):
            if path.stat().st_size > limit:
                name = path.relative_to(unfinished)
                raise ValueError(f"--shard-size {shard_size}: {name} has {path.stat().st_size:,} bytes.")
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
    parts = {part: {name: list(_read(folder / part / f"{name}.jsonl.gz")) for name in names} for part in PARTS}
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
    text = "".join(json.dumps(asdict(row), separators=(",", ":")) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode(), mtime=0))


def _read(path: Path) -> Iterator[Encoded]:
    with gzip.open(path, "rt") as lines:
        yield from (Encoded(**json.loads(line)) for line in lines)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _bytes(size: str) -> int:
    found = re.fullmatch(r"(\d+)\s*([KMG])B", size)
    if found is None or not int(found[1]):
        raise ValueError(f"--shard-size must be a size such as 50MB, not {size!r}.")
    return int(found[1]) * 1000 ** (1 + "KMG".index(found[2]))


def main() -> None:
    from multilora_fast.models import load_tokenizer, packaged_model

    parser = argparse.ArgumentParser(prog="python -m examples.multitask.prepare", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shard-size", default=SHARD_SIZE, help=f"largest size of a file (default: {SHARD_SIZE})")
    options = parser.parse_args()
    folder, size = options.folder, options.shard_size
    try:
        _bytes(size)  # before the slow part
        said = prepare(folder, packaged_model(), all_tasks(), gpu("bfloat16"), load_tokenizer(None), size)
    except ValueError as error:
        print(f"prepare: {error}", file=sys.stderr)
        sys.exit(2)
    for task, counts in said["tasks"].items():
        print(f"{task}: " + ", ".join(f"{count:,} {part.replace('_', ' ')}" for part, count in counts.items()))
    files = _files(folder)
    matrices = ", ".join(f"{count} {kind}" for kind, count in said["weights"].items())
    print(f"weights: {matrices}; {len(files)} files, {sum(path.stat().st_size for path in files) / 1e6:.1f} MB in all")


if __name__ == "__main__":
    main()
