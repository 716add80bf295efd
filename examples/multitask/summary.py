"""The figures of the report, computed from the records of the runs."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

import torch

from examples.multitask.claims import BRANCHES, VARIANTS, claims
from examples.multitask.plan import (
    COST,
    METHODS,
    ZERO_SHOT,
    Results,
    Run,
    Study,
    chosen,
    is_swept,
    sweep,
    validation_score,
)
from examples.multitask.significance import Marks, compare, sign_flip_p

PAIRED = ("pairs", "spectrum_pairs")


def pairs(study: Study) -> list[tuple[str, str]]:
    """The compared methods: MultiLoRA with LoRA of its rank, full fine-tuning and summed LoRAs; on a single task; and
    with other scales and initializations."""
    n3, n5 = BRANCHES
    found = [(n3, study.rival(n3)), (n5, study.rival(n5)), (n3, "full"), (n5, "full"), ("lora", "full"),
             (n3, "task-arithmetic"), (n5, "task-arithmetic"), (f"{n3}-alone", "lora-alone"),
             *((name, n3) for name in VARIANTS)]  # fmt: skip
    return [pair for pair in found if all(method in study.rates for method in pair)]


def summarise(study: Study, done: Results) -> dict:
    """A JSON-serializable summary of the finished runs. Leaves out methods and pairs without runs."""
    found_by = {method: finals(study, method, done) for method in METHODS if method in study.rates}
    found_by = {method: records for method, records in found_by.items() if records}
    found = {"settings": study.settings(), "conditions": _conditions(done)}
    if ZERO_SHOT in done:
        record = done[ZERO_SHOT]
        found["items"] = {
            part: {t: len(r["right"]) for t, r in record[part].items()} for part in ("validation", "test")
        }
        found["zero_shot"] = {task: result["accuracy"] for task, result in record["test"].items()}
        found["majority"] = record["majority"]
        found["in_mean"] = in_mean(study, record)
    found["methods"] = {method: _method(study, method, records, done) for method, records in found_by.items()}
    there = [(a, b) for a, b in pairs(study) if found_by.get(a, {}).keys() & found_by.get(b, {}).keys()]
    found["pairs"] = {f"{a} - {b}": _pair(study, found_by[a], found_by[b]) for a, b in there}
    found["spectrum_pairs"] = {f"{a} - {b}": _spectrum_pair(found_by[a], found_by[b]) for a, b in there}
    if COST in done:
        found["cost"] = {key: done[COST][key] for key in ("batch_tokens", "rounds", "costs", "environment")}
    found["progress"] = {f"{a} - {b}": _progress(study, a, b, found_by, done) for a, b in pairs(study)}
    complete = {name for name, one in found["progress"].items() if one["complete"]}
    kept = {key: {name: one for name, one in found[key].items() if name in complete} for key in PAIRED}
    final = {claim["claim"] for claim in claims(found | kept, study)}
    return found | {"claims": [claim | {"final": claim["claim"] in final} for claim in claims(found, study)]}


def _progress(study: Study, first: str, second: str, found_by: Mapping[str, Mapping], done: Results) -> dict:
    """How many seeds of both methods are finished, and whether all are and no sweep goes on."""
    finished = found_by.get(first, {}).keys() & found_by.get(second, {}).keys()
    wanted = {seed for seed in range(study.seeds) if study.is_tested(seed)}
    swept = all(is_swept(study, method, done) for method in (first, second))
    return {"seeds": len(finished), "of": len(wanted), "complete": swept and finished == wanted}


def finals(study: Study, method: str, done: Results) -> dict[int, Mapping]:
    """The method's tested records at its chosen learning rate, by seed."""
    rate = chosen(study, method, done)
    names = {seed: Run(method, rate, seed).name for seed in range(study.seeds)} if rate is not None else {}
    return {seed: done[name] for seed, name in names.items() if name in done and "test" in done[name]}


def _method(study: Study, method: str, records: Mapping[int, Mapping], done: Results) -> dict:
    grid = sweep(study, method, done)
    tried = {rate: done[Run(method, rate).name] for rate in grid if Run(method, rate).name in done}
    rate = chosen(study, method, done)
    runs = list(records.values())
    tasks = {task: [run["test"][task]["accuracy"] for run in runs] for task in runs[0]["test"]}
    counted = [tasks[task] for task in in_mean(study, runs[0])]
    means = [statistics.mean(accuracies) for accuracies in zip(*counted, strict=True)]
    found = {
        "learning_rate": rate,
        "sweep": {f"{r:g}": validation_score(record)[0] for r, record in sorted(tried.items())},
        "sweep_complete": len(tried) == len(grid),
        "at_edge": len(tried) > 1 and rate in (min(tried), max(tried)),
        "seeds": sorted(records),
        "tasks": {task: statistics.mean(accuracies) for task, accuracies in tasks.items()},
        "mean": statistics.mean(means),
        "sd": statistics.stdev(means) if len(means) > 1 else None,
        "tokens": statistics.mean(run["tokens"] for run in runs),
        "tokens_per_second": max(run["tokens_per_second"] for run in runs),
        "spectrum": {kind: _kind([run["spectrum"][kind] for run in runs]) for kind in runs[0]["spectrum"]},
    }
    for key in ("trainable", "task_weight", "cuda_peak"):
        if key in runs[0]:
            found[key] = runs[0][key]
    if "memory" in runs[0]:
        found["memory"] = {key: statistics.mean(run["memory"][key] for run in runs) for key in runs[0]["memory"]}
    return found


def _kind(spectra: Sequence[Mapping]) -> dict:
    """Means over layers and seeds, and the standard deviation of the seeds' effective ranks."""
    by_seed = {key: [statistics.mean(s[key]) for s in spectra] for key in ("effective_rank", "leading", "top_share")}
    ranks = by_seed["effective_rank"]
    spread = {"effective_rank_sd": statistics.stdev(ranks) if len(ranks) > 1 else None}
    return {key: statistics.mean(values) for key, values in by_seed.items()} | spread


def _pair(study: Study, first: Mapping[int, Mapping], second: Mapping[int, Mapping]) -> dict:
    seeds = sorted(first.keys() & second.keys())
    both = [marks([records[seed] for seed in seeds]) for records in (first, second)]
    counted = in_mean(study, first[seeds[0]])
    return compare(*({task: one[task] for task in counted} for one in both)) | {"seeds": seeds}


def in_mean(study: Study, record: Mapping) -> list[str]:
    """The tasks with enough test items for the mean."""
    return [task for task, result in record["test"].items() if len(result["right"]) >= (study.least_items or 0)]


def marks(runs: Sequence[Mapping]) -> Marks:
    return {
        task: torch.tensor([[int(mark) for mark in run["test"][task]["right"]] for run in runs])
        for task in runs[0]["test"]
    }


def _spectrum_pair(first: Mapping[int, Mapping], second: Mapping[int, Mapping]) -> dict[str, dict]:
    """By projection, the mean difference of the effective ranks, its p over the layers, and the mean difference for the
    leading values."""
    seeds = sorted(first.keys() & second.keys())

    def differences(kind: str, key: str) -> torch.Tensor:
        one, other = (torch.tensor([r[seed]["spectrum"][kind][key] for seed in seeds]) for r in (first, second))
        return (one - other).double().mean(0)

    found = {}
    for kind in first[seeds[0]]["spectrum"]:
        by_layer = differences(kind, "effective_rank")
        found[kind] = {
            "difference": by_layer.mean().item(),
            "p": sign_flip_p(by_layer),
            "leading": differences(kind, "leading").mean().item(),
        }
    return found


def _conditions(done: Results) -> dict:
    """All values found in the runs' environments, so that a mixture of machines or commits shows."""
    seen: dict[str, list] = {}
    for record in done.values():
        environment = record["environment"]
        versions = ", ".join(f"{name} {found}" for name, found in environment["versions"].items() if found)
        for key, value in {**environment, "versions": versions, "model": record["model"]}.items():
            if value not in seen.setdefault(key, []):
                seen[key].append(value)
    return seen
